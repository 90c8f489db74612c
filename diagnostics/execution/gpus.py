"""One GPU a worker: claimed through a lock file on the machine."""

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def own_gpu() -> int:
    """The GPU of this worker among those that it sees; the same for all that it does."""
    count = torch.cuda.device_count()
    if count < 2:  # whoever started the worker gave it one, or there is no other
        return 0
    identities = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))
    user = os.getuid() if hasattr(os, "getuid") else 0
    return claimed(identities, Path(tempfile.gettempdir()) / f"tunescope-gpus-{user}")


@lru_cache
def claimed(identities: tuple[str, ...], folder: Path) -> int:
    """The first of these that no other process holds; it is held until this process ends."""
    return claim(identities, folder, os.getpid())[0]


def claim(identities: Sequence[str], folder: Path, process: int) -> tuple[int, Any]:
    """Take one of some things of which every process wants its own.

    Locks are the system's, which frees them however a process ends; dask-cuda and Ray, which show a worker
    its own GPU first or alone, are so followed.

    Args:
        identities: by which all processes call them, in the order of this one's liking.
        folder: of the locks, the same for all.
        process: number of this process.

    Returns:
        Its place, and the lock to be kept; where all are held, a place by the process's number, and None.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place, identity in enumerate(identities):
        lock = FileLock(folder / f"{identity}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _HELD.append(lock)
        return place, lock
    return process % len(identities), None


_HELD: list[Any] = []
