"""Policies: thresholds with their sources, kept apart from the analyses, which only measure.

A policy is a TOML file with a table for each analysis and in it a rule for each metric::

    [intruders]
    intruders_per_matrix = {warn = 0.5, fail = 2.0, source = "our release gate"}

A value beyond a threshold is a finding: above it, or below it where the rule says `below = true`. `per = "k"`
multiplies both thresholds by that parameter of the analysis; `when = "full_finetune"` applies the rule only
where that parameter or metric is true. `{}` switches a rule off.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.core.registry import find_source, modules
from probes.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from diagnostics.core.analysis import Result

# The largest threshold; infinity is refused.
LARGEST = 1e300

Severity = Literal["warn", "fail"]
Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One metric beyond one threshold.

    >>> from diagnostics.core.analysis import Result
    >>> result = Result(analysis="path", metrics={"bump_task_nats": 0.3}, tables={})
    >>> [(finding.severity, finding.threshold) for finding in result.findings()]
    [('warn', 0.1)]
    """

    analysis: str
    severity: Severity
    metric: str
    value: float | int
    threshold: float
    message: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The thresholds of one metric.

    Attributes:
        warn, fail: a value beyond it is a finding; None: never.
    """

    warn: float | None = None
    fail: float | None = None
    below: bool = False  # whether small values are the bad ones
    per: str = ""  # a numeric parameter of the analysis that both thresholds are multiplied by
    when: str = ""  # a parameter or metric of the analysis; where it is missing or 0, the rule does not apply
    message: str = ""  # the meaning of such a value; the comparison itself when empty
    source: str = ""  # where the thresholds come from

    @property
    def side(self) -> str:
        """The bad side of its thresholds."""
        return "below" if self.below else "above"

    @property
    def off(self) -> bool:
        """Whether it has no threshold at all."""
        return self.warn is None and self.fail is None

    def beyond(self, value: float | int, scale: float = 1.0) -> tuple[Severity, float] | None:
        """The severest threshold, times `scale`, that the value is beyond; equal to it is not beyond."""
        steps: tuple[tuple[Severity, float | None], ...] = (("fail", self.fail), ("warn", self.warn))
        for severity, threshold in steps:
            if threshold is None:
                continue
            limit = threshold * scale
            if value < limit if self.below else value > limit:
                return severity, limit
        return None


@dataclass(frozen=True)
class Policy:
    """Rules by analysis and metric, and where they were read.

    >>> policy = parse({"path": {"bump_task_nats": {"fail": 1}}}, origin="our release gate")
    >>> policy.plain()
    {'path': {'bump_task_nats': {'fail': 1.0, 'source': 'our release gate'}}}
    """

    rules: Mapping[str, Mapping[str, Rule]]
    origin: str

    def plain(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The rules as JSON and TOML hold them, without what a rule leaves at its default."""

        def set_fields(rule: Rule) -> dict[str, Any]:
            return {k: v for k, v in asdict(rule).items() if v is not None and v != "" and v is not False}

        return {
            name: {metric: set_fields(rule) for metric, rule in rules.items()}
            for name, rules in self.rules.items()
        }


def default_policy() -> Policy:
    """The rules that the installed analyses bring; every rule names its source, or says that there is none.

    They are in the `policy.toml` in the folder of an analysis, which is read without importing the analysis.

    >>> default_policy().rules["path"]["bump_task_nats"].warn
    0.1

    Raises:
        InputError, UnknownNameError: a package brings a file that is not TOML, or a rule that makes no sense.
    """
    return _assembled(tuple(modules().items()))


@cache
def _assembled(places: tuple[tuple[str, str], ...]) -> Policy:
    """The rules of analyses, given as name and module."""
    tables: dict[str, Any] = {}
    for name, module in places:
        spec = find_source(module)
        file = Path(spec.origin).with_name("policy.toml") if spec and spec.origin else None
        if file and file.is_file():
            try:
                rules = tomllib.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{file}: not a TOML file: {error}; mend or uninstall {module}") from error
            tables |= {name: rules[name]} if name in rules else {}
    return parse(tables, origin="default policy")


def parse(tables: Mapping[str, Any], origin: str) -> Policy:
    """Rules out of nested tables, as TOML and audit.json hold them; names are not looked up."""
    rules: dict[str, dict[str, Rule]] = {}
    for name, metrics in tables.items():
        if not isinstance(metrics, Mapping):
            raise InputError(
                f"{origin}: {name} = {metrics!r} stands outside a table; write [ANALYSIS] above it"
            )
        named = {metric: parse_rule(value, f"{origin}: {name}.{metric}") for metric, value in metrics.items()}
        rules[name] = {
            metric: rule if rule.source else replace(rule, source=origin) for metric, rule in named.items()
        }
    return Policy(rules, origin=origin)


def parse_rule(table: Any, where: str) -> Rule:
    """A rule from its inline table; `where` begins every message."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where} = {table!r} is not a rule; write {{warn = …, fail = …}}")
    kinds = {field.name: field.type if field.type in (str, bool) else float for field in fields(Rule)}
    for key, value in table.items():
        if key not in kinds:
            raise UnknownNameError(f"{where}: unknown key {key!r}; known: {', '.join(kinds)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        if not (number if kinds[key] is float else isinstance(value, kinds[key])):
            word = {float: "a finite number", bool: "true or false", str: "a text"}[kinds[key]]
            raise InputError(f"{where}: {key} = {value!r} is not {word}")
    values: dict[str, Any] = {k: float(v) if kinds[k] is float else v for k, v in table.items()}
    rule = Rule(**values)
    if rule.warn is not None and rule.fail is not None:
        first, second = (rule.fail, rule.warn) if rule.below else (rule.warn, rule.fail)
        if first > second:
            raise InputError(
                f"{where}: fail = {rule.fail:g} would be met before warn = {rule.warn:g}; "
                f"this rule judges values {rule.side} its thresholds"
            )
    return rule


def judge(result: "Result", policy: Policy) -> list[Finding]:
    """The findings of one result, the severest first."""
    findings = []
    for metric, rule in judged(result, policy).items():
        value = result.metrics[metric]
        if crossed := rule.beyond(value, scale(result, rule)):
            severity, threshold = crossed
            comparison = f"{metric} is {value:.4g}, {rule.side} {threshold:.4g}"
            finding = Finding(
                analysis=result.analysis, severity=severity, metric=metric, value=value, threshold=threshold,
                message=rule.message or comparison, source=rule.source,
            )  # fmt: skip
            findings.append(finding)
    return sorted(findings, key=lambda finding: finding.severity != "fail")


def judged(result: "Result", policy: Policy) -> dict[str, Rule]:
    """The rules for which a result has a number, by metric."""
    return {metric: rule for metric, rule in applying(result, policy) if not unjudged(result, metric, rule)}


def not_measured(result: "Result", policy: Policy) -> dict[str, str]:
    """The rules for which a result has no number, as metric -> reason; such a rule is not passed."""
    reasons = {metric: unjudged(result, metric, rule) for metric, rule in applying(result, policy)}
    return {metric: reason for metric, reason in reasons.items() if reason}


def applying(result: "Result", policy: Policy) -> list[tuple[str, Rule]]:
    """The rules that are switched on and apply to this result, with their metrics."""
    facts = {**result.parameters, **result.metrics}
    rules = policy.rules.get(result.analysis, {}).items()
    return [
        (metric, rule) for metric, rule in rules if not rule.off and (not rule.when or facts.get(rule.when))
    ]


def verdict(findings: Iterable[Finding]) -> Verdict:
    """The severest of the findings; `pass` when there is none."""
    severities = {finding.severity for finding in findings}
    return "fail" if "fail" in severities else "warn" if "warn" in severities else "pass"


def scale(result: "Result", rule: Rule) -> float:
    """The factor by which the thresholds of a rule are multiplied."""
    return float(result.parameters[rule.per]) if rule.per else 1.0


def unjudged(result: "Result", metric: str, rule: Rule) -> str:
    """Why a rule cannot be applied to a result; empty when it can."""
    value = result.metrics.get(metric)
    if value is None:
        return "the analysis left it out"
    if math.isnan(value):
        return "it came out as not a number"
    factor = result.parameters.get(rule.per) if rule.per else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or abs(factor) > LARGEST:
        return f"its thresholds are per {rule.per}, which is {factor!r} here"
    return ""
