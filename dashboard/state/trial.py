"""Other thresholds tried on a saved audit: what they would say, and the file that `--policy` takes."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dashboard.state.query import Query
from diagnostics.core.policy import Policy, Rule, default_policy, parse_rule
from diagnostics.core.policy_file import check_names
from diagnostics.store.audit_store import Audit
from probes.errors import InputError

OFF = "off"  # how an address writes a threshold that was taken away
STEPS = ("warn", "fail")
SIDES = ("above", "below")


@dataclass(frozen=True)
class Trial:
    """An audit under the thresholds that an address asks for.

    Attributes:
        audit: judged by them.
        own: the rules that were changed, by (analysis, metric), as the audit's own policy has them; a rule
            without thresholds where it has none.
        troubles: rules that make no sense and stay as they were, with why.
    """

    audit: Audit
    own: Mapping[tuple[str, str], Rule] = field(default_factory=dict)
    troubles: Mapping[tuple[str, str], str] = field(default_factory=dict)


def key(part: str, analysis: str, metric: str) -> str:
    """What an address calls a threshold, or the side that is bad."""
    return f"{part}.{analysis}.{metric}"


def trial(audit: Audit, query: Query, known: str) -> Trial:
    """The audit under the thresholds of an address.

    Args:
        known: what the audit is called, for the sources of the new rules.
    """
    wanted: dict[tuple[str, str], dict[str, str]] = {}
    for name in query.values:
        part, _, rest = name.partition(".")
        analysis, _, metric = rest.partition(".")
        if part in (*STEPS, "side") and analysis in audit.results:
            wanted.setdefault((analysis, metric), {})[part] = query.one(name)
    rules = {name: dict(own) for name, own in audit.policy.rules.items()}
    own: dict[tuple[str, str], Rule] = {}
    troubles = {}
    for (analysis, metric), parts in wanted.items():
        found = rules.get(analysis, {}).get(metric)
        old = found or Rule()
        if found is None and metric not in audit.results[analysis].metrics:
            continue  # an address of another audit: this one has no such number
        try:
            new = altered(old, parts, f"{analysis}.{metric}")
        except ValueError as error:
            troubles[analysis, metric] = str(error)
            continue
        if new != old:
            rules.setdefault(analysis, {})[metric] = replace(new, source=f"set by hand, tried on {known}")
            own[analysis, metric] = old
    policy = Policy(rules, origin=f"thresholds tried on {known}" if own else audit.policy.origin)
    return Trial(replace(audit, policy=policy), own, troubles)


def altered(old: Rule, parts: Mapping[str, str], where: str) -> Rule:
    """A rule with some of its thresholds changed.

    Raises:
        InputError: one is not a number, or `fail` would be met before `warn`.
    """
    table = {name: value for name, value in asdict(old).items() if value is not None}
    for step in STEPS:
        if step not in parts:
            continue
        table.pop(step, None)
        if parts[step] != OFF:
            try:
                table[step] = float(parts[step])
            except ValueError:
                table[step] = math.nan
            if not math.isfinite(table[step]):
                raise InputError(f"{where}: {step} is {parts[step]!r}, which is not a finite number")
    if parts.get("side") in SIDES:
        table["below"] = parts["side"] == "below"
    return parse_rule(table, where)


def toml(policy: Policy, known: str) -> tuple[str, list[str]]:
    """A policy as the file that `--policy` takes, and the rules that had to be left out.

    Every rule is written, and the default rules that it lacks are switched off: the file judges the same
    whatever the defaults become. Rules of analyses that are not installed would be refused.
    """
    rules: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in policy.rules}
    left = []
    for name, own in policy.plain().items():
        for metric, table in own.items():
            if known_rule(name, metric, policy.rules[name][metric]):
                rules[name][metric] = table
            else:
                left.append(f"{name}.{metric}")
    for name, others in default_policy().rules.items():
        for metric, made in others.items():
            if metric not in policy.rules.get(name, {}) and known_rule(name, metric, made):
                rules.setdefault(name, {})[metric] = {}
    lines = [f"# Thresholds tried on the audit {bare(known)}: `tunescope audit BASE TUNED --policy FILE`"]
    lines += [f"# left out, for it is not installed here: {bare(each)}" for each in left]
    for name, own in rules.items():
        for metric, table in own.items():
            lines += ["", f"[{quoted(name)}.{quoted(metric)}]", *written(table)]
    return "\n".join(lines) + "\n", left


def known_rule(name: str, metric: str, made: Rule) -> bool:
    """Whether a rule would be taken by this installation."""
    try:
        check_names(Policy({name: {metric: made}}, origin=""))
    except LookupError:
        return False
    return True


def changes(tried: Trial) -> str:
    """The changed rules alone, as TOML, for reading."""
    lines = []
    for analysis, metric in tried.own:
        table = tried.audit.policy.plain()[analysis][metric]
        kept = {name: table[name] for name in (*STEPS, "below", "per", "when") if name in table}
        lines += [f"[{quoted(analysis)}.{quoted(metric)}]", *written(kept), ""]
    return "\n".join(lines).strip()


def written(table: Mapping[str, Any]) -> list[str]:
    """The keys and values of a rule as lines of TOML."""
    return [f"{name} = {value_of(value)}" for name, value in table.items()]


def value_of(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(float(value)) if isinstance(value, int | float) else text(value)


def text(value: str) -> str:
    """A string as TOML writes it: as JSON does, and DEL escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def quoted(name: str) -> str:
    """A key as TOML writes it."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else text(name)


def bare(words: str) -> str:
    """Words that fit into a comment."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", words)
