"""Local complexity: how many MLP units switch within a small neighbourhood of a model's input.

Around the embeddings of a row lie P vertices: the embedding of every token moved by ± r along P/2 random
orthonormal directions. A unit is crossed at a token where the sign of its pre-activation differs between any
two vertices. Embeddings are moved because tokens are discrete; of a gated MLP the gate decides.
Source: Humayun et al., arXiv:2402.15555; its code counts crossings over the same cross-polytope.
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
from probes.models.body import evaluating, full_pass, run, unwrapped
from probes.naming.matrices import matrices
from probes.text.batches import Batch, Example, batches


class ActivationSwitch(NamedTuple):
    """The module that returns a layer's pre-activations: the outputs `start:stop` of each of equal groups."""

    layer: int
    module: nn.Module
    start: int = 0
    stop: int | None = None
    groups: int = 1

    def units(self, output: Tensor) -> Tensor:
        """The pre-activations in the module's output."""
        if self.stop is None:
            return output
        return output.unflatten(-1, (self.groups, -1))[..., self.start : self.stop].flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """Share of crossed units.

    Attributes:
        share: of each layer's units, averaged over tokens.
        units: number of units of each layer.
        radius: length of the moves of embeddings, in their own units.
    """

    share: dict[int, float]
    units: dict[int, int]
    radius: float
    vertices: int
    tokens: int


def switches(model: nn.Module) -> tuple[list[ActivationSwitch], list[int]]:
    """The pre-activations of each block, and the blocks with routed experts.

    Units of routed experts are left out: at each vertex an expert gets other tokens.
    """
    inner = unwrapped(model)
    parameters = inner.named_parameters()
    headers = {name: Header(name, tuple(weight.shape), weight.dtype) for name, weight in parameters}
    by_mlp: dict[tuple[int, str], ActivationSwitch] = {}
    routed: set[int] = set()
    for matrix in matrices(headers, inner.config.to_dict()).values():
        role = matrix.component.removeprefix("shared_")
        if matrix.layer is None or role not in ("gate_proj", "up_proj"):
            continue
        if matrix.expert is not None or ".experts." in matrix.tensor:
            routed.add(matrix.layer)
            continue
        mlp = matrix.layer, matrix.component.removesuffix(role)
        if role == "gate_proj" or mlp not in by_mlp:
            module = inner.get_submodule(matrix.tensor.removesuffix(".weight"))
            by_mlp[mlp] = ActivationSwitch(matrix.layer, module, matrix.start, matrix.stop, matrix.heads)
    return [by_mlp[mlp] for mlp in sorted(by_mlp)], sorted(routed)


def orthonormal(
    tokens: int, width: int, count: int, generator: torch.Generator
) -> Float[Tensor, "count tokens width"]:
    """For each token `count` random orthonormal directions; at most as many as the width."""
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
        vertices: P, for P/2 directions; limited by the width of the embeddings.
        seed: of the directions: the same for every checkpoint of a run.
        tokens: most tokens in a forward pass, over all vertices; changes no result.

    Raises:
        InputError: no dense MLP, or embeddings that cannot be moved.
    """
    layer_switches, _ = switches(model)
    if not layer_switches:
        raise InputError(f"{type(unwrapped(model)).__name__}: has no dense MLP with units to watch")
    embeddings = unwrapped(model).get_input_embeddings()
    directions = min(vertices // 2, embeddings.weight.shape[1])
    crossed, units, count = Counter[int](), Counter[int](), 0
    with evaluating(model), torch.no_grad():
        parts = list(batches(examples, tokens=max(1, tokens // (2 * directions)), pad_id=0))
        size = _mean_length(embeddings, parts)
        for batch in parts:
            tokens_at = batch.attention_mask.bool()
            moves = _moves(batch, embeddings.weight, directions, radius * size, seed)
            units.clear()
            for layer, switched in _switched(model, embeddings, layer_switches, batch, moves):
                crossed[layer] += int(switched[tokens_at.to(switched.device)].sum())
                units[layer] += switched.shape[-1]
            count += int(tokens_at.sum())
    return Complexity(
        share={layer: crossed[layer] / (count * units[layer]) for layer in sorted(units)},
        units={layer: units[layer] for layer in sorted(units)},
        radius=radius * size,
        vertices=2 * directions,
        tokens=count,
    )


def _mean_length(embeddings: Any, parts: Sequence[Batch]) -> float:
    ids = torch.cat([batch.ids[batch.attention_mask.bool()] for batch in parts])
    distinct, times = ids.unique(return_counts=True)
    lengths = torch.linalg.vector_norm(embeddings(distinct.to(embeddings.weight.device)).double(), dim=-1)
    return float((lengths.cpu() * times).sum() / times.sum())


def _moves(
    batch: Batch, weight: Tensor, directions: int, length: float, seed: int
) -> Float[Tensor, "vertices rows length width"]:
    """The move of each token's embedding to each vertex; padding is not moved."""
    width = weight.shape[1]
    moves = torch.zeros(2 * directions, *batch.ids.shape, width, dtype=weight.dtype)
    for row, index in enumerate(batch.indices.tolist()):
        at_tokens = batch.attention_mask[row].bool()
        # A generator for each row, so that its directions do not depend on the batch.
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        drawn = length * orthonormal(int(at_tokens.sum()), width, directions, generator)
        moves[:, row, at_tokens] = torch.cat([drawn, -drawn]).to(weight.dtype)
    return moves


def _switched(
    model: nn.Module,
    embeddings: nn.Module,
    layer_switches: Sequence[ActivationSwitch],
    batch: Batch,
    moves: Float[Tensor, "vertices rows length width"],
) -> Iterator[tuple[int, Bool[Tensor, "rows length units"]]]:
    """The units that switch between the vertices of a batch, for each layer."""
    count, where = len(moves), type(unwrapped(model)).__name__
    repeats = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in vars(batch).items()}
    repeated = Batch(**repeats)
    switched_units: dict[int, Tensor] = {}

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape != (*repeated.ids.shape, moves.shape[-1]):
            sizes = "x".join(map(str, output.shape))
            raise InputError(f"{where}: its embeddings are {sizes}, not rows by tokens, and are not moved")
        return output + moves.flatten(0, 1).to(output)

    def seeing(index: int, switch: ActivationSwitch) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            on = switch.units(output) > 0
            on = on.reshape(count, *batch.ids.shape, on.shape[-1])  # some modules get all tokens in one list
            switched_units[index] = on.any(dim=0) & ~on.all(dim=0)

        return see

    with ExitStack() as stack:
        stack.callback(embeddings.register_forward_hook(move).remove)
        for index, switch in enumerate(layer_switches):
            stack.callback(switch.module.register_forward_hook(seeing(index, switch)).remove)
        if unwrapped(model).get_output_embeddings() is None:
            full_pass(model, repeated)
        else:
            run(model, repeated)
    for index, switched in switched_units.items():
        yield layer_switches[index].layer, switched
