"""What an audit supplies to its analyses: the pair, the series that it is of, and tasks by role.

An analysis names its inputs by the names of its positional arguments; `OPTIONS` says what supplies each. A
role reaches it as its tasks by name, whole and checked; called from Python it takes any of `Source`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from probes.errors import InputError
from probes.text.rows import Task, read_task, task_of

# What names the rows of a role: a task, a file or `hub-dataset:split`, texts, or several of these by name.
Source: TypeAlias = "Task | str | Path | Iterable[str | Mapping[str, Any]]"

# input -> the option that supplies it
OPTIONS = {
    "pair": "BASE TUNED",
    "task": "--task F",
    "keep": "--keep F",
    "guard": "--guard F",
    "ood": "--ood NAME=F",
    "train": "--train F",
    "series": "CKPT CKPT…",
}
ROLES = ("task", "keep", "guard", "ood", "train")


@dataclass(frozen=True, kw_only=True)
class NamedTask:
    """One task in one role.

    Attributes:
        name: what results call it; the file's own name unless `--ood NAME=F` gives one.
        ref: as it was asked for.
    """

    name: str
    ref: str
    task: Task

    def describe(self) -> dict[str, Any]:
        """What an audit records of it."""
        return {
            "name": self.name,
            "ref": self.ref,
            "fingerprint": self.task.fingerprint,
            "rows": len(self.task.rows),
        }


def open_roles(
    files: Mapping[str, str | Path | Iterable[str | Path]], *, limit: int | None = None
) -> dict[str, tuple[NamedTask, ...]]:
    """The tasks of each role that has any, checked.

    Args:
        files: role -> a reference, or several; one of `ood` may be `NAME=F`.
        limit: read the first so many rows of each only.

    Raises:
        InputError: a missing, empty or malformed file, one name twice in a role, or one text that is to be
            both in and out of distribution.
    """
    opened = {}
    for role, refs in files.items():
        several = [refs] if isinstance(refs, str | Path) else refs  # one file may be given as it is
        opened[role] = tuple(open_rows(role, str(ref), limit=limit) for ref in several)
    for role, rows in opened.items():
        names = [made.name for made in rows]
        for name in names:
            if names.count(name) > 1:
                hint = "give each a name, --ood NAME=F" if role == "ood" else "rename one of the files"
                raise InputError(f"--{role}: two files are called {name!r}; {hint}")
    for made in opened.get("task", ()):
        for other in opened.get("ood", ()):
            if made.task.fingerprint == other.task.fingerprint:
                raise InputError(
                    f"--task {made.ref} and --ood {other.ref} hold the same rows; what is in distribution "
                    "cannot be out of it: give another file for one of them"
                )
    return {role: rows for role, rows in opened.items() if rows}


def open_rows(role: str, ref: str, *, limit: int | None = None) -> NamedTask:
    """Read and check one task.

    Raises:
        InputError: it is missing, empty or malformed; the message names the file, the line and the field.
    """
    name, place = "", ref
    if role == "ood" and "=" in ref and not Path(ref).exists():
        name, _, place = ref.partition("=")
    try:
        task = read_task(place, limit=limit)
    except ValueError as error:
        if Path(place).is_file():
            raise  # begins with the file and the line
        raise InputError(f"--{role} {error}") from error
    stem = Path(place).stem if Path(place).is_file() else place
    return NamedTask(name=name or stem, ref=ref, task=task)


def tasks(given: "Source | Mapping[str, Source]", role: str) -> dict[str, Task]:
    """The tasks of a role by name, whatever form they were given in.

    Raises:
        InputError: as `open_rows`, or nothing was given.
    """
    if isinstance(given, Mapping):
        made = {str(name): one_task(source, str(name)) for name, source in given.items()}
    else:
        task = one_task(given, role)
        made = {Path(task.ref).stem if Path(task.ref).is_file() else task.ref: task}
    if not made:
        raise InputError(f"{role} is empty; give a task, or several by name")
    return made


def one_task(source: Source, name: str) -> Task:
    """One task out of whatever names its rows; texts in memory are called `name`."""
    if isinstance(source, Task):
        return source
    return read_task(source) if isinstance(source, str | Path) else task_of(source, ref=name)


def check_input_types(analysis: str, inputs: Mapping[str, Any]) -> None:
    """Refuse a pair or a series of another type; say what was given, what is wanted, and how to make it.

    >>> check_input_types("intruders", {"pair": ("base", "tuned")})
    Traceback (most recent call last):
    probes.errors.InputError: intruders: pair is a tuple; it takes a CheckpointPair: ...
    """
    for name, value in inputs.items():
        if name == "pair" and not (hasattr(value, "base") and hasattr(value, "tuned")):
            wanted, example = "a CheckpointPair", "CheckpointPair(base, tuned)"
        elif name == "series" and not is_series(value):
            wanted, example = "a CheckpointSeries or a list of checkpoints in order", "[first, second, last]"
            if hasattr(value, "tuned"):
                example = "[pair.base, pair.tuned]"
        else:
            continue
        kind = "None" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{analysis}: {name} is {kind}; it takes {wanted}: {example}")


def is_series(value: Any) -> bool:
    """Whether `probes.checkpoints.series.series_of` can make a series of a value."""
    several = isinstance(value, Iterable) and not isinstance(value, Mapping)
    return hasattr(value, "checkpoints") or several or isinstance(value, Path)
