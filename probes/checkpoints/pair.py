"""Two checkpoints, aligned: which matrices are the same weight, and which tensors have no counterpart."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from probes.adapters.parts import LowRank, sum_of
from probes.checkpoints.alignment import (
    align_checkpoints,
    is_head,
    is_tied,
    parameters_of,
    shared_tensors,
    tied_copies,
    used_tensors,
)
from probes.checkpoints.checkpoint import Checkpoint, nearest, summary_table
from probes.checkpoints.in_memory import wraps
from probes.checkpoints.opening import open_checkpoint
from probes.errors import InputError, UnknownNameError
from probes.files.layout import Header, Matrix
from probes.files.sources import finite, raw, same_bytes
from probes.files.untrusted import plain
from probes.naming import families
from probes.naming.align import natural_key, renamed

Side = Literal["base", "tuned"]


@dataclass(frozen=True)
class Unmatched:
    """A tensor without a counterpart (then that shape is None), or with one of another shape."""

    tensor: str  # its name in the base, or in tuned if only that has it
    reason: str
    base_shape: tuple[int, ...] | None
    tuned_shape: tuple[int, ...] | None


class CheckpointPair:
    """Base and tuned, aligned by tensor name.

    Attributes:
        base, tuned: the checkpoints.
        matrices: the common matrices under the base's names and in its view; by layer, then by name.
        resized: vocabulary matrices of unequal length, as (base rows, tuned rows). They keep the common rows.
        prefixes: taken off the names of each side to align them.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> pair = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8")
    >>> pair.tuned.kind, len(pair.unmatched), pair.delta("model.layers.0.self_attn.q_proj.weight").rank
    ('adapter', 0, 8)
    """

    def __init__(self, base: Any, tuned: Any, *, tokenizer: Any = None):
        """Open and align two checkpoints.

        Args:
            base, tuned: what `open_checkpoint` takes. A tuned adapter is applied to this base, or, where the
                base is an adapter too, to that adapter's base; open it yourself to have it otherwise.
                The base of a PeftModel may be its own `get_base_model()`.
            tokenizer: reads the rows for both, in this process; by default each has its directory's.

        Raises:
            InputError: one cannot be opened, or they have no matrix in common.
        """
        if wraps(tuned, base):
            tuned = open_checkpoint(tuned)
            base = tuned.base
        self.base = open_checkpoint(base)
        self.tuned = open_checkpoint(tuned, base=self.base.base or self.base)
        if tokenizer is not None:
            self.base, self.tuned = (side.with_tokenizer(tokenizer) for side in self._sides)
        if not self.base.config:
            self.base = self.base.described_by(self.tuned.config)
        elif not self.tuned.config:
            self.tuned = self.tuned.described_by(self.base.config)
        self.resized: dict[str, tuple[int, int]] = {}
        self._alignment = align_checkpoints(self.base, self.tuned)
        self._tensors, self.prefixes = self._alignment.tensors, self._alignment.prefixes
        self._names = self._aligned()
        # An adapter of this very base, or of the base of another adapter: its factors are the whole delta.
        self._child = _same_weights(self.tuned.base, self.base)
        self._sibling = not self._child and _same_weights(self.tuned.base, self.base.base)
        self.matrices: dict[str, Matrix] = {}
        for name in sorted(self._names, key=lambda name: _order(self.base.matrices[name])):
            matrix = self.base.matrices[name]
            self.matrices[name] = replace(matrix, rows=min(self.resized.get(name, (matrix.rows,))))
        self._refuse_strangers()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.base.opened is None or self.tuned.opened is None:
            return super().__reduce_ex__(protocol)
        return _realigned, (self.base, self.tuned)

    def __repr__(self) -> str:
        return f"<CheckpointPair {self.base!r} and {self.tuned!r}: {self._counts}>"

    def _repr_html_(self) -> str:
        table = summary_table({"base": self.base.summary, "tuned": self.tuned.summary})
        return f"{table}<p>{self._counts}</p>"

    @property
    def _counts(self) -> str:
        return f"{len(self.matrices)} matrices aligned, {len(self.unmatched)} tensors unmatched"

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A matrix of base and tuned, both (out, in): as stored, or float32 where an adapter changes it.

        Raises:
            UnknownNameError: not a matrix of both.
            InputError: NaN or infinite weights.
        """
        other, rows = self._other(name), self.matrices[name].rows
        base = self.base.matrix(name)[:rows]
        finite(self.base.ref, name, base)
        low = self.delta(name) if self._child else None
        tuned = self.tuned.matrix(other)[:rows] if low is None else base.float() + low.dense()
        finite(self.tuned.ref, other, tuned)
        return base, tuned

    def dtypes(self, name: str) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes that the files of base and tuned store a matrix in."""
        return self.base.matrices[name].dtype, self.counterpart(name).dtype

    def identical(self, name: str) -> bool:
        """Whether a matrix is bit for bit the same in both; reads none that an adapter leaves alone."""
        other, rows = self._other(name), self.matrices[name].rows
        ours, theirs = self.base.matrices[name], self.tuned.matrices[other]
        if not self.tuned.touched(other) and (self._child or not self.base.touched(name)):
            shared = self.base.source.location(ours.tensor) == self.tuned.source.location(theirs.tensor)
            if self._child or self._sibling or (shared and _view(ours) == _view(theirs)):
                return True
        return same_bytes(self.base.matrix(name)[:rows], self.tuned.matrix(other)[:rows])

    def counterpart(self, name: str) -> Matrix:
        """A matrix as the tuned checkpoint names and stores it."""
        return self.tuned.matrices[self._other(name)]

    def delta(self, name: str) -> LowRank | None:
        """The factors that adapters add to the base's matrix; None if they add none, or no product."""
        other, rows = self._other(name), self.matrices[name].rows
        if not self._child and not self._sibling:
            return None
        low = self.tuned.delta(other)
        if low is None and self.tuned.touched(other):
            return None
        if self._sibling and self.base.touched(name):
            minus = self.base.delta(name)
            if minus is None:
                return None
            minus = replace(minus, scaling=-minus.scaling)
            low = minus if low is None else sum_of(low, minus)
        return None if low is None else replace(low, B=low.B[:rows])

    @cached_property
    def unmatched(self) -> list[Unmatched]:
        """Every tensor without a counterpart, and why; reads those that may be renamed or tied copies."""
        base, tuned = self.base.headers, self.tuned.headers
        missing, extra = self._missing, self._extra
        hints = renamed(missing, extra, self._head, self._same_tensor)
        forms = self._in_another_form
        reason = "stored in another form in base; not compared"
        unmatched = [
            Unmatched(n, reason if n in forms else "extra in tuned", None, h.shape) for n, h in extra.items()
        ]
        for name, header in missing.items():
            hint = f"; {hints[name]}" if name in hints else ""
            unmatched.append(Unmatched(name, f"missing from tuned{hint}", header.shape, None))
        rows = {self.base.matrices[name].tensor: rows for name, rows in self.resized.items()}
        tied = [{alias: m.tensor for m in s.matrices.values() for alias in m.tied} for s in self._sides]
        for name, other in self._tensors.items():
            if not self._alike(name):
                reason = "another shape"
                if name in rows:
                    reason = "vocabulary resized from {} to {} rows".format(*rows[name])
                    reason += f"; the first {min(rows[name])} are compared"
                unmatched.append(Unmatched(name, reason, base[name].shape, tuned[other].shape))
            elif (name in tied[0]) != (other in tied[1]):
                role, to = ("base", tied[0][name]) if name in tied[0] else ("tuned", tied[1][other])
                reason = f"tied to {to} in {role} alone"
                reason += "; not compared"
                unmatched.append(Unmatched(name, reason, base[name].shape, tuned[other].shape))
        by_tie = self.tensors.keys() - set(self._tensors.values()) - tied[1].keys()
        for name in by_tie - tied_copies(self.tuned, by_tie):
            to = self.tensors[name]
            reason = f"tied to {to} in base alone; not compared"
            unmatched.append(Unmatched(name, reason, base[to].shape, tuned[name].shape))
        return sorted(unmatched, key=lambda tensor: natural_key(tensor.tensor))

    @cached_property
    def tensors(self) -> dict[str, str]:
        """The base's tensor with the same parameter as each tensor of tuned, of any shape.

        A tensor that holds several matrices may also have these in others of base: see `counterpart`.
        """
        return shared_tensors(self.base, self.tuned, self._alignment)

    @cached_property
    def _missing(self) -> dict[str, Header]:
        """Tensors of base without a counterpart in tuned."""
        missing = _alone(self.base, set(self._tensors).union(self.tensors.values()), set(self._names))
        copies = tied_copies(self.base, missing)
        return {name: header for name, header in missing.items() if name not in copies}

    @cached_property
    def _extra(self) -> dict[str, Header]:
        """Tensors of tuned without a counterpart in base."""
        return _alone(self.tuned, set(self.tensors), set(self._names.values()))

    @cached_property
    def _in_another_form(self) -> frozenset[str]:
        """Tensors of tuned that are in base too, stacked or divided in a way that is not followed."""
        if not self._extra or not self._missing:
            return frozenset()
        parameters = [parameters_of(side) for side in self._sides]
        of_base = {parameters[0][name] for name in self._missing}
        changed = {name for name in self._extra if parameters[1][name] != name}
        return frozenset(name for name in changed if parameters[1][name] in of_base)

    def common_rows(self, name: str) -> int | None:
        """How many first rows a tensor of tuned shares with base's, in a resized vocabulary; else None."""
        ours, theirs = self.base.headers.get(self.tensors.get(name, "")), self.tuned.headers[name]
        if ours is None or not ours.shape or not theirs.shape or ours.shape[1:] != theirs.shape[1:]:
            return None
        rows = ours.shape[0], theirs.shape[0]
        return min(rows) if rows in self.resized.values() else None

    @cached_property
    def _between(self) -> str | None:
        base, tuned = self.base.headers, self.tuned.headers
        shapes, lacking = {}, []
        for name, header in tuned.items():
            ours = base.get(self.tensors.get(name, ""))
            equal = ours is not None and ours.shape == header.shape
            divided = header.entries > 0 and self._covered[name] == header.entries
            if equal or divided or self.common_rows(name) is not None:
                continue
            if ours is not None:
                shapes[name] = f"{name} ({_size(ours)} in base, {_size(header)} in tuned)"
            elif name in self._in_another_form or (name in self._extra and not is_head(name, self.tuned)):
                lacking.append(name)
        if shapes or lacking:
            used = used_tensors(self.tuned)
            shapes = {name: text for name, text in shapes.items() if name in used}
            lacking = [name for name in lacking if name in used]
        problems = [
            (list(shapes.values()), "of another shape"),
            (lacking, "that base lacks" + (" or stores otherwise" if self._in_another_form else "")),
            (self._lost, "of base that tuned lacks"),
        ]
        parts = [
            f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what}, such as {names[0]}"
            for names, what in problems
            if names
        ]
        if not parts:
            return None
        return (
            f"{self.base.ref} and {self.tuned.ref}: no model lies between the two, which differ in more than "
            f"values ({'; '.join(map(plain, parts))}); give the base that tuned was made from, or measure "
            "what runs each by itself, such as ood or drift"
        )

    def between_problem(self) -> str | None:
        """Why no single model leads from base to tuned, in one line; None if one does.

        Weights between the two, or some of either, make sense where both have the same parameters. A new task
        head is tuned's at either end, and so are the rows that a shorter vocabulary lacks.

        >>> import torch
        >>> def experts(count):
        ...     return {f"layers.0.experts.{i}.up_proj.weight": torch.eye(4) for i in range(count)}
        >>> CheckpointPair(experts(2), experts(2)).between_problem() is None
        True
        >>> print(CheckpointPair(experts(3), experts(2)).between_problem())
        state dict and state dict: no model lies between the two, which differ in more than values (1...
        """
        return self._between

    @cached_property
    def _lost(self) -> list[str]:
        """Tensors without which base does not run, in parts of the model that tuned has too."""
        # Stored by both, but only a copy in tuned, whose head cannot be base's.
        copies = [
            {alias for matrix in side.matrices.values() for alias in matrix.tied} for side in self._sides
        ]
        tied = [n for n, other in self._tensors.items() if other in copies[1] and n not in copies[0]]
        if not tied and not self._missing:
            return []
        used = used_tensors(self.base)
        missing = [
            name
            for name in self._missing
            if (
                is_tied(self.tuned, self.base, name)
                if is_head(name, self.base)
                else self._has_neighbours(name)
            )
        ]
        return [name for name in (*tied, *missing) if name in used]

    def _has_neighbours(self, name: str) -> bool:
        """Whether the part of the model with this tensor, a stack of blocks or a module, is in both."""
        if block := re.search(families.BLOCK, name):
            stack = re.sub(r"\d+$", "", name[: block.end(1)])
            return any(other.startswith(stack) for other in self._tensors)
        # `model.norm.weight` is beside `model.layers`; a tower at `model.visual` is left out as a whole.
        parent = ".".join(name.split(".")[:-2])
        return any(other.startswith(f"{parent}." if parent else "") for other in self._tensors)

    @cached_property
    def _covered(self) -> Counter[str]:
        """How many entries of each tensor of tuned have a counterpart in base."""
        covered: Counter[str] = Counter()
        for name in self.matrices:
            matrix = self.counterpart(name)
            covered[matrix.tensor] += self.matrices[name].rows * matrix.columns
        for name, ours in self.tensors.items():
            header = self.tuned.headers[name]
            if self.base.headers[ours].shape == header.shape:
                covered[name] = header.entries
            elif (rows := self.common_rows(name)) is not None:
                covered[name] = header.entries // header.shape[0] * rows
        return covered

    @cached_property
    def compared(self) -> float:
        """Share of tuned's parameters that have a counterpart in base, in [0, 1]; tied ones count once.

        1 where both have the same tensors. Well below 1, the two are only partly one model: six of eight
        experts, another tokenizer's vocabulary, layers of another width.
        """
        covered = self._covered
        tied = {alias for matrix in self.tuned.matrices.values() for alias in matrix.tied}
        locations: dict[Any, Header] = {}
        for name, header in self.tuned.headers.items():
            if header.dtype.is_floating_point and name not in tied:
                locations.setdefault(self.tuned.source.location(name), header)
        total = sum(header.entries for header in locations.values())
        return sum(covered[header.name] for header in locations.values()) / total if total else 0.0

    @property
    def _sides(self) -> tuple[Checkpoint, Checkpoint]:
        return self.base, self.tuned

    def _aligned(self) -> dict[str, str]:
        """Tuned name of each base matrix that has a counterpart, by its tensor's name or its role."""
        names: dict[str, str] = {}
        for name, matrix in self.base.matrices.items():
            tensor = self._tensors.get(matrix.tensor)
            other = None if tensor is None else tensor + name.removeprefix(matrix.tensor)
            theirs = self.tuned.matrices.get(other) if other else None
            if other and theirs and self._fits(matrix, theirs):
                names[name] = other
        # One side may keep in one tensor what the other keeps apart: fused projections, stacked experts.
        # Blocks that share no name, not even that of a norm, only happen to have matrices of equal shape.
        if not any(self._alike(name) and re.search(r"\.\d+\.", name) for name in self._tensors):
            return names
        by_role: dict[Any, list[Matrix]] = {}
        taken = set(names.values())
        for matrix in self.tuned.matrices.values():
            if matrix.name not in taken:
                by_role.setdefault(_role(matrix), []).append(matrix)
        ours = [matrix for matrix in self.base.matrices.values() if matrix.name not in names]
        counts = Counter(_role(matrix) for matrix in ours)
        for matrix in ours:
            candidates = by_role.get(_role(matrix), [])
            if counts[_role(matrix)] == len(candidates) == 1 and _divided(matrix) != _divided(candidates[0]):
                names[matrix.name] = candidates[0].name
        return names

    def _alike(self, name: str) -> bool:
        return self.base.headers[name].shape == self.tuned.headers[self._tensors[name]].shape

    def _fits(self, ours: Matrix, theirs: Matrix) -> bool:
        """Whether two matrices have the same shape, up to the length of the vocabulary."""
        if ours.columns != theirs.columns:
            return False
        vocabulary = ours.component == theirs.component in ("embed", "lm_head")
        if vocabulary and ours.rows != theirs.rows:
            self.resized[ours.name] = (ours.rows, theirs.rows)
        return vocabulary or ours.rows == theirs.rows

    def _refuse_strangers(self) -> None:
        """Raise if no block matrix, or no matrix at all, is common."""
        sides = self._sides
        blocks = [[m for m in side.matrices.values() if m.part == "block"] for side in sides]
        if any(matrix.part == "block" or not all(blocks) for matrix in self.matrices.values()):
            return
        named = [
            f"{role} {side.ref} ({side.architecture})"
            for role, side in (("base", sides[0]), ("tuned", sides[1]))
        ]
        for side, label in zip(sides, named, strict=True):
            if not side.matrices:
                raise InputError(f"{label} holds no matrix, only {_some(list(side.headers.values()))}")
        for name, matrix in self.base.matrices.items():
            other = self._tensors.get(matrix.tensor, "") + name.removeprefix(matrix.tensor)
            if matrix in (blocks[0] or [matrix]) and other in self.tuned.matrices:
                theirs = self.tuned.matrices[other]
                shapes = f"base is {matrix.rows}x{matrix.columns}, tuned {theirs.rows}x{theirs.columns}"
                raise InputError(
                    f"{plain(name)}: {shapes}, and no other matrix fits either; {named[0]}, {named[1]}: are "
                    "these of one architecture?"
                )
        shown = [
            _some([side.headers[m.tensor] for m in some or side.matrices.values()])
            for side, some in zip(sides, blocks, strict=True)
        ]
        raise InputError(
            f"no matrix in common: {named[0]} has {shown[0]}, {named[1]} has {shown[1]}; are these of one "
            "architecture?"
        )

    def _other(self, name: str) -> str:
        if name not in self.matrices:
            raise UnknownNameError(f"{name!r} is not a matrix of both; {nearest(name, self.matrices)}")
        return self._names[name]

    def _head(self, role: Side, name: str) -> bytes:
        side = self.base if role == "base" else self.tuned
        return bytes(raw(side.tensor(name).reshape(-1)[:1024]))

    def _same_tensor(self, missing: str, extra: str) -> bool:
        return same_bytes(self.base.tensor(missing), self.tuned.tensor(extra))


@lru_cache(maxsize=4)
def _realigned(base: Checkpoint, tuned: Checkpoint) -> CheckpointPair:
    """The pair of two checkpoints that come from another process."""
    return CheckpointPair(base, tuned)


def _same_weights(first: Checkpoint | None, second: Checkpoint | None) -> bool:
    if first is None or second is None:
        return False
    if first.source is second.source:
        return True
    # The stamp of weights in memory is their hash: not worth taking where it cannot be equal.
    return type(first.source) is type(second.source) and first.source.stamp() == second.source.stamp()


def _alone(side: Checkpoint, aligned: set[str], names: set[str]) -> dict[str, Header]:
    """Tensors of a side without a counterpart; copies tied to a tensor that has one are left out."""
    matrices = [side.matrices[name] for name in names]
    covered = aligned.union(*((matrix.tensor, *matrix.tied) for matrix in matrices))
    embeds = [side.headers[matrix.tensor] for matrix in matrices if matrix.component == "embed"]

    def copied(header: Header) -> bool:
        """Whether an unembedding holds the bytes of an aligned embedding."""
        is_head = header.name in side.matrices and side.matrices[header.name].part == "head"
        likely = (e.name for e in embeds if is_head and (e.shape, e.dtype) == (header.shape, header.dtype))
        return any(same_bytes(side.tensor(header.name), side.tensor(name)) for name in likely)

    return {n: h for n, h in side.headers.items() if n not in covered and not copied(h)}


def _view(matrix: Matrix) -> Matrix:
    """How a matrix lies in its tensor, without the names of both."""
    return replace(matrix, name="", tensor="", layer=None, component="", part="other", tied=(), missing=())


def _size(header: Header) -> str:
    return "x".join(map(str, header.shape)) or "a scalar"


def _divided(matrix: Matrix) -> bool:
    return matrix.name != matrix.tensor


def _role(matrix: Matrix) -> tuple[Any, ...]:
    """The role of a matrix in its model, however it is named and stored."""
    unstacked = re.search(r"\bexperts\.(\d{1,9})\.", matrix.tensor)
    expert = int(unstacked[1]) if unstacked else matrix.expert
    return matrix.part, matrix.layer, matrix.component, expert, matrix.rows, matrix.columns


def _some(headers: list[Header]) -> str:
    first = headers[0]
    return f"{len(headers)} such as {plain(first.name)} ({_size(first)})"


def _order(matrix: Matrix) -> tuple[Any, ...]:
    """By layer, matrices outside the blocks first; the order in a file means nothing."""
    layer = -1 if matrix.layer is None else matrix.layer
    return layer, natural_key(matrix.tensor), matrix.expert or 0, matrix.start, matrix.name
