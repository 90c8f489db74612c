"""Models that run elsewhere, on the engine's workers: passes over rows split by batch, and walks by place.

Each worker opens the pair itself and keeps it while there is work for it. What is computed of a batch, or at
a place, is the same wherever it runs, so that its numbers are too.
"""

import gc
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from diagnostics.execution import jobs
from diagnostics.execution.engines import in_this_process
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.pair import CheckpointPair, Side
from probes.checkpoints.series import CheckpointSeries, RunCalls, one_by_one
from probes.models.loading import Loading
from probes.models.runnable import RunnablePair
from probes.models.two_sided import TwoSidedModel
from probes.passes.batched import NonFiniteError
from probes.text.batches import Example, batches

Made = TypeVar("Made")
Thing = TypeVar("Thing")

# Seconds without work after which a worker gives a model's memory back.
IDLE = 30.0


def by_checkpoint(series: CheckpointSeries, device: str) -> RunCalls:
    """Does calls on a checkpoint each: on workers, if an engine with some is chosen and all can travel."""
    if _stays(*series.checkpoints):
        return one_by_one
    return partial(jobs.each, device=torch.device(device).type)


@dataclass(frozen=True)
class WorkerObject(Generic[Thing]):
    """What every worker makes for itself when it is first asked, and holds while there is work with it.

    Attributes:
        packed: the pickle of a callable without arguments that makes it.
        device: where it computes.
    """

    packed: bytes
    device: str

    def each(self, calls: Iterable[Callable[[Thing], Made]]) -> Iterator[Made]:
        """What calls make of it, in their order; each finds it as some other has left it.

        Raises:
            EngineError: as `diagnostics.execution.jobs.each`.
        """
        return jobs.each((partial(_used, self.packed, call) for call in calls), device=self.device)


def elsewhere(
    pair: CheckpointPair, loading: Loading, make: Callable[[CheckpointPair, Loading], Thing]
) -> WorkerObject[Thing] | None:
    """What is made of a pair on every worker; None if all is to be done here.

    That is without an engine that has workers, or if a model lies in memory and cannot travel.

    Args:
        make: a top-level function, or `functools.partial` of one.
    """
    if _stays(pair.base, pair.tuned):
        return None
    device = "cpu" if loading.device is None else loading.device.type
    return WorkerObject(pickle.dumps(partial(make, pair, loading)), device)


def hosts(host: TwoSidedModel, make: Callable[[TwoSidedModel], Thing]) -> WorkerObject[Thing] | None:
    """As `elsewhere`, of a host like this one."""
    return elsewhere(host.pair, host.editable.loading, partial(_hosted, make=make))


def each(
    there: WorkerObject[Thing] | None, here: Thing, calls: Iterable[Callable[[Thing], Made]]
) -> Iterator[Made]:
    """What calls make of a thing on workers, or of that here; in their order, as soon as each is known."""
    return (call(here) for call in calls) if there is None else there.each(calls)


def _stays(*checkpoints: Checkpoint) -> bool:
    return in_this_process() or not all(map(_travels, checkpoints))


def _travels(checkpoint: Checkpoint) -> bool:
    return checkpoint.opened is not None and (checkpoint.base is None or _travels(checkpoint.base))


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """One side of a pair on whichever worker is asked."""

    pair: WorkerObject[RunnablePair]
    side: Side

    def by_batch(
        self,
        measure: Callable[[Any, Sequence[Example]], Made],
        examples: Sequence[Example],
        tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[list[int], Made]]:
        """What is measured of each batch, with the indices of its examples, in the order of the batches.

        Args:
            measure: gets the model and the examples of one batch, which come to one batch again.
            tokens: as of `batches`.
            progress: called with the examples that are done.
        """
        plan = [batch.indices.tolist() for batch in batches(examples, tokens=tokens, pad_id=0)]
        calls = (partial(_measured, self.side, measure, own, [examples[i] for i in own]) for own in plan)
        done = 0
        for own, made in zip(plan, self.pair.each(calls), strict=True):
            done += len(own)
            if progress:
                progress(done)
            yield own, made


def entered(runnable: RunnablePair, side: Side) -> AbstractContextManager[Any]:
    """A side of a pair: its torch model, or a `RemoteModel` where it is to be run on workers."""
    there = elsewhere(runnable.pair, runnable.loading, _opened)
    if there is not None:
        return nullcontext(RemoteModel(pair=there, side=side))
    return runnable.base() if side == "base" else runnable.tuned()


# On a worker

_LOCK = threading.Lock()
_OPEN: dict[bytes, Any] = {}
_CLOSING: list[threading.Timer] = []


def _opened(pair: CheckpointPair, loading: Loading) -> RunnablePair:
    return RunnablePair(
        pair,
        device=loading.device,
        dtype=loading.dtype,
        device_map=loading.device_map,
        trust_remote_code=loading.trust_remote_code,
    )


def _hosted(pair: CheckpointPair, loading: Loading, *, make: Callable[[TwoSidedModel], Thing]) -> Thing:
    trust = loading.trust_remote_code
    return make(TwoSidedModel(pair, device=loading.device, dtype=loading.dtype, trust_remote_code=trust))


def _measured(
    side: Side,
    measure: Callable[[Any, Sequence[Example]], Made],
    own: list[int],
    examples: list[Example],
    runnable: RunnablePair,
) -> Made:
    """Measure one batch."""
    try:
        with getattr(runnable, side)() as model:
            return measure(model, examples)
    except NonFiniteError as error:
        raise NonFiniteError(own[error.example], error.layer, error.name) from error


def _used(packed: bytes, call: Callable[[Any], Made]) -> Made:
    with _held(packed) as thing:
        return call(thing)


@contextmanager
def _held(packed: bytes) -> Iterator[Any]:
    """What is packed, which the jobs of one process use in turns; one such thing is in memory."""
    with _LOCK:
        for timer in _CLOSING:
            timer.cancel()
        _CLOSING.clear()
        if packed not in _OPEN:
            _close()
            _OPEN[packed] = pickle.loads(packed)()
        try:
            yield _OPEN[packed]
        finally:
            timer = threading.Timer(IDLE, _close_if_idle)
            timer.daemon = True
            timer.start()
            _CLOSING.append(timer)


def _close_if_idle() -> None:
    with _LOCK:
        if threading.current_thread() in _CLOSING:  # else there was work again meanwhile
            _CLOSING.clear()
            _close()


def _close() -> None:
    _OPEN.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
