"""Independent jobs, run by the chosen engine with the same results everywhere.

A job runs with as many threads as the process that asked for it, because a sum over more threads is rounded
differently. It opens the files that it works on itself.
"""

import os
import pickle
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, Generic, TypeVar

import torch

from diagnostics.execution.errors import RESTARTS, EngineError, first_line
from diagnostics.execution.gpus import worker_gpu

Outcome = TypeVar("Outcome")

# Multi-threaded jobs of one process run one at a time: the number of threads is a setting of the process.
_THREADS_LOCK = threading.Lock()


def run_jobs(calls: Iterable[Callable[[], Outcome]], *, device: str = "cpu") -> Iterator[Outcome]:
    """Yield the results of independent calls, in order, each as soon as it is ready.

    They run on the engine that `diagnostics.execution.engines.engine` chose, by default in this process. The
    iterable is consumed as workers become free.

    Args:
        calls: best `functools.partial` of a top-level function on a `CheckpointPair` of files and names: of
            such a pair only the paths are sent.
        device: `cuda` is, on a worker, a GPU that no other process of its machine has claimed.

    Raises:
        EngineError: workers were lost, and repeating their unfinished work failed.
    """
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    threads = torch.get_num_threads()
    backend, _ = get_active_backend()
    # Ray's backend gives all results at the end.
    return_as = "generator" if backend.supports_return_generator else "list"
    waiting = iter(calls)
    running: deque[Callable[[], Outcome]] = deque()  # sent to workers, in order, without a result yet

    def jobs(repeated: list[Callable[[], Outcome]]) -> Iterator[Any]:
        for call in chain(repeated, waiting):
            running.append(call)
            yield delayed(Job(call, threads, device))()

    lost = 0
    while True:
        repeated = list(running)
        running.clear()
        try:
            for outcome in Parallel(return_as=return_as)(jobs(repeated)):
                running.popleft()
                lost = 0
                yield outcome
            return
        except BrokenProcessPool as error:  # a lost process of this machine takes all others with it
            lost += 1
            if lost > RESTARTS:
                reason = "processes were lost one after another with the same work; out of memory?"
                raise EngineError(f"{lost} {reason}") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "ray":
                raise
            raise EngineError(f"Ray gave work up: {first_line(error)}") from error


class Job(Generic[Outcome]):
    """A call that is sent to a worker and run there."""

    def __init__(self, call: Callable[[], Outcome], threads: int, device: str):
        self.call: Callable[[], Outcome] | None = call
        self.packed = b""
        self.threads, self.device = threads, device

    def __getstate__(self) -> dict[str, Any]:
        state = {"packed": self.packed, "threads": self.threads, "device": self.device}
        if self.call is None:  # on a worker, which sends it on
            return state
        import cloudpickle  # all engines use it: it sends functions that no worker can import

        # Unpacked when called, so that failing to unpack is an error of this job. Failing to pack is turned
        # into one as well: the engines would lose an error raised here.
        try:
            return state | {"packed": cloudpickle.dumps(self.call)}
        except Exception as error:
            reason = f"this work cannot be sent to a worker: {error}"
            return state | {"packed": cloudpickle.dumps(partial(raise_unsendable, reason))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.call = None
        self.__dict__ |= state

    def __call__(self) -> Outcome:
        """Run the call, with the threads of the process that asked and the GPU of this worker."""
        if self.call is not None:  # it was never sent
            return self.call()
        call = pickle.loads(self.packed)
        if self.device == "cuda":
            torch.cuda.set_device(worker_gpu())
        with nullcontext() if self.threads == 1 else _THREADS_LOCK:
            torch.set_num_threads(self.threads)
            return call()


def raise_unsendable(reason: str) -> None:
    """Raise on the worker what failed on the way to it."""
    raise TypeError(reason)


def worker_facts() -> dict[str, Any]:
    """Machine, cores and torch version of a worker; an answer shows that tunescope is installed there."""
    return {"machine": platform.node(), "cores": os.cpu_count() or 1, "torch": torch.__version__}
