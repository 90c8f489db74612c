"""Engines: which processes of which machines do the work that splits."""

import asyncio
import importlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from diagnostics.execution.errors import ANSWER, RESTARTS, WORKER, first_line
from probes.errors import InputError

log = logging.getLogger(__name__)

# Above how many bytes Dask warns of what a task brings along.
LARGE = "distributed.admin.large-graph-warning-threshold"
# How often Ray is asked to let us in, and seconds in between: what it starts for each client begins to serve
# before it can, and then fails.
TRIES, PAUSE = 3, 2.0


@contextmanager
def engine(name: str, device: str = "cpu") -> Iterator[None]:
    """Let every `joblib.Parallel` within run on an engine.

    Args:
        name: `local` (this process), `local:N` (N processes), `dask://HOST:PORT` or `ray://HOST:PORT` (a
            cluster that is running already, workers with the same packages and files).
        device: of the analyses; Ray reserves a GPU a worker for `cuda`.

    Raises:
        InputError: unknown, its package is not installed, or it cannot be reached.
    """
    if name == "local":
        yield
        return
    kind, _, rest = name.partition(":")
    if kind == "local" and rest.isdecimal() and int(rest) > 0:
        with local(int(rest)):
            yield
    elif kind == "dask" and rest.startswith("//"):
        with dask(name, rest.removeprefix("//")):
            yield
    elif kind == "ray" and rest.startswith("//"):
        with ray(name, rest.removeprefix("//"), device):
            yield
    else:
        raise InputError(
            f"--engine {name}: unknown; known: local, local:N, dask://HOST:PORT, ray://HOST:PORT"
        )


@contextmanager
def local(workers: int) -> Iterator[None]:
    """So many processes of this machine."""
    import torch
    from joblib import parallel_config

    said = crowded({"this machine": workers}, {"this machine": os.cpu_count() or 1}, torch.get_num_threads())
    if said:
        log.warning(said)
    with parallel_config(backend="loky", n_jobs=workers):
        yield


@contextmanager
def dask(name: str, address: str) -> Iterator[None]:
    """The workers of a Dask scheduler."""
    import torch
    from joblib import parallel_config

    distributed = imported("distributed", name, "tunescope[dask]")
    from diagnostics.execution.dask_backend import LastingBackend
    from diagnostics.execution.jobs import where

    answers(name, address, "scheduler", "dask scheduler")
    try:
        # The client waits for ever for what answers, but not as a scheduler does.
        # In a thread, for a notebook has a loop running in this one.
        with ThreadPoolExecutor(1) as thread:
            kind = thread.submit(asked, distributed, f"tcp://{address}").result()
        if kind != "Scheduler":
            raise InputError(f"it is a Dask {kind}; give the address of its scheduler")
        client = distributed.Client(f"tcp://{address}", timeout=ANSWER, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--engine {name}: no Dask scheduler answers there: {first_line(error)}") from error
    with client:
        try:
            # A task, not a look: an adaptive cluster starts workers when there is something to do.
            client.submit(where, pure=False).result(timeout=WORKER)
            facts = client.run(where)
        except distributed.TimeoutError as error:
            raise InputError(
                f"--engine {name}: the scheduler has no worker; start some: dask worker tcp://{address}"
            ) from error
        except Exception as error:  # whatever a worker raises that lacks us, or half of us
            raise InputError(
                f"--engine {name}: a worker cannot run tunescope ({first_line(error)}); install the same "
                "packages there"
            ) from error
        threads = client.nthreads()
        workers: Counter[str] = Counter()
        for worker, told in facts.items():
            workers[told["machine"]] += threads.get(worker, 1)
        cores = {told["machine"]: told["cores"] for told in facts.values()}
        if said := crowded(workers, cores, torch.get_num_threads()):
            log.warning(said)
        others = {told["torch"] for told in facts.values()} - {torch.__version__}
        if others:
            log.warning(
                "workers have torch %s, this process %s: the last digits may differ from a local run's",
                ", ".join(sorted(others)),
                torch.__version__,
            )
        backend = LastingBackend(client=client, wait_for_workers_timeout=WORKER)
        # Rows travel with their jobs, which take far longer than sending them does.
        silent = importlib.import_module("dask").config.set({LARGE: "1 GB"})
        with silent, parallel_config(backend=backend):
            yield


def asked(distributed: Any, address: str) -> str:
    """As `kind_of`, in bounded time.

    Raises:
        TimeoutError, OSError: nothing answers.
    """
    return asyncio.run(asyncio.wait_for(kind_of(distributed, address), ANSWER))


async def kind_of(distributed: Any, address: str) -> str:
    """What a process of Dask is, `Scheduler` or another."""
    async with distributed.rpc(address) as process:
        return str((await process.identity())["type"])


@contextmanager
def ray(name: str, address: str, device: str) -> Iterator[None]:
    """The machines of a Ray cluster."""
    from joblib import parallel_config

    package = imported("ray", name, "tunescope[ray]")
    backend = imported("ray.util.joblib", name, "tunescope[ray]")
    answers(name, address, "cluster", "ray start --head --ray-client-server-port PORT")
    for left in reversed(range(TRIES)):
        try:
            package.init(address=name, log_to_driver=False)
            break
        except (OSError, RuntimeError, ValueError) as error:
            if not left or not isinstance(error, ConnectionAbortedError):
                raise InputError(
                    f"--engine {name}: no Ray cluster answers there: {first_line(error)}"
                ) from error
            time.sleep(PAUSE)
    backend.register_ray()
    actors = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
    if device == "cuda":
        actors["num_gpus"] = 1
    try:
        workers = actors_of(name, package.cluster_resources(), device)
        with parallel_config(backend="ray", n_jobs=workers, ray_remote_args=actors):
            yield
    finally:
        package.shutdown()


def actors_of(name: str, resources: Mapping[str, float], device: str) -> int:
    """How many workers of a Ray cluster there is room for; more would be waited for, for ever.

    Raises:
        InputError: it has no GPU, and one is asked for.
    """
    kind = "GPU" if device == "cuda" else "CPU"
    count = int(resources.get(kind, 0))
    if count < 1:
        raise InputError(
            f"--engine {name}: the cluster has no {kind}; add a machine that has, or use --device"
        )
    return count


def crowded(workers: Mapping[str, int], cores: Mapping[str, int], threads: int) -> str:
    """What to say of machines that have fewer cores than their workers have threads; empty if none has.

    Args:
        workers, cores: of each machine; a worker that does several jobs at once counts as several.
        threads: of each job, which are those of the process that asks.
    """
    if threads == 1:
        return ""
    for machine, count in workers.items():
        if count * threads > cores[machine]:
            return (
                f"{machine}: {count} jobs at once, of {threads} threads each as here, on {cores[machine]} "
                "cores will mostly wait for each other; set OMP_NUM_THREADS=1 for this command"
            )
    return ""


def answers(name: str, address: str, what: str, start: str) -> None:
    """Refuse an address at which nothing listens, at once: the libraries try for half a minute.

    Raises:
        InputError: no HOST:PORT, or nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--engine {name}: should end in HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except OSError as error:
        raise InputError(
            f"--engine {name}: no {what} answers there ({error}); start one with `{start}`"
        ) from error


def imported(module: str, name: str, package: str) -> Any:
    """The module behind an engine.

    Raises:
        InputError: not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"--engine {name}: needs a package that is not here; pip install '{package}'"
        ) from error


def in_this_process() -> bool:
    """Whether the engine runs jobs here, one after the other, so that there is a next one to read ahead."""
    from joblib import Parallel

    return bool(Parallel().n_jobs == 1)
