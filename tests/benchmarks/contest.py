"""A contest: one measurement made by tunescope and by what a user would run instead, each in its own process.

Both sides get the same files, the same threads and the same machine, in turns. A side is a function from the
folder of the files to what is timed, so that imports and other preparations are not; it gives its answer,
and a contest says whether the two answers agree.
"""

import contextlib
import gc
import io
import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

Side = Callable[[Path], Callable[[], Any]]
# Seconds of a run under which it is repeated, and how often: the least counts.
SHORT, REPEATS = 3.0, 3
PRELOADED = [
    "torch", "numpy", "pandas", "scipy.linalg", "sklearn.covariance", "joblib", "safetensors.torch",
    "transformers", "transformers.models.llama.modeling_llama", "peft", "probes", "diagnostics",
    "transformer_lens", "probes.passes.activations", "probes.models.runnable", "probes.models.two_sided",
    "diagnostics.analyses.intruders",
]  # fmt: skip


class Agreement(NamedTuple):
    """Whether two answers agree, and in how many words: by how much, or who is right and why."""

    same: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One line of the table.

    Attributes:
        analysis: of tunescope.
        what: what both sides measure.
        peer: what a user would run instead.
        packages: the peer's distribution names; none where it is the paper's way, written out here.
        make: writes the input; `quick` makes it small.
        theirs, ours: both sides.
        agree: from both answers.
        apart: where the peer does more or less than asked, in words.
    """

    analysis: str
    what: str
    peer: str
    make: Callable[[Path, bool], None]
    theirs: Side
    ours: Side
    agree: Callable[[Any, Any], Agreement]
    packages: tuple[str, ...] = ()
    apart: str = ""


class Spent(NamedTuple):
    """Seconds, and the most memory beyond that at the start, in bytes; NaN where the system does not tell."""

    seconds: float
    memory: float


class Line(NamedTuple):
    """What became of a contest; `theirs` and `ours` are missing where it could not be run."""

    contest: Contest
    theirs: Spent | None
    ours: Spent | None
    agreement: Agreement
    failed: bool = False


class Absent(NamedTuple):
    """Why a peer cannot be run here."""

    reason: str


def peer_version(distribution: str) -> str | Absent:
    """The version of an installed peer, or that there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return Absent(f"{distribution} is not installed: pip install 'tunescope[bench]'")


def held(contest: Contest, *, quick: bool, threads: int, rounds: int) -> Line:
    """Hold a contest: both sides in turns, and the least that each took."""
    for package in contest.packages:
        installed = peer_version(package)
        if isinstance(installed, Absent):
            return Line(contest, None, None, Agreement(False, f"not run: {installed.reason}"))
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            alone(contest.make, folder, quick, threads=threads)
            spent: dict[str, list[Spent]] = {"theirs": [], "ours": []}
            answers = {}
            for _ in range(rounds):
                for side in spent:
                    cost, answers[side] = alone(measured, getattr(contest, side), folder, threads=threads)
                    spent[side].append(cost)
            least = {side: Spent(*map(min, zip(*costs, strict=True))) for side, costs in spent.items()}
            agreement = contest.agree(answers["theirs"], answers["ours"])
    except SideError as error:
        return Line(contest, None, None, Agreement(False, f"FAILED: {error}"), failed=True)
    return Line(contest, least["theirs"], least["ours"], agreement, failed=not agreement.same)


class SideError(RuntimeError):
    """A side ended with an error, whose last line this is."""


def alone(run: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """What a function gives in a process of its own, forked from a server that has only imported.

    Raises:
        SideError: it raised something, or its process was killed.
    """
    # Read by the libraries when the server, which starts with the first of these, imports them.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        answer_file = Path(name) / "answer"
        process = context.Process(target=_in_process, args=(run, arguments, threads, answer_file))
        process.start()
        process.join()
        if not answer_file.is_file():
            raise SideError(f"its process ended with code {process.exitcode}")
        kind, value, trace = pickle.loads(answer_file.read_bytes())
    if kind == "raised":
        print(trace, file=sys.stderr)
        raise SideError(value)
    return value


def _in_process(run: Callable[..., Any], arguments: tuple[Any, ...], threads: int, answer_file: Path) -> None:
    import torch

    torch.set_num_threads(threads)
    log = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            warnings.simplefilter("ignore")
            answer: tuple[str, Any, str] = ("gave", run(*arguments), "")
    except BaseException as error:
        text = str(error).strip().partition("\n")[0]
        answer = ("raised", f"{type(error).__name__}: {text}"[:200], traceback.format_exc())
    answer_file.write_bytes(pickle.dumps(answer))


def measured(side: Side, folder: Path) -> tuple[Spent, Any]:
    """What a side costs, prepared before it is timed, and its answer."""
    run = side(folder)
    gc.collect()
    before = started()
    begun = time.perf_counter()
    answer = run()
    times = [time.perf_counter() - begun]
    memory = status("VmHWM") - before
    while times[0] < SHORT and len(times) < REPEATS:
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return Spent(min(times), memory), answer


def started() -> float:
    """Let the peak of this process's memory start from where it is, and say where that is."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return status("VmRSS")


def status(field: str) -> float:
    """A line of this process's status, in bytes; NaN on a system without."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024.0


def apart(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The largest difference of numbers, as a share of the largest of them; infinite where all are 0."""
    import numpy as np

    first, second = np.asarray(theirs, float), np.asarray(ours, float)
    largest = float(np.abs(first).max(initial=0.0))
    return float(np.abs(first - second).max()) / largest if largest else math.inf


def near(theirs: Sequence[float], ours: Sequence[float], limit: float, what: str) -> Agreement:
    """Whether numbers agree to a share of the largest."""
    if len(theirs) != len(ours):
        return Agreement(False, f"{what}: {len(theirs)} numbers against {len(ours)}")
    difference = apart(theirs, ours)
    same = difference <= limit
    over = "" if same else f", over {limit:.0e}"
    return Agreement(same, f"{what}: {len(theirs)} within {difference:.0e}{over}")
