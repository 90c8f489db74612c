"""How several audits differ: their numbers, their findings, and what makes them hard to compare."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.core.policy import Finding, judged, scale
from diagnostics.report.content import NOTHING, format_number
from diagnostics.store.audit_store import Audit

MARKED = 0.1  # differences beyond this share of the larger number are marked

Value = float | int | None


@dataclass(frozen=True)
class Measure:
    """One number of one audit, compared with the first audit.

    Attributes:
        text: the number; a dash where there is none.
        verdict: under the audit's own policy; empty where it is not judged.
        change: the difference from the first audit; empty without one.
        differs: whether text or verdict differ from the first audit's.
        marked: `up` or `down` far above or below the first, `verdict` where the verdict differs.
    """

    text: str
    verdict: str = ""
    change: str = ""
    differs: bool = False
    marked: str = ""


def measures(audits: Mapping[str, Audit]) -> dict[tuple[str, str], list[Measure]]:
    """Every number that any of the audits has, by analysis and metric, one entry for each audit."""
    rows = {}
    for name in analyses_of(audits.values()):
        results = [audit.results.get(name) for audit in audits.values()]
        for metric in dict.fromkeys(metric for result in results if result for metric in result.metrics):
            values: list[tuple[Value, str]] = [
                (result.metrics.get(metric) if result else None, verdict(audit, name, metric))
                for audit, result in zip(audits.values(), results, strict=True)
            ]
            rows[name, metric] = [measure(*value, *values[0]) for value in values]
    return rows


def analyses_of(audits: Iterable[Audit]) -> list[str]:
    """The names of the analyses that have a result in some audit."""
    return list(dict.fromkeys(name for audit in audits for name in audit.results))


def verdict(audit: Audit, name: str, metric: str) -> str:
    """The verdict of an audit's policy on one of its numbers; empty without a rule or a number."""
    result = audit.results.get(name)
    rule = judged(result, audit.policy).get(metric) if result else None
    if result is None or rule is None or metric not in result.metrics:
        return ""
    beyond = rule.beyond(result.metrics[metric], scale(result, rule))
    return beyond[0] if beyond else "pass"


def measure(value: Value, value_verdict: str, first: Value, first_verdict: str) -> Measure:
    """One number, compared with the first audit's."""
    text = format_number(value)
    differs = text != format_number(first)
    if value is None or first is None or math.isnan(value) or math.isnan(first):
        return Measure(text, value_verdict, differs=differs)
    delta, marked = value - first, ""
    if value_verdict != first_verdict:
        marked = "verdict"
    elif differs and abs(delta) > MARKED * max(abs(value), abs(first)):
        marked = "up" if delta > 0 else "down"
    change = signed(delta) if differs else ""
    return Measure(text, value_verdict, change, differs or value_verdict != first_verdict, marked)


def signed(value: float | int) -> str:
    """A number with its sign."""
    return ("+" if value > 0 else "−" if value < 0 else "") + format_number(abs(value))


@dataclass(frozen=True)
class SharedFinding:
    """A finding that some of the audits have.

    Attributes:
        findings: one for each audit; None where an audit does not have it.
        reasons: why an audit does not have it: the number passes, is not judged, or was not measured.
    """

    analysis: str
    metric: str
    findings: list[Finding | None]
    reasons: list[str]

    @property
    def worst(self) -> Finding:
        """The most severe of them."""
        return min(filter(None, self.findings), key=lambda finding: finding.severity)  # fail before warn


def shared_findings(audits: Mapping[str, Audit]) -> list[SharedFinding]:
    """The findings of all audits: those that the fewest audits have first, then by severity."""
    by_audit = [{(f.analysis, f.metric): f for f in reversed(audit.findings)} for audit in audits.values()]
    keys = dict.fromkeys((f.analysis, f.metric) for audit in audits.values() for f in audit.findings)
    shared = []
    for key in keys:
        findings = [findings.get(key) for findings in by_audit]
        pairs = zip(audits.values(), findings, strict=True)
        shared.append(SharedFinding(*key, findings, ["" if f else reason(audit, *key) for audit, f in pairs]))
    return sorted(shared, key=lambda row: (len(row.findings) - row.findings.count(None), row.worst.severity))


def reason(audit: Audit, analysis: str, metric: str) -> str:
    """Why an audit does not have a finding that another has."""
    result = audit.results.get(analysis)
    if result is None:
        return "not run"
    if metric not in result.metrics:
        return "not measured"
    passes = f"{format_number(result.metrics[metric])}, passes"
    return passes if verdict(audit, analysis, metric) else "not judged"


def cautions(audits: Mapping[str, Audit]) -> list[str]:
    """What makes these audits hard to compare."""
    notes = []
    bases = {str(audit.base.get("fingerprint") or audit.base.get("ref")) for audit in audits.values()}
    if len(bases) > 1:
        notes.append("The bases differ: a difference in a number may come from the base.")
    notes += [
        f"The {role} rows differ: numbers measured on them differ for that reason too."
        for role in dict.fromkeys(role for audit in audits.values() for role in audit.data)
        if len({fingerprints(audit.data.get(role, ())) for audit in audits.values()}) > 1
    ]
    for name in analyses_of(audits.values()):
        used = [audit.results[name].parameters for audit in audits.values() if name in audit.results]
        settings = {
            key: list(dict.fromkeys(format_number(parameters.get(key)) or NOTHING for parameters in used))
            for key in dict.fromkeys(key for parameters in used for key in parameters)
        }
        differing = [f"{key} is {' or '.join(values)}" for key, values in settings.items() if len(values) > 1]
        if differing:
            notes.append(f"{name} was run with different settings: {', '.join(differing)}.")
    if len({repr(sorted(audit.policy.plain().items())) for audit in audits.values()}) > 1:
        origins = ", ".join(dict.fromkeys(audit.policy.origin for audit in audits.values()))
        notes.append(f"The policies differ ({origins}).")
    return notes


def fingerprints(files: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """What identifies the rows of a role."""
    return frozenset(str(file.get("fingerprint") or file.get("ref")) for file in files)
