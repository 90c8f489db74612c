"""Remedies for stragglers, each measured on all sets.

Pin the layer to an end; realign it, where units were permuted; keep only the largest part of its delta; prune
the blend's weights in it. The paper reports that sparsity in such layers helps, but not of which weights nor
how much: none of these is its method. Every remedy is shown with its cost on the task.
Source of the idea: arXiv:2410.16476.
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

# Shares set to zero: of a layer's delta, and of its blended weights.
DROPPED, PRUNED = (0.5, 0.7, 0.9), (0.5, 0.7)
# Relative change of tuned's loss up to which a realigned model counts as the same function in float32.
SAME = 1e-3


@dataclass(frozen=True)
class Remedy:
    """A change of the flagged layers.

    Attributes:
        name: `none`, `pin`, `realign`, `sparse_delta` or `sparse_weight`.
        setting: the end, or the share set to zero.
        applied: context in which the model stands at an α with the remedy.
    """

    name: str
    setting: str
    applied: Callable[[float], AbstractContextManager[None]]


def remedies(interpolated: InterpolatedModel, pair: CheckpointPair, layers: Sequence[Layer]) -> list[Remedy]:
    """All remedies for some layers; `realign` only if units in them were permuted or flipped."""
    options = [Remedy("none", "", partial(_placed, interpolated))]
    for end, name in ((0.0, "base"), (1.0, "tuned")):
        options.append(Remedy("pin", name, partial(_placed, interpolated, layers=layers, end=end)))
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= realigned_tensors(interpolated, pair, layer)
    if tensors:
        options.append(Remedy("realign", "", partial(_replaced, interpolated, tensors=lambda: tensors)))
    for share in DROPPED:
        sparse = partial(_sparse_deltas, interpolated, layers, share)
        options.append(Remedy("sparse_delta", f"{share:g}", partial(_replaced, interpolated, tensors=sparse)))
    for share in PRUNED:
        pruned = partial(_pruned, interpolated, layers=layers, share=share)
        options.append(Remedy("sparse_weight", f"{share:g}", pruned))
    return options


def realigned_tensors(
    interpolated: InterpolatedModel, pair: CheckpointPair, layer: Layer
) -> dict[str, Tensor]:
    """Tuned's changed tensors of a layer in the order nearest to base."""
    matrices = [matrix for matrix in pair.tuned.matrices.values() if matrix.layer == layer.index]
    config = interpolated.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if layer.index < 0 or not matrices or not isinstance(heads, int):
        return {}
    positions = any(matrix.component == "position_embed" for matrix in pair.tuned.matrices.values())
    # Without a table of positions, these are taken to rotate queries and keys. Heads that have their own
    # position bias cannot be permuted.
    own_bias = bool(getattr(config, "alibi", False)) or config.model_type in ("bloom", "mpt")
    return realigned(
        matrices, pair.tuned.headers, lambda name: interpolated.ends(name)[0],
        lambda name: interpolated.ends(name)[1], heads=heads, rotary=not positions, movable=not own_bias,
    ).tensors  # fmt: skip


def _sparse_deltas(
    interpolated: InterpolatedModel, layers: Sequence[Layer], dropped: float
) -> dict[str, Tensor]:
    """Tuned's tensors of layers with the smallest share of each layer's delta set back to base."""
    tensors = {}
    for layer in layers:
        ends = {
            name: interpolated.ends(name) for name in layer.tensors if name in interpolated.two_sided.in_both
        }
        sizes = [(tuned - base).abs().flatten() for base, tuned in ends.values()]
        if not sizes:
            continue
        order = torch.cat(sizes).argsort(stable=True)
        reset = torch.zeros(len(order), dtype=torch.bool)
        reset[order[: round(dropped * len(order))]] = True
        for (name, (base, tuned)), part in zip(ends.items(), reset.split(list(map(len, sizes))), strict=True):
            tensors[name] = torch.where(part.view(base.shape), base, tuned)
    return tensors


@contextmanager
def _placed(
    interpolated: InterpolatedModel, alpha: float, layers: Sequence[Layer] = (), end: float = 0.0
) -> Iterator[None]:
    try:
        interpolated.set_alpha(alpha, {layer.index: end for layer in layers})
        yield
    finally:
        interpolated.set_alpha(alpha)


@contextmanager
def _replaced(
    interpolated: InterpolatedModel, alpha: float, tensors: Callable[[], Mapping[str, Tensor]]
) -> Iterator[None]:
    with interpolated.other_end(tensors()):
        interpolated.set_alpha(alpha)
        yield


@contextmanager
def _pruned(
    interpolated: InterpolatedModel, alpha: float, layers: Sequence[Layer], share: float
) -> Iterator[None]:
    """The blend with the smallest weights of each layer's matrices set to zero."""
    interpolated.set_alpha(alpha)
    with ExitStack() as stack:
        for layer in layers:
            names = [name for name in layer.tensors if name in interpolated.two_sided.in_both]
            matrices = [interpolated.between(name, alpha).abs().flatten() for name in names
                        if interpolated.ends(name)[0].ndim > 1]  # fmt: skip
            if not matrices:
                continue
            sizes = torch.cat(matrices)
            pruned = round(share * len(sizes))
            limit = float(sizes.kthvalue(pruned).values) if pruned else -1.0

            def cut(name: str, value: Tensor, limit: float = limit) -> Tensor:
                return value.masked_fill(value.abs() <= limit, 0) if value.ndim > 1 else value

            stack.enter_context(interpolated.changed(layer, cut))
        yield


def remedy_rows(
    evaluator: PathEvaluator, options: Sequence[Remedy], alphas: Sequence[float]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every remedy at some α on every set, and notes on those left out."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for remedy in options:
        if remedy.name == "realign" and not same_function(evaluator, remedy):
            notes.append(
                "Realigning is left out: it would change what tuned computes. Its blocks are not plain "
                "transformer blocks."
            )
            continue
        for alpha in alphas:
            with remedy.applied(alpha):
                current = evaluator.current_units()
            for (role, name), units in current.items():
                loss, accuracy = (math.nan, math.nan) if units is None else (units.loss, units.accuracy)
                rows.append(
                    {
                        "remedy": remedy.name, "setting": remedy.setting, "alpha": alpha, "role": role,
                        "set": name, "loss": loss, "accuracy": accuracy,
                    }
                )  # fmt: skip
    return rows, notes


def same_function(evaluator: PathEvaluator, remedy: Remedy) -> bool:
    """Whether tuned's losses stay the same with the remedy."""
    with remedy.applied(1.0):
        current = evaluator.current_units()
    for which, units in current.items():
        tuned = evaluator.at(1.0)[which]
        if units is None or tuned is None or abs(units.loss - tuned.loss) > SAME * max(abs(tuned.loss), 1e-3):
            return False
    return True
