"""Groups of work: the next one is read while this one is worked on, and halved where memory runs out."""

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


def ahead(read: Callable[[Key], Value], keys: Iterable[Key]) -> Generator[Value, None, None]:
    """What is read for each key, in order; a thread reads the next one meanwhile, and no further.

    Two are in memory at a time if the one given before is let go of before the next is asked for. An error in
    `read` is raised in its turn. No thread is left when the iterator ends or is closed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    waiting: deque[Future[Value]] = deque()
    try:
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) > 1:
                yield waiting.popleft().result()  # under no name: it would stay here while the next is read
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_halves(
    run: Callable[[list[Item]], list[Outcome]], items: list[Item], called: Callable[[Item], str]
) -> list[Outcome]:
    """What `run` gives for some items, in their order; too many for memory are halved until they fit.

    Args:
        called: what an error calls an item.

    Raises:
        InputError: one item alone does not fit.
    """
    try:
        return run(items)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(items) == 1:
            raise InputError(
                f"{called(items[0])}: does not fit into memory; free some, or choose another --device"
            ) from error
    # Only here: until the handler above was left, the error kept what had been allocated.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = (len(items) + 1) // 2
    return [*in_halves(run, items[:middle], called), *in_halves(run, items[middle:], called)]
