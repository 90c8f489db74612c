"""Malformed files by the thousand: `make fuzz`, or `python -m tests.fuzz TARGET…` for some of the readers.

Each reader has a process of its own, a share of its time for Hypothesis and the rest for atheris, which
follows coverage; half of what atheris makes are raw bytes, half steer the generators of Hypothesis. The first
broken promise ends the run of an engine: the input is kept in `fuzz-findings/`, and the exit code is 1.
"""

import argparse
import faulthandler
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads them once. An adapter may name a base on the hub, for
# which a user's token would be looked up.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"

SECONDS = int(os.environ.get("FUZZ_SECONDS", "30"))
# Of a reader's time, what Hypothesis has.
SHARE = 0.4
# Inputs of one run of Hypothesis, after which it forgets what it has tried.
ROUND = 500
FINDINGS = Path("fuzz-findings")
# What atheris follows coverage in.
INSTRUMENTED = [
    "probes",
    "diagnostics.store.audit_store",
    "diagnostics.store.files",
    "diagnostics.core.policy",
    "dashboard.state.steps",
]
# Written this often, because atheris ends its process without a word.
EVERY = 50


def main() -> None:
    """Run every reader, or one of them inside of its own process."""
    if "atheris" in sys.argv:  # it must see the readers being imported
        import atheris

        with atheris.instrument_imports(include=INSTRUMENTED):
            from tests.fuzz.targets import TARGETS
    else:
        from tests.fuzz.targets import TARGETS

    logging.disable()
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="malformed files by the thousand"
    )
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all where none is named")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time of each reader")
    parser.add_argument(
        "--only", choices=("hypothesis", "atheris"), help="one engine, inside of this process"
    )
    parser.add_argument("--home", type=Path, help="where inputs are laid out")
    asked = parser.parse_args()
    unknown = [name for name in asked.targets if name not in TARGETS]
    if unknown:
        parser.error(f"unknown reader {unknown[0]!r}; known: {', '.join(TARGETS)}")
    if asked.only:
        {"hypothesis": by_hypothesis, "atheris": by_atheris}[asked.only](
            asked.targets[0], asked.seconds, asked.home
        )
        return
    raise SystemExit(all_of(asked.targets or list(TARGETS), asked.seconds))


def all_of(names: list[str], seconds: int) -> int:
    """Fuzz readers in turn and print what came of it; 1 when a promise was broken."""
    engines = {"hypothesis": round(seconds * SHARE), "atheris": seconds - round(seconds * SHARE)}
    if find_spec("atheris") is None:
        print("atheris is not installed (pip install 'tunescope[fuzz]'): Hypothesis alone")
        engines = {"hypothesis": seconds}
    print(
        f"{'reader':<12} {'inputs':>8} {'taken':>7} {'refused':>8} {'slowest s':>9} {'peak GB':>8} {'s':>8}"
    )
    findings: list[str] = []
    totals: Counter[str] = Counter()
    for name in names:
        counts: Counter[str] = Counter()
        slowest = peak = 0.0
        began = time.monotonic()
        for engine, share in engines.items():
            numbers, problem = one_of(name, engine, share)
            counts.update({key: numbers[key] for key in ("taken", "refused")})
            slowest, peak = max(slowest, numbers["slowest"]), max(peak, numbers["peak"])
            if problem:
                findings.append(problem)
        totals.update(counts)
        took = time.monotonic() - began
        print(
            f"{name:<12} {counts.total():>8} {counts['taken']:>7} {counts['refused']:>8} {slowest:>9.2f} "
            f"{peak / 1e9:>8.2f} {took:>8.0f}",
            flush=True,
        )
    print(f"{'all':<12} {totals.total():>8} {totals['taken']:>7} {totals['refused']:>8}")
    for finding in findings:
        print(finding, file=sys.stderr)
    return 1 if findings else 0


def one_of(name: str, engine: str, seconds: int) -> tuple[dict[str, Any], str]:
    """Fuzz a reader in another process: its numbers, and what it found with the input that did it."""
    from tests.fuzz.watch import HANGS

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
        command = [sys.executable, "-m", "tests.fuzz", name, "--only", engine, "--seconds", str(seconds)]
        try:
            done = subprocess.run(
                [*command, "--home", home], capture_output=True, text=True, errors="replace",
                timeout=seconds + 2 * HANGS,
            )  # fmt: skip
            # atheris tells of exceptions on the one, of everything else on the other.
            ended, output = done.returncode, done.stderr + done.stdout
        except subprocess.TimeoutExpired as error:
            ended, output = "hangs", (error.stderr or b"").decode(errors="replace")
        numbers = {"taken": 0, "refused": 0, "slowest": 0.0, "peak": 0}
        if (Path(home) / "numbers").exists():
            numbers |= json.loads((Path(home) / "numbers").read_text())
        if ended == 0:
            return numbers, ""
        FINDINGS.mkdir(exist_ok=True)
        kept = FINDINGS / f"{name}-{engine}-{time.time_ns()}"
        for part in ("current", "seed"):
            if (Path(home) / part).exists():
                shutil.copy(Path(home) / part, kept)
                break
        kept.with_suffix(".txt").write_text(output)
        lines = [line for line in output.splitlines() if "FindingError: " in line]
        return numbers, f"{name} ({engine}, {ended}): {lines[-1] if lines else 'it crashed'}; input in {kept}"


def watched(name: str, home: Path) -> Any:
    """A reader with its watch; every so often its numbers are written down."""
    import torch

    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import HANGS, Watch, limited, peak

    torch.set_num_threads(1)
    limited()
    target = TARGETS[name]
    watch = Watch(target.read, home, target.prepare)

    def tell() -> None:
        counts = {key: watch.outcomes[key] for key in ("taken", "refused")}
        text = json.dumps({**counts, "slowest": watch.slowest, "peak": peak()})
        (home / "numbers.part").write_text(text)
        os.replace(home / "numbers.part", home / "numbers")

    def run(data: bytes) -> None:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            watch(data)
        except BaseException:
            tell()
            raise
        if watch.runs % EVERY == 0:
            tell()

    run.tell = tell  # type: ignore[attr-defined]
    return run


def by_hypothesis(name: str, seconds: int, home: Path) -> None:
    """Try what the generators make, round after round."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.fuzz.targets import TARGETS

    run = watched(name, home)
    until = time.monotonic() + seconds
    for turn in range(10**6):
        if time.monotonic() > until:
            break

        @seed(time.time_ns() + turn)
        @settings(
            max_examples=ROUND, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(TARGETS[name].inputs)
        def tried(data: bytes) -> None:
            if time.monotonic() < until:
                run(data)

        tried()
    run.tell()


def by_atheris(name: str, seconds: int, home: Path) -> None:
    """Follow coverage: bytes as they are, and bytes that the generators draw from."""
    import atheris
    from hypothesis import HealthCheck, given, settings

    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import HANGS

    run = watched(name, home)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TARGETS[name].inputs)
    def drawn(data: bytes) -> None:
        run(data)

    steered = drawn.hypothesis.fuzz_one_input

    def try_one_input(data: bytes) -> None:
        if data[:1] < b"\x80":
            run(data[1:])
        else:
            steered(data[1:])

    corpus = home / "corpus"
    corpus.mkdir()
    for index, example in enumerate(seeds(name)):
        (corpus / str(index)).write_bytes(b"\0" + example)
    (corpus / "steered").write_bytes(b"\xff" + os.urandom(512))
    options = [
        f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=0", f"-timeout={2 * HANGS}",
        f"-artifact_prefix={home}/", "-verbosity=0", "-len_control=0",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], try_one_input)
    atheris.Fuzz()


def seeds(name: str, count: int = 100) -> list[bytes]:
    """Inputs that the generators make, to begin with."""
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.fuzz.targets import TARGETS

    examples: list[bytes] = []

    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(TARGETS[name].inputs)
    def keep(data: bytes) -> None:
        if len(data) < 2**16:
            examples.append(data)

    keep()
    return examples


if __name__ == "__main__":
    main()
