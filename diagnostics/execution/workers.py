"""Models on the engine's workers: rows split by batch, interpolations by alpha, series by checkpoint.

Each worker opens the pair itself. A batch, or a point, is computed alike wherever it runs.
"""

import gc
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from diagnostics.execution import jobs
from diagnostics.execution.engines import runs_in_this_process
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.pair import CheckpointPair, Side
from probes.checkpoints.series import CheckpointSeries, RunCalls, one_by_one
from probes.models.loading import Loading
from probes.models.runnable import RunnablePair
from probes.models.two_sided import TwoSidedModel
from probes.passes.batched import NonFiniteError
from probes.text.batches import Example, batches

Outcome = TypeVar("Outcome")
Object = TypeVar("Object")
Measure: TypeAlias = Callable[[Any, Sequence[Example]], Outcome]

# A worker frees a model after so long without work.
IDLE_SECONDS = 30.0


def checkpoint_runner(series: CheckpointSeries, device: str) -> RunCalls:
    """Runs a call for each checkpoint: on workers, if the engine has some and all checkpoints are files."""
    if _runs_here(*series.checkpoints):
        return one_by_one
    return partial(jobs.run_jobs, device=torch.device(device).type)


@dataclass(frozen=True)
class WorkerObject(Generic[Object]):
    """Lazily built per-worker object, kept while jobs arrive."""

    packed: bytes  # pickle of a callable without arguments that builds it
    device: str  # where it computes

    def run(self, calls: Iterable[Callable[[Object], Outcome]]) -> Iterator[Outcome]:
        """Results of calls on it, in order; a call gets it in the state that another left it in."""
        sent = (partial(_call_on_object, self.packed, call) for call in calls)
        return jobs.run_jobs(sent, device=self.device)


def pair_on_workers(
    pair: CheckpointPair, loading: Loading, build: Callable[[CheckpointPair, Loading], Object]
) -> WorkerObject[Object] | None:
    """An object that every worker builds from a pair by a top-level function, or a partial of one.

    None if all runs here: the engine has no workers, or a model lies in memory and cannot be sent.
    """
    if _runs_here(pair.base, pair.tuned):
        return None
    device = "cpu" if loading.device is None else loading.device.type
    return WorkerObject(pickle.dumps(partial(build, pair, loading)), device)


def two_sided_on_workers(
    two_sided: TwoSidedModel, build: Callable[[TwoSidedModel], Object]
) -> WorkerObject[Object] | None:
    """As `pair_on_workers`, built from a two-sided model with this one's pair and loading."""
    open_host = partial(_open_host, build=build, apart=bool(two_sided.changes))
    return pair_on_workers(two_sided.pair, two_sided.editable.loading, open_host)


def run_calls(
    remote: WorkerObject[Object] | None, local: Object, calls: Iterable[Callable[[Object], Outcome]]
) -> Iterator[Outcome]:
    """Results of calls on the workers' object, or on the local one without workers; in order."""
    return (call(local) for call in calls) if remote is None else remote.run(calls)


def _runs_here(*checkpoints: Checkpoint) -> bool:
    return runs_in_this_process() or not all(map(_is_portable, checkpoints))


def _is_portable(checkpoint: Checkpoint) -> bool:
    return checkpoint.opened is not None and (checkpoint.base is None or _is_portable(checkpoint.base))


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """One side of a pair that runs on workers."""

    pair: WorkerObject[RunnablePair]
    side: Side

    def run_batches(
        self,
        measure: Measure[Outcome],
        examples: Sequence[Example],
        tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[list[int], Outcome]]:
        """The indices of each batch's examples, and what is measured of it, batch by batch.

        Args:
            measure: gets the model and the examples of one batch, which form one batch again.
            progress: called with the number of examples done.
        """
        plan = [batch.indices.tolist() for batch in batches(examples, tokens=tokens, pad_id=0)]
        measured = partial(_measure_batch, self.side, measure)
        calls = (partial(measured, indices, [examples[i] for i in indices]) for indices in plan)
        done = 0
        for indices, outcome in zip(plan, self.pair.run(calls), strict=True):
            done += len(indices)
            if progress:
                progress(done)
            yield indices, outcome


def open_side(runnable: RunnablePair, side: Side) -> AbstractContextManager[Any]:
    """One side of a pair: its torch model, or a `RemoteModel` where it runs on workers."""
    remote = pair_on_workers(runnable.pair, runnable.loading, _open_pair)
    if remote is not None:
        return nullcontext(RemoteModel(pair=remote, side=side))
    return runnable.base() if side == "base" else runnable.tuned()


# On a worker

_LOCK = threading.Lock()
_HELD: dict[bytes, Any] = {}
_TIMERS: list[threading.Timer] = []


def _open_pair(pair: CheckpointPair, loading: Loading) -> RunnablePair:
    return RunnablePair(pair, **vars(loading))


def _open_host(
    pair: CheckpointPair, loading: Loading, *, build: Callable[[TwoSidedModel], Object], apart: bool
) -> Object:
    options = {name: getattr(loading, name) for name in ("device", "dtype", "trust_remote_code")}
    return build(TwoSidedModel(pair, **options, apart=apart))


def _measure_batch(
    side: Side, measure: Measure[Outcome], indices: list[int], examples: list[Example], runnable: RunnablePair
) -> Outcome:
    try:
        with getattr(runnable, side)() as model:
            return measure(model, examples)
    except NonFiniteError as error:
        raise NonFiniteError(indices[error.example], error.layer, error.name) from error


def _call_on_object(packed: bytes, call: Callable[[Any], Outcome]) -> Outcome:
    with _hold(packed) as built:
        return call(built)


@contextmanager
def _hold(packed: bytes) -> Iterator[Any]:
    """The packed object, used by one job of this process at a time; only one object is in memory."""
    with _LOCK:
        for timer in _TIMERS:
            timer.cancel()
        _TIMERS.clear()
        if packed not in _HELD:
            _close()
            _HELD[packed] = pickle.loads(packed)()
        try:
            yield _HELD[packed]
        finally:
            timer = threading.Timer(IDLE_SECONDS, _close_if_idle)
            timer.daemon = True
            timer.start()
            _TIMERS.append(timer)


def _close_if_idle() -> None:
    with _LOCK:
        if threading.current_thread() in _TIMERS:  # else work arrived in the meantime
            _TIMERS.clear()
            _close()


def _close() -> None:
    _HELD.clear()
    gc.collect()
    torch.cuda.empty_cache()
