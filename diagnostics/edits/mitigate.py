"""Damping intruder dimensions: the tuned checkpoint with its intruders scaled down.

W(λ) = W1 + (λ − 1) s u vᵀ for a singular triple (u, s, v) of the tuned matrix W1: λ = 1 changes nothing, 0
removes the direction, above 1 amplifies it. Source: Shuttleworth et al., arXiv:2410.21228 v3: mode `top` is
its intervention, `neighbour` its control. `all` is PEFT's `reduce_intruder_dimension`. `update` is a control
that the paper's reviewers asked for; compare with it, since it may retain as much at the same cost.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from diagnostics.analyses.intruders.damping import Mode, applied, by_tensor, choose, damp
from diagnostics.edits.merge_check import check_merge
from diagnostics.edits.trail import write_trail
from diagnostics.evaluation.one_function import refuse_two_functions
from diagnostics.execution import jobs
from probes import CheckpointPair
from probes.adapters.adapter import Adapter
from probes.checkpoints.adapter_refit import Edit, Refit, refit, scaled, write_adapter
from probes.checkpoints.blend import between, write_blend
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.lineage import adapter_notes
from probes.checkpoints.save import refuse_occupied, write_checkpoint
from probes.errors import InputError
from probes.files.layout import Part

if TYPE_CHECKING:
    import pandas as pd

    from diagnostics.store.factor_cache import FactorCache

Progress = Callable[[int, int, str], None]
TRAIL = "tunescope_mitigation.json"
CONTROL = (
    "Scaling the whole update (mode `update`) may retain as much at the same cost; measure both on rows to "
    "keep before you choose."
)


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """One scaled singular triple of a tuned matrix.

    Attributes:
        cosine_low, cosine_high: bounds of its largest |cosine| with a base vector.
    """

    matrix: str
    layer: int | None
    component: str
    rank: int  # from 1, for the largest singular value
    singular_value: float  # before scaling
    cosine_low: float
    cosine_high: float


@dataclass(frozen=True, kw_only=True)
class Edited:
    """One changed matrix (in mode `update` one stored tensor)."""

    matrix: str
    layer: int | None
    component: str
    rank: int | None  # of the edit; None in mode `update`
    norm: float  # Frobenius norm of the edit
    update_norm: float  # Frobenius norm of tuned − base
    share: float = 1.0  # share of the edit's squared norm that the written files hold


@dataclass(frozen=True, kw_only=True)
class MitigatedCheckpoint:
    """A checkpoint that `mitigate` wrote.

    Attributes:
        triples, edits: the scaled triples, and the change of each matrix.
    """

    out: Path
    kind: Literal["full", "adapter"]
    mode: Mode
    scale: float
    k: int
    epsilon: float
    triples: tuple[Scaled, ...]
    edits: tuple[Edited, ...]
    notes: tuple[str, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole edit."""
        return math.sqrt(sum(edit.norm**2 for edit in self.edits))

    @property
    def relative(self) -> float:
        """The norm relative to the update of the changed matrices; 0 when nothing changed."""
        update = math.sqrt(sum(edit.update_norm**2 for edit in self.edits))
        return self.norm / update if update else 0.0

    @property
    def share(self) -> float:
        """Share of the edit's squared norm that the files hold; below 1 if an adapter's rank is too low."""
        total = sum(edit.norm**2 for edit in self.edits)
        return sum(edit.share * edit.norm**2 for edit in self.edits) / total if total else 1.0

    def tables(self) -> "dict[str, pd.DataFrame]":
        """`triples` and `edits` as tables."""
        import pandas as pd

        return {
            "triples": pd.DataFrame(map(asdict, self.triples), columns=list(Scaled.__dataclass_fields__)),
            "edits": pd.DataFrame(map(asdict, self.edits), columns=list(Edited.__dataclass_fields__)),
        }

    def describe(self) -> dict[str, Any]:
        """The attributes as plain values, as in the JSON file next to the weights."""
        numbers = {"norm": self.norm, "relative": self.relative, "share": self.share}
        return asdict(self) | {"out": str(self.out)} | numbers

    def summary(self) -> str:
        """A sentence or two for the terminal."""
        if not self.edits:
            among = f"the {self.k} leading vectors of any matrix"
            return f"Nothing was scaled: no intruder dimension among {among}."
        what = f"the whole update of {len(self.edits)} tensors"
        if self.mode != "update":
            kind = "base-like neighbour" if self.mode == "neighbour" else "intruder dimension"
            plural = "s" * (len(self.triples) > 1)
            matrices = "matrix" if len(self.edits) == 1 else "matrices"
            what = f"{len(self.triples)} {kind}{plural} in {len(self.edits)} {matrices}"
        size = f"{self.norm:.3g}, {self.relative:.1%} of the update"
        text = f"Scaled {what} by {self.scale:g}: an edit of norm {size}."
        if self.kind == "adapter":
            text += f" The adapter holds {self.share:.1%} of it"
            text += "; full weights would hold all." if self.share < 0.995 else "."
        return text


def mitigate(
    base: Any, tuned: Any, out: str | Path, *, scale: float = 0.7, mode: Mode = "top", k: int = 10,
    epsilon: float = 0.5, parts: tuple[Part, ...] = ("block",), full: bool | None = None, device: str = "cpu",
    cache: "FactorCache | str | Path | None" = None, progress: Progress | None = None,
) -> MitigatedCheckpoint:  # fmt: skip
    """Write the tuned checkpoint with its intruder dimensions scaled.

    A full checkpoint stays full, and its other tensors stay bit for bit the same. An adapter stays an adapter
    of the same ranks: exact in mode `update`, else the nearest one (`share` says how near).

    >>> from diagnostics.audit.demo import BUNDLED
    >>> damped = mitigate(BUNDLED / "base", BUNDLED / "lora-r8", "damped", scale=0.7)
    >>> len(damped.triples), round(damped.share, 2)
    (15, 0.91)

    Args:
        base, tuned: what `CheckpointPair` takes.
        out: a directory that is new or empty.
        scale: λ: 0 removes, 1 changes nothing (paper: 0.1 to 0.9, and 0.7 to 0.9 first).
        mode: `top`, the highest-ranked intruder of each matrix (paper); `all`, every intruder; `neighbour`,
            in the same matrices the nearest leading vector that is no intruder (a control); `update`, base +
            λ (tuned − base) of every tensor (the other control).
        k, epsilon, parts: what counts as an intruder, and where, as in `intruder_dimensions`.
        full: write full weights even for an adapter.
        device: where the arithmetic runs.
        cache: as of `intruder_dimensions`.
        progress: called with (done, total, name), for the search and then for the writing.

    Raises:
        NotApplicableError: mode `update`, and configurations that give two functions.
        InputError: a parameter out of range; checkpoints that cannot be opened or are not related; an adapter
            that cannot hold the edit; `out` is occupied or cannot be written.
    """
    _check(mode, scale)
    out = Path(out).expanduser()
    refuse_occupied(out)
    pair = CheckpointPair(base, tuned)
    if full is False and pair.tuned.kind == "full":
        raise InputError(f"{pair.tuned.ref}: holds full weights, which cannot be written as an adapter")
    full = pair.tuned.kind == "full" or bool(full)
    if mode == "update":
        refuse_two_functions(pair, instead="modes top and all edit tuned alone, under its own config.json")
        triples, edits, notes = _scale_update(pair, out, scale, full, progress)
    else:
        triples, edits, notes = _scale_triples(
            pair, out, scale, mode, full, device, progress, k=k, epsilon=epsilon, parts=parts, cache=cache
        )
    notes = [*notes, *adapter_notes(pair.base, pair.tuned)]
    result = MitigatedCheckpoint(
        out=out, kind="full" if full else "adapter", mode=mode, scale=scale, k=k, epsilon=epsilon,
        triples=tuple(triples), edits=tuple(edits), notes=tuple(notes),
    )  # fmt: skip
    factor = scale if mode == "update" else 1.0
    edited = () if mode == "update" else {edit.matrix for edit in edits}
    merge = check_merge(pair, out, factor, edited=edited)
    write_trail(out / TRAIL, pair, result.describe(), merge=merge)
    return result


def _check(mode: str, scale: float) -> None:
    if mode not in get_args(Mode):
        raise InputError(f"mode is {mode!r}; it is one of: {', '.join(get_args(Mode))}")
    if not 0 <= scale < math.inf:
        raise InputError(f"scale is {scale}; 0 removes, 1 changes nothing, above 1 amplifies")


Written = tuple[list[Scaled], list[Edited], list[str]]


def _scale_triples(
    pair: CheckpointPair, out: Path, scale: float, mode: Mode, full: bool, device: str,
    progress: Progress | None, **search: Any,
) -> Written:  # fmt: skip
    """Find the intruders, damp those that the mode chooses, and write the result."""
    from diagnostics.analyses.intruders.analysis import intruder_dimensions

    intruders = intruder_dimensions(pair, device=device, progress=progress, **search)
    if not intruders.metrics.get("descendant", 1):
        raise InputError(
            f"{pair.tuned.ref}: does not descend from {pair.base.ref}, so nothing in it is an intruder; "
            "give the base that it was trained from"
        )
    chosen = choose(intruders.tables["vectors"], mode)
    calls = (partial(_edit, pair, name, ranks, scale, device) for name, ranks in chosen.items())
    damped = dict(zip(chosen, jobs.run_jobs(calls, device=device), strict=True))
    edits = [edit for edit, _ in damped.values()] if scale != 1 else []
    refitted = Refit()
    if full:
        tensors = by_tensor(edits)

        def change(name: str, stored: Tensor) -> Tensor:
            return applied(pair.tuned, name, stored, tensors.get(name, ()))

        write_checkpoint(pair.tuned, out, change, progress=progress)
    else:
        adapter = pair.tuned.source
        assert isinstance(adapter, Adapter)
        refitted = refit(adapter, edits)
        write_adapter(pair.tuned, out, refitted.tensors)
    cosines = intruders.tables["vectors"].set_index(["matrix", "rank"])[["cosine_low", "cosine_high"]]
    nearest: dict[Any, Any] = cosines.to_dict("index")
    # Where no matrix of these parts was changed, none was measured.
    measured = intruders.tables["matrices"].set_index("matrix")
    norms: Any = measured["update_norm"] if damped else {}
    triples, edited = [], []
    for name, (edit, values) in damped.items():
        matrix = pair.matrices[name]
        where: dict[str, Any] = {"matrix": matrix.name, "layer": matrix.layer, "component": matrix.component}
        for rank, value in zip(chosen[name], values, strict=True):
            triples.append(Scaled(**where, rank=rank, singular_value=value, **nearest[name, rank]))
        size: dict[str, Any] = {"norm": edit.norm, "update_norm": float(norms[name])}
        share = refitted.share.get(edit.matrix.name, 1.0)
        edited.append(Edited(**where, **size, rank=len(values), share=share))
    return triples, edited, [*intruders.notes, CONTROL]


def _edit(
    pair: CheckpointPair, name: str, ranks: list[int], scale: float, device: str
) -> tuple[Edit, list[float]]:
    left, right, values = damp(pair.read(name)[1].to(device), ranks, scale)
    return Edit(pair.counterpart(name), left.cpu(), right.cpu()), values.tolist()


def _scale_update(
    pair: CheckpointPair, out: Path, scale: float, full: bool, progress: Progress | None
) -> Written:
    """base + λ (tuned − base) for every tensor."""
    base, tuned = pair.base, pair.tuned
    if full:
        blend = write_blend(pair, out, scale, progress=progress)
        notes = [f"{len(blend.alone)} tensors that the base lacks stay as they are"] if blend.alone else []
        return [], _updated(tuned, blend.squares, scale), notes
    adapter = tuned.source
    assert isinstance(adapter, Adapter)
    assert tuned.base is not None
    if tuned.base is not base and tuned.base.fingerprint() != base.fingerprint():
        raise InputError(
            f"{tuned.ref}: is an adapter of {tuned.base.ref}; scaled, it moves toward that base, not "
            f"toward {base.ref}; write full weights instead (full=True)"
        )
    rescaled = scaled(adapter, scale) if scale != 1 else Refit()
    write_adapter(tuned, out, rescaled.tensors)
    squares = {}
    for name, header in base.headers.items():
        if adapter.changes(name) and adapter.headers[name].shape == header.shape:
            dtypes = header.dtype, adapter.headers[name].dtype
            squares[name] = between(base.tensor(name), tuned.tensor(name), 1.0, dtypes)[1]
    return [], _updated(tuned, squares, scale), rescaled.notes


def _updated(tuned: Checkpoint, squares: Mapping[str, float], scale: float) -> list[Edited]:
    """A row for each tensor with a scaled update."""
    matrices = {matrix.tensor: matrix for matrix in tuned.matrices.values()}
    rows = []
    for name, square in squares.items():
        layer, component = None, name.removesuffix(".weight").rpartition(".")[2]
        if name in matrices:
            layer, component = matrices[name].layer, matrices[name].component
        size: dict[str, Any] = {"norm": abs(1 - scale) * math.sqrt(square), "update_norm": math.sqrt(square)}
        rows.append(Edited(matrix=name, layer=layer, component=component, rank=None, **size))
    return rows
