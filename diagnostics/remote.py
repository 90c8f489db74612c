"""Models that run elsewhere: passes over rows split by batch, on the engine's workers.

Each worker opens the pair itself and keeps it while there is work for it. A batch is the same wherever it
runs, so that its numbers are too.
"""

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from diagnostics import work
from diagnostics.groups import in_this_process
from probes.batches import Example, batches
from probes.measure import NonFiniteError
from probes.models import RunnablePair
from probes.pair import Side

Made = TypeVar("Made")

# Seconds without work after which a worker gives a model's memory back.
IDLE = 30.0


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """One side of a pair on whichever worker is asked.

    Attributes:
        packed: the pair as it travels, and how it is loaded: `probes.loading.Loading`.
        device: where it runs.
    """

    packed: bytes
    side: Side
    device: str

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
        calls = (partial(self._measured, measure, own, [examples[i] for i in own]) for own in plan)
        done = 0
        for own, made in zip(plan, work.each(calls, device=self.device), strict=True):
            done += len(own)
            if progress:
                progress(done)
            yield own, made

    def _measured(
        self, measure: Callable[[Any, Sequence[Example]], Made], own: list[int], examples: list[Example]
    ) -> Made:
        """On the worker: measure one batch."""
        try:
            with _held(self.packed) as runnable, getattr(runnable, self.side)() as model:
                return measure(model, examples)
        except NonFiniteError as error:
            raise NonFiniteError(own[error.example], error.layer, error.name) from error


def entered(runnable: RunnablePair, side: Side) -> AbstractContextManager[Any]:
    """A side of a pair: its torch model, or a `RemoteModel` where an engine with workers is chosen.

    Models in memory do not travel and run here.
    """
    pair = runnable.pair
    if in_this_process() or pair.base.opened is None or pair.tuned.opened is None:
        return runnable.base() if side == "base" else runnable.tuned()
    return _remote(runnable, side)


@contextmanager
def _remote(runnable: RunnablePair, side: Side) -> Iterator[RemoteModel]:
    device = runnable.loading.device
    kind = "cpu" if device is None else device.type
    yield RemoteModel(packed=pickle.dumps((runnable.pair, runnable.loading)), side=side, device=kind)


# On a worker

_LOCK = threading.Lock()
_OPEN: dict[bytes, RunnablePair] = {}
_CLOSING: list[threading.Timer] = []


@contextmanager
def _held(packed: bytes) -> Iterator[RunnablePair]:
    """The pair, which the jobs of one process use in turns; one at a time is in memory."""
    with _LOCK:
        for timer in _CLOSING:
            timer.cancel()
        _CLOSING.clear()
        if packed not in _OPEN:
            _close()
            pair, loading = pickle.loads(packed)
            _OPEN[packed] = RunnablePair(
                pair,
                device=loading.device,
                dtype=loading.dtype,
                device_map=loading.device_map,
                trust_remote_code=loading.trust_remote_code,
            )
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
    for runnable in _OPEN.values():
        runnable.close()
    _OPEN.clear()
