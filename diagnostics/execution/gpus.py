"""One GPU a worker, claimed through a lock file on the machine."""

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_LOCKS: list[Any] = []


def worker_gpu() -> int:
    """Index of this worker's GPU; the same for all of its jobs."""
    count = torch.cuda.device_count()
    if count < 2:  # there is only one, or the cluster assigned one
        return 0
    identities = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))
    user = os.getuid() if hasattr(os, "getuid") else 0
    return claimed_gpu(identities, Path(tempfile.gettempdir()) / f"tunescope-gpus-{user}")


@lru_cache
def claimed_gpu(identities: tuple[str, ...], folder: Path) -> int:
    """Index of the first GPU that no other process holds; held until this process ends."""
    return claim_gpu(identities, folder, os.getpid())[0]


def claim_gpu(identities: Sequence[str], folder: Path, process: int) -> tuple[int, Any]:
    """Claim one of several GPUs for one process: its index, and the lock to keep.

    Identities are in order of preference: dask-cuda and Ray show a worker its own GPU first. The operating
    system frees a lock however its process ends. Where all are held: process id modulo their number, None.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for index, identity in enumerate(identities):
        lock = FileLock(folder / f"{identity}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _LOCKS.append(lock)
        return index, lock
    return process % len(identities), None
