"""Edits of a tuned model in its adapter: the truncated SVD is the nearest of a rank (Eckart & Young 1936)."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from probes.adapters.adapter import Adapter, expert_columns, expert_rows, rows_of_part
from probes.adapters.parts import AdapterUpdate
from probes.checkpoints.blend import between
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.save import atomic_directory, carry_file, companion_files
from probes.errors import InputError
from probes.files.layout import Matrix

WRITE_FULL = "write full weights instead (full=True)"


@dataclass(frozen=True)
class Edit:
    """A change of one matrix, or of its first rows in a resized vocabulary: `left @ right`, both float64."""

    matrix: Matrix
    left: Float[Tensor, "out count"]
    right: Float[Tensor, "count in"]

    @property
    def norm(self) -> float:
        """Frobenius norm, without the product."""
        return float(((self.left.mT @ self.left) * (self.right @ self.right.mT)).sum().clamp(min=0).sqrt())

    def apply(self, stored: Tensor) -> Tensor:
        """The stored tensor with this change: computed in float64, rounded once to the tensor's dtype."""
        value = self.matrix.take(stored).to(torch.float64, copy=True)
        value[: len(self.left)] += self.left @ self.right
        return self.matrix.put(stored, value)


@dataclass(frozen=True)
class Refit:
    """An edited adapter: new values of some of its own tensors, by name.

    `share` is by matrix, of the edit's squared norm that the adapter holds after rounding to its dtype;
    matrices that share factors share this number.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def refit(adapter: Adapter, edits: Iterable[Edit]) -> Refit:
    """The adapter of the same ranks nearest to the model with these edits.

    Raises:
        InputError: an edit of a matrix that this adapter cannot change.
    """
    done = Refit()
    groups: dict[tuple[str, int | None], list[tuple[AdapterUpdate, Edit]]] = defaultdict(list)
    for edit in edits:
        matrix = edit.matrix
        update = next(iter(adapter.updates(matrix)), None)
        chosen = matrix if update is None else update.part or matrix
        if matrix.tensor in adapter.targets.tokens or chosen.experts is not None:
            update = None
        if update is not None:
            groups[update.A, chosen.expert if update.experts else None].append((update, edit))
        elif matrix.tensor in adapter.targets.replaced:
            key = adapter.targets.replaced[matrix.tensor]
            done.tensors[key] = edit.apply(done.tensors.get(key, adapter.weights.read(key)))
            done.share[matrix.name] = 1.0
        else:
            problem = "the adapter cannot hold a change of this matrix"
            raise InputError(f"{matrix.name}: {problem}; {WRITE_FULL}")
    for (_, expert), group in groups.items():
        share = _truncate(adapter, group, expert, done.tensors)
        done.share.update((edit.matrix.name, share) for _, edit in group)
    return done


def _truncate(
    adapter: Adapter, group: list[tuple[AdapterUpdate, Edit]], expert: int | None, tensors: dict[str, Tensor]
) -> float:
    """Write the factors nearest to delta + edits to `tensors`; the share of the edits that they hold."""
    update = group[0][0]
    dora = _Dora.of(adapter, update)
    low = adapter.factors(update, expert)
    B, A = dora.times(low.B.double() * low.scaling, low.A.double())
    left, right = _placed(group, len(B))
    B_new, A_new = _nearest(torch.cat([B, left], dim=1), torch.cat([A, right]), low.rank)
    if update.magnitude is not None:
        tensors[update.magnitude] = dora.lengths(B_new @ A_new, adapter.weights.read(update.magnitude))
    # Half of the scaling goes to either factor, as PEFT shares the singular values.
    root = abs(low.scaling) ** 0.5
    B_new, A_new = dora.over(B_new / (root if low.scaling > 0 else -root), A_new / root)
    B_kept, A_kept = dora.times(*_store(adapter, update, expert, B_new, A_new, tensors))
    missed = _norm(torch.cat([B, left, -low.scaling * B_kept], dim=1), torch.cat([A, right, A_kept]))
    return 1 - (missed / _norm(left, right)) ** 2


def _placed(group: list[tuple[AdapterUpdate, Edit]], rows: int) -> tuple[Tensor, Tensor]:
    """The edits of all parts of one matrix as one product."""
    lefts = []
    row_indices = torch.arange(rows)[:, None]
    for update, edit in group:
        left = torch.zeros(rows, edit.left.shape[1], dtype=edit.left.dtype)
        left[rows_of_part(update.part or edit.matrix, row_indices).flatten()[: len(edit.left)]] = edit.left
        lefts.append(left)
    return torch.cat(lefts, dim=1), torch.cat([edit.right for _, edit in group])


def _nearest(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of rank `rank` nearest to `left @ right`, its singular values shared by both factors."""
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.mT)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.mT)
    kept = min(rank, len(S))
    B, A = left.new_zeros(len(left), rank), right.new_zeros(rank, right.shape[1])
    B[:, :kept] = Q_left @ U[:, :kept] * S[:kept].sqrt()
    A[:kept] = S[:kept, None].sqrt() * (Vh[:kept] @ Q_right.mT)
    return B, A


def _norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of a product of two factors, which may nearly cancel."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT))


def _store(
    adapter: Adapter,
    update: AdapterUpdate,
    expert: int | None,
    B: Tensor,
    A: Tensor,
    tensors: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Store factors in the adapter's layout; returns them as rounded by its dtype, in float64."""
    exchanged = update.embedding or update.exchanged
    if exchanged:
        B, A = A.mT, B.mT
    kept = []
    for key, value in ((update.B, B), (update.A, A)):
        view = tensors[key] = tensors.get(key, adapter.weights.read(key)).clone()
        if expert is not None:
            view = (expert_columns if key == update.B else expert_rows)(view, update, expert)
        view.copy_(value.reshape(view.shape))
        kept.append(view.flatten(1).double())
    return (kept[1].mT, kept[0].mT) if exchanged else (kept[0], kept[1])


@dataclass(frozen=True)
class _Dora:
    """The gain that DoRA applies to the rows of base + delta; to the columns of an embedding. None in LoRA.

    The tuned matrix is gain · base + gain · delta, so that an edit of it is an edit of gain · delta.
    """

    gain: Tensor | None
    base: Tensor | None
    embedding: bool

    @classmethod
    def of(cls, adapter: Adapter, update: AdapterUpdate) -> "_Dora":
        """The gain of one update; raises InputError if it is not positive, for no factors could follow it."""
        if update.magnitude is None:
            return cls(None, None, update.embedding)
        if update.tensor in adapter.targets.replaced and not adapter.carried(update.tensor):
            problem = "this DoRA stands on a weight that was trained too"
            raise InputError(f"{update.module}: {problem}; {WRITE_FULL}")
        matrix = update.matrix or adapter.undivided(update)[0]
        base = matrix.take(adapter.stored(update.tensor)).double()
        low = adapter.factors(update)
        tuned = base + low.scaling * (low.B.double() @ low.A.double())
        sizes = torch.linalg.vector_norm(tuned, dim=0 if update.embedding else 1)
        gain = adapter.weights.read(update.magnitude).double().flatten() / sizes
        if not bool(((gain > 0) & gain.isfinite()).all()):
            problem = "this DoRA turns or removes rows of its base, which no factors can follow"
            raise InputError(f"{update.module}: {problem}; {WRITE_FULL}")
        return cls(gain, base, update.embedding)

    def times(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of gain · delta."""
        if self.gain is None:
            return B, A
        return (B, A * self.gain) if self.embedding else (B * self.gain[:, None], A)

    def over(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the delta, from factors of gain · delta."""
        if self.gain is None:
            return B, A
        return (B, A / self.gain) if self.embedding else (B / self.gain[:, None], A)

    def lengths(self, delta: Tensor, like: Tensor) -> Tensor:
        """The row lengths for which the tuned matrix is gain · base + `delta`."""
        assert self.gain is not None
        assert self.base is not None
        tuned = self.base * (self.gain if self.embedding else self.gain[:, None]) + delta
        sizes = torch.linalg.vector_norm(tuned, dim=0 if self.embedding else 1)
        return sizes.reshape(like.shape).to(like.dtype)


def scaled(adapter: Adapter, scale: float) -> Refit:
    """The adapter with its delta scaled: exactly base + scale · (tuned − base).

    Raises:
        InputError: a DoRA for which no such adapter exists.
    """
    done = Refit()
    weights, targets = adapter.weights, adapter.targets
    updates = {update.B: update for updates in targets.updates.values() for update in updates}
    for update in updates.values():
        if update.magnitude is None:
            done.tensors[update.B] = _times(weights.read(update.B), scale)
        else:
            _scale_dora(adapter, update, scale, done.tensors)
    for name, key in targets.replaced.items():
        original = adapter.original(name)
        base, replacement = adapter.base.headers.get(original), weights.read(key)
        if base is None or base.shape != replacement.shape:
            done.notes.append(f"{name} is not in the base in this shape and stays as it was trained")
        else:
            done.tensors[key], _ = between(adapter.base.read(original), replacement, scale)
    for name, (key, rows) in targets.tokens.items():
        stored = adapter.base.read(adapter.original(name))
        done.tensors[key], _ = between(stored[rows], weights.read(key), scale)
    for key, _ in targets.shifts.values():
        done.tensors[key] = _times(weights.read(key), scale)
    return done


def _scale_dora(adapter: Adapter, update: AdapterUpdate, scale: float, tensors: dict[str, Tensor]) -> None:
    """base + scale · (gain · (base + delta) − base) is a DoRA with the gain 1 − scale + scale · gain."""
    dora, key = _Dora.of(adapter, update), update.magnitude
    assert dora.gain is not None
    assert key is not None
    gain = 1 - scale + scale * dora.gain
    if not bool((gain > 0).all()):
        problem = f"scaled by {scale:g} this DoRA would turn rows of its base"
        raise InputError(f"{update.module}: {problem}; {WRITE_FULL}")
    low = adapter.factors(update)
    new = _Dora(gain, dora.base, update.embedding)
    B, A = dora.times(low.B.double() * scale, low.A.double())
    tensors[key] = new.lengths(low.scaling * (B @ A), adapter.weights.read(key))
    _store(adapter, update, None, *new.over(B, A), tensors)


def _times(value: Tensor, scale: float) -> Tensor:
    return (value.double() * scale).to(value.dtype)


def write_adapter(source: Checkpoint, out: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write an adapter with new values of some tensors; `out` appears complete or not at all.

    Raises:
        InputError: `out` is a file, is not empty or cannot be written.
    """
    adapter = source.source
    assert isinstance(adapter, Adapter)
    weights = adapter.weights
    content = {key: tensors.get(key, weights.read(key)).contiguous() for key in weights.headers}
    for key, mirrored in adapter.targets.mirrors.items():
        value = content[mirrored]
        content[key] = (value if value.shape == content[key].shape else value.mT).contiguous().clone()
    size = sum(header.bytes for header in weights.headers.values())
    with atomic_directory(Path(out).expanduser(), size) as directory:
        save_file(content, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        if source.directory is not None:
            for name in ("adapter_config.json", *companion_files(source.directory)):
                carry_file(source.directory, name, directory)
        else:
            text = json.dumps(adapter.config, indent=2, sort_keys=True)
            (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return Path(out)
