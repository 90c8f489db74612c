"""What an audit supplies to its analyses: the pair, its series, and tasks by role.

The positional arguments of an analysis name its inputs; `OPTIONS` says what supplies each. An audit supplies
a role as checked tasks by name; a call from Python may give any `Source`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from probes.errors import InputError
from probes.text.rows import SUFFIXES, TABLES, Task, local, read_task, task_of

# Rows of a role: a task, a file or `hub-dataset:split`, or texts. Several are given by name, files in a list.
Source: TypeAlias = "Task | str | Path | Iterable[str | Path | Mapping[str, Any]]"

Files: TypeAlias = str | Path | Iterable[str | Path]  # of rows, as an audit takes them

# input -> the option that supplies it
OPTIONS = {
    "pair": "BASE TUNED", "task": "--task F", "keep": "--keep F", "guard": "--guard F", "ood": "--ood NAME=F",
    "train": "--train F", "series": "CKPT CKPT…", "adapter": "--adapter A",
}  # fmt: skip
ROLES = ("task", "keep", "guard", "ood", "train")
# Characters of a path; a longer string is a text.
LONGEST_PATH = 4096


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
    """The tasks of a role by name, from one source or several; files in a list are called by their names.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> list(tasks([BUNDLED / "task.jsonl", BUNDLED / "keep.jsonl"], "task"))
    ['task', 'keep']
    """
    if isinstance(sources, Mapping):
        by_name = {str(name): task_from(source, str(name)) for name, source in sources.items()}
    else:
        items = listed(sources)
        files = files_among(items, role) if items is not None else None
        source = sources if items is None else items
        read = [task_from(source, role)] if files is None else map(read_task, files)
        by_name = {}
        for task in read:
            name = Path(task.ref).stem if Path(task.ref).is_file() else task.ref
            if name in by_name:
                raise InputError(
                    f"{role}: two files are called {name!r}, {by_name[name].ref} and {task.ref}; give each a "
                    'name, {"first": …, "second": …}'
                )
            by_name[name] = task
    if not by_name:
        raise InputError(f"{role} is empty; give a task, or several by name")
    return by_name


def task_from(source: Source, name: str) -> Task:
    """The task that a source names; texts in memory are called `name`."""
    if isinstance(source, Task):
        return source
    if isinstance(source, str | Path):
        return read_task(source)
    items = listed(source)
    assert items is not None
    files = files_among(items, name)
    if files is None:
        return task_of(items, ref=name)
    if len(files) > 1:
        raise InputError(f"{name}: is a list of {len(files)} files; give each a name of its own, or one file")
    return read_task(files[0])


def listed(source: Any) -> list[Any] | None:
    """The items of a source that is neither a task nor one reference; None for these."""
    if isinstance(source, str | Path | Task):
        return None
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise InputError(f"rows are a {type(source).__name__}; give a file, a list of texts or a task")
    return list(source)


def files_among(items: Sequence[Any], name: str) -> list[str | Path] | None:
    """The items if they are all files, None if none is; a mixture is refused."""
    files = [item for item in items if names_file(item)]
    if not files:
        return None
    if len(files) < len(items):
        other = next(item for item in items if not names_file(item))
        raise InputError(
            f"{name}: {str(files[0])!r} is a file and {str(other)!r:.60} is none; give a list of files, or "
            'one of rows, with a text as {"text": …}'
        )
    return files


def names_file(item: Any) -> bool:
    """Whether an item of a list is a path, not a text: a `Path`, a file that exists, or `name.jsonl`."""
    if isinstance(item, Path):
        return True
    if not isinstance(item, str) or not item or "\n" in item or len(item) > LONGEST_PATH:
        return False
    try:
        exists = local(item).is_file()
    except (InputError, ValueError, OSError):  # no name that a file could have
        return False
    return exists or (not any(map(str.isspace, item)) and item.lower().endswith((*SUFFIXES, *TABLES)))


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
