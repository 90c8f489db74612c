"""Audits that visitors may start: of pairs that the server was started with, in a directory of their own.

A visitor chooses a pair and analyses by name. What is running lies apart from what is finished, so that no
half of an audit is ever on the shelf.
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

from dashboard.state.audit_library import AuditLibrary, Entry
from probes.errors import InputError, UnknownNameError

GOING = ".unfinished"
LINES = 200  # of the log that a page shows


@dataclass(frozen=True)
class Runs:
    """What may be run, and where.

    Attributes:
        directory: where audits are written; made if need be.
        pairs: base and tuned by the name that visitors know.
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
        """What runs Dash's background callbacks: every process that serves the app shares it."""
        from dash import DiskcacheManager
        from diskcache import Cache

        made = DiskcacheManager(Cache(str(self.directory / ".cache")))
        atexit.register(stop, made)
        return made

    def request(self, pair: Any, only: Any, limit: Any) -> dict[str, Any]:
        """What a visitor asks for, checked, as the arguments of `diagnostics.audit.audit` without `out`.

        Raises:
            UnknownNameError: a pair or an analysis that is not offered.
            InputError: a limit that is not a number of rows.
        """
        from diagnostics.core.registry import installed

        if not isinstance(pair, str) or pair not in self.pairs:
            raise UnknownNameError(f"there is no pair {pair!r} here; there are: {', '.join(self.pairs)}")
        names = list(only or [])
        for name in names:
            if name not in installed():
                raise UnknownNameError(f"unknown analysis {name!r}; known: {', '.join(installed())}")
        if limit in (None, ""):
            limit = None
        elif not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise InputError(f"{limit!r} rows cannot be read; give a whole number from 1")
        base, tuned = self.pairs[pair]
        return {
            "base": base,
            "tuned": tuned,
            "only": names,
            "limit": limit,
            "policy": self.policy,
            "device": self.device,
            **{role: list(files) for role, files in self.rows.items()},
        }

    def run(self, name: str, request: Mapping[str, Any], tell: Callable[[float, str, str], None]) -> str:
        """Run an audit in a process of its own; the name of the finished audit.

        Args:
            name: of the pair.
            request: see `request`.
            tell: called with the share that is done, what is being done, and the log.

        Raises:
            InputError: another audit is running, or this one came to nothing; the text says why.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.directory / ".lock", blocking=False):
                return self._run(name, request, tell)
        except Timeout:
            raise InputError("another audit is being run from here; wait for it, or cancel it") from None

    def _run(self, name: str, request: Mapping[str, Any], tell: Callable[[float, str, str], None]) -> str:
        """The run, once nobody else can run one."""
        shutil.rmtree(self.directory / GOING, ignore_errors=True)  # what was cancelled
        known = self.free(name)
        going = self.directory / GOING / known
        log = Log(tell)
        log.say("starting")
        command = [sys.executable, "-m", "dashboard.server.job", json.dumps({**request, "out": str(going)})]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace",
        ) as job:  # fmt: skip
            assert job.stdout is not None
            for line in job.stdout:
                log.take(line)
        if job.returncode or log.trouble:
            raise InputError(log.trouble or f"the audit ended with exit code {job.returncode}:\n{log.tail}")
        going.rename(self.directory / known)
        log.say("finished")
        return known

    def free(self, name: str) -> str:
        """A name that no audit has yet: the pair's, the time, a number if need be."""
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "audit"
        stamp = f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        known, n = stamp, 1
        while (self.directory / known).exists():
            n += 1
            known = f"{stamp}-{n}"
        return known

    def finished(self) -> list[Path]:
        """The directories of finished audits, the oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if (path / "audit.json").exists())

    def join(self, shelf: AuditLibrary) -> None:
        """Put finished audits that are not yet there on a shelf."""
        there = {entry.path.resolve() for entry in list(shelf.entries.values()) if entry.path}
        for path in self.finished():
            if path.resolve() not in there:
                shelf.add(path)

    def entry(self, shelf: AuditLibrary, known: Any) -> Entry | None:
        """The entry of a finished audit by its name here; None for any other name."""
        path = next((path.resolve() for path in self.finished() if path.name == known), None)
        found = (each for each in shelf.entries.values() if each.path and each.path.resolve() == path)
        return next(found, None) if path else None


def stop(manager: Any) -> None:
    """End what still runs: a server that is told to end would wait for it otherwise."""
    import multiprocess

    for process in multiprocess.active_children():
        manager.terminate_job(process.pid)


class Log:
    """What a running audit says, as a page shows it."""

    def __init__(self, tell: Callable[[float, str, str], None]):
        self.tell = tell
        self.lines: list[str] = []
        self.share = 0.0
        self.now = ""
        self.analysis = ""
        self.trouble = ""

    @property
    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self.lines[-LINES:])

    def say(self, text: str) -> None:
        """Add a line with the time, and tell of it."""
        self.lines.append(f"{datetime.now(UTC):%H:%M:%S} {text}")
        self.tell(self.share, self.now or text, self.tail)

    def take(self, line: str) -> None:
        """A line of the job: progress as JSON, or whatever a library prints."""
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict) or not said.keys() & {"analysis", "error", "verdict"}:
            if line.strip():
                self.say(line.rstrip())
            return
        if "error" in said:
            self.trouble = str(said["error"])
            self.say(self.trouble)
        elif "verdict" in said:
            self.share, self.now = 1.0, "done"
            self.say(f"verdict: {said['verdict']}")
        else:
            self.share = float(said["share"])
            self.now = f"{said['analysis']}: {said['done']} of {said['total']} {said['what']}".rstrip()
            if said["analysis"] != self.analysis:
                self.analysis = str(said["analysis"])
                self.say(self.analysis)
            else:
                self.tell(self.share, self.now, self.tail)


def pairs(given: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The pairs of `--pair "NAME=BASE TUNED"`, by name.

    Raises:
        InputError: one is written otherwise, or two share a name.
    """
    found: dict[str, tuple[str, str]] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        try:
            sides = shlex.split(rest)
        except ValueError as error:
            raise InputError(f"--pair {text!r}: {error}") from error
        if not name.strip() or not equals or len(sides) != 2:
            raise InputError(
                f'--pair {text!r}: write "NAME=BASE TUNED", with quotes around a path with spaces'
            )
        if name.strip() in found:
            raise InputError(f"--pair {text!r}: {name.strip()} is already the name of another pair")
        found[name.strip()] = (sides[0], sides[1])
    return found
