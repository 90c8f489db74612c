"""Runs a target on one input and holds it to its promises.

A reader may take an input or refuse it in one line that says which file is wrong. It may not raise anything
else, take a second or a gigabyte, open what lies outside of the directory that it was given, reach for the
network or start a program. What Python opens is seen by an audit hook; what libraries in other languages open
is seen by inotify on the decoys that every hostile path and link points to.
"""

import ctypes
import os
import resource
import shutil
import struct
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probes.errors import IncompleteError, InputError, NotApplicableError, UnknownNameError

# Seconds of processor time for one input; wall clock says little on a machine that does other work.
LONGEST = 1.0
# Growth of the largest resident memory by one input, bytes.
LARGEST = 2**30
# Characters of a message.
MESSAGE = 2000
# Wall clock after which a run is taken to hang for ever.
HANGS = 60

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = {os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix, _ROOT) if path} | {
    os.path.realpath(path) for path in sysconfig.get_paths().values()
}
_SYSTEM = ("/proc", "/sys", "/dev", "/usr/lib", "/usr/share/zoneinfo", "/etc/localtime", "/lib")
_ACTING = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
)
_IN_OPEN = 0x20


class FindingError(Exception):
    """A promise that a reader broke."""


class Watch:
    """Runs inputs through one target.

    Attributes:
        home: holds `inside`, which the target is given anew for each input, `outside`, which nobody may
            open, and `current`, the input of the run that is on.
        outcomes: how many inputs were taken and how many refused.
        slowest: seconds of processor time of the slowest input.
    """

    active: "Watch | None" = None
    _hooked = False

    def __init__(self, target: Callable[[bytes, Path], None], home: Path, prepare: Callable[[Path], None]):
        self.target = target
        self.home = Path(os.path.realpath(home))
        self.inside, self.outside = self.home / "inside", self.home / "outside"
        self.outside.mkdir(parents=True, exist_ok=True)
        prepare(self.home)
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0
        self.escapes: list[str] = []
        self.decoys = Decoys(self.outside)
        if not Watch._hooked:
            sys.addaudithook(_seen)
            Watch._hooked = True

    @property
    def runs(self) -> int:
        """How many inputs there were."""
        return self.outcomes.total()

    def __call__(self, data: bytes) -> None:
        """Run one input.

        Raises:
            FindingError: a promise was broken.
        """
        (self.home / "current").write_bytes(data)
        shutil.rmtree(self.inside, ignore_errors=True)
        self.inside.mkdir()
        self.escapes.clear()
        self.decoys.opened()
        before, began = peak(), time.process_time()
        Watch.active = self
        error: BaseException | None = None
        try:
            self.target(data, self.inside)
        except (Exception, SystemExit) as raised:
            error = raised
        finally:
            Watch.active = None
        seconds, grown = time.process_time() - began, peak() - before
        self.outcomes["refused" if error else "taken"] += 1
        self.slowest = max(self.slowest, seconds)
        if self.escapes or (opened := self.decoys.opened()):
            raise FindingError(f"went outside: {', '.join(self.escapes or opened)}") from error
        if error is not None and (problem := unclear(error)):
            raise FindingError(f"{problem}: {type(error).__name__}: {str(error)[:300]!r}") from error
        if seconds > LONGEST:
            raise FindingError(f"took {seconds:.1f} s") from error
        if grown > LARGEST:
            raise FindingError(f"took {grown / 1e9:.1f} GB") from error


def unclear(error: BaseException) -> str:
    """What is wrong with an error as the answer to a malformed file; empty if nothing is."""
    # A library's own ValueError or KeyError is a crash: no reader checked for its cause.
    if type(error) not in (InputError, IncompleteError, NotApplicableError, UnknownNameError):
        return "an error that no reader documents"
    text = str(error)
    if not text.isprintable():
        return "a message of several lines, or with characters that cannot be printed"
    if len(text) > MESSAGE:
        return f"a message of {len(text)} characters"
    if "inside" not in text and "base" not in text:
        return "a message that does not say which file"
    return ""


def peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limited(gigabytes: int = 6) -> None:
    """Keep a broken promise about memory from taking the machine with it."""
    resource.setrlimit(resource.RLIMIT_DATA, (gigabytes * 2**30, gigabytes * 2**30))


def _seen(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook: notes what a run opens, connects to or starts."""
    watch = Watch.active
    if watch is None:
        return
    if event in ("open", "os.listdir", "os.scandir"):
        path = args[0]
        if isinstance(path, str | bytes | os.PathLike):
            real = os.path.realpath(os.fsdecode(path))
            if not allowed(real, watch):
                watch.escapes.append(real)
    elif event in _ACTING:
        watch.escapes.append(f"{event} {args!r}"[:200])


def allowed(real: str, watch: Watch) -> bool:
    """Whether a run may open a path: its own directory, what was made for it to read, Python's libraries."""
    if real == str(watch.outside) or real.startswith(f"{watch.outside}/"):
        return False
    if real.startswith(f"{watch.home}/"):
        return True
    roots = (*_LIBRARIES, *_SYSTEM)
    return any(real == root or real.startswith(f"{root}/") for root in roots)


class Decoys:
    """Tells when a file of a directory is opened, by whatever library; blind where there is no inotify."""

    def __init__(self, directory: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self._file = -1
        if not hasattr(libc, "inotify_init1"):
            return
        self._file = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if libc.inotify_add_watch(self._file, os.fsencode(directory), _IN_OPEN) < 0:
            os.close(self._file)
            self._file = -1

    @property
    def watching(self) -> bool:
        """Whether the system tells of opened files."""
        return self._file >= 0

    def opened(self) -> list[str]:
        """The names opened since the last call."""
        if self._file < 0:
            return []
        try:
            events = os.read(self._file, 65536)
        except BlockingIOError:
            return []
        names, at = [], 0
        while at < len(events):
            _, _, _, length = struct.unpack_from("iIII", events, at)
            names.append(events[at + 16 : at + 16 + length].rstrip(b"\0").decode() or "the directory")
            at += 16 + length
        return names

    def close(self) -> None:
        """Stop watching."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
