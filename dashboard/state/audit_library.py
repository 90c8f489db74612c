"""The audits that a dashboard shows: a fixed set, known to its visitors by id and never by path.

Audits are read when they are first looked at, and again when they change on disk. One that cannot be read is
shown as damaged, and the others work.
"""

import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dashboard.state.query import Query
from diagnostics.store.audit_store import Audit, load
from probes.errors import InputError
from probes.files.untrusted import confined, read_json

log = logging.getLogger(__name__)

NAMES = ("audit.json", "series.json")


@dataclass
class Entry:
    """One audit, or a series of them.

    Attributes:
        id: how addresses call it.
        path: its directory; None for an audit that is only in memory.
        kind: whether it is one audit or a series.
        series: the id of the series that it is part of, if it is part of one.
    """

    id: str
    path: Path | None = None
    kind: str = "audit"
    series: str = ""
    held: Audit | None = None
    stamp: Any = None
    trouble: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def file(self) -> Path | None:
        """The file that makes the directory what it is."""
        return None if self.path is None else self.path / f"{self.kind}.json"

    @property
    def version(self) -> Any:
        """Changes whenever the audit changes."""
        self.refresh()
        return self.stamp

    @property
    def audit(self) -> Audit | None:
        """The audit, or None when it cannot be read; `damage` then says why."""
        self.refresh()
        return self.held

    @property
    def damage(self) -> str:
        """Why it cannot be read; empty when it can."""
        self.refresh()
        return self.trouble

    def refresh(self) -> None:
        """Read the audit unless that was done since it was last written."""
        if self.path is None or self.kind != "audit":
            return
        with self.lock:
            stamp = written(self.file)
            if stamp == self.stamp and (self.held or self.trouble):
                return
            self.held, self.trouble, self.stamp = None, "", stamp
            try:
                self.held = load(self.path)
            except Exception as error:  # half-written tables break in the ways of many libraries
                log.warning("%s: cannot be read: %r", self.id, error)
                self.trouble = str(error) or type(error).__name__


def written(file: Path | None) -> Any:
    """When and how a file was last written; None if it is not there."""
    try:
        about = file.stat() if file else None
    except OSError:
        return None
    return about and (about.st_mtime_ns, about.st_size, about.st_ino)


class AuditLibrary:
    """The entries by id, in order.

    Args:
        audits: directories of audits, of series, or that hold some; audits in memory; or names for these.

    Raises:
        InputError: a path that does not exist, or a directory without any audit.
    """

    def __init__(self, audits: "Sequence[str | Path | Audit] | Mapping[str, str | Path | Audit]" = ()):
        self.entries: dict[str, Entry] = {}
        if isinstance(audits, str | Path | Audit):
            audits = [audits]
        named = audits.items() if isinstance(audits, Mapping) else [("", given) for given in audits]
        for name, given in named:
            if isinstance(given, Audit):
                self._put(name or Path(str(given.tuned.get("ref", "audit"))).name, held=given)
            else:
                self.add(given, name)

    def add(self, path: str | Path, name: str = "") -> list[Entry]:
        """Put what a directory holds on the shelf: an audit, a series with its audits, or several of these.

        Raises:
            InputError: it does not exist, or holds no audit.
        """
        given = Path(path)
        directory = given.parent if given.name in NAMES else given
        if not directory.exists():
            raise InputError(f"{path}: does not exist; give the directory of an audit")
        if (directory / "series.json").exists():
            return self._series(directory, name)
        if (directory / "audit.json").exists() or (directory / "tables").is_dir():
            return [self._put(name or directory.resolve().name, path=directory)]
        found = [entry for each in holding(directory) for entry in self.add(each)]
        if not found:
            raise InputError(
                f"{path}: no audit here; `tunescope audit BASE TUNED --out {path}` would write one"
            )
        return found

    def _series(self, directory: Path, name: str) -> list[Entry]:
        """A series and its audits."""
        top = self._put(name or directory.resolve().name, path=directory, kind="series")
        parts = sorted(each for each in directory.iterdir() if (each / "audit.json").exists())
        return [top, *(self._put(f"{top.id}/{each.name}", path=each, series=top.id) for each in parts)]

    def _put(self, name: str, **about: Any) -> Entry:
        """A new entry, with an id of its own."""
        stem = re.sub(r"[^\w./-]+", "-", name).strip("-") or "audit"
        known, n = stem, 1
        while known in self.entries:
            n += 1
            known = f"{stem}-{n}"
        self.entries[known] = Entry(id=known, **about)
        return self.entries[known]

    def find(self, known: str) -> Entry | None:
        """The entry with an id, if there is one."""
        return self.entries.get(known)

    def meant(self, query: Query) -> Entry | None:
        """The entry that an address names, or means by naming none: the only one."""
        alone = [*self.audits, *self.series]
        known = query.one("audit")
        return alone[0] if not known and len(alone) == 1 else self.find(known)

    @property
    def audits(self) -> list[Entry]:
        """The audits that stand for themselves, not for a step of a series."""
        return [entry for entry in self.entries.values() if entry.kind == "audit" and not entry.series]

    @property
    def series(self) -> list[Entry]:
        """The series."""
        return [entry for entry in self.entries.values() if entry.kind == "series"]

    def parts(self, series: str) -> list[Entry]:
        """The audits of a series."""
        return [entry for entry in self.entries.values() if entry.series == series]


def holding(directory: Path) -> list[Path]:
    """The directories of audits and series that lie directly in a directory."""
    return sorted(
        each
        for each in directory.iterdir()
        if each.is_dir() and any((each / name).exists() for name in NAMES)
    )


def nearby(directory: Path) -> Iterable[Path]:
    """What a person who names no audit most likely means: those here, or one level down."""
    if any((directory / name).exists() for name in NAMES):
        return [directory]
    return holding(directory)


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
