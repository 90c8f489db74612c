"""Symmetries of a block: relabelled heads and neurons and turned signs, which no function sees, undone.

A tuned block that was relabelled computes the same, and yet every blend of it with base is another block.
`realigned` gives tuned's tensors in the labelling nearest to base: feed-forward neurons and heads permuted
(heads of one key-value head among themselves, key-value heads with all of theirs), signs turned of value rows
with output columns, of query with key rows, and, in a gated feed-forward, of up rows with down columns.
Everything is copied and negated, never computed: signs come back bit for bit.
Sources: arXiv:2407.02447 (assignment, as in weight matching); which signs are free is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.files.layout import Header, Matrix

Read: TypeAlias = Callable[[str], Tensor]


@dataclass
class Realigned:
    """A block in the labelling nearest to base.

    Attributes:
        tensors: those that differ from tuned's, by name.
        moved: neurons and heads that stand elsewhere.
        turned: rows whose sign was turned, in value, query or up.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    moved: int = 0
    turned: int = 0


def matched(A: Float[Tensor, "units units"]) -> Int[Tensor, " units"]:
    """For each row the column that it is matched with, so that the sum of what is chosen is largest.

    Where the largest entries of the rows are a matching they are the best one, and nothing is solved.
    """
    best = A.argmax(dim=1)
    if len(best.unique()) == len(best):
        return best
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(A.double().numpy(), maximize=True)[1])


def realigned(
    matrices: Sequence[Matrix],
    headers: Mapping[str, Header],
    base: Read,
    tuned: Read,
    *,
    heads: int,
    rotary: bool,
    movable: bool = True,
) -> Realigned:
    """Undo relabelling and turned signs of one block.

    Args:
        matrices: of the block, as tuned's file stores them.
        headers: of tuned's file: biases are found there.
        base, tuned: give a stored tensor of either, both under the names and in the form of tuned's.
        heads: query heads.
        rotary: positions are in queries and keys: only the sign of a whole head is free there.
        movable: heads may change places; not where each has a position bias of its own.

    Returns:
        nothing changed for what has other parts, such as experts, or does not come nearer to base.
    """
    parts = _Parts({matrix.component: matrix for matrix in matrices if matrix.expert is None}, headers)
    found = Realigned()
    for attention in (False, True):
        values = _Values(parts, base, tuned)
        moved, turned = (
            _heads(values, heads=heads, rotary=rotary, movable=movable) if attention else _neurons(values)
        )
        if values.nearer() and (moved or turned):
            found.tensors |= values.changed
            found.moved, found.turned = found.moved + moved, found.turned + turned
    return found


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
    """Both sides of a block, and what becomes of tuned's."""

    def __init__(self, parts: _Parts, base: Read, tuned: Read):
        self.parts, self._base, self._tuned = parts, base, tuned
        self.changed: dict[str, Tensor] = {}

    def both(self, component: str) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """A matrix of base and of tuned, its bias as one more column."""
        sides = []
        for read in (self._base, self._tuned):
            matrix, bias = self.parts.matrices[component], self.parts.bias(component)
            whole = [matrix.take(read(matrix.tensor))]
            if bias is not None:
                whole.append(bias.take(read(bias.tensor)[:, None]))
            sides.append(torch.cat(whole, dim=1))
        return sides[0], sides[1]

    def weights(self, component: str) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """A matrix of base and of tuned without its bias."""
        matrix = self.parts.matrices[component]
        return matrix.take(self._base(matrix.tensor)), matrix.take(self._tuned(matrix.tensor))

    def rows(self, component: str, order: Tensor, signs: Tensor) -> None:
        """Reorder the outputs of a matrix and turn their signs, its bias with them."""
        for matrix in (self.parts.matrices[component], self.parts.bias(component)):
            if matrix is not None:
                self._put(matrix, lambda W: turned(W[order], signs[:, None]))

    def columns(self, component: str, order: Tensor, signs: Tensor) -> None:
        """The same of its inputs."""
        self._put(self.parts.matrices[component], lambda W: turned(W[:, order], signs[None]))

    def _put(self, matrix: Matrix, change: Callable[[Tensor], Tensor]) -> None:
        stored = self.changed.get(matrix.tensor, self._tuned(matrix.tensor))
        flat = stored.ndim == 1
        wide = stored[:, None] if flat else stored
        made = matrix.put(wide, change(matrix.take(wide)))
        self.changed[matrix.tensor] = made[:, 0] if flat else made

    def nearer(self) -> bool:
        """Whether what was changed is nearer to base than tuned's own."""
        after = before = 0.0
        for name, value in self.changed.items():
            base = self._base(name).double()
            after += float((value.double() - base).square().sum())
            before += float((self._tuned(name).double() - base).square().sum())
        return after < before


def turned(values: Tensor, signs: Tensor) -> Tensor:
    """Values with some signs turned; the others are copied, negative zeros too."""
    return torch.where(signs < 0, -values, values)


def signs_of(dots: Tensor) -> Tensor:
    """−1 where a product is negative, else 1."""
    return torch.where(dots < 0, -torch.ones_like(dots), torch.ones_like(dots))


def _neurons(values: _Values) -> tuple[int, int]:
    """Neurons of a feed-forward, each with what it reads and writes."""
    parts = values.parts.matrices
    if "up_proj" not in parts or "down_proj" not in parts:
        return 0, 0
    (up, up_), (down, down_) = values.both("up_proj"), values.weights("down_proj")
    if len(up) != down.shape[1]:
        return 0, 0
    linear = unit(torch.cat([up, down.T], dim=1)) @ unit(torch.cat([up_, down_.T], dim=1)).T
    gated = "gate_proj" in parts
    A = linear
    if gated:  # what is not behind the gate's activation may turn its sign
        gate, gate_ = values.both("gate_proj")
        A = linear.abs() + unit(gate) @ unit(gate_).T
    order = matched(A)
    places = torch.arange(len(order))
    signs = signs_of(linear[places, order]) if gated else torch.ones(len(order), dtype=up.dtype)
    values.rows("up_proj", order, signs)
    values.columns("down_proj", order, signs)
    if gated:
        values.rows("gate_proj", order, torch.ones_like(signs))
    return int((order != places).sum()), int((signs < 0).sum())


def _heads(values: _Values, *, heads: int, rotary: bool, movable: bool) -> tuple[int, int]:
    """Heads of an attention: key-value heads, and the query heads of each."""
    parts = values.parts.matrices
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= parts.keys():
        return 0, 0
    q, k, v, o = (parts[f"{letter}_proj"] for letter in "qkvo")
    if q.rows % heads or o.columns % heads or k.rows % (q.rows // heads):
        return 0, 0
    size, stores = q.rows // heads, k.rows // (q.rows // heads)
    if heads % stores or v.rows % stores or v.rows // stores != o.columns // heads:
        return 0, 0
    each = heads // stores
    Q = [side.unflatten(0, (stores, each, size)) for side in values.both("q_proj")]
    K = [side.unflatten(0, (stores, size)) for side in values.both("k_proj")]
    V = [side.unflatten(0, (stores, -1)) for side in values.both("v_proj")]
    O = [side.T.unflatten(0, (stores, each, -1)) for side in values.weights("o_proj")]  # noqa: E741
    # Of every pair of heads, base and tuned, the products of what one dimension of theirs reads or writes.
    read = [torch.einsum("gid,hid->ghi", *sides) for sides in (K, V)]
    write = [torch.einsum("gaid,hbid->ghabi", *sides) for sides in (Q, O)]
    inner = write[0].abs().sum(-1) + write[1].abs().sum(-1)
    match = matched if movable else _in_place
    orders = [[match(inner[g, h]) for h in range(stores)] for g in range(stores)]
    within = torch.tensor(
        [[float(inner[g, h][range(each), orders[g][h]].sum()) for h in range(stores)] for g in range(stores)]
    )
    outer = match(read[0].abs().sum(-1) + read[1].abs().sum(-1) + within.to(inner))
    chosen = [orders[g][int(h)] for g, h in enumerate(outer)]
    queries = torch.cat([int(h) * each + order for h, order in zip(outer, chosen, strict=True)])
    signs = []
    for which, (first, second) in enumerate(zip(read, write, strict=True)):
        dots = torch.stack(
            [
                first[g, h] + second[g, h][range(each), order].sum(0)
                for g, (h, order) in enumerate(zip(outer.tolist(), chosen, strict=True))
            ]
        )
        if which == 0 and rotary:
            dots = dots.sum(-1, keepdim=True).expand_as(dots)
        signs.append(signs_of(dots))
    keys, values_ = signs
    turn_q, turn_o = (sign[:, None].expand(-1, each, -1).flatten() for sign in signs)
    values.rows("q_proj", _spread(queries, size), turn_q)
    values.rows("k_proj", _spread(outer, size), keys.flatten())
    values.rows("v_proj", _spread(outer, v.rows // stores), values_.flatten())
    values.columns("o_proj", _spread(queries, o.columns // heads), turn_o)
    moved = int((queries != torch.arange(heads)).sum())
    return moved, int((keys < 0).sum() + (values_ < 0).sum())


def _in_place(A: Float[Tensor, "units units"]) -> Int[Tensor, " units"]:
    """Everything matched with itself."""
    return torch.arange(len(A))


def _spread(order: Tensor, size: int) -> Tensor:
    """An order of heads as one of their rows."""
    return (order[:, None] * size + torch.arange(size)).flatten()


def unit(rows: Float[Tensor, "units width"]) -> Float[Tensor, "units width"]:
    """Rows at length 1; a row of zeros stays."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(float(np.finfo(np.float32).tiny))
