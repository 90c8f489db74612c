"""Other thresholds tried on a saved audit, and the file for `--policy` that they are saved as."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import tomli_w

from dashboard.state.query import Query
from diagnostics.core.policy import Policy, Rule, default_policy, parse_rule
from diagnostics.core.policy_file import check_names
from diagnostics.store.audit_store import Audit
from probes.errors import InputError, UnknownNameError

OFF = "off"  # a removed threshold in an address
STEPS = ("warn", "fail")
SIDES = ("above", "below")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Trial:
    """An audit under the thresholds of an address.

    Attributes:
        audit: judged by the tried thresholds.
        changed: the audit's own rule for each changed one, by (analysis, metric); empty if it had none.
        errors: rules that are invalid and stay as they were, with the reason.
    """

    audit: Audit
    changed: Mapping[tuple[str, str], Rule] = field(default_factory=dict)
    errors: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def rule(self, analysis: str, metric: str) -> Rule:
        """The tried rule of a metric; without thresholds if there is none."""
        return self.audit.policy.rules.get(analysis, {}).get(metric, Rule())


def key(part: str, analysis: str, metric: str) -> str:
    """The key of a threshold, or of the bad side, in an address."""
    return f"{part}.{analysis}.{metric}"


def trial(audit: Audit, query: Query, audit_id: str) -> Trial:
    """The audit under the thresholds of an address; the new rules name the audit as their source."""
    wanted: dict[tuple[str, str], dict[str, str]] = {}
    for name in query.values:
        part, _, rest = name.partition(".")
        analysis, _, metric = rest.partition(".")
        if part in (*STEPS, "side") and analysis in audit.results:
            wanted.setdefault((analysis, metric), {})[part] = query.value(name)
    rules = {name: dict(by_metric) for name, by_metric in audit.policy.rules.items()}
    changed: dict[tuple[str, str], Rule] = {}
    errors = {}
    for (analysis, metric), values in wanted.items():
        if metric not in rules.get(analysis, {}) and metric not in audit.results[analysis].metrics:
            continue  # an address of another audit
        old = rules.get(analysis, {}).get(metric, Rule())
        try:
            new = altered(old, values, f"{analysis}.{metric}")
        except ValueError as error:
            errors[analysis, metric] = str(error)
            continue
        if new != old:
            rules.setdefault(analysis, {})[metric] = replace(new, source=f"set by hand, tried on {audit_id}")
            changed[analysis, metric] = old
    policy = Policy(rules, origin=f"thresholds tried on {audit_id}" if changed else audit.policy.origin)
    return Trial(replace(audit, policy=policy), changed, errors)


def altered(old: Rule, values: Mapping[str, str], name: str) -> Rule:
    """A rule with some of its thresholds changed.

    Raises:
        InputError: a threshold is not a number, or `fail` would be met before `warn`.
    """
    table = {field: value for field, value in asdict(old).items() if value is not None}
    for step in STEPS:
        if step not in values:
            continue
        table.pop(step, None)
        if values[step] != OFF:
            try:
                table[step] = float(values[step])
            except ValueError:
                table[step] = math.nan
            if not math.isfinite(table[step]):
                raise InputError(f"{name}: {step} is {values[step]!r}, which is not a finite number")
    if values.get("side") in SIDES:
        table["below"] = values["side"] == "below"
    return parse_rule(table, name)


def toml(policy: Policy, audit_id: str) -> tuple[str, list[str]]:
    """A policy as a file for `--policy`, and the rules that it leaves out.

    The file has every rule, and switches off the default rules that the policy lacks: it judges the same when
    the defaults change. Rules of analyses that are not installed are left out, since `--policy` refuses them.
    """
    tables: dict[str, dict[str, Any]] = {name: {} for name in policy.rules}
    omitted = []
    for name, rules in policy.plain().items():
        for metric, table in rules.items():
            if is_known(name, metric, policy.rules[name][metric]):
                tables[name][metric] = table
            else:
                omitted.append(f"{name}.{metric}")
    for name, defaults in default_policy().rules.items():
        for metric, judging in defaults.items():
            if metric not in policy.rules.get(name, {}) and is_known(name, metric, judging):
                tables.setdefault(name, {})[metric] = {}
    head = [f"Thresholds tried on the audit {audit_id}: `tunescope audit BASE TUNED --policy FILE`"]
    head += [f"left out, not installed: {name}" for name in omitted]
    comments = "".join(f"# {CONTROL.sub(' ', line)}\n" for line in head)
    return f"{comments}\n{tomli_w.dumps({name: rules for name, rules in tables.items() if rules})}", omitted


def is_known(name: str, metric: str, judging: Rule) -> bool:
    """Whether this installation accepts a rule."""
    try:
        check_names(Policy({name: {metric: judging}}, origin=""))
    except UnknownNameError:
        return False
    return True


def changes(tried: Trial) -> str:
    """The changed rules as TOML, without their messages and sources."""
    tables = tried.audit.policy.plain()
    shown = (*STEPS, "below", "per", "when")
    changed: dict[str, dict[str, Any]] = {}
    for name, metric in tried.changed:
        table = {key: value for key, value in tables[name][metric].items() if key in shown}
        changed.setdefault(name, {})[metric] = table
    return tomli_w.dumps(changed)
