"""The checkpoints of one run, each compared with the first and with the previous one, and the run as a whole.

What sequential fine-tuning adds must be counted against the original base: against the previous checkpoint
alone it looks small at every step.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diagnostics.audit.plan import Progress, missing_inputs, name_list, usable_analyses
from diagnostics.audit.run import audit
from diagnostics.core.inputs import ROLES, Files
from diagnostics.core.policy import Verdict
from diagnostics.core.registry import find
from diagnostics.store.audit_store import Audit
from diagnostics.store.files import replacing, to_json
from diagnostics.store.keys import one_line
from diagnostics.store.occupied import SERIES, other_audit, refuse_occupied, stranger
from probes.checkpoints.series import CheckpointSeries
from probes.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AuditedCheckpoint:
    """One checkpoint of a series: its audits against the first checkpoint and against the previous one."""

    ref: str
    label: str
    first: Audit
    previous: Audit

    def record(self) -> dict[str, Any]:
        """Its entry in series.json."""
        against = {"against_first": audit_record(self.first), "against_previous": audit_record(self.previous)}
        return {"ref": self.ref, "label": self.label, **against}

    @property
    def verdict(self) -> Verdict:
        """The more severe of the two verdicts."""
        return max(self.first.verdict, self.previous.verdict, key=("pass", "warn", "fail").index)


@dataclass(frozen=True, kw_only=True)
class AuditSeries:
    """The audits of a series.

    Attributes:
        rows: every checkpoint after the first, in order; empty when no analysis compares two checkpoints.
        left_out: checkpoints that are still being written, as far as can be told, and what they lack.
    """

    base: str
    rows: tuple[AuditedCheckpoint, ...] = ()
    run: Audit | None = None  # the audit of the analyses of a whole run; None when there is none
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def measures(self) -> list[str]:
        """The first metric of each analysis, as `analysis.metric`."""
        names: dict[str, None] = {}
        for row in self.rows:
            for analysis, result in row.first.results.items():
                names |= {f"{analysis}.{metric}": None for metric in list(result.metrics)[:1]}
        return list(names)

    @property
    def audits(self) -> list[Audit]:
        """Every audit once, in order."""
        audits = []
        for row in self.rows:
            audits += [row.first] if row.first is row.previous else [row.first, row.previous]
        return audits + ([] if self.run is None else [self.run])

    @property
    def exit_code(self) -> int:
        """The worst exit code of the audits."""
        return max(audit.exit_code for audit in self.audits)

    def record(self) -> dict[str, Any]:
        """The contents of series.json."""
        return {
            "schema": 1,
            "base": self.base,
            "checkpoints": [row.record() for row in self.rows],
            "run": None if self.run is None else audit_record(self.run),
            "left_out": dict(self.left_out),
        }

    def write(self, out: Path) -> "AuditSeries":
        """Write series.json in one step."""
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "series.json") as part:
            part.write_text(to_json(self.record()), encoding="utf-8")
        return self


def audit_record(audit: Audit) -> dict[str, Any]:
    """What series.json keeps of one audit."""
    return {
        "audit": audit.path.name if audit.path else None,
        "verdict": audit.verdict,
        "metrics": {name: dict(result.metrics) for name, result in audit.results.items()},
    }


def series(
    checkpoints: Sequence[Any], *, out: str | Path, labels: Sequence[Any] = (),
    only: str | Collection[str] = (), skip: str | Collection[str] = (), progress: Progress | None = None,
    train: Files = (), replace: bool = False, **options: Any,
) -> AuditSeries:  # fmt: skip
    """Audit every checkpoint against the first and the previous one, then the run as a whole.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> models = [BUNDLED / name for name in ("base", "full", "lora-r8")]
    >>> run = series(models, out="series", labels=[0, 1, 2], only="intruders")
    >>> [(row.label, row.first.results["intruders"].metrics["intruders"]) for row in run.rows]
    [('1', 0), ('2', 19)]

    Args:
        checkpoints: in order, the base first, as `probes.checkpoints.series.expand` takes them; adapters
            belong to the base.
        out: directory for an audit of each comparison, that of the run, and series.json.
        labels: a step or a name for each checkpoint, the first included; by default the steps in
            trainer_state.json or in the names, else the references.
        only, skip: names of the analyses to run, or to leave out; one of a whole run is run once.
        progress: as of `audit`; names of analyses are preceded by the comparison.
        train: files of rows that the run was trained on.
        replace: as of `audit`: write into `out` even if it holds a model, or audits of other checkpoints.
        options: of `audit`.

    Raises:
        InputError: fewer than two checkpoints, not as many labels, steps that do not rise, or as `audit`.
    """
    run = CheckpointSeries(checkpoints, steps=labels)
    if len(run) < 2:
        raise InputError("a series needs at least two checkpoints, the base first")
    only, skip, out = name_list(only), name_list(skip), Path(out)
    if not replace:
        refuse_other_audits(run, out)
    options["replace"] = replace
    chosen, _ = usable_analyses(only, skip)
    of_run = [name for name in chosen if "series" in find(name).inputs]
    of_pairs = [name for name in chosen if name not in of_run]
    rows: list[AuditedCheckpoint] = []
    if of_pairs:
        left_out = dict.fromkeys(of_run, "looks at the whole run: see the audit `run` in the same directory")
        shared = {"only": only, "skip": skip, "left_out": left_out, **options}
        for position in range(1, len(run)):
            rows.append(audit_checkpoint(run, position, out, progress, shared))
            AuditSeries(base=run.base.ref, rows=tuple(rows), left_out=run.left_out).write(out)
    supplied = {"pair", "series", *(role for role in ROLES if {**options, "train": train}.get(role))}
    run_audit, why = None, "compares two checkpoints: see the audits in the same directory"
    if not of_pairs or not all(missing_inputs(find(name), supplied) for name in of_run):
        run_audit = audit(
            run.base, run.checkpoints[-1], out=out / "run", series=run, only=only, skip=skip, train=train,
            left_out=dict.fromkeys(of_pairs, why), progress=prefixed(progress, "the run"), **options,
        )  # fmt: skip
    finished = AuditSeries(base=run.base.ref, rows=tuple(rows), run=run_audit, left_out=run.left_out)
    return finished.write(out)


def refuse_other_audits(run: CheckpointSeries, out: Path) -> None:
    """Raise InputError if a directory holds a model, or audits of other checkpoints than a series has."""
    what = "a single audit" if (out / "audit.json").exists() else stranger(out)
    refuse_occupied(out, None if what == SERIES else what)
    checkpoints = run.checkpoints
    for position in range(1, len(checkpoints)):
        for kind, other in (("first", 0), ("previous", position - 1)):
            directory = comparison(out, position, kind)
            refuse_occupied(directory, other_audit(directory, checkpoints[other], checkpoints[position]))
    refuse_occupied(out / "run", other_audit(out / "run", run.base, None))


def comparison(out: Path, position: int, kind: str) -> Path:
    """The directory for the audit of one checkpoint against the first or the previous one."""
    return out / f"{position:03d}-against-{kind}"


def audit_checkpoint(
    run: CheckpointSeries, position: int, out: Path, progress: Progress | None, options: dict[str, Any]
) -> AuditedCheckpoint:
    """The two audits of one checkpoint; for the second checkpoint of a run they are one."""
    audits: dict[int, Audit] = {}
    for kind, other in (("first", 0), ("previous", position - 1)):
        if other in audits:
            continue
        what = f"{run.labels[position]} against {run.labels[other]}"
        try:
            audits[other] = audit(
                run.checkpoints[other], run.checkpoints[position], out=comparison(out, position, kind),
                progress=prefixed(progress, what), **options,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{what}: {one_line(error)}") from error
    ref, label = run.checkpoints[position].ref, run.labels[position]
    return AuditedCheckpoint(ref=ref, label=label, first=audits[0], previous=audits[position - 1])


def prefixed(progress: Progress | None, what: str) -> Progress | None:
    """A progress callback that puts a prefix in front of the names of analyses; None without one."""
    return progress and (lambda name, *counts: progress(f"{what}: {name}", *counts))
