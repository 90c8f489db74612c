"""Engines: the processes and machines that run parallel work."""

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

from diagnostics.execution.errors import CONNECT_SECONDS, RESTARTS, WORKER_SECONDS, first_line
from probes.errors import InputError

log = logging.getLogger(__name__)

# Dask warns of tasks that bring along more bytes than this.
LARGE_TASK = "distributed.admin.large-graph-warning-threshold"
# Attempts to connect to Ray, and seconds in between: it accepts clients before it can serve them, and fails.
TRIES, RETRY_SECONDS = 3, 2.0


@contextmanager
def engine(name: str, device: str = "cpu") -> Iterator[None]:
    """Run every `joblib.Parallel` within on an engine.

    Args:
        name: `local` (this process), `local:N` (N processes), `dask://HOST:PORT` or `ray://HOST:PORT` (a
            running cluster with the same packages and files on its workers).
        device: of the analyses; for `cuda`, Ray reserves a GPU for each worker.

    Raises:
        InputError: unknown, its package is not installed, or it cannot be reached.
    """
    if name == "local":
        yield
        return
    kind, _, rest = name.partition(":")
    if kind == "local" and rest.isdecimal() and int(rest) > 0:
        running = local_engine(int(rest))
    elif kind == "dask" and rest.startswith("//"):
        running = dask_engine(name, rest.removeprefix("//"))
    elif kind == "ray" and rest.startswith("//"):
        running = ray_engine(name, rest.removeprefix("//"), device)
    else:
        engine_forms = "local, local:N, dask://HOST:PORT, ray://HOST:PORT"
        raise InputError(f"--engine {name}: unknown; known: {engine_forms}")
    with running:
        yield


@contextmanager
def local_engine(workers: int) -> Iterator[None]:
    """Several processes of this machine."""
    import torch
    from joblib import parallel_config

    cores = {"this machine": os.cpu_count() or 1}
    if warning := oversubscription_warning({"this machine": workers}, cores, torch.get_num_threads()):
        log.warning(warning)
    with parallel_config(backend="loky", n_jobs=workers):
        yield


@contextmanager
def dask_engine(name: str, address: str) -> Iterator[None]:
    """The workers of a Dask scheduler."""
    import torch
    from joblib import parallel_config

    distributed = import_package("distributed", name, "tunescope[dask]")
    from diagnostics.execution.dask_backend import LastingBackend
    from diagnostics.execution.jobs import worker_facts

    check_listening(name, address, "scheduler", "dask scheduler")
    try:
        # Dask's client waits for ever for a process that answers but is no scheduler.
        # In a thread, because a notebook already runs an event loop in this one.
        with ThreadPoolExecutor(1) as thread:
            kind = thread.submit(process_type, distributed, f"tcp://{address}").result()
        if kind != "Scheduler":
            raise InputError(f"it is a Dask {kind}; give the address of its scheduler")
        client = distributed.Client(f"tcp://{address}", timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--engine {name}: no Dask scheduler answers there: {first_line(error)}") from error
    with client:
        try:
            # A task, because an adaptive cluster starts its workers for one.
            client.submit(worker_facts, pure=False).result(timeout=WORKER_SECONDS)
            facts = client.run(worker_facts)
        except distributed.TimeoutError as error:
            raise InputError(
                f"--engine {name}: the scheduler has no worker; start some: dask worker tcp://{address}"
            ) from error
        except Exception as error:  # a worker without tunescope, or with half of it, raises anything
            raise InputError(
                f"--engine {name}: a worker cannot run tunescope ({first_line(error)}); install the same "
                "packages there"
            ) from error
        threads = client.nthreads()
        workers: Counter[str] = Counter()
        for worker, fact in facts.items():
            workers[fact["machine"]] += threads.get(worker, 1)
        cores = {fact["machine"]: fact["cores"] for fact in facts.values()}
        if warning := oversubscription_warning(workers, cores, torch.get_num_threads()):
            log.warning(warning)
        others = {fact["torch"] for fact in facts.values()} - {torch.__version__}
        if others:
            log.warning(
                f"workers have torch {', '.join(sorted(others))}, this process {torch.__version__}: the last "
                "digits may differ from a local run"
            )
        backend = LastingBackend(client=client, wait_for_workers_timeout=WORKER_SECONDS)
        # Jobs carry their rows, and take far longer than sending these does.
        silent = importlib.import_module("dask").config.set({LARGE_TASK: "1 GB"})
        with silent, parallel_config(backend=backend):
            yield


def process_type(distributed: Any, address: str) -> str:
    """The kind of a Dask process, `Scheduler` or another; raises TimeoutError or OSError."""

    async def identify() -> str:
        async with distributed.rpc(address) as process:
            return str((await process.identity())["type"])

    return asyncio.run(asyncio.wait_for(identify(), CONNECT_SECONDS))


@contextmanager
def ray_engine(name: str, address: str, device: str) -> Iterator[None]:
    """The machines of a Ray cluster."""
    from joblib import parallel_config

    package = import_package("ray", name, "tunescope[ray]")
    backend = import_package("ray.util.joblib", name, "tunescope[ray]")
    check_listening(name, address, "cluster", "ray start --head --ray-client-server-port PORT")
    for tries_left in reversed(range(TRIES)):
        try:
            package.init(address=name, log_to_driver=False)
            break
        except (OSError, RuntimeError, ValueError) as error:
            if not tries_left or not isinstance(error, ConnectionAbortedError):
                raise InputError(
                    f"--engine {name}: no Ray cluster answers there: {first_line(error)}"
                ) from error
            time.sleep(RETRY_SECONDS)
    backend.register_ray()
    actors = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
    if device == "cuda":
        actors["num_gpus"] = 1
    try:
        workers = ray_worker_count(name, package.cluster_resources(), device)
        with parallel_config(backend="ray", n_jobs=workers, ray_remote_args=actors):
            yield
    finally:
        package.shutdown()


def ray_worker_count(name: str, resources: Mapping[str, float], device: str) -> int:
    """How many workers a Ray cluster has room for: it waits for ever for more. InputError for none."""
    kind = "GPU" if device == "cuda" else "CPU"
    if resources.get(kind, 0) < 1:
        mend = "add a machine that has one, or use --device"
        raise InputError(f"--engine {name}: the cluster has no {kind}; {mend}")
    return int(resources[kind])


def oversubscription_warning(workers: Mapping[str, int], cores: Mapping[str, int], threads: int) -> str:
    """The warning for a machine with fewer cores than threads of its jobs at once; empty where none is."""
    for machine, count in workers.items():
        if threads > 1 and count * threads > cores[machine]:
            return (
                f"{machine}: {count} jobs at once with {threads} threads each, but {cores[machine]} cores: "
                "they will wait for each other; set OMP_NUM_THREADS=1 for this command"
            )
    return ""


def check_listening(name: str, address: str, what: str, start: str) -> None:
    """Raise InputError for an address where nothing listens, at once: the libraries try for half a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--engine {name}: should end in HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--engine {name}: no {what} answers there ({error}); start one with `{start}`"
        ) from error


def import_package(module: str, name: str, package: str) -> Any:
    """The module of an engine's package; raises InputError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"--engine {name}: needs a missing package; pip install '{package}'") from error


def runs_in_this_process() -> bool:
    """Whether jobs run in this process, one after the other: only then can the next one be prefetched."""
    from joblib import Parallel

    return bool(Parallel().n_jobs == 1)
