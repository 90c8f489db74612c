"""Work that splits: independent calls, done wherever the engine runs them, with the same results everywhere.

Every call runs with as many threads as the process that asked for it has, for a sum over more threads is
rounded otherwise; and what it works on is a file that it opens itself.
"""

import os
import pickle
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain
from typing import Any, Generic, TypeVar

import torch

from diagnostics.execution.errors import RESTARTS, EngineError, first_line
from diagnostics.execution.gpus import own_gpu

Made = TypeVar("Made")

# Jobs of one process that use several threads each take turns: the number of threads is the process's.
_TURN = threading.Lock()


def each(calls: Iterable[Callable[[], Made]], *, device: str = "cpu") -> Iterator[Made]:
    """What independent calls return, in their order, as soon as each is known.

    They run where `diagnostics.execution.engines.engine` says, in this process otherwise; calls are taken
    from the iterable as workers become free.

    Args:
        calls: best `functools.partial` of a top-level function on a `CheckpointPair` of files and names: of
            the pair only the paths travel.
        device: `cuda` is on a worker the GPU that no other process of its machine has taken.

    Raises:
        EngineError: workers were lost, and what they had not finished was tried again in vain.
    """
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    threads = torch.get_num_threads()
    backend, _ = get_active_backend()
    known = "generator" if backend.supports_return_generator else "list"  # Ray's gives all at the end
    rest = iter(calls)
    out: deque[Callable[[], Made]] = deque()  # given to workers, in order, and not back yet

    def jobs(again: Sequence[Callable[[], Made]]) -> Iterator[Any]:
        for call in chain(again, rest):
            out.append(call)
            yield delayed(Job(call, threads, device))()

    lost = 0
    while True:
        again = list(out)
        out.clear()
        try:
            for made in Parallel(return_as=known)(jobs(again)):
                out.popleft()
                lost = 0
                yield made
            return
        except BrokenProcessPool as error:  # one lost process of this machine takes all others with it
            lost += 1
            if lost > RESTARTS:
                raise EngineError(
                    f"{lost} processes were lost one after another with the same work; out of memory?"
                ) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "ray":
                raise
            raise EngineError(f"Ray gave work up: {first_line(error)}") from error


class Job(Generic[Made]):
    """One call on its way to a worker and there."""

    def __init__(self, call: Callable[[], Made], threads: int, device: str):
        self.call: Callable[[], Made] | None = call
        self.packed = b""
        self.threads, self.device = threads, device

    def __getstate__(self) -> dict[str, Any]:
        if self.call is None:  # on a worker, which hands it on
            return {"packed": self.packed, "threads": self.threads, "device": self.device}
        import cloudpickle  # the pickle of all engines: knows functions that no worker can import

        # Unpacked when it is called: what cannot be opened on the worker is then an error of this call. So is
        # what cannot be packed, for the engines lose an error at this place.
        try:
            packed = cloudpickle.dumps(self.call)
        except Exception as error:
            packed = cloudpickle.dumps(partial(refuse, f"this work cannot be sent to a worker: {error}"))
        return {"packed": packed, "threads": self.threads, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.call = None
        self.__dict__ |= state

    def __call__(self) -> Made:
        """Do it, with the threads of whoever asked and the GPU of this worker."""
        if self.call is not None:  # it never left
            return self.call()
        call = pickle.loads(self.packed)
        if self.device == "cuda":
            torch.cuda.set_device(own_gpu())
        if self.threads == 1:
            torch.set_num_threads(1)
            return call()
        with _TURN:
            torch.set_num_threads(self.threads)
            return call()


def refuse(reason: str) -> None:
    """Say on the worker what went wrong on the way to it."""
    raise TypeError(reason)


# GPUs


def where() -> dict[str, Any]:
    """What an engine wants to know of a worker; that it can be asked shows that tunescope is there."""
    return {"machine": platform.node(), "cores": os.cpu_count() or 1, "torch": torch.__version__}
