"""Reparametrised weights, resolved to the weight that the model uses.

Pruning, weight norm and spectral norm of `torch.nn.utils` store what a weight is computed from in its place.
A file that was saved before they were made permanent holds no `weight` at all.
"""

import re
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from probes.errors import InputError
from probes.files.layout import Header
from probes.files.sources import FileSource, Source, fingerprint

# Endings of the names of what one weight is computed from; the weight is named by the rest.
_PARAMETRIZED = re.compile(r"^(?:(.*)\.)?parametrizations\.([^.]+)\.(.+)$")
_HOOKED = re.compile(r"^(.*)_(orig|mask|g|u|v)$")
REMEDY = (
    "call torch.nn.utils.parametrize.remove_parametrizations(module, name) "
    "(prune.remove(module, name) after pruning), and save it again"
)


@dataclass(frozen=True)
class Recipe:
    """How a weight is computed from stored tensors.

    Attributes:
        sources: their names, first the one of the weight's shape.
    """

    name: str
    sources: tuple[str, ...]
    compute: Callable[..., Tensor]


def masked(original: Tensor, mask: Tensor) -> Tensor:
    """The weight under `torch.nn.utils.prune`: its original times its mask.

    >>> masked(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]))
    tensor([2., 0.])
    """
    return mask.to(original.dtype) * original


def weight_normed(v: Tensor, g: Tensor) -> Tensor:
    """The weight under weight norm, g v / |v|; the norm is over the axes along which g has one entry.

    >>> weight_normed(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]))
    tensor([[6., 8.]])
    """
    axis = next((axis for axis, length in enumerate(g.shape) if length > 1), 0 if g.ndim else -1)
    return torch._weight_norm(v, g, axis)


def spectral_normed(original: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The weight under spectral norm in evaluation: W / uᵀ W v, with the stored estimates of u and v.

    >>> spectral_normed(torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)[0], torch.eye(2)[0])
    tensor([[1.0000, 0.0000],
            [0.0000, 0.2500]])
    """
    axes = [axis for axis, length in enumerate(original.shape) if length == len(u)]
    axes = axes[:1] if original.ndim == 2 else axes
    sigmas = [torch.vdot(u, torch.mv(original.movedim(axis, 0).flatten(1), v)) for axis in axes]
    # Transposed convolutions have the second axis in front; the estimates fit the right one best.
    return original / max(sigmas, key=lambda sigma: abs(float(sigma)))


def resolve(
    source: Source, where: str, stored: Callable[[Collection[str]], Collection[str]] = lambda names: ()
) -> Source:
    """A source whose reparametrised weights are those that the model uses; itself, if it has none.

    Args:
        where: names the checkpoint in messages.
        own: which of a file's names the model's architecture has by itself, asked only if there is need:
            wav2vec 2.0 has a weight norm that is part of it.

    Raises:
        InputError: a parametrization that the file does not suffice to compute.
    """
    groups = _groups(source.headers)
    if not groups:
        return source
    architecture = set(stored([part for parts in groups.values() for part in parts.values()]))
    groups = {name: parts for name, parts in groups.items() if architecture.isdisjoint(parts.values())}
    recipes = [_recipe(name, parts, source.headers, where) for name, parts in groups.items()]
    return Resolved(source, recipes) if recipes else source


def _groups(headers: Mapping[str, Header]) -> dict[str, dict[str, str]]:
    """The parts of each reparametrised weight, by what is behind its name."""
    groups: dict[str, dict[str, str]] = {}
    hooked: dict[str, dict[str, str]] = {}
    for name in headers:
        if match := _PARAMETRIZED.match(name):
            module, parameter, part = match.groups()
            weight = f"{module}.{parameter}" if module else parameter
            groups.setdefault(weight, {})[part] = name
        elif match := _HOOKED.match(name):
            hooked.setdefault(match[1], {})[match[2]] = name
    for weight, parts in hooked.items():
        named = weight.rpartition(".")[2].startswith("weight") and parts.keys() == {"g", "v"}
        normed = named and _are_norms(headers[parts["g"]].shape, headers[parts["v"]].shape)
        if weight not in headers and (normed or "orig" in parts):
            groups[weight] = parts
    return groups


def _are_norms(g: tuple[int, ...], v: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes could be norms along an axis, and what they are the norms of."""
    axes = [(norms, length) for norms, length in zip(g, v, strict=False) if norms > 1]
    return not g or (len(g) == len(v) and len(axes) <= 1 and all(norms == length for norms, length in axes))


def _recipe(name: str, parts: Mapping[str, str], headers: Mapping[str, Header], where: str) -> Recipe:
    """How to compute a weight from its parts."""
    recipes: list[tuple[tuple[str, ...], Callable[..., Tensor]]] = [
        (("orig", "mask"), masked),
        (("v", "g"), weight_normed),
        (("original1", "original0"), weight_normed),
        (("orig", "u", "v"), spectral_normed),
        (("original", "0._u", "0._v"), spectral_normed),
    ]
    for needed, compute in recipes:
        if parts.keys() == set(needed):
            sources = tuple(parts[part] for part in needed)
            if problem := _misfit(compute, [headers[source] for source in sources]):
                raise InputError(f"{where}: {name}: {problem}; is the file damaged?")
            return Recipe(name, sources, compute)
    stored = ", ".join(sorted(parts.values()))
    raise InputError(f"{where}: {name} is reparametrised and cannot be computed from {stored}; {REMEDY}")


def _misfit(compute: Callable[..., Tensor], parts: list[Header]) -> str:
    """Why parts of these shapes give no weight; empty if they do."""
    first, *others = (header.shape for header in parts)
    if compute is masked:
        return "" if first == others[0] else f"its mask is {others[0]}, and what it masks {first}"
    if compute is weight_normed:
        return (
            "" if _are_norms(others[0], first) else f"its norms are {others[0]}, and what they scale {first}"
        )
    lengths = [shape[0] for shape in others if len(shape) == 1]
    fits = len(first) > 1 and len(lengths) == 2 and lengths[0] in first and prod(lengths) == prod(first)
    return "" if fits else f"its singular vectors are {others[0]} and {others[1]}, and the weight {first}"


class Resolved:
    """A source in which some tensors are computed from others, one at a time, when they are read."""

    def __init__(self, source: Source, recipes: Collection[Recipe]):
        self.source = source
        self.recipes = {recipe.name: recipe for recipe in recipes}
        used = {name: recipe for recipe in recipes for name in recipe.sources}
        self.headers: dict[str, Header] = {}
        for name, header in source.headers.items():
            recipe = used.get(name)
            if recipe is None:
                self.headers[name] = header
            elif name == recipe.sources[0]:
                self.headers[recipe.name] = replace(header, name=recipe.name)

    def read(self, name: str) -> Tensor:
        """The tensor as stored, or the weight that the model uses."""
        recipe = self.recipes.get(name)
        if recipe is None:
            return self.source.read(name)
        weight = recipe.compute(*(self.source.read(part) for part in recipe.sources))
        return weight.to(self.headers[name].dtype)

    def file(self, name: str) -> Path:
        """The file that holds a tensor, or the first part of a weight."""
        assert isinstance(self.source, FileSource)
        recipe = self.recipes.get(name)
        return self.source.file(name if recipe is None else recipe.sources[0])

    def location(self, name: str) -> Hashable:
        """The location of its bytes, or those of what it is computed from."""
        recipe = self.recipes.get(name)
        if recipe is None:
            return self.source.location(name)
        return recipe.compute.__name__, *map(self.source.location, recipe.sources)

    def stamp(self) -> str:
        """That of the files."""
        return self.source.stamp()

    def fingerprint(self) -> str:
        """Content hash of the weights that the model uses."""
        return fingerprint(self)
