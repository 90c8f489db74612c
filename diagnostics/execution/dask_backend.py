"""joblib's backend for Dask, which also ends when work is lost.

Dask gives the tasks of a lost worker to another one. When it gives a task up, because that took several
workers with it, or when no worker or no scheduler is left, joblib's own backend waits for ever: it does not
hear of what failed, and not of a result that was lost on its way here. So every task is asked for its own
outcome.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from distributed import CancelledError, Future, KilledWorker
from joblib import parallel_config
from joblib._dask import DaskDistributedBackend

from diagnostics.execution.errors import WORKER, EngineError

# Seconds without any worker until it is over, and between two looks.
PATIENCE, LOOK = 60.0, 1.0


def run(items: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """The calls of one task, on the worker; what they would split in turn stays there."""
    with parallel_config(backend="sequential"):
        return [call(*args, **kwargs) for call, args, kwargs in items]


class LastingBackend(DaskDistributedBackend):
    """The workers of a Dask client."""

    def effective_n_jobs(self, n_jobs: int) -> int:
        """How many jobs run at once; never 1, for then joblib would do the work in this process."""
        try:
            return max(2, super().effective_n_jobs(n_jobs))
        except TimeoutError as error:
            raise EngineError(f"no Dask worker for {WORKER} s; start workers, then run it again") from error

    def start_call(self) -> None:
        """Begin to look after the workers."""
        super().start_call()
        self._open: dict[Future, Callable[[Any], None]] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._look_after, args=(self._ended,), daemon=True).start()

    def stop_call(self) -> None:
        """Look after them no more."""
        self._ended.set()
        super().stop_call()

    def submit(self, func: Any, callback: Any = None) -> Future:
        """Give a batch to Dask; its results, or why there are none, go to the callback."""
        opened = self._open
        future = self.client.submit(run, func.items, pure=False)
        opened[future] = callback

        def tell(done: Future) -> None:
            try:
                out = done.result()
            except (Exception, CancelledError) as error:
                out = error
            if opened.pop(done, None):
                callback(out)

        future.add_done_callback(tell)
        return future

    def retrieve_result_callback(self, out: Any) -> Any:
        """The results of a batch.

        Raises:
            Exception: what one of its calls raised.
            EngineError: Dask gave it up.
        """
        if isinstance(out, KilledWorker):
            raise EngineError(
                f"{out.allowed_failures + 1} workers were lost one after another while they had the same "
                f"work, the last at {out.last_worker.address}: out of memory, or killed? see their output"
            )
        if isinstance(out, CancelledError):
            raise EngineError(
                "the Dask scheduler was lost, and what was not finished with it; start it again"
            )
        if isinstance(out, Exception):
            raise out
        return out

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Withdraw what is not finished."""
        withdrawn = list(self._open)
        self._open.clear()
        self.client.cancel(withdrawn, force=True)

    def _look_after(self, ended: threading.Event) -> None:
        last = time.monotonic()
        while not ended.wait(LOOK):
            try:
                workers = self.client.nthreads()
            except Exception:  # no answer is no worker
                workers = {}
            if workers:
                last = time.monotonic()
            elif time.monotonic() - last > PATIENCE:
                error = EngineError(
                    f"no Dask worker for {PATIENCE:g} s and work left to do; start workers, then run it again"
                )
                for callback in list(self._open.values()):
                    callback(error)
                return
