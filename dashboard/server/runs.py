"""Audits that visitors may start, of pairs that the server was started with.

Visitors choose a pair and analyses by name. A running audit lies in a separate directory, so that the
dashboard never shows a part of one.
"""

import atexit
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dashboard.state.audit_library import AuditLibrary, Entry, unused
from probes.errors import InputError, UnknownNameError

UNFINISHED = ".unfinished"
LINES = 200  # of the log on the page


@dataclass(frozen=True)
class Runs:
    """The audits that visitors may run.

    Attributes:
        directory: where audits are written; created if it does not exist.
        pairs: base and tuned by the name that visitors see.
        rows: files of rows by role, as `tunescope audit` takes them.
        policy: a TOML file of thresholds; the default policy otherwise.
        device: where models run.
    """

    directory: Path
    pairs: Mapping[str, tuple[str, str]]
    rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    policy: str | None = None
    device: str = "auto"

    def manager(self) -> Any:
        """Dash's manager of background callbacks, shared by every process that serves the app."""
        from dash import DiskcacheManager
        from diskcache import Cache

        manager = DiskcacheManager(Cache(str(self.directory / ".cache")))
        atexit.register(stop, manager)
        return manager

    def request(self, pair: Any, only: Any, limit: Any) -> dict[str, Any]:
        """The checked request of a visitor, as arguments of `diagnostics.audit.audit` without `out`.

        Raises:
            UnknownNameError: a pair or an analysis that is not offered.
            InputError: a limit that is not a number of rows, or analyses that are not a list.
        """
        from diagnostics.core.registry import installed

        if not isinstance(pair, str) or pair not in self.pairs:
            raise UnknownNameError(f"unknown pair {pair!r}; known: {', '.join(self.pairs)}")
        if not isinstance(only or [], list):
            raise InputError(f"analyses: {only!r} is not a list of names")
        names = list(only or [])
        for name in names:
            if name not in installed():
                raise UnknownNameError(f"unknown analysis {name!r}; known: {', '.join(installed())}")
        limit = None if limit == "" else limit
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise InputError(f"rows per file: {limit!r} is not a whole number of 1 or more")
        base, tuned = self.pairs[pair]
        options = {"only": names, "limit": limit, "policy": self.policy, "device": self.device}
        rows = {role: list(files) for role, files in self.rows.items()}
        return {"base": base, "tuned": tuned, **options, **rows}

    def run(self, name: str, request: Mapping[str, Any], report: Callable[[float, str, str], None]) -> str:
        """Run an audit in its own process and return the name of the finished audit.

        Args:
            name: the name of the pair.
            request: see `request`.
            report: called with the share that is done, the current activity, and the log.

        Raises:
            InputError: another audit is running, or this one failed.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.directory / ".lock", blocking=False):
                return self._run(name, request, report)
        except Timeout:
            raise InputError("another audit is running; wait for it, or cancel it") from None

    def _run(self, name: str, request: Mapping[str, Any], report: Callable[[float, str, str], None]) -> str:
        """Run an audit while holding the lock."""
        shutil.rmtree(self.directory / UNFINISHED, ignore_errors=True)  # what was cancelled
        finished = self.directory / self.unused_name(name)
        unfinished = self.directory / UNFINISHED / finished.name
        log = Log(report)
        log.add("starting")
        arguments = json.dumps({**request, "out": str(unfinished)})
        command = [sys.executable, "-m", "dashboard.server.job", arguments]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace",
        ) as job:  # fmt: skip
            assert job.stdout is not None
            for line in job.stdout:
                log.read(line)
        if job.returncode or log.error:
            raise InputError(log.error or f"the audit ended with exit code {job.returncode}:\n{log.tail}")
        unfinished.rename(finished)
        log.add("finished")
        return finished.name

    def unused_name(self, pair: str) -> str:
        """A name that no audit has yet: the pair, the time, and a number if necessary."""
        stem = re.sub(r"[^\w.-]+", "-", pair).strip("-.") or "audit"
        stamp = f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        return unused(stamp, lambda name: (self.directory / name).exists())

    def finished(self) -> list[Path]:
        """The directories of finished audits, sorted by name."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if (path / "audit.json").exists())

    def add_finished(self, library: AuditLibrary) -> None:
        """Add the finished audits that a library does not have yet."""
        present = {entry.path.resolve() for entry in list(library.entries.values()) if entry.path}
        for path in self.finished():
            if path.resolve() not in present:
                library.add(path)

    def entry(self, library: AuditLibrary, name: Any) -> Entry | None:
        """The entry of a finished audit; None for any other name."""
        path = next((path.resolve() for path in self.finished() if path.name == name), None)
        entries = (entry for entry in library.entries.values() if entry.path and entry.path.resolve() == path)
        return next(entries, None) if path else None


def stop(manager: Any) -> None:
    """End the background jobs: a server that stops would wait for them otherwise."""
    import multiprocess

    for process in multiprocess.active_children():
        manager.terminate_job(process.pid)


@dataclass
class Log:
    """The progress and the output of a running audit, as the page shows them."""

    report: Callable[[float, str, str], None]
    lines: list[str] = field(default_factory=list)
    share: float = 0.0
    now: str = ""
    analysis: str = ""
    error: str = ""

    @property
    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self.lines[-LINES:])

    def add(self, text: str) -> None:
        """Add a line with the time, and report it."""
        self.lines.append(f"{datetime.now(UTC):%H:%M:%S} {text}")
        self.report(self.share, self.now or text, self.tail)

    def read(self, line: str) -> None:
        """Read a line of the job: progress as JSON, or the output of a library."""
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not record.keys() & {"analysis", "error", "verdict"}:
            if line.strip():
                self.add(line.rstrip())
        elif "error" in record:
            self.error = str(record["error"])
            self.add(self.error)
        elif "verdict" in record:
            self.share, self.now = 1.0, "done"
            self.add(f"verdict: {record['verdict']}")
        else:
            self.share = float(record["share"])
            count = f"{record['done']} of {record['total']} {record['what']}"
            self.now = f"{record['analysis']}: {count}".rstrip()
            if record["analysis"] != self.analysis:
                self.analysis = str(record["analysis"])
                self.add(self.analysis)
            else:
                self.report(self.share, self.now, self.tail)


def pairs(options: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The pairs of `--pair "NAME=BASE TUNED"`, by name.

    Raises:
        InputError: an option has another form, or two share a name.
    """
    by_name: dict[str, tuple[str, str]] = {}
    for text in options:
        name, equals, rest = text.partition("=")
        try:
            sides = shlex.split(rest)
        except ValueError as error:
            raise InputError(f"--pair {text!r}: {error}") from error
        if not name.strip() or not equals or len(sides) != 2:
            raise InputError(f'--pair {text!r}: write "NAME=BASE TUNED"; quote a path that has spaces')
        if name.strip() in by_name:
            raise InputError(f"--pair {text!r}: another pair is already named {name.strip()}")
        by_name[name.strip()] = (sides[0], sides[1])
    return by_name
