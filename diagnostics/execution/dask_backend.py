"""joblib backend for Dask that reports lost work: every task is asked for its own outcome.

joblib's own backend waits for ever when Dask gives a task up (it took several workers with it), when no
worker or scheduler is left, or when a result is lost on the way.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from distributed import CancelledError, Future, KilledWorker
from joblib import parallel_config
from joblib._dask import DaskDistributedBackend

from diagnostics.execution.errors import WORKER_SECONDS, EngineError

# How long work waits for any worker, and how often workers are counted.
NO_WORKER_SECONDS, POLL_SECONDS = 60.0, 1.0


def run_batch(items: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """Run the calls of one task on the worker; nested parallel work stays there."""
    with parallel_config(backend="sequential"):
        return [call(*args, **kwargs) for call, args, kwargs in items]


class LastingBackend(DaskDistributedBackend):
    """The workers of a Dask client."""

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Number of parallel jobs; at least 2, because joblib runs a single job in this process."""
        try:
            return max(2, super().effective_n_jobs(n_jobs))
        except TimeoutError as error:
            raise EngineError(
                f"no Dask worker for {WORKER_SECONDS} s; start workers, then run it again"
            ) from error

    def start_call(self) -> None:
        """Start the thread that watches the workers."""
        super().start_call()
        self._callbacks: dict[Future, Callable[[Any], None]] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._watch_workers, args=(self._ended,), daemon=True).start()

    def stop_call(self) -> None:
        """Stop the thread that watches the workers."""
        self._ended.set()
        super().stop_call()

    def submit(self, func: Any, callback: Any = None) -> Future:
        """Submit a batch to Dask; the callback gets its results or its error."""
        callbacks = self._callbacks
        future = self.client.submit(run_batch, func.items, pure=False)
        callbacks[future] = callback

        def report(done: Future) -> None:
            try:
                outcome = done.result()
            except (Exception, CancelledError) as error:
                outcome = error
            if callbacks.pop(done, None):
                callback(outcome)

        future.add_done_callback(report)
        return future

    def retrieve_result_callback(self, out: Any) -> Any:
        """The results of a batch."""
        if isinstance(out, KilledWorker):
            raise EngineError(
                f"{out.allowed_failures + 1} workers were lost one after another while they ran the same "
                f"task, the last at {out.last_worker.address}; were they out of memory, or killed? see their "
                "output"
            )
        if isinstance(out, CancelledError):
            raise EngineError("the Dask scheduler was lost, with all unfinished work; start it again")
        if isinstance(out, Exception):
            raise out
        return out

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel unfinished batches."""
        cancelled = list(self._callbacks)
        self._callbacks.clear()
        self.client.cancel(cancelled, force=True)

    def _watch_workers(self, ended: threading.Event) -> None:
        last_seen = time.monotonic()
        while not ended.wait(POLL_SECONDS):
            try:
                workers = self.client.nthreads()
            except Exception:  # a scheduler that does not answer has no workers
                workers = {}
            if workers:
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > NO_WORKER_SECONDS:
                error = EngineError(
                    f"no Dask worker for {NO_WORKER_SECONDS:g} s and work left to do; start workers, then "
                    "run it again"
                )
                for callback in list(self._callbacks.values()):
                    callback(error)
                return
