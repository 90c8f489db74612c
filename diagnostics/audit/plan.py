"""The plan of an audit: which analyses run, with which parameters, and why the others do not."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core.analysis import Analysis
from diagnostics.core.inputs import OPTIONS
from diagnostics.core.policy import Policy, default_policy
from diagnostics.core.policy_file import load_policy
from diagnostics.core.registry import (
    broken_analyses,
    find,
    installed,
    installed_analyses,
    preflight_first,
)
from diagnostics.store.audit_store import Outcome
from probes.errors import UnknownNameError

if TYPE_CHECKING:
    pass

Progress = Callable[[str, int, int, str], None]
Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an audit does with each installed analysis.

    Attributes:
        parameters: of each analysis that runs, defaults included, without where it runs (device, progress).
    """

    parameters: Mapping[str, dict[str, Any]]
    lacking: Mapping[str, str]  # the missing option of each analysis that was chosen and cannot run
    left_out: Mapping[str, str]  # the reason of each other one
    notes: tuple[str, ...]  # on analyses that cannot be imported

    def outcomes(self, pending: Outcome) -> dict[str, Outcome]:
        """An outcome for each installed analysis: `pending` if it runs, else skipped with the reason."""
        outcomes = {name: Outcome(status="skipped", reason=reason) for name, reason in self.left_out.items()}
        for name, reason in self.lacking.items():
            outcomes[name] = Outcome(status="skipped", reason=reason, **registry_facts(name))
        outcomes |= {name: replace(pending, **registry_facts(name)) for name in self.parameters}
        first = [name for name in self.parameters if find(name).preflight]
        return {name: outcomes[name] for name in dict.fromkeys([*first, *sorted(outcomes)])}


def make_plan(
    supplied: Collection[str], *, only: Collection[str], skip: Collection[str], settings: Settings,
    shared: Mapping[str, Any], left_out: Mapping[str, str],
) -> Plan:  # fmt: skip
    """Choose the analyses and their parameters.

    Args:
        supplied: names of the inputs that there are.
        shared: parameters for every analysis that takes them; `settings` come first.
        left_out: analyses that do not run, with the reason.

    Raises:
        UnknownNameError: an analysis or a parameter that does not exist; the message lists those that do.
    """
    for name in settings:
        if name not in installed():
            analysis_names = ", ".join(installed())
            raise UnknownNameError(f"--set {name}.…: unknown analysis {name!r}; known: {analysis_names}")
    chosen, broken = usable_analyses(only, skip)
    not_asked, skipped = f"not asked for: --only {','.join(only)}", "left out by --skip"
    unchosen = [name for name in installed() if name not in chosen]
    reasons = {name: not_asked if only and name not in only else skipped for name in unchosen} | broken
    reasons |= {name: reason for name, reason in left_out.items() if name in chosen}
    parameters, lacking = {}, {}
    for name in chosen:
        if name not in reasons:
            parameters[name] = analysis_parameters(find(name), settings.get(name, {}), shared)
            lacking[name] = missing_inputs(find(name), supplied)
    return Plan(
        parameters={name: used for name, used in parameters.items() if not lacking[name]},
        lacking={name: reason for name, reason in lacking.items() if reason},
        left_out=reasons,
        notes=tuple(f"Left out: {reason}" for reason in broken.values()),
    )


def chosen_analyses(only: Collection[str], skip: Collection[str]) -> list[str]:
    """The names of the analyses that are asked for.

    >>> chosen_analyses(only=["intruders", "drift"], skip=["drift"])
    ['intruders']

    Raises:
        UnknownNameError: an analysis is not installed; the message lists those that are.
    """
    names = installed()
    for option, name in (*(("--only", name) for name in only), *(("--skip", name) for name in skip)):
        if name not in names:
            raise UnknownNameError(f"{option}: unknown analysis {name!r}; known: {', '.join(names)}")
    return [name for name in names if (not only or name in only) and name not in skip]


def usable_analyses(only: Collection[str], skip: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The analyses that are asked for and can be imported, and why the others cannot be, by name."""
    names = chosen_analyses(only, skip)
    broken = broken_analyses(names)
    for name in only:
        if name in broken:
            raise UnknownNameError(broken[name])
    return preflight_first(name for name in names if name not in broken), broken


def name_list(names: str | Collection[str]) -> list[str]:
    """Names of analyses as a list; one name may be given as it is."""
    return [names] if isinstance(names, str) else list(names)


def missing_inputs(record: Analysis, supplied: Collection[str]) -> str:
    """The options that an analysis lacks; empty when it can run."""
    lacking = [name for name in record.inputs if name not in supplied]
    for name in lacking:
        if name not in OPTIONS:
            return f"needs {name!r}, which this tunescope cannot supply"
    return "needs " + " and ".join(OPTIONS[name] for name in lacking) if lacking else ""


def analysis_parameters(
    record: Analysis, settings: Mapping[str, Any], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters that an analysis runs with: its settings, then the shared ones, then its defaults."""
    defaults = record.defaults
    for name in settings:
        if name not in defaults:
            raise UnknownNameError(f"{record.name} has no parameter {name!r}; it has: {', '.join(defaults)}")
    applicable = defaults.keys() - set(record.unshared)
    taken = {name: value for name, value in shared.items() if name in applicable}
    return {**defaults, **taken, **settings}


def resolve_policy(policy: Policy | str | Path | None) -> Policy:
    """The policy itself, the one in a TOML file, or the default policy."""
    if isinstance(policy, Policy):
        return policy
    return load_policy(policy) if policy else default_policy()


def registry_facts(name: str) -> dict[str, Any]:
    """What an audit keeps of the registry, so that it can be read without the package."""
    record = find(name)
    return {"question": record.question, "paper": record.paper}


# --- notes ---


def unread_role_notes(roles: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Notes on the supplied roles that no analysis reads, or none of those that run."""
    notes = []
    for role in roles:
        records = installed_analyses().values()
        readers = {record.name for record in records if role in (*record.inputs, *record.optional)}
        if not readers:
            notes.append(
                f"no installed analysis reads --{role}; the file is recorded and has no other effect"
            )
        elif not readers & set(names):
            notes.append(f"none of the analyses asked for reads --{role}; {', '.join(sorted(readers))} would")
    return tuple(notes)
