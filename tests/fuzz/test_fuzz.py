"""The short form of `make fuzz`, and what it rests on: that a broken promise is seen."""

import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from probes.errors import InputError


@pytest.fixture
def watch(tmp_path):
    """Makes a watch over a made-up reader."""
    from tests.fuzz.watch import Watch

    def watch(read):
        return Watch(read, tmp_path, lambda home: (home / "outside" / "secret").write_text("secret") and None)

    return watch


@pytest.mark.parametrize(
    "name",
    [
        *("safetensors", "model", "pair", "adapter", "torch", "mask"),
        *("jsonl", "csv", "audit", "table", "series", "policy"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_reader_takes_a_malformed_file_or_refuses_it_in_one_line(name, tmp_path, monkeypatch):
    from tests.fuzz import watch as module
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import Watch

    # Here an input that hangs is found; `make fuzz`, alone on its machine, asks for a second.
    monkeypatch.setattr(module, "LONGEST", 30.0)
    target = TARGETS[name]
    watch = Watch(target.read, tmp_path, target.prepare)

    @settings(
        max_examples=100, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.inputs)
    def tried(data):
        watch(data)

    tried()
    assert watch.outcomes["taken"] > 0, "no input was good, so nothing behind the first check was tried"
    assert watch.outcomes["refused"] > 0


def test_every_reader_is_in_the_short_form():
    from tests.fuzz.targets import TARGETS

    (mark, *_) = (
        mark
        for mark in test_a_reader_takes_a_malformed_file_or_refuses_it_in_one_line.pytestmark
        if mark.name == "parametrize"
    )
    assert set(mark.args[1]) == set(TARGETS)


def test_a_clear_refusal_is_no_finding(watch):
    def refuse(data, directory):
        raise InputError(f"{directory}/x: damaged")

    watched = watch(refuse)
    watched(b"")
    assert watched.outcomes == {"refused": 1}


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (KeyError("x"), "an error that no reader documents"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "inside"), "an error that no reader documents"),
        (RecursionError("inside"), "an error that no reader documents"),
        (ValueError("inside"), "no reader documents"),
        (InputError("inside\nmore"), "several lines"),
        (InputError("inside\x1b[2J"), "cannot be printed"),
        (InputError("inside" * 1000), "a message of 6000 characters"),
        (InputError("bad"), "does not say which file"),
    ],
)
def test_an_unclear_error_is_a_finding(watch, error, match):
    from tests.fuzz.watch import FindingError

    def broken(data, directory):
        raise error

    with pytest.raises(FindingError, match=match):
        watch(broken)(b"")


def by_python(directory: Path) -> None:
    (directory / "../outside/secret").read_text()


def by_link(directory: Path) -> None:
    (directory / "x").symlink_to("../outside/secret")
    (directory / "x").read_text()


def by_the_system(directory: Path) -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    libc.close(libc.open(os.fsencode(directory.parent / "outside" / "secret"), os.O_RDONLY))


def elsewhere(directory: Path) -> None:
    Path("/etc/hostname").read_bytes()


def by_a_program(directory: Path) -> None:
    subprocess.run(["true"], check=True)


@pytest.mark.parametrize("leave", [by_python, by_link, by_the_system, elsewhere, by_a_program])
def test_leaving_the_directory_is_a_finding_by_whatever_way(watch, leave):
    from tests.fuzz.watch import FindingError

    watched = watch(lambda data, directory: leave(directory))
    if leave is by_the_system and not watched.decoys.watching:
        pytest.skip("no inotify here: what C opens is not seen")
    with pytest.raises(FindingError, match="went outside"):
        watched(b"")


def test_what_lies_in_the_directory_may_be_read(watch):
    def read(data, directory):
        (directory / "x").write_bytes(data)
        assert (directory / "x").read_bytes() == b"1"

    watched = watch(read)
    watched(b"1")
    assert watched.outcomes == {"taken": 1}


def test_a_second_of_work_is_a_finding(watch, monkeypatch):
    from tests.fuzz.watch import FindingError

    clock = iter((0.0, 1.5))
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    with pytest.raises(FindingError, match=r"took 1\.5 s"):
        watch(lambda data, directory: None)(b"")


def test_a_gigabyte_is_a_finding(watch, monkeypatch):
    from tests.fuzz import watch as module

    sizes = iter((2**30, 2**31 + 2**20))
    monkeypatch.setattr(module, "peak", lambda: next(sizes))
    with pytest.raises(module.FindingError, match=r"took 1\.1 GB"):
        watch(lambda data, directory: None)(b"")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
