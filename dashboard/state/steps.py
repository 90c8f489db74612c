"""A series as its page shows it: the checkpoints in order, and every measure over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dashboard.state.audit_library import AuditLibrary, Entry, read_series
from diagnostics.core.policy import judged, scale
from diagnostics.plotting import theme
from diagnostics.store.files import number
from probes.errors import InputError
from probes.files.untrusted import plain

SIDES = {"against_first": "against the first", "against_previous": "against the previous"}
VERDICTS = ("pass", "warn", "fail")
LEADING = 8  # measures shown before a visitor chooses


@dataclass(frozen=True)
class Step:
    """One checkpoint after the first.

    Attributes:
        entries: the id of its audit by side; a side without an audit is missing.
        verdicts, metrics: by side; metrics by `analysis.metric`.
    """

    label: str
    ref: str
    entries: Mapping[str, str] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The most severe verdict."""
        return max(self.verdicts.values(), key=VERDICTS.index, default="")

    @property
    def title(self) -> str:
        """Its name as a heading."""
        return f"Step {self.label}" if self.label.isdecimal() else self.label[:1].upper() + self.label[1:]


def read_steps(entry: Entry) -> list[Step]:
    """The checkpoints of a series after the first.

    Raises:
        InputError: series.json is damaged.
    """
    record = read_series(entry)
    try:
        return [read_step(entry, checkpoint) for checkpoint in record["checkpoints"]]
    except InputError as error:
        raise InputError(f"series.json of {entry.id}: damaged: {plain(str(error))}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = plain(f"{type(error).__name__} {error}")
        raise InputError(f"series.json of {entry.id}: damaged: {reason}") from error


def read_step(entry: Entry, checkpoint: Mapping[str, Any]) -> Step:
    """One checkpoint of series.json."""
    sides = {side: checkpoint[side] for side in SIDES}
    metrics: dict[str, dict[str, float]] = {side: {} for side in SIDES}
    for side, record in sides.items():
        for analysis, values in record["metrics"].items():
            metrics[side] |= {f"{analysis}.{metric}": number(value) for metric, value in values.items()}
    verdicts = {side: str(record["verdict"]) for side, record in sides.items()}
    if unknown := set(verdicts.values()) - set(VERDICTS):
        raise InputError(f"unknown verdict {unknown.pop()!r}")
    entries = {side: f"{entry.id}/{record['audit']}" for side, record in sides.items() if record["audit"]}
    return Step(str(checkpoint["label"]), str(checkpoint["ref"]), entries, verdicts, metrics)


def measures(steps: Sequence[Step]) -> list[str]:
    """Every number that some checkpoint has, as `analysis.metric`, in the order of the audits."""
    return list(dict.fromkeys(name for step in steps for side in step.metrics.values() for name in side))


def leading(steps: Sequence[Step], thresholds: Mapping[str, Any]) -> list[str]:
    """The measures shown first: the first of each analysis, and those with a threshold."""
    names = measures(steps)
    firsts = {name.partition(".")[0]: name for name in reversed(names)}.values()
    return [name for name in names if name in firsts or name in thresholds][:LEADING]


def limits(library: AuditLibrary, steps: Sequence[Step]) -> dict[str, dict[str, float]]:
    """The thresholds of each judged measure by severity, from the last audit that can be read."""
    entries = (library.find(next(iter(step.entries.values()), "")) for step in reversed(steps))
    audit = next((audit for entry in entries if entry and (audit := entry.audit)), None)
    thresholds: dict[str, dict[str, float]] = {}
    if audit is None:
        return thresholds
    for name, result in audit.results.items():
        for metric, rule in judged(result, audit.policy).items():
            values, factor = {"warn": rule.warn, "fail": rule.fail}, scale(result, rule)
            thresholds[f"{name}.{metric}"] = {key: v * factor for key, v in values.items() if v is not None}
    return thresholds


def positions(steps: Sequence[Step]) -> list[Any]:
    """Where the checkpoints lie on an axis: at their step numbers, or at their names if some have none."""
    try:
        return [float(step.label) for step in steps]
    except ValueError:
        return [theme.verbatim(step.label) for step in steps]
