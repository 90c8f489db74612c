"""A pair as one running model, interpolated at any α, for each layer if need be.

θ(α) = (1 − α) base + α tuned. Both ends are copied, never computed. Interpolated values are computed in
float64 and rounded once, to the dtype of the running model: float32, or small steps are lost.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from probes.checkpoints.blend import between
from probes.models.body import blocks
from probes.models.two_sided import TwoSidedModel

# Modules behind the blocks that may be registered before them.
BEHIND = re.compile(r"final|project_out|norm_f\b|ln_f\b")


@dataclass(frozen=True)
class Layer:
    """A transformer block, or all modules before or behind the blocks.

    Attributes:
        index: of the block from 0; −1 before the blocks, the number of blocks behind them.
        name: `embed`, `block 3`, `head`.
        parameters: of the running model; one that several layers share belongs to the first alone.
        tensors: their names in the checkpoint.
    """

    index: int
    name: str
    parameters: tuple[nn.Parameter, ...]
    tensors: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters)


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a running model, first to last; the embeddings and the head only if they have weights."""
    inside = [list(block.parameters()) for block in blocks(model)]
    taken: set[int] = set()

    def untaken(parameters: list[nn.Parameter]) -> tuple[nn.Parameter, ...]:
        fresh = {id(parameter): parameter for parameter in parameters if id(parameter) not in taken}
        taken.update(fresh)
        return tuple(fresh.values())

    first = {id(parameter) for parameters in inside for parameter in parameters}
    embeddings = {id(parameter) for parameter in _parameters(model, "get_input_embeddings")}
    outputs = {id(parameter) for parameter in _parameters(model, "get_output_embeddings")} - embeddings
    before, behind, passed = list[nn.Parameter](), list[nn.Parameter](), False
    for name, parameter in model.named_parameters():
        if id(parameter) in first:
            passed = True
            continue
        late = id(parameter) in outputs or passed or BEHIND.search(name)
        (behind if late and id(parameter) not in embeddings else before).append(parameter)
    layers = [Layer(-1, "embed", untaken(before))]
    layers += [Layer(index, f"block {index}", untaken(parameters)) for index, parameters in enumerate(inside)]
    layers.append(Layer(len(inside), "head", untaken(behind)))
    return [layer for layer in layers if layer.parameters or 0 <= layer.index < len(inside)]


def _parameters(model: nn.Module, getter: str) -> list[nn.Parameter]:
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return []
    return list(module.parameters()) if isinstance(module, nn.Module) else []


class InterpolatedModel:
    """A two-sided model at any α; it starts at tuned.

    Attributes:
        two_sided: the running model; its `restore` undoes all changes.
        pinned: tensors that base lacks; they are tuned's at any α.
    """

    def __init__(self, two_sided: TwoSidedModel):
        self.two_sided = two_sided
        self.pinned = two_sided.only_tuned
        self._alphas: dict[str, float] = {}
        self._ends: dict[str, Tensor] = {}

    @property
    def model(self) -> Any:
        """The torch model."""
        return self.two_sided.model

    @cached_property
    def layers(self) -> list[Layer]:
        """Its layers with the tensors of the checkpoint in them; raises InputError if it has no blocks."""
        layers = layers_of(self.model)
        owner = {id(weight): index for index, layer in enumerate(layers) for weight in layer.parameters}
        names: list[list[str]] = [[] for _ in layers]
        for name in self.two_sided.headers:
            tensors = (id(slot.tensor) for slot in self.two_sided.editable.slots(name))
            owners = [owner[tensor] for tensor in tensors if tensor in owner]
            if owners:
                names[min(owners)].append(name)
        return [replace(layer, tensors=tuple(tensors)) for layer, tensors in zip(layers, names, strict=True)]

    def ends(self, name: str) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]:
        """A tensor of base and of tuned, in a dtype that holds both and at least float32; read-only."""
        return _widened(*self._stored(name))

    def _stored(self, name: str) -> tuple[Tensor, Tensor]:
        base, tuned = self.two_sided.read(name, "base"), self._ends.get(name)
        return base, self.two_sided.read(name, "tuned") if tuned is None else tuned

    def displacement(self, layer: Layer) -> tuple[float, float]:
        """Frobenius norms of tuned − base, but for what a dtype rounded, and of base over a layer."""
        moved = size = 0.0
        for name in layer.tensors:
            if name in self.two_sided.in_both:
                tuned = self._ends.get(name)
                tuned = (self.two_sided.settled(name) if tuned is None else tuned).double()
                base = self.two_sided.read(name, "base").double()
                moved += float((tuned - base).square().sum())
                size += float(base.square().sum())
        return math.sqrt(moved), math.sqrt(size)

    def set_alpha(self, alpha: float, layers: Mapping[int, float] | None = None) -> None:
        """Set the model to α, and layers by their index to others; only tensors that move are written."""
        by_tensor = {}
        if layers:
            for layer in self.layers:
                if layer.index in layers:
                    by_tensor.update(dict.fromkeys(layer.tensors, layers[layer.index]))
        wanted = {name: float(by_tensor.get(name, alpha)) for name in self.two_sided.headers}
        moving = self.two_sided.in_both - {
            name for name in wanted if self._alphas.get(name, 1.0) == wanted[name]
        }
        self._rewrite({name: value for name, value in wanted.items() if name in moving})
        in_both = self.two_sided.in_both
        self.two_sided.vocabulary.cut = all(wanted[name] == 0 for name in in_both) and bool(in_both)

    def between(self, name: str, alpha: float) -> Shaped[Tensor, "..."]:
        """A tensor at α; an exact copy at both ends."""
        return _between(*self._stored(name), alpha)

    @contextmanager
    def changed(self, layer: Layer, change: Callable[[str, Tensor], Tensor]) -> Iterator[Any]:
        """Inside, a layer has tensors as `change(name, value)`, which must not write to the value."""
        names = [name for name in layer.tensors if name in self.two_sided.in_both]
        try:
            for name in names:
                self._write(name, change(name, self.between(name, self._alphas.get(name, 1.0))))
            yield self.model
        finally:
            for name in names:
                self._put(name, self._alphas.get(name, 1.0))

    @contextmanager
    def other_end(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, these tensors replace tuned's own as the end of the path."""
        before = {name: self._alphas.pop(name, 1.0) for name in tensors}
        try:
            self._ends = dict(tensors)
            self._rewrite(before)
            yield
        finally:
            alphas = {name: self._alphas.get(name, 1.0) for name in tensors}
            self._ends = {}
            self._rewrite(alphas)

    def _rewrite(self, alphas: Mapping[str, float]) -> None:
        for name, alpha in alphas.items():
            self._put(name, alpha)
            self._alphas[name] = alpha

    def _put(self, name: str, alpha: float) -> None:
        """Write a tensor at α; for a model on a GPU the ends are blended there, from their stored dtype."""
        [slot, *more] = self.two_sided.editable.slots(name)
        single = not more and isinstance(slot.which, slice)
        base, tuned = (end.to(slot.tensor.device) if single else end for end in self._stored(name))
        self._write(name, _between(base, tuned, alpha))

    def _write(self, name: str, value: Tensor) -> None:
        vocabulary = self.two_sided.vocabulary
        cut = vocabulary.cut  # a perturbed base is one still
        self.two_sided.changed([name])
        vocabulary.cut = cut
        self.two_sided.editable.write(name, value)


def _widened(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    return base.to(wide), tuned.to(wide)


def _between(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    base, tuned = _widened(base, tuned)
    if alpha in (0.0, 1.0):
        return tuned if alpha else base
    return between(base, tuned, alpha)[0]
