"""Read the next group of work while this one is processed, and halve groups that do not fit into memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from probes.errors import InputError
from probes.text.batches import out_of_memory

Key = TypeVar("Key")
Value = TypeVar("Value")
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def prefetch(read: Callable[[Key], Value], keys: Iterable[Key]) -> Generator[Value, None, None]:
    """Yield `read(key)` for each key in order; a thread reads one value ahead.

    Two values are in memory at a time if the caller drops one before it asks for the next. An error in `read`
    is raised in its turn. No thread is left when the iterator ends or is closed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    reads: deque[Future[Value]] = deque()
    try:
        for key in keys:
            reads.append(pool.submit(read, key))
            if len(reads) > 1:
                yield reads.popleft().result()  # a name here would keep the value while the next is read
        while reads:
            yield reads.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def run_halving_on_oom(
    run: Callable[[list[Item]], list[Outcome]], items: list[Item], name_of: Callable[[Item], str]
) -> list[Outcome]:
    """The results of `run` for some items, in order; a list that does not fit into memory is halved."""
    try:
        return run(items)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(items) == 1:
            raise InputError(
                f"{name_of(items[0])}: does not fit into memory; free some, or choose another --device"
            ) from error
    # Behind the handler: in it, the error still holds what was allocated.
    torch.cuda.empty_cache()
    middle = (len(items) + 1) // 2
    halves = items[:middle], items[middle:]
    return [outcome for half in halves for outcome in run_halving_on_oom(run, half, name_of)]
