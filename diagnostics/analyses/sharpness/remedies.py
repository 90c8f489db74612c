"""What can be done about a layer that makes a hole in the path, each remedy measured side by side.

Offered: pinning the layer to an end; realigning it, where it was only relabelled; keeping only the largest
part of its delta; pruning the blend's own weights there. The paper reports that sparsity in such layers
helps, without saying which weights or how many: nothing here is its method. Every remedy has its price on the
task, and is shown with it. Source of the idea: arXiv:2410.16476.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diagnostics.evaluation.interpolation import PathEvaluator
from diagnostics.numerics.realignment import realigned
from probes import CheckpointPair
from probes.models.interpolated import InterpolatedModel, Layer

# Shares of a layer's delta, and of its blended weights, that are dropped.
DROPPED, PRUNED = (0.5, 0.7, 0.9), (0.5, 0.7)
# Relative change of the loss at tuned up to which a realigned model is the same function in float32.
SAME = 1e-3


@dataclass(frozen=True)
class Remedy:
    """Something done to the flagged layers.

    Attributes:
        name: `none`, `pin`, `realign`, `sparse_delta` or `sparse_weight`.
        setting: the end, or the share that is dropped.
    """

    name: str
    setting: str
    applied: Callable[[float], AbstractContextManager[None]]

    @property
    def label(self) -> str:
        """Both in words."""
        return f"{self.name} {self.setting}".strip()


def remedies(walk: InterpolatedModel, pair: CheckpointPair, layers: Sequence[Layer]) -> list[Remedy]:
    """All that can be done to some layers; `realign` only if something in them was relabelled."""
    found = [Remedy("none", "", partial(_placed, walk))]
    for end, name in ((0.0, "base"), (1.0, "tuned")):
        found.append(Remedy("pin", name, partial(_placed, walk, layers=layers, end=end)))
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= undone(walk, pair, layer)
    if tensors:
        found.append(Remedy("realign", "", partial(_elsewhere, walk, tensors=lambda: tensors)))
    for share in DROPPED:
        made = partial(_sparse_deltas, walk, layers, share)
        found.append(Remedy("sparse_delta", f"{share:g}", partial(_elsewhere, walk, tensors=made)))
    for share in PRUNED:
        pruned = partial(_pruned, walk, layers=layers, share=share)
        found.append(Remedy("sparse_weight", f"{share:g}", pruned))
    return found


def undone(walk: InterpolatedModel, pair: CheckpointPair, layer: Layer) -> dict[str, Tensor]:
    """Tuned's tensors of a layer in the labelling nearest to base; none if nothing was relabelled."""
    matrices = [matrix for matrix in pair.tuned.matrices.values() if matrix.layer == layer.index]
    heads = getattr(walk.model.config.get_text_config(), "num_attention_heads", None)
    if layer.index < 0 or not matrices or not isinstance(heads, int):
        return {}
    positions = any(matrix.component == "position_embed" for matrix in pair.tuned.matrices.values())
    made = realigned(
        matrices,
        pair.tuned.headers,
        lambda name: walk.ends(name)[0],
        lambda name: walk.ends(name)[1],
        heads=heads,
        # Where it is not known to be otherwise, positions are taken to turn queries and keys.
        rotary=not positions,
        movable=not biased(walk.model.config),
    )
    return made.tensors


def biased(config: Any) -> bool:
    """Whether each head has a position bias of its own, so that heads cannot change places."""
    text = config.get_text_config()
    return bool(getattr(text, "alibi", False)) or text.model_type in ("bloom", "mpt")


def sparse_delta(walk: InterpolatedModel, layer: Layer, dropped: float) -> dict[str, Tensor]:
    """Tuned's tensors of a layer with the smallest share of its delta taken back to base, by selection."""
    names = [name for name in layer.tensors if name in walk.host.twins]
    if not names:
        return {}
    sizes = {name: (walk.ends(name)[1] - walk.ends(name)[0]).abs() for name in names}
    order = torch.cat([size.flatten() for size in sizes.values()]).argsort(stable=True)
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[: round(dropped * len(order))]] = True
    parts = gone.split([size.numel() for size in sizes.values()])
    return {
        name: torch.where(part.view(sizes[name].shape), *walk.ends(name))
        for name, part in zip(names, parts, strict=True)
    }


@contextmanager
def _placed(
    walk: InterpolatedModel, alpha: float, layers: Sequence[Layer] = (), end: float = 0.0
) -> Iterator[None]:
    try:
        walk.place(alpha, {layer.index: end for layer in layers})
        yield
    finally:
        walk.place(alpha)


def _sparse_deltas(walk: InterpolatedModel, layers: Sequence[Layer], dropped: float) -> dict[str, Tensor]:
    return {name: each for layer in layers for name, each in sparse_delta(walk, layer, dropped).items()}


@contextmanager
def _elsewhere(
    walk: InterpolatedModel, alpha: float, tensors: Callable[[], Mapping[str, Tensor]]
) -> Iterator[None]:
    with walk.other_end(tensors()):
        walk.place(alpha)
        yield


@contextmanager
def _pruned(walk: InterpolatedModel, alpha: float, layers: Sequence[Layer], share: float) -> Iterator[None]:
    """The blend with the smallest weights of each layer's matrices set to zero."""
    walk.place(alpha)
    with ExitStack() as stack:
        for layer in layers:
            matrices = [walk.between(name, alpha).abs().flatten() for name in layer.tensors if
                        name in walk.host.twins and walk.ends(name)[0].ndim > 1]  # fmt: skip
            if not matrices:
                continue
            sizes = torch.cat(matrices)
            place = round(share * len(sizes))
            limit = float(sizes.kthvalue(place).values) if place else -1.0

            def cut(name: str, value: Tensor, limit: float = limit) -> Tensor:
                return value.masked_fill(value.abs() <= limit, 0) if value.ndim > 1 else value

            stack.enter_context(walk.changed(layer, cut))
        yield


def remedy_rows(
    along: PathEvaluator, found: Sequence[Remedy], alphas: Sequence[float]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every remedy at some α on every set, and what to say of those that were left out."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for remedy in found:
        if remedy.name == "realign" and not same_function(along, remedy):
            notes.append(
                "Realigning is not offered: it would change what tuned computes, which is not a plain "
                "transformer block."
            )
            continue
        for alpha in alphas:
            with remedy.applied(alpha):
                standing = along.current_units()
            for (role, name), units in standing.items():
                rows.append(
                    {
                        "remedy": remedy.name,
                        "setting": remedy.setting,
                        "alpha": alpha,
                        "role": role,
                        "set": name,
                        "loss": math.nan if units is None else units.loss,
                        "accuracy": math.nan if units is None else units.accuracy,
                    }
                )
    return rows, notes


def same_function(along: PathEvaluator, remedy: Remedy) -> bool:
    """Whether the tuned end is as it was."""
    with remedy.applied(1.0):
        standing = along.current_units()
    for which, units in standing.items():
        own = along.at(1.0)[which]
        if units is None or own is None or abs(units.loss - own.loss) > SAME * max(abs(own.loss), 1e-3):
            return False
    return True
