"""What an audit supplies to its analyses: the pair, its series, and tasks by role.

The positional arguments of an analysis name its inputs; `OPTIONS` says what supplies each. An audit supplies
a role as checked tasks by name; a call from Python may give any `Source`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from probes.errors import InputError
from probes.text.rows import Task, read_task, task_of

# Rows of a role: a task, a file or `hub-dataset:split`, or texts. Several are given by name.
Source: TypeAlias = "Task | str | Path | Iterable[str | Mapping[str, Any]]"

Files: TypeAlias = str | Path | Iterable[str | Path]  # of rows, as an audit takes them

# input -> the option that supplies it
OPTIONS = {
    "pair": "BASE TUNED", "task": "--task F", "keep": "--keep F", "guard": "--guard F", "ood": "--ood NAME=F",
    "train": "--train F", "series": "CKPT CKPT…", "adapter": "--adapter A",
}  # fmt: skip
ROLES = ("task", "keep", "guard", "ood", "train")


@dataclass(frozen=True, kw_only=True)
class NamedTask:
    """One task in one role."""

    name: str  # what results call it; the file's own name unless `--ood NAME=F` gives one
    ref: str  # as the user wrote it
    task: Task

    def describe(self) -> dict[str, Any]:
        """The task as an audit records it."""
        fingerprint, rows = self.task.fingerprint, len(self.task.rows)
        return {"name": self.name, "ref": self.ref, "fingerprint": fingerprint, "rows": rows}


def open_roles(files: Mapping[str, Files], *, limit: int | None = None) -> dict[str, tuple[NamedTask, ...]]:
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
        names = [named.name for named in rows]
        for name in names:
            if names.count(name) > 1:
                hint = "give each a name, --ood NAME=F" if role == "ood" else "rename one of the files"
                raise InputError(f"--{role}: two files are called {name!r}; {hint}")
    for inside in opened.get("task", ()):
        for outside in opened.get("ood", ()):
            if inside.task.fingerprint == outside.task.fingerprint:
                raise InputError(
                    f"--task {inside.ref} and --ood {outside.ref} hold the same rows; rows in distribution "
                    "cannot be out of it: give another file for one of them"
                )
    return {role: rows for role, rows in opened.items() if rows}


def open_rows(role: str, ref: str, *, limit: int | None = None) -> NamedTask:
    """Read and check one task."""
    name, path = "", ref
    if role == "ood" and "=" in ref and not Path(ref).exists():
        name, _, path = ref.partition("=")
    try:
        task = read_task(path, limit=limit)
    except ValueError as error:
        if Path(path).is_file():
            raise  # begins with the file and the line
        raise InputError(f"--{role} {error}") from error
    stem = Path(path).stem if Path(path).is_file() else path
    return NamedTask(name=name or stem, ref=ref, task=task)


def tasks(sources: "Source | Mapping[str, Source]", role: str) -> dict[str, Task]:
    """The tasks of a role by name, from one source or several."""
    if isinstance(sources, Mapping):
        by_name = {str(name): task_from(source, str(name)) for name, source in sources.items()}
    else:
        task = task_from(sources, role)
        by_name = {Path(task.ref).stem if Path(task.ref).is_file() else task.ref: task}
    if not by_name:
        raise InputError(f"{role} is empty; give a task, or several by name")
    return by_name


def task_from(source: Source, name: str) -> Task:
    """The task that a source names; texts in memory are called `name`."""
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
