"""One pass over both checkpoints: each tensor is read once, and all that is measured is measured then."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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

SAMPLE = 2**20  # entries of a matrix that tell its factor to four digits
RECENT = 3  # tensors of base that are kept, mapped from their files
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
        self._split: dict[str, list[str]] = {}
        for name in pair.matrices:
            self._split.setdefault(pair.counterpart(name).tensor, []).append(name)
        self._of_tensor = [_by_tensor(side) for side in (pair.base, pair.tuned)]
        self._read: set[str] = set()  # tensors of base
        self._recent: dict[str, Tensor] = {}  # of base: parts of one tensor follow each other

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
            if name not in self._read:  # tuned lacks it
                self._base(name)
        if progress:
            progress(total, total, "")
        if self.adapter is not None and isinstance(self.adapter.source, Adapter):
            aligned = set(pair.tensors.values()) | {pair.base.matrices[name].tensor for name in pair.matrices}
            changed = filter(self.adapter.source.changes, self.adapter.headers)
            self.measured.unread += [name for name in changed if name not in aligned]
        return self.measured

    def _tensor(self, name: str) -> None:
        """One stored tensor of tuned with its counterpart."""
        pair, header = self.pair, self.pair.tuned.headers[name]
        ours, matrix = pair.tensors.get(name), _first(self._of_tensor[1].get(name, ()))
        rows = pair.common_rows(name)
        if ours is not None and pair.base.headers[ours].shape == header.shape:
            rows = None  # all
        elif rows is None:
            ours = None
        row = Compared(
            tensor=ours or name, matrix=matrix, part=matrix.part if matrix else "other",
            entries=header.entries, compared=0, changed=0,
        )  # fmt: skip
        self.measured.compared.append(row)
        if ours and pair.tuned.source.location(name) == pair.base.source.location(ours):
            tuned = self._base(ours)  # the very same bytes, such as those that an adapter leaves alone
        else:
            tuned = pair.tuned.tensor(name)
            self._health("tuned", pair.tuned, name, tuned)
        if ours:
            base, part = self._base(ours), tuned
            if rows is not None:
                base, part = base[:rows], tuned[:rows]
            row.compared = base.numel()
            row.changed = 0 if part is base else self._changed(name, base, part)
            self._merge(ours, base, part, row.changed)
            return
        for other in self._split.get(name, ()):  # stored differently
            of_base, of_tuned = pair.base.matrices[other], pair.counterpart(other)
            count = pair.matrices[other].rows
            base = of_base.take(self._base(of_base.tensor))[:count]
            part = of_tuned.take(tuned)[:count]
            changed = self._changed(name, base, part)
            row.compared += part.numel()
            row.changed += changed
            self._merge_matrix(of_base, base, part, changed)

    def _base(self, name: str) -> Tensor:
        """A tensor of base; its health is measured when it is first read."""
        if name not in self._recent:
            if len(self._recent) == RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[name] = values = self.pair.base.tensor(name)
            if name not in self._read:
                self._read.add(name)
                self._health("base", self.pair.base, name, values)
        return self._recent[name]

    def _health(self, side: str, checkpoint: Checkpoint, name: str, values: Tensor) -> None:
        if not values.is_floating_point() or values.dtype.itemsize == 1:
            return
        values = values.contiguous()
        state = sum((health(part) for part in chunks(values)), Health())
        matrices = self._of_tensor[side == "tuned"].get(name, ())
        dtype = implied_dtype(checkpoint)
        self.measured.healths.append(
            TensorHealth(
                side=side, tensor=name, matrix=_first(matrices), health=state,
                dtype=str(checkpoint.headers[name].dtype).removeprefix("torch."),
                overflow=overflowing(values, state.largest, dtype) if dtype else 0,
                dead=sum(_dead(matrix.take(values)) for matrix in matrices) if state.zero else 0,
            )
        )  # fmt: skip

    def _changed(self, name: str, base: Tensor, tuned: Tensor) -> int:
        """Entries of a stored tensor of tuned, or of a part, that differ by more than rounding."""
        source = self.pair.tuned.source
        if isinstance(source, Adapter) and source.changes(name):
            # Never stored: it is exact but for the arithmetic of the merge.
            base, tuned = base.float(), tuned.float()
            return int(((tuned - base).abs() > MERGED_EPS * base.abs()).sum())
        return changed_entries(base, tuned)

    # --- the merge check ---

    def _merge(self, name: str, base: Tensor, tuned: Tensor, changed: int) -> None:
        """The merge of a stored tensor of base, or of its first rows, matrix by matrix."""
        if self.adapter is None:
            return
        matrices = self._of_tensor[0].get(name, ())
        if len(matrices) == 1 and not matrices[0].transposed and base.ndim == 2:
            self._merge_matrix(matrices[0], base, tuned, changed)
            return
        for matrix in matrices:
            ours, theirs = matrix.take(base), matrix.take(tuned)
            self._merge_matrix(matrix, ours, theirs, changed and changed_entries(ours, theirs))
        if matrices:
            return
        source, fit = self.adapter.source, None
        if isinstance(source, Adapter) and source.changes(name):  # norms and biases
            delta = self.adapter.tensor(name).float() - base.float()
            fit = fit_merge(*(values.reshape(1, -1) for values in (base, tuned, delta)))
        if fit is not None or changed:
            self.measured.merges.append(Merged(name=name, matrix=None, fit=fit, changed=changed))

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
        rows = sampled(matrix)
        fit = fit_merge(base[rows], tuned[rows], delta_of(adapter, matrix.name, base, rows))
        self.measured.merges.append(Merged(name=matrix.name, matrix=matrix, fit=fit, changed=changed))


def sampled(matrix: Matrix) -> slice:
    """The rows on which the merge of a matrix is judged: of a large one every n-th."""
    return slice(None, None, max(1, matrix.rows * matrix.columns // SAMPLE))


def delta_of(adapter: Checkpoint, name: str, base: Tensor, rows: slice) -> Tensor:
    """Rows of what an adapter adds to a matrix of its base."""
    low = adapter.delta(name)
    if low is not None:
        return replace(low, B=low.B[: len(base)][rows]).dense()
    # No product of factors: DoRA, or a matrix that was trained as a whole.
    return adapter.matrix(name)[: len(base)][rows].float() - base[rows].float()


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


def _first(matrices: Sequence[Matrix]) -> Matrix | None:
    """Where a stored tensor lies; of several matrices the first stands for all."""
    return matrices[0] if matrices else None


def _dead(matrix: Tensor) -> int:
    """Outputs whose weights are all zero."""
    return int((matrix.abs().amax(dim=1) == 0).sum()) if matrix.numel() else 0
