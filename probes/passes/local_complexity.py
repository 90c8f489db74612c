"""Local complexity: how many MLP units switch within a small neighbourhood of what a model reads.

Around the embeddings of a row lie P vertices: at every token its embedding moved by ± r along P/2 random
orthonormal directions. A unit is crossed at a token where the sign of its pre-activation differs between any
two vertices. Tokens being discrete, it is their embeddings that are moved; of a gated MLP the gate decides.
Source: Humayun et al., arXiv:2402.15555, whose code counts crossings over the same cross-polytope.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probes.errors import InputError
from probes.files.layout import Header
from probes.models.body import evaluating, inputs, padding_known, run, unwrapped
from probes.naming.matrices import matrices
from probes.text.batches import Batch, Example, batches


class ActivationSwitch(NamedTuple):
    """Where a layer's units are seen before they are activated.

    Attributes:
        module: what gives the pre-activations.
        start, stop, groups: which of its outputs they are: these of each of so many equal groups.
    """

    layer: int
    module: nn.Module
    start: int = 0
    stop: int | None = None
    groups: int = 1

    def units(self, output: Tensor) -> Tensor:
        """The pre-activations among what the module gives."""
        if self.stop is None:
            return output
        return output.unflatten(-1, (self.groups, -1))[..., self.start : self.stop].flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """What is crossed.

    Attributes:
        share: of each layer's units, at a token, on average.
        units: of each layer.
        radius: by which embeddings are moved, in their own units.
        vertices: to which they are moved.
        tokens: looked at.
    """

    share: dict[int, float]
    units: dict[int, int]
    radius: float
    vertices: int
    tokens: int


def switches(model: nn.Module) -> tuple[list[ActivationSwitch], list[int]]:
    """Where the units of each block are seen, and the blocks that have routed experts.

    Units of routed experts are not seen: at each vertex an expert is given other tokens.
    """
    inner = unwrapped(model)
    headers = {name: Header(name, tuple(each.shape), each.dtype) for name, each in inner.named_parameters()}
    found: dict[tuple[int, str], ActivationSwitch] = {}
    routed: set[int] = set()
    for matrix in matrices(headers, inner.config.to_dict()).values():
        role = matrix.component.removeprefix("shared_")
        if matrix.layer is None or role not in ("gate_proj", "up_proj"):
            continue
        if matrix.expert is not None or ".experts." in matrix.tensor:
            routed.add(matrix.layer)
            continue
        mlp = matrix.layer, matrix.component.removesuffix(role)
        if role == "gate_proj" or mlp not in found:
            module = inner.get_submodule(matrix.tensor.removesuffix(".weight"))
            found[mlp] = ActivationSwitch(matrix.layer, module, matrix.start, matrix.stop, matrix.heads)
    return [found[mlp] for mlp in sorted(found)], sorted(routed)


def orthonormal(
    tokens: int, width: int, count: int, generator: torch.Generator
) -> Float[Tensor, "count tokens width"]:
    """For each token so many random directions at right angles, of length 1; at most as many as the width."""
    drawn = torch.randn(tokens, width, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.permute(2, 0, 1)


def local_complexity(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    radius: float,
    vertices: int = 40,
    seed: int = 0,
    tokens: int = 16384,
) -> Complexity:
    """Share of the units of every layer that are crossed around some sequences.

    Args:
        radius: as a share of the mean length of an embedding.
        vertices: P; half of them are directions, at most as many as embeddings have.
        seed: of the directions: the same for every checkpoint of a run.
        tokens: most tokens in a forward pass, those of all vertices together; changes no result.

    Raises:
        InputError: no dense MLP, or embeddings that cannot be moved.
    """
    places, _ = switches(model)
    if not places:
        raise InputError(f"{type(unwrapped(model)).__name__}: has no dense MLP whose units could be seen")
    embeddings = unwrapped(model).get_input_embeddings()
    directions = min(vertices // 2, embeddings.weight.shape[1])
    crossed, units, count = Counter[int](), Counter[int](), 0
    with evaluating(model), torch.no_grad():
        parts = list(batches(examples, tokens=max(1, tokens // (2 * directions)), pad_id=0))
        size = _mean_length(embeddings, parts)
        for batch in parts:
            known = batch.attention_mask.bool()
            moves = _moves(batch, embeddings.weight, directions, radius * size, seed)
            units.clear()
            for layer, switched in _switched(model, embeddings, places, batch, moves):
                crossed[layer] += int(switched[known.to(switched.device)].sum())
                units[layer] += switched.shape[-1]
            count += int(known.sum())
    return Complexity(
        share={layer: crossed[layer] / (count * units[layer]) for layer in sorted(units)},
        units={layer: units[layer] for layer in sorted(units)},
        radius=radius * size,
        vertices=2 * directions,
        tokens=count,
    )


def _mean_length(embeddings: Any, parts: Sequence[Batch]) -> float:
    """Mean length of the embeddings of all tokens."""
    ids = torch.cat([batch.ids[batch.attention_mask.bool()] for batch in parts])
    known, times = ids.unique(return_counts=True)
    lengths = torch.linalg.vector_norm(embeddings(known.to(embeddings.weight.device)).double(), dim=-1)
    return float((lengths.cpu() * times).sum() / times.sum())


def _moves(
    batch: Batch, weight: Tensor, directions: int, length: float, seed: int
) -> Float[Tensor, "vertices rows length width"]:
    """By how much each vertex moves the embedding of each token; padding is not moved."""
    width = weight.shape[1]
    moves = torch.zeros(2 * directions, *batch.ids.shape, width, dtype=weight.dtype)
    for place, index in enumerate(batch.indices.tolist()):
        here = batch.attention_mask[place].bool()
        # Of each row its own, so that they do not depend on what is in a batch with it.
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        drawn = length * orthonormal(int(here.sum()), width, directions, generator)
        moves[:, place, here] = torch.cat([drawn, -drawn]).to(weight.dtype)
    return moves


def _switched(
    model: nn.Module,
    embeddings: nn.Module,
    places: Sequence[ActivationSwitch],
    batch: Batch,
    moves: Float[Tensor, "vertices rows length width"],
) -> Iterator[tuple[int, Bool[Tensor, "rows length units"]]]:
    """Which units switch between the vertices of a batch, for each place."""
    count, where = len(moves), type(unwrapped(model)).__name__
    repeated = Batch(
        **{name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in vars(batch).items()}
    )
    seen: dict[int, Tensor] = {}

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape != (*repeated.ids.shape, moves.shape[-1]):
            sizes = "x".join(map(str, output.shape))
            raise InputError(f"{where}: its embeddings are {sizes}, not rows by tokens, and are not moved")
        return output + moves.flatten(0, 1).to(output)

    def seeing(index: int, place: ActivationSwitch) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            on = place.units(output) > 0
            on = on.reshape(count, *batch.ids.shape, on.shape[-1])  # some modules get all tokens in one list
            seen[index] = on.any(dim=0) & ~on.all(dim=0)

        return see

    with ExitStack() as stack:
        stack.callback(embeddings.register_forward_hook(move).remove)
        for index, place in enumerate(places):
            stack.callback(place.module.register_forward_hook(seeing(index, place)).remove)
        _run(model, repeated)
    for index, switched in seen.items():
        yield places[index].layer, switched


def _run(model: nn.Module, batch: Batch) -> None:
    inner = unwrapped(model)
    if inner.get_output_embeddings() is not None:
        run(model, batch)
        return
    given = inputs(inner, batch)
    with padding_known(inner, given):
        inner(**given)
