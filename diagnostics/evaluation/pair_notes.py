"""Notes on a pair run as one model: precision, dropout, experts, and tensors that base lacks."""

from collections.abc import Sequence
from typing import Any

from probes import CheckpointPair
from probes.errors import InputError
from probes.models.loading import memory_of
from probes.models.two_sided import TwoSidedModel

HALF_DTYPES = ("bfloat16", "float16")


def is_half(model: Any) -> bool:
    """Whether any weight of a model is in half precision."""
    return any(str(weight.dtype).removeprefix("torch.") in HALF_DTYPES for weight in model.parameters())


def model_notes(pair: CheckpointPair, model: Any) -> list[str]:
    """Notes on how a model is interpolated and perturbed; one with batch norms is refused."""
    from torch import nn

    modules = list(model.modules())
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        raise InputError(f"{pair.tuned.ref}: has batch norms, and their statistics cannot be interpolated")
    notes = []
    training = any(getattr(memory_of(side), "training", False) for side in (pair.base, pair.tuned))
    dropping = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    if training or dropping:
        reason = "was given in training mode" if training else "has dropout"
        notes.append(f"The model {reason}: it was run in evaluation mode, without dropout.")
    if any(matrix.expert is not None for matrix in pair.tuned.matrices.values()):
        notes.append(
            "Experts without tokens show neither barrier nor sharpness. Where routes change, the path jumps."
        )
    if is_half(model):
        notes.append(
            "Interpolated models ran in half precision: small steps from an end change few weights or none."
        )
    elif {pair.base.dtype, pair.tuned.dtype} & set(HALF_DTYPES):
        notes.append(
            "Interpolated models ran in float32. Saved in the file's half precision, small steps from an end "
            "are rounded away."
        )
    return notes


def pinned_note(pinned: Sequence[str]) -> list[str]:
    """The note on tensors that base lacks; empty without any."""
    if not pinned:
        return []
    first = f"{len(pinned)} tensors that base lacks, such as {pinned[0]}"
    return [f"{first}, are tuned's at every alpha: alpha 0 is base but for these."]


def only_tuned_note(two_sided: TwoSidedModel) -> list[str]:
    """The note on tensors that base lacks, where both sides are run with tuned's; empty without any."""
    names = sorted(two_sided.only_tuned)
    if not names:
        return []
    tensors = names[0] if len(names) == 1 else f"{len(names)} tensors, such as {names[0]}"
    return [f"Base lacks {tensors}; it is measured with tuned's."]
