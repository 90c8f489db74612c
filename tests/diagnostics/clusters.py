"""Dask and Ray clusters of two worker processes, and calls to run on them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from diagnostics.execution.engines import engine


@contextmanager
def dask_cluster(**options: Any) -> Iterator[tuple[str, Any]]:
    """An engine's name, and a client that looks at its workers from outside."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50,
            **{"n_workers": 2, "threads_per_worker": 1, **options},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield cluster.scheduler_address.replace("tcp", "dask"), client


@contextmanager
def ray_cluster() -> Iterator[str]:
    """An engine's name; Ray runs in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    options = [
        "--head", "--block", "--port=0", f"--ray-client-server-port={port}", "--num-cpus=2",
        "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000",
        "--dashboard-port=0",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    head = subprocess.Popen(
        [command, "start", *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        name = f"ray://127.0.0.1:{port}"
        for _ in range(100):  # it listens before it serves
            with suppress(ValueError), engine(name):
                break
            time.sleep(0.5)
        yield name
    finally:
        head.terminate()
        head.wait(timeout=60)


def pids(client: Any) -> list[int]:
    """The processes of the workers."""
    return list(client.run(os.getpid).values())


def kill(pid: int) -> None:
    """What the system does to a process that takes too much memory."""
    os.kill(pid, signal.SIGKILL)


def slowly(number: int) -> tuple[int, int]:
    """The number, and the process that thought about it."""
    time.sleep(0.1)
    return number, os.getpid()


def deadly(number: int, here: int, once: Path | None = None) -> int:
    """Number 3 kills its process, every time or only once, but never the process `here`."""
    if number == 3 and os.getpid() != here and not (once and once.exists()):
        if once:
            once.touch()
        kill(os.getpid())
    time.sleep(0.05)
    return number


def threads() -> int:
    """Of torch in this process."""
    return torch.get_num_threads()


def refusing(number: int) -> int:
    """Refuses its input."""
    raise ValueError(f"matrix {number}: is not to my liking")


# How many of `crowd` were at it in this process, each time that one came.
MOST: list[int] = []
_INSIDE: list[int] = []


def crowd() -> None:
    """Counts itself among the others, and stays a while."""
    _INSIDE.append(1)
    MOST.append(len(_INSIDE))
    time.sleep(0.05)
    _INSIDE.pop()
