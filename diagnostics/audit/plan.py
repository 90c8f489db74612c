"""What an audit will run: the chosen analyses, their parameters, and the inputs they lack."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core.analysis import EXECUTION, Analysis
from diagnostics.core.inputs import OPTIONS
from diagnostics.core.registry import broken_analyses, find, installed, installed_analyses
from probes.errors import UnknownNameError

if TYPE_CHECKING:
    from probes import CheckpointPair
    from probes.checkpoints.series import CheckpointSeries


Progress = Callable[[str, int, int, str], None]


def chosen(only: Collection[str], skip: Collection[str]) -> list[str]:
    """The names of the analyses that are asked for.

    Raises:
        UnknownNameError: one is not installed; the message lists those that are.
    """
    known = installed()
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                raise UnknownNameError(f"{option}: unknown analysis {name!r}; known: {', '.join(known)}")
    return [name for name in known if (not only or name in only) and name not in skip]


def usable(only: Collection[str], skip: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The analyses that are asked for and can be imported, and why the others cannot be, by name.

    Raises:
        UnknownNameError: one of `only` cannot be imported, or a name is not installed.
    """
    names = chosen(only, skip)
    broken = broken_analyses(names)
    for name in only:
        if name in broken:
            raise UnknownNameError(broken[name])
    return [name for name in names if name not in broken], broken


def not_chosen(name: str, only: Collection[str]) -> str:
    """Why an analysis is not run although it could be."""
    return f"not asked for: --only {','.join(only)}" if only and name not in only else "left out by --skip"


def missing(record: Analysis, supplied: Collection[str]) -> str:
    """Which option would let an analysis run; empty when nothing is missing."""
    lacking = [name for name in record.inputs if name not in supplied]
    if any(name not in OPTIONS for name in lacking):
        unknown = next(name for name in lacking if name not in OPTIONS)
        return f"needs {unknown!r}, which this tunescope cannot supply"
    return "needs " + " and ".join(OPTIONS[name] for name in lacking) if lacking else ""


def unread_role_notes(rows: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Notes on the roles that were given and that nothing reads."""
    records = installed_analyses().values() if rows else ()
    notes = []
    for role in rows:
        readers = {record.name for record in records if role in (*record.inputs, *record.optional)}
        if not readers:
            notes.append(
                f"no installed analysis reads --{role}; the file is recorded and has no other effect"
            )
        elif not readers & set(names):
            notes.append(f"none of the analyses asked for reads --{role}; {', '.join(sorted(readers))} would")
    return tuple(notes)


def run_notes(series: "CheckpointSeries") -> tuple[str, ...]:
    """Which checkpoints a run has, where there are others than the two ends."""
    if len(series) < 3:
        return ()
    return (f"{len(series)} checkpoints of one run: {', '.join(series.labels)}",)


def adapter_notes(pair: "CheckpointPair") -> tuple[str, ...]:
    """Notes on the adapters among the checkpoints: how they are read, and whether they name another base."""
    notes = []
    for side in (pair.base, pair.tuned):
        facts = side.adapter or {}
        notes += [f"{side.ref}: {note}" for note in facts.get("notes", ())]
        named, base = facts.get("base"), side.base
        # Directories are moved and hub ids downloaded: the last part of the name is what stays.
        if named and base and base.directory and Path(named).name not in str(base.directory.resolve()):
            notes.append(
                f"{side.ref} was trained on {named!r} and is applied to {base.ref}: is that the same model?"
            )
    return tuple(dict.fromkeys(notes))


def check_settings(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings of what is not installed.

    Raises:
        UnknownNameError: the message lists what is.
    """
    for name in settings:
        if name not in installed():
            raise UnknownNameError(
                f"--set {name}.…: unknown analysis {name!r}; known: {', '.join(installed())}"
            )


def parameters(
    record: Analysis, settings: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters that an analysis will run with, defaults included, without those of its execution.

    Raises:
        UnknownNameError: a setting that it does not have; the message lists those that it has.
    """
    own = {name: p.default for name, p in record.parameters.items() if name not in EXECUTION}
    given = settings.get(record.name, {})
    for name in given:
        if name not in own:
            raise UnknownNameError(f"{record.name} has no parameter {name!r}; it has: {', '.join(own)}")
    shared = {
        name: value
        for name, value in common.items()
        if name in own and name not in record.unshared and value is not None
    }
    return {**own, **shared, **given}


def about(name: str) -> dict[str, Any]:
    """What an audit keeps of the registry, so that it reads without the package."""
    record = find(name)
    return {"question": record.question, "paper": record.paper}
