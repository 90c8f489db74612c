"""The audits that a dashboard shows: known to visitors by id, never by path.

An audit is read when it is first requested, and again when it changes on disk. One that cannot be read is
shown as damaged and does not affect the others.
"""

import itertools
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dashboard.state.query import Query
from diagnostics.store.audit_store import Audit, load
from probes.errors import InputError
from probes.files.untrusted import confined, read_json

log = logging.getLogger(__name__)

FILES = ("audit.json", "series.json")


@dataclass
class Entry:
    """One audit, or a series of them.

    Attributes:
        id: its name in addresses.
        path: its directory; None for an audit in memory.
        kind: `audit` or `series`.
        series: the id of the series that it belongs to, if any.
    """

    id: str
    path: Path | None = None
    kind: str = "audit"
    series: str = ""
    held: Audit | None = None
    stamp: Any = None
    error: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def version(self) -> Any:
        """Changes whenever the audit changes."""
        self.refresh()
        return self.stamp

    @property
    def audit(self) -> Audit | None:
        """The audit, or None when it cannot be read; `damage` then has the reason."""
        self.refresh()
        return self.held

    @property
    def damage(self) -> str:
        """Why it cannot be read; empty when it can."""
        self.refresh()
        return self.error

    def refresh(self) -> None:
        """Read the audit, unless it was read since it was last written."""
        if self.path is None or self.kind != "audit":
            return
        with self.lock:
            stamp = file_stamp(self.path / "audit.json")
            if stamp == self.stamp and (self.held or self.error):
                return
            self.held, self.error, self.stamp = None, "", stamp
            try:
                self.held = load(self.path)
            except Exception as error:  # many libraries read the tables, and each fails in its own way
                log.warning("%s: cannot be read: %r", self.id, error)
                self.error = str(error) or type(error).__name__


def file_stamp(file: Path) -> Any:
    """The time, size and inode of a file; None if it does not exist."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class AuditLibrary:
    """The audits and series by id, in order.

    Args:
        audits: directories of audits, of series, or of several of these; audits in memory; or either by name.

    Raises:
        InputError: a path does not exist, or a directory has no audit.
    """

    def __init__(self, audits: "Sequence[str | Path | Audit] | Mapping[str, str | Path | Audit]" = ()):
        self.entries: dict[str, Entry] = {}
        if isinstance(audits, str | Path | Audit):
            audits = [audits]
        named = audits.items() if isinstance(audits, Mapping) else [("", source) for source in audits]
        for name, source in named:
            if isinstance(source, Audit):
                self._insert(name or Path(str(source.tuned.get("ref", "audit"))).name, held=source)
            else:
                self.add(source, name)

    def add(self, path: str | Path, name: str = "") -> list[Entry]:
        """Add what a directory holds: an audit, a series with its audits, or several of these.

        Raises:
            InputError: it does not exist, or has no audit.
        """
        source = Path(path)
        directory = source.parent if source.name in FILES else source
        if not directory.exists():
            raise InputError(f"{path}: does not exist; give the directory of an audit")
        if (directory / "series.json").exists():
            return self._add_series(directory, name)
        if (directory / "audit.json").exists() or (directory / "tables").is_dir():
            return [self._insert(name or directory.resolve().name, path=directory)]
        entries = [entry for child in audit_directories(directory) for entry in self.add(child)]
        if not entries:
            hint = f"`tunescope audit BASE TUNED --out {path}` would write one"
            raise InputError(f"{path}: no audit here; {hint}")
        return entries

    def _add_series(self, directory: Path, name: str) -> list[Entry]:
        """Add a series and its audits."""
        top = self._insert(name or directory.resolve().name, path=directory, kind="series")
        children = sorted(child for child in directory.iterdir() if (child / "audit.json").exists())
        entries = [self._insert(f"{top.id}/{child.name}", path=child, series=top.id) for child in children]
        return [top, *entries]

    def _insert(self, name: str, **fields: Any) -> Entry:
        """Add an entry under an unused id."""
        stem = re.sub(r"[^\w./-]+", "-", name).strip("-") or "audit"
        entry_id = unused(stem, self.entries.__contains__)
        return self.entries.setdefault(entry_id, Entry(id=entry_id, **fields))

    def find(self, entry_id: str) -> Entry | None:
        """The entry with an id, if there is one."""
        return self.entries.get(entry_id)

    def selected(self, query: Query) -> Entry | None:
        """The entry that an address names; without a name, the only one there is."""
        entry_id = query.value("audit")
        top = [*self.audits, *self.series]
        return top[0] if not entry_id and len(top) == 1 else self.find(entry_id)

    @property
    def audits(self) -> list[Entry]:
        """The audits that are not part of a series."""
        return [entry for entry in self.entries.values() if entry.kind == "audit" and not entry.series]

    @property
    def series(self) -> list[Entry]:
        """The series."""
        return [entry for entry in self.entries.values() if entry.kind == "series"]

    def parts(self, series: str) -> list[Entry]:
        """The audits of a series."""
        return [entry for entry in self.entries.values() if entry.series == series]


def unused(stem: str, is_used: Callable[[str], bool]) -> str:
    """A name that is not used yet: the stem, with a number from 2 on if necessary."""
    names = (stem if n == 1 else f"{stem}-{n}" for n in itertools.count(1))
    return next(name for name in names if not is_used(name))


def audit_directories(directory: Path) -> list[Path]:
    """The directories of audits and series directly inside a directory."""
    children = (child for child in directory.iterdir() if child.is_dir())
    return sorted(child for child in children if any((child / name).exists() for name in FILES))


def nearby(directory: Path) -> list[Path]:
    """The audits to show when none is named: a directory itself, or those directly inside."""
    if any((directory / name).exists() for name in FILES):
        return [directory]
    return audit_directories(directory)


def read_series(entry: Entry) -> dict[str, Any]:
    """The contents of series.json.

    Raises:
        InputError: it is damaged.
    """
    assert entry.path is not None
    try:
        record = read_json(confined(entry.path / "series.json", entry.path, "series"))
        if not isinstance(record.get("checkpoints"), list):
            raise InputError("checkpoints is not a list")
    except ValueError as error:
        raise InputError(f"series.json of {entry.id}: damaged: {error}") from error
    return record
