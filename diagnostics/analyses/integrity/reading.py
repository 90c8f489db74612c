"""One pass over both checkpoints: each tensor is read once, and all that is measured is measured then."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diagnostics.analyses.integrity.health import Health, chunks, health, overflowing
from diagnostics.analyses.integrity.merge import MergeFit, fit_merge
from diagnostics.analyses.integrity.quantised import scheme
from diagnostics.analyses.integrity.rounding import changed_entries
from probes import CheckpointPair
from probes.adapters.adapter import Adapter
from probes.checkpoints.checkpoint import Checkpoint
from probes.files.layout import Matrix
from probes.naming.align import align

# Of an adapter's merge in float32: a delta that is no product of factors is a difference, which rounds.
MERGED_EPS = 4 * torch.finfo(torch.float32).eps


@dataclass(kw_only=True)
class TensorHealth:
    """The health of one stored tensor of one side."""

    side: str
    tensor: str
    matrix: Matrix | None
    dtype: str
    health: Health
    overflow: int = 0  # finite entries that are infinite in the dtype that config.json names
    dead: int = 0  # outputs whose weights are all zero


@dataclass(kw_only=True)
class Compared:
    """One stored tensor of tuned, compared with base entry by entry."""

    tensor: str  # as base names it, or tuned where base lacks it
    matrix: Matrix | None
    part: str
    entries: int
    compared: int
    changed: int


@dataclass(kw_only=True)
class Merged:
    """How an adapter's delta of one matrix was added; `fit` is None where the adapter leaves it alone."""

    name: str
    matrix: Matrix | None
    fit: MergeFit | None
    changed: int = 0
    scheme: str = ""


@dataclass(kw_only=True)
class Measured:
    """All that one pass over a pair gives."""

    healths: list[TensorHealth] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    merges: list[Merged] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # tensors that the adapter changes and tuned lacks


class PairReader:
    """Reads the tensors of a pair, one at a time."""

    def __init__(self, pair: CheckpointPair, adapter: Checkpoint | None):
        self.pair, self.adapter = pair, adapter
        self.measured = Measured()
        ours = align(pair.base.headers, pair.tuned.headers)[0]
        self._ours = {theirs: name for name, theirs in ours.items()}
        self._split: dict[str, list[str]] = {}
        for name in pair.matrices:
            self._split.setdefault(pair.counterpart(name).tensor, []).append(name)
        self._of_tensor = [_by_tensor(side) for side in (pair.base, pair.tuned)]
        self._read: set[str] = set()  # tensors of base
        self._last: tuple[str, Tensor] | None = None  # of base: parts of one tensor follow each other

    def run(self, progress: Callable[[int, int, str], None] | None = None) -> Measured:
        """Read everything once."""
        pair = self.pair
        names = list(_unique(pair.tuned))
        total = len(names) + len(pair.base.headers)
        for done, name in enumerate(names):
            if progress:
                progress(done, total, name)
            self._tensor(name)
        for name in _unique(pair.base):
            self._base(name)  # those that tuned lacks
        if progress:
            progress(total, total, "")
        if self.adapter is not None and isinstance(self.adapter.source, Adapter):
            aligned = set(self._ours.values()) | {pair.base.matrices[name].tensor for name in pair.matrices}
            changed = filter(self.adapter.source.changes, self.adapter.headers)
            self.measured.unread += [name for name in changed if name not in aligned]
        return self.measured

    def _tensor(self, name: str) -> None:
        """One stored tensor of tuned with its counterpart."""
        pair = self.pair
        header = pair.tuned.headers[name]
        matrix = _only(self._of_tensor[1].get(name, ()))
        ours = self._ours.get(name)
        whole = ours is not None and pair.base.headers[ours].shape == header.shape
        part = matrix.part if matrix else "other"
        row = Compared(
            tensor=ours if whole and ours else name, matrix=matrix, part=part, entries=header.entries,
            compared=0, changed=0,
        )  # fmt: skip
        self.measured.compared.append(row)
        if whole and ours and pair.tuned.source.location(name) == pair.base.source.location(ours):
            base = self._base(ours)  # the very same bytes, such as those that an adapter leaves alone
            row.compared = header.entries
            self._merge(ours, base, base, row)
            return
        tuned = pair.tuned.tensor(name)
        self._health("tuned", pair.tuned, name, tuned)
        if whole and ours:
            base = self._base(ours)
            row.compared = header.entries
            row.changed = self._changed(name, base, tuned)
            self._merge(ours, base, tuned, row)
            return
        for other in self._split.get(name, ()):  # stored differently, or a resized vocabulary
            ours_matrix, theirs = pair.matrices[other], pair.counterpart(other)
            base = ours_matrix.take(self._base(pair.base.matrices[other].tensor))[: ours_matrix.rows]
            part_of_tuned = theirs.take(tuned)[: ours_matrix.rows]
            row.compared += part_of_tuned.numel()
            changed = changed_entries(base, part_of_tuned)
            row.changed += changed
            self._merge_matrix(pair.base.matrices[other], base, part_of_tuned, changed)

    def _base(self, name: str) -> Tensor:
        """A tensor of base; its health is measured when it is first read."""
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        values = self.pair.base.tensor(name)
        self._last = (name, values)
        if name not in self._read:
            self._read.add(name)
            self._health("base", self.pair.base, name, values)
        return values

    def _health(self, side: str, checkpoint: Checkpoint, name: str, values: Tensor) -> None:
        if not values.is_floating_point() or values.dtype.itemsize == 1:
            return
        values = values.contiguous()
        state = sum((health(part) for part in chunks(values)), Health())
        matrices = self._of_tensor[side == "tuned"].get(name, ())
        dtype = implied_dtype(checkpoint)
        self.measured.healths.append(
            TensorHealth(
                side=side, tensor=name, matrix=_only(matrices), health=state,
                dtype=str(checkpoint.headers[name].dtype).removeprefix("torch."),
                overflow=overflowing(values, state.largest, dtype) if dtype else 0,
                dead=sum(_dead(matrix.take(values)) for matrix in matrices) if state.zero else 0,
            )
        )  # fmt: skip

    def _changed(self, name: str, base: Tensor, tuned: Tensor) -> int:
        """Entries of a stored tensor that differ by more than rounding."""
        source = self.pair.tuned.source
        if isinstance(source, Adapter) and source.changes(name):
            # Never stored: it is exact but for the arithmetic of the merge.
            base, tuned = base.float(), tuned.float()
            return int(((tuned - base).abs() > MERGED_EPS * base.abs()).sum())
        if base.is_contiguous() and tuned.is_contiguous():
            return sum(map(changed_entries, chunks(base), chunks(tuned)))
        return changed_entries(base, tuned)

    # --- the merge check ---

    def _merge(self, name: str, base: Tensor, tuned: Tensor, row: Compared) -> None:
        """The merge of a stored tensor of base, matrix by matrix."""
        if self.adapter is None:
            return
        if matrices := self._of_tensor[0].get(name):
            for matrix in matrices:
                ours, theirs = matrix.take(base), matrix.take(tuned)
                changed = row.changed if len(matrices) == 1 else changed_entries(ours, theirs)
                self._merge_matrix(matrix, ours, theirs, changed)
            return
        source = self.adapter.source
        fit = None
        if isinstance(source, Adapter) and source.changes(name):
            shape = (1, -1)  # norms and biases
            delta = self.adapter.tensor(name).float() - base.float()
            fit = fit_merge(base.reshape(shape), tuned.reshape(shape), delta.reshape(shape))
        if fit is not None or row.changed:
            self.measured.merges.append(Merged(name=name, matrix=None, fit=fit, changed=row.changed))

    def _merge_matrix(self, matrix: Matrix, base: Tensor, tuned: Tensor, changed: int) -> None:
        adapter = self.adapter
        if adapter is None:
            return
        if not adapter.touched(matrix.name):
            if changed:
                levels = scheme(tuned, torch.zeros(()).expand(tuned.shape))
                row = Merged(name=matrix.name, matrix=matrix, fit=None, changed=changed, scheme=levels)
                self.measured.merges.append(row)
            return
        low = adapter.delta(matrix.name)
        delta = adapter.matrix(matrix.name).float() if low is None else low.dense()
        delta = delta[: len(base)] - (base.float() if low is None else 0)
        fit = fit_merge(base, tuned, delta)
        self.measured.merges.append(Merged(name=matrix.name, matrix=matrix, fit=fit, changed=changed))


def implied_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype that transformers loads a checkpoint in: the one of its config; None without one."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype: Any = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _unique(checkpoint: Checkpoint) -> Iterator[str]:
    """The names of the tensors, tied copies once."""
    seen = set()
    for name in checkpoint.headers:
        location = checkpoint.source.location(name)
        if location not in seen:
            seen.add(location)
            yield name


def _by_tensor(checkpoint: Checkpoint) -> dict[str, list[Matrix]]:
    """The matrices of each stored tensor."""
    matrices: dict[str, list[Matrix]] = {}
    for matrix in checkpoint.matrices.values():
        matrices.setdefault(matrix.tensor, []).append(matrix)
    return matrices


def _only(matrices: "list[Matrix] | tuple[()]") -> Matrix | None:
    """Where a stored tensor lies; of several matrices the first stands for all."""
    return matrices[0] if matrices else None


def _dead(matrix: Tensor) -> int:
    """Outputs whose weights are all zero."""
    return int((matrix.abs().amax(dim=1) == 0).sum()) if matrix.numel() else 0
