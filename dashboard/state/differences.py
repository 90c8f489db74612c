"""What tells several audits apart: their numbers, their findings, and what makes them hard to compare."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.core.policy import Finding, judged, scale
from diagnostics.report.content import NOTHING, format_number
from diagnostics.store.audit_store import Audit

MARKED = 0.1  # a number that differs from the first by more than this share of the larger one is marked


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of one audit beside that of the first audit.

    Attributes:
        text: the number; a dash where there is none.
        verdict: by the audit's own policy; empty where it is not judged.
        change: how it differs from the first audit's; empty where it does not, or where one has no number.
        differs: whether it reads otherwise than the first audit's, or is judged otherwise.
        marked: `up` or `down` where it lies far above or below, `verdict` where the verdict is another.
    """

    text: str
    verdict: str = ""
    change: str = ""
    differs: bool = False
    marked: str = ""


def measures(audits: Mapping[str, Audit]) -> dict[tuple[str, str], list[Measure]]:
    """Every number that any of the audits has, by analysis and metric, in the order of the audits."""
    made = {}
    for name in dict.fromkeys(name for audit in audits.values() for name in audit.results):
        results = [audit.results.get(name) for audit in audits.values()]
        for metric in dict.fromkeys(metric for result in results if result for metric in result.metrics):
            values = [result.metrics.get(metric) if result else None for result in results]
            verdicts = [
                verdict(audit, name, metric) if value is not None else ""
                for audit, value in zip(audits.values(), values, strict=True)
            ]
            first = (values[0], verdicts[0])
            made[name, metric] = [measure(*each, *first) for each in zip(values, verdicts, strict=True)]
    return made


def verdict(audit: Audit, name: str, metric: str) -> str:
    """How an audit's policy judges one of its numbers."""
    result = audit.results[name]
    rule = judged(result, audit.policy).get(metric)
    if rule is None:
        return ""
    beyond = rule.beyond(result.metrics[metric], scale(result, rule))
    return beyond[0] if beyond else "pass"


def measure(value: float | int | None, judged_as: str, first: float | int | None, first_as: str) -> Measure:
    """One number beside the first audit's."""
    text = format_number(value)
    if value is None or first is None or math.isnan(value) or math.isnan(first):
        return Measure(text=text, verdict=judged_as, differs=text != format_number(first))
    delta = value - first
    differs = text != format_number(first)
    marked = ""
    if judged_as != first_as:
        marked = "verdict"
    elif abs(delta) > MARKED * max(abs(value), abs(first)):
        marked = "up" if delta > 0 else "down"
    return Measure(
        text=text,
        verdict=judged_as,
        change=signed(delta) if differs else "",
        differs=differs or judged_as != first_as,
        marked=marked if differs or judged_as != first_as else "",
    )


def signed(delta: float | int) -> str:
    """A difference with its sign."""
    return ("+" if delta > 0 else "−") + format_number(abs(delta))


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A finding, and which audits have it.

    Attributes:
        found: the finding of each audit, in order; None where an audit has none.
        why: where an audit has none, whether that number passed, was not judged, or is not there.
    """

    analysis: str
    metric: str
    found: list[Finding | None]
    why: list[str]

    @property
    def any(self) -> Finding:
        """The severest of them."""
        had = [each for each in self.found if each is not None]
        return next((each for each in had if each.severity == "fail"), had[0])


def findings(audits: Mapping[str, Audit]) -> list[Shared]:
    """Every finding of any audit: first those that fewest have, the severer before the others."""
    keys = dict.fromkeys((f.analysis, f.metric) for audit in audits.values() for f in audit.findings)
    made = []
    for analysis, metric in keys:
        own = [
            next((f for f in audit.findings if (f.analysis, f.metric) == (analysis, metric)), None)
            for audit in audits.values()
        ]
        why = [
            "" if found else reason(audit, analysis, metric)
            for audit, found in zip(audits.values(), own, strict=True)
        ]
        made.append(Shared(analysis=analysis, metric=metric, found=own, why=why))
    return sorted(
        made, key=lambda each: (sum(f is not None for f in each.found), each.any.severity != "fail")
    )


def reason(audit: Audit, analysis: str, metric: str) -> str:
    """Why an audit lacks a finding that another has."""
    result = audit.results.get(analysis)
    if result is None:
        return "not run"
    if metric not in result.metrics:
        return "not measured"
    return (
        f"{format_number(result.metrics[metric])}, passes"
        if verdict(audit, analysis, metric)
        else "not judged"
    )


def cautions(audits: Mapping[str, Audit]) -> list[str]:
    """What makes these audits hard to compare."""
    said = []
    bases = {str(audit.base.get("fingerprint") or audit.base.get("ref")) for audit in audits.values()}
    if len(bases) > 1:
        said.append("These are of different bases: a difference may be one of the bases.")
    said += [
        f"The {role} rows are not the same: numbers that rest on them differ for that too."
        for role in dict.fromkeys(role for audit in audits.values() for role in audit.data)
        if len({prints(audit.data.get(role, ())) for audit in audits.values()}) > 1
    ]
    for name in dict.fromkeys(name for audit in audits.values() for name in audit.results):
        used = [audit.results[name].parameters for audit in audits.values() if name in audit.results]
        settings = {
            key: list(dict.fromkeys(format_number(each.get(key)) or NOTHING for each in used))
            for key in dict.fromkeys(key for each in used for key in each)
        }
        unlike = [f"{key} is {' or '.join(values)}" for key, values in settings.items() if len(values) > 1]
        if unlike:
            said.append(f"{name} was run with other settings: {', '.join(unlike)}.")
    rules = {repr(sorted(audit.policy.plain().items())) for audit in audits.values()}
    if len(rules) > 1:
        origins = ", ".join(dict.fromkeys(audit.policy.origin for audit in audits.values()))
        said.append(f"They are judged by different policies ({origins}).")
    return said


def prints(given: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """What tells the rows of a role from other rows."""
    return frozenset(str(each.get("fingerprint") or each.get("ref")) for each in given)
