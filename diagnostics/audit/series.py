"""The checkpoints of one run, each against the first and against the one before it, and the run as a whole.

What sequential fine-tuning adds must be counted against the original base: against the previous checkpoint
alone it looks small at every step.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diagnostics.audit.plan import Progress, missing, usable
from diagnostics.audit.run import audit
from diagnostics.core.inputs import ROLES
from diagnostics.core.policy import Verdict
from diagnostics.core.registry import find
from diagnostics.store.audit_store import Audit
from diagnostics.store.files import replacing, to_json
from diagnostics.store.keys import one_line
from probes.checkpoints.series import CheckpointSeries
from probes.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SeriesRow:
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
    """Every checkpoint after the first, in order, and all of them together.

    Attributes:
        rows: none where no analysis that compares two checkpoints was asked for.
        run: the audit of the analyses that look at the whole run, if any was asked for.
    """

    base: str
    rows: tuple[SeriesRow, ...] = ()
    run: Audit | None = None

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
        return [made for pair in pairs for made in pair] + ([] if self.run is None else [self.run])

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
            "run": None if self.run is None else summary(self.run),
        }


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
    labels: Sequence[Any] = (),
    only: Collection[str] = (),
    skip: Collection[str] = (),
    progress: Progress | None = None,
    train: Iterable[str | Path] = (),
    **options: Any,
) -> Series:
    """Audit every checkpoint against the first and against the previous one, then the run as a whole.

    Args:
        checkpoints: in order, the base first, as of `probes.checkpoints.series.expand`; adapters are of it.
        out: holds an audit's directory for each comparison, that of the run, and series.json.
        labels: a step or a name for each checkpoint, the first included; otherwise the steps that
            trainer_state.json or the names tell, or the references.
        only, skip: names of analyses to run, or to leave out; what looks at the whole run is run once.
        progress: as of `audit`; names of analyses are preceded by what is compared.
        train: files of rows that the run was trained on.
        options: of `audit`.

    Raises:
        InputError: fewer than two checkpoints, not as many labels, steps that do not rise, or as `audit`.
    """
    over = CheckpointSeries(checkpoints, steps=labels)
    if len(over) < 2:
        raise InputError("a series needs at least two checkpoints, the base first")
    names, _ = usable(only, skip)
    whole = {name for name in names if "series" in find(name).inputs}
    compared = set(names) - whole
    rows: list[SeriesRow] = []
    if compared:
        aside = dict.fromkeys(whole, "looks at the whole run: see the audit `run` beside this one")
        shared = {"only": only, "skip": skip, "aside": aside, **options}
        for place in range(1, len(over)):
            rows.append(compare(over, place, Path(out), progress, shared))
            written(Path(out), Series(base=over.base.ref, rows=tuple(rows)))
    supplied = {"pair", "series", *(role for role in ROLES if {**options, "train": train}.get(role))}
    if not compared or not all(missing(find(name), supplied) for name in whole):
        aside = dict.fromkeys(compared, "compares two checkpoints: see the audits beside this one")
        shown = partial(prefixed, progress, "the run") if progress else None
        run = audit(
            over.base,
            over.checkpoints[-1],
            out=Path(out) / "run",
            series=over,
            only=only,
            skip=skip,
            aside=aside,
            progress=shown,
            train=train,
            **options,
        )
    else:
        run = None
    return written(Path(out), Series(base=over.base.ref, rows=tuple(rows), run=run))


def compare(
    over: CheckpointSeries, place: int, out: Path, progress: Progress | None, options: dict[str, Any]
) -> SeriesRow:
    """The audits of one checkpoint; of the second one the first is the previous."""
    made: list[Audit] = []
    for kind, other in (("first", 0), ("previous", place - 1)):
        if kind == "previous" and other == 0:
            made.append(made[0])
            continue
        what = f"{over.labels[place]} against {over.labels[other]}"
        shown = partial(prefixed, progress, what) if progress else None
        where = out / f"{place:03d}-against-{kind}"
        try:
            made.append(
                audit(over.checkpoints[other], over.checkpoints[place], out=where, progress=shown, **options)
            )
        except ValueError as error:
            raise InputError(f"{what}: {one_line(error)}") from error
    return SeriesRow(
        ref=over.checkpoints[place].ref, label=over.labels[place], first=made[0], previous=made[1]
    )


def written(out: Path, made: Series) -> Series:
    """Write series.json in one step."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "series.json") as part:
        part.write_text(to_json(made.record()), encoding="utf-8")
    return made


def prefixed(progress: Progress, what: str, name: str, done: int, total: int, step: str) -> None:
    """Report progress under what is compared."""
    progress(f"{what}: {name}", done, total, step)
