"""Permutation and sign symmetries of a block, undone.

A tuned block with permuted units computes the same function, but its blends with base do not. Neurons and
heads are permuted (query heads within their key-value head), and signs flipped of value rows with output
columns, of query with key rows, and, in a gated feed-forward, of up rows with down columns. This is exact.
Sources: arXiv:2407.02447 (assignment, as in weight matching); which signs are free is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.files.layout import Header, Matrix

Read: TypeAlias = Callable[[str], Tensor]


@dataclass
class Realigned:
    """A block in the order nearest to base: changed tensors, permuted neurons and heads, flipped rows."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    moved: int = 0
    turned: int = 0


def matched(A: Float[Tensor, "units units"]) -> Int[Tensor, " units"]:
    """The assignment of rows to columns with the largest sum.

    Where the largest entries of the rows are an assignment, it is the best one and nothing is solved.
    """
    best = A.argmax(dim=1)
    if len(best.unique()) == len(best):
        return best
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(A.double().numpy(), maximize=True)[1])


def realigned(
    matrices: Sequence[Matrix], headers: Mapping[str, Header], base: Read, tuned: Read, *, heads: int,
    rotary: bool, movable: bool = True,
) -> Realigned:  # fmt: skip
    """Undo permutations and sign flips of one block, if that brings it nearer to base.

    Args:
        matrices: of the block, as tuned's file stores them; other parts, such as experts, stay.
        headers: of tuned's file; biases are looked up there.
        base, tuned: read a stored tensor of either, under the names and in the layout of tuned's file.
        heads: number of query heads.
        rotary: queries and keys carry positions: only the sign of a whole head is free there.
        movable: heads may be permuted; not where each has its own position bias.
    """
    parts = _Parts({matrix.component: matrix for matrix in matrices if matrix.expert is None}, headers)
    result = Realigned()
    for attention in (False, True):
        values = _Values(parts, base, tuned)
        moved, turned = (
            _heads(values, heads=heads, rotary=rotary, movable=movable) if attention else _neurons(values)
        )
        if values.nearer() and (moved or turned):
            result.tensors |= values.changed
            result.moved, result.turned = result.moved + moved, result.turned + turned
    return result


@dataclass(frozen=True)
class _Parts:
    """The matrices of a block by component, and their biases as matrices of one column."""

    matrices: Mapping[str, Matrix]
    headers: Mapping[str, Header]

    def bias(self, component: str) -> Matrix | None:
        matrix = self.matrices[component]
        name = matrix.tensor.removesuffix("weight") + "bias"
        if name == matrix.tensor or name not in self.headers or len(self.headers[name].shape) != 1:
            return None
        return replace(matrix, name=name, tensor=name, columns=1, transposed=False)


class _Values:
    """Both sides of a block, and the changed tensors of tuned."""

    def __init__(self, parts: _Parts, base: Read, tuned: Read):
        self.parts, self._base, self._tuned = parts, base, tuned
        self.changed: dict[str, Tensor] = {}

    def both(self, component: str) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """A matrix of base and of tuned, with its bias as one more column."""
        sides = []
        for read in (self._base, self._tuned):
            matrix, bias = self.parts.matrices[component], self.parts.bias(component)
            columns = [matrix.take(read(matrix.tensor))]
            if bias is not None:
                columns.append(bias.take(read(bias.tensor)[:, None]))
            sides.append(torch.cat(columns, dim=1))
        return sides[0], sides[1]

    def weights(self, component: str) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """A matrix of base and of tuned without its bias."""
        matrix = self.parts.matrices[component]
        return matrix.take(self._base(matrix.tensor)), matrix.take(self._tuned(matrix.tensor))

    def rows(self, component: str, order: Tensor, signs: Tensor) -> None:
        """Permute and flip the outputs of a matrix and of its bias."""
        for matrix in (self.parts.matrices[component], self.parts.bias(component)):
            if matrix is not None:
                self._put(matrix, lambda W: turned(W[order], signs[:, None]))

    def columns(self, component: str, order: Tensor, signs: Tensor) -> None:
        """Permute and flip the inputs of a matrix."""
        self._put(self.parts.matrices[component], lambda W: turned(W[:, order], signs[None]))

    def _put(self, matrix: Matrix, change: Callable[[Tensor], Tensor]) -> None:
        stored = self.changed.get(matrix.tensor, self._tuned(matrix.tensor))
        flat = stored.ndim == 1
        wide = stored[:, None] if flat else stored
        changed = matrix.put(wide, change(matrix.take(wide)))
        self.changed[matrix.tensor] = changed[:, 0] if flat else changed

    def nearer(self) -> bool:
        """Whether the changed tensors are nearer to base than tuned's."""
        after = before = 0.0
        for name, value in self.changed.items():
            base = self._base(name).double()
            after += float((value.double() - base).square().sum())
            before += float((self._tuned(name).double() - base).square().sum())
        return after < before


def turned(values: Tensor, signs: Tensor) -> Tensor:
    """Values with some signs flipped; the others are copied, negative zeros too."""
    return torch.where(signs < 0, -values, values)


def signs_of(dots: Tensor) -> Tensor:
    """−1 where a product is negative, else 1."""
    return torch.where(dots < 0, -torch.ones_like(dots), torch.ones_like(dots))


def _neurons(values: _Values) -> tuple[int, int]:
    """Permute the neurons of a feed-forward; returns how many were moved and flipped."""
    parts = values.parts.matrices
    if "up_proj" not in parts or "down_proj" not in parts:
        return 0, 0
    (up, up_), (down, down_) = values.both("up_proj"), values.weights("down_proj")
    if len(up) != down.shape[1]:
        return 0, 0
    linear = unit(torch.cat([up, down.T], dim=1)) @ unit(torch.cat([up_, down_.T], dim=1)).T
    gated = "gate_proj" in parts
    A = linear
    if gated:  # up rows, not being behind the activation, may be flipped
        gate, gate_ = values.both("gate_proj")
        A = linear.abs() + unit(gate) @ unit(gate_).T
    order = matched(A)
    neurons = torch.arange(len(order))
    signs = signs_of(linear[neurons, order]) if gated else torch.ones(len(order), dtype=up.dtype)
    values.rows("up_proj", order, signs)
    values.columns("down_proj", order, signs)
    if gated:
        values.rows("gate_proj", order, torch.ones_like(signs))
    return int((order != neurons).sum()), int((signs < 0).sum())


def _heads(values: _Values, *, heads: int, rotary: bool, movable: bool) -> tuple[int, int]:
    """Permute key-value heads and their query heads; returns how many were moved and flipped."""
    parts = values.parts.matrices
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= parts.keys():
        return 0, 0
    q, k, v, o = (parts[f"{letter}_proj"] for letter in "qkvo")
    if q.rows % heads or o.columns % heads or k.rows % (q.rows // heads):
        return 0, 0
    size, stores = q.rows // heads, k.rows // (q.rows // heads)
    if heads % stores or v.rows % stores or v.rows // stores != o.columns // heads:
        return 0, 0
    shared = heads // stores
    Q = [side.unflatten(0, (stores, shared, size)) for side in values.both("q_proj")]
    K = [side.unflatten(0, (stores, size)) for side in values.both("k_proj")]
    V = [side.unflatten(0, (stores, -1)) for side in values.both("v_proj")]
    O = [side.T.unflatten(0, (stores, shared, -1)) for side in values.weights("o_proj")]  # noqa: E741
    # Products of base and tuned for every pair of heads, by the dimension that is read or written.
    read = [torch.einsum("gid,hid->ghi", *sides) for sides in (K, V)]
    write = [torch.einsum("gaid,hbid->ghabi", *sides) for sides in (Q, O)]
    inner = write[0].abs().sum(-1) + write[1].abs().sum(-1)
    match = matched if movable else lambda A: torch.arange(len(A))
    orders = {(g, h): match(inner[g, h]) for g in range(stores) for h in range(stores)}
    sums = [float(inner[pair][range(shared), order].sum()) for pair, order in orders.items()]
    within = torch.tensor(sums).view(stores, stores).to(inner)
    outer = match(read[0].abs().sum(-1) + read[1].abs().sum(-1) + within)
    chosen = {pair: orders[pair] for pair in enumerate(outer.tolist())}
    queries = torch.cat([h * shared + order for (_, h), order in chosen.items()])
    signs = []
    for first, second in zip(read, write, strict=True):
        dots = [first[pair] + second[pair][range(shared), order].sum(0) for pair, order in chosen.items()]
        signs.append(torch.stack(dots))
    if rotary:
        signs[0] = signs[0].sum(-1, keepdim=True).expand_as(signs[0])
    key_signs, value_signs = signs = [signs_of(dots) for dots in signs]
    turn_q, turn_o = (sign[:, None].expand(-1, shared, -1).flatten() for sign in signs)
    values.rows("q_proj", _spread(queries, size), turn_q)
    values.rows("k_proj", _spread(outer, size), key_signs.flatten())
    values.rows("v_proj", _spread(outer, v.rows // stores), value_signs.flatten())
    values.columns("o_proj", _spread(queries, o.columns // heads), turn_o)
    moved = int((queries != torch.arange(heads)).sum())
    return moved, int((key_signs < 0).sum() + (value_signs < 0).sum())


def _spread(order: Tensor, size: int) -> Tensor:
    """A permutation of heads as a permutation of their rows."""
    return (order[:, None] * size + torch.arange(size)).flatten()


def unit(rows: Float[Tensor, "units width"]) -> Float[Tensor, "units width"]:
    """Rows scaled to length 1; a row of zeros stays."""
    return torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(torch.float32).tiny)
