"""The checkpoints of one run, each against the first and against the one before it.

What sequential fine-tuning adds must be counted against the original base: against the previous checkpoint
alone it looks small at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diagnostics.analysis import Result
from diagnostics.audit import Progress, audit
from diagnostics.disk import replacing, to_json
from diagnostics.policy import Verdict
from diagnostics.provenance import one_line
from diagnostics.store import Audit


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint of a series: its audits against the first checkpoint and against the previous one."""

    ref: str
    label: str
    first: Audit
    previous: Audit

    @property
    def verdict(self) -> Verdict:
        """The severer of the two verdicts."""
        return max(self.first.verdict, self.previous.verdict, key=("pass", "warn", "fail").index)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Every checkpoint after the first, in order.

    Attributes:
        sparse: how sparse every checkpoint is, and where that jumps: `diagnostics.sparsification`.
    """

    base: str
    rows: tuple[Row, ...]
    sparse: Result | None = None

    @property
    def measures(self) -> list[str]:
        """The first metric of each analysis, as `analysis.metric`."""
        found: dict[str, None] = {}
        for row in self.rows:
            for name, result in row.first.results.items():
                found |= {f"{name}.{metric}": None for metric in list(result.metrics)[:1]}
        return list(found)

    @property
    def audits(self) -> list[Audit]:
        """Every audit once, in order."""
        pairs = [
            (row.first,) if row.first is row.previous else (row.first, row.previous) for row in self.rows
        ]
        return [made for pair in pairs for made in pair]

    @property
    def exit_code(self) -> int:
        """The worst of the audits."""
        return max(made.exit_code for made in self.audits)

    def record(self) -> dict[str, Any]:
        """The contents of series.json."""
        return {
            "schema": 1,
            "base": self.base,
            "checkpoints": [
                {
                    "ref": row.ref,
                    "label": row.label,
                    "against_first": summary(row.first),
                    "against_previous": summary(row.previous),
                }
                for row in self.rows
            ],
            "sparsification": None if self.sparse is None else sparse_record(self.sparse),
        }


def sparse_record(sparse: Result) -> dict[str, Any]:
    """What series.json keeps of how sparse the checkpoints are: the table whole, a row a checkpoint."""
    table = sparse.tables.get("checkpoints")
    rows = [] if table is None else table.to_dict("records")
    return {"metrics": dict(sparse.metrics), "notes": list(sparse.notes), "checkpoints": rows}


def summary(made: Audit) -> dict[str, Any]:
    """What series.json keeps of one audit."""
    return {
        "audit": made.path.name if made.path else None,
        "verdict": made.verdict,
        "metrics": {name: dict(result.metrics) for name, result in made.results.items()},
    }


def series(
    checkpoints: Sequence[Any],
    *,
    out: str | Path,
    labels: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Series:
    """Audit every checkpoint against the first and against the previous one, one audit at a time.

    Args:
        checkpoints: in order, the base first; adapters are adapters of that base.
        out: holds an audit's directory for each comparison, and series.json.
        labels: a name for each checkpoint, the first included; their references otherwise.
        progress: as of `audit`; names of analyses are preceded by what is compared.
        options: of `audit`.

    Raises:
        ValueError: fewer than two checkpoints, not as many labels, steps that do not rise, or as `audit`.
    """
    if len(checkpoints) < 2:
        raise ValueError("a series needs at least two checkpoints, the base first")
    if labels and len(labels) != len(checkpoints):
        raise ValueError(
            f"--steps: {len(labels)} steps for {len(checkpoints)} checkpoints, the first included"
        )
    from diagnostics.sparsification import in_order, sparsification
    from probes import open_checkpoint

    in_order(labels)
    # All are opened before anything runs: the last path may be the misspelt one.
    base = open_checkpoint(checkpoints[0])
    opened = [base, *(open_checkpoint(ref, base=base) for ref in checkpoints[1:])]
    names = list(labels) or [each.ref for each in opened]
    rows: list[Row] = []
    for place in range(1, len(opened)):
        made: list[Audit] = []
        for kind, other in (("first", 0), ("previous", place - 1)):
            if kind == "previous" and other == 0:
                made.append(made[0])
                continue
            what = f"{names[place]} against {names[other]}"
            shown = partial(prefixed, progress, what) if progress else None
            where = Path(out) / f"{place:03d}-against-{kind}"
            try:
                made.append(audit(opened[other], opened[place], out=where, progress=shown, **options))
            except ValueError as error:
                raise ValueError(f"{what}: {one_line(error)}") from error
        rows.append(Row(ref=opened[place].ref, label=names[place], first=made[0], previous=made[1]))
        written(Path(out), Series(base=base.ref, rows=tuple(rows)))
    shown = partial(progress, "sparsification") if progress else None
    try:
        sparse = sparsification(opened, names, progress=shown)
    except ValueError as error:  # the audits stand without it
        sparse = Result(metrics={}, tables={}, notes=(f"Sparsification is not measured: {one_line(error)}.",))
    return written(Path(out), Series(base=base.ref, rows=tuple(rows), sparse=sparse))


def written(out: Path, made: Series) -> Series:
    """Write series.json in one step."""
    with replacing(out / "series.json") as part:
        part.write_text(to_json(made.record()), encoding="utf-8")
    return made


def prefixed(progress: Progress, what: str, name: str, done: int, total: int, step: str) -> None:
    """Report progress under what is compared."""
    progress(f"{what}: {name}", done, total, step)
