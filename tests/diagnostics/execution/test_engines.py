import asyncio
import json
import os
import re
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import joblib
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from diagnostics.execution import engines, errors, jobs
from tests.diagnostics import clusters
from tests.diagnostics.shell import shell


@pytest.fixture(scope="module")
def cluster():
    """Two Dask workers in processes of their own, started again when they are killed."""
    pytest.importorskip("distributed", reason="needs tunescope[dask]")
    with clusters.dask_cluster() as (name, client):
        yield name, client


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Base and tuned of 24 matrices in two shards, one matrix large enough for the tiers, as directories."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("pair")
    shapes = {"q_proj": (192, 192), "k_proj": (96, 192), "v_proj": (96, 192), "o_proj": (192, 192)}
    places = []
    base = {
        f"model.layers.{layer}.self_attn.{name}.weight": torch.randn(shape, generator=generator)
        for layer in range(6)
        for name, shape in shapes.items()
    }
    base["model.layers.6.mlp.up_proj.weight"] = torch.randn(704, 640, generator=generator)
    for side in ("base", "tuned"):
        (folder / side).mkdir()
        weights = dict(base)
        if side == "tuned":
            for name, W in base.items():
                u, v = (torch.randn(size, 1, generator=generator) / size**0.5 for size in W.shape)
                weights[name] = W + 60 * u @ v.mT  # the largest of W is near 2 √192 = 28 and 2 √700 = 53
        names, index = list(weights), {}
        for shard, some in enumerate((names[::2], names[1::2]), 1):
            file = f"model-0000{shard}-of-00002.safetensors"
            save_file({name: weights[name].bfloat16() for name in some}, folder / side / file)
            index |= dict.fromkeys(some, file)
        (folder / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / side / "config.json").write_text('{"model_type": "llama"}')
        places.append(str(folder / side))
    return tuple(places)


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The tables of an audit in this process."""
    from diagnostics.audit.run import audit

    out = tmp_path_factory.mktemp("alone")
    audit(*pair, out=out, only=["intruders"])
    return tables(out)


def tables(out):
    """Every table of an audit, as the bytes that were written."""
    contents = {path.name: path.read_bytes() for path in (out / "tables").iterdir()}
    assert "intruders.vectors.parquet" in contents
    return contents


# Names and addresses


@pytest.mark.parametrize("name", ["slurm", "local:0", "local:x", "dask", "ray:HOST", ""])
def test_an_unknown_engine_is_refused_with_the_known_ones(name):
    with (
        pytest.raises(ValueError, match="unknown; known: local, local:N, dask://HOST:PORT, ray://HOST:PORT"),
        engines.engine(name),
    ):
        pass


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_an_engine_whose_package_is_not_here_names_it(monkeypatch, kind):
    for module in ("distributed", "ray"):
        monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(
            ValueError,
            match=rf"--engine {kind}://h:1: needs a missing package; pip install 'tunescope\[{kind}\]'",
        ),
        engines.engine(f"{kind}://h:1"),
    ):
        pass


@pytest.mark.parametrize("address", ["h", "h:", ":1", "h:x", "h:99999"])
def test_an_address_without_host_or_port_is_refused(address):
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match="should end in HOST:PORT"), engines.engine(f"dask://{address}"):
        pass


def test_a_scheduler_that_does_not_answer_is_one_line_and_exit_code_2(monkeypatch, pair, tmp_path, capsys):
    pytest.importorskip("distributed")
    with socket.socket() as bound:  # bound but not listening: nobody else gets the port, and nobody answers
        bound.bind(("127.0.0.1", 0))
        name = f"dask://127.0.0.1:{bound.getsockname()[1]}"
        code = shell(monkeypatch, "audit", *pair, "--engine", name, "--out", tmp_path / "out", "--quiet")
    assert code == 2
    message = capsys.readouterr().err.strip()
    assert re.search(
        rf"--engine {name}: no scheduler answers there \(.*\); start one with `dask scheduler`", message
    )
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_something_else_that_answers_is_no_scheduler(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(engines, "CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        name = f"dask://127.0.0.1:{other.getsockname()[1]}"
        with (
            pytest.raises(ValueError, match=f"--engine {name}: no Dask scheduler answers"),
            engines.engine(name),
        ):
            pass


def test_a_scheduler_without_workers_is_refused_with_how_to_start_one(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(engines, "WORKER_SECONDS", 0.5)
    with (
        clusters.dask_cluster(n_workers=0) as (name, _),
        pytest.raises(ValueError, match=r"has no worker; start some: dask worker tcp://127\.0\.0\.1:"),
        engines.engine(name),
    ):
        pass


def test_more_threads_than_cores_are_said_and_enough_cores_are_not():
    # 4 jobs of 2 threads on 4 cores are twice too many; 2 such jobs fit; one thread each is never too many.
    warning = engines.oversubscription_warning({"here": 2, "there": 4}, {"here": 4, "there": 4}, 2)
    assert warning.startswith("there: 4 jobs at once with 2 threads each, but 4 cores")
    assert engines.oversubscription_warning({"here": 2}, {"here": 4}, 2) == ""
    assert engines.oversubscription_warning({"here": 9}, {"here": 2}, 1) == ""


# This machine


def test_an_error_that_quotes_a_traceback_is_told_with_its_cause():
    quoted = (
        "Initialization failure from server:\nTraceback (most recent call last):\n  x()\nOSError: no port\n"
    )
    assert errors.first_line(RuntimeError(quoted)) == "Initialization failure from server: OSError: no port"
    assert errors.first_line(RuntimeError("no:\n")) == "no:"
    assert errors.first_line(RuntimeError("it ended\nand more")) == "it ended"
    assert errors.first_line(TimeoutError()) == "TimeoutError"


def test_ray_is_asked_for_as_many_workers_as_it_has_room_for():
    room = {"CPU": 16.0, "GPU": 2.0}
    assert engines.ray_worker_count("ray://h:1", room, "cpu") == 16
    assert engines.ray_worker_count("ray://h:1", room, "cuda") == 2
    with pytest.raises(ValueError, match=r"--engine ray://h:1: the cluster has no GPU; add a machine"):
        engines.ray_worker_count("ray://h:1", {"CPU": 16.0}, "cuda")


@pytest.mark.parametrize(
    ("error", "failures", "message", "asked"),
    [
        (ConnectionAbortedError, 2, "the cluster has no CPU", 3),  # it let us in
        (ConnectionAbortedError, 9, "no Ray cluster answers there: it failed", 3),
        (ConnectionError, 1, "no Ray cluster answers there: it failed", 1),
    ],
)
def test_a_ray_server_that_is_not_ready_is_asked_again(monkeypatch, error, failures, message, asked):
    tries = []

    def init(**options):
        tries.append(options)
        if len(tries) <= failures:
            raise error("it failed")

    package = SimpleNamespace(
        init=init, cluster_resources=dict, shutdown=lambda: None, register_ray=tries.copy
    )
    monkeypatch.setattr(engines, "import_package", lambda *names: package)
    monkeypatch.setattr(engines, "RETRY_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        name = f"ray://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"--engine {name}: {message}"), engines.engine(name):
            pass
    assert tries == [{"address": name, "log_to_driver": False}] * asked


def test_a_local_engine_with_workers_runs_elsewhere():
    with engines.engine("local:2"):
        there = joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(4))
    assert os.getpid() not in there
    assert joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2


def test_the_default_engine_is_this_process():
    with engines.engine("local"):
        assert joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2


def test_processes_of_this_machine_give_the_same_numbers(pair, tmp_path):
    from diagnostics.analyses.intruders.analysis import intruder_dimensions
    from probes import CheckpointPair

    opened = CheckpointPair(*pair)
    here = intruder_dimensions(opened)
    with engines.engine("local:2"):
        there = intruder_dimensions(opened)
    same(here, there)


def test_a_killed_process_of_this_machine_costs_only_its_work(tmp_path):
    with engines.engine("local:2"):
        calls = (partial(clusters.deadly, i, os.getpid(), tmp_path / "once") for i in range(12))
        assert list(jobs.run_jobs(calls)) == list(range(12))
    assert (tmp_path / "once").exists()


@pytest.mark.slow
def test_work_that_kills_every_process_of_this_machine_ends_as_one_error():
    with engines.engine("local:2"):
        with pytest.raises(errors.EngineError, match="4 processes were lost one after another"):
            list(jobs.run_jobs(partial(clusters.deadly, i, os.getpid()) for i in range(8)))
        assert list(jobs.run_jobs(partial(pow, i, 2) for i in range(3))) == [0, 1, 4]


def same(first, second):
    """Two results, bit for bit."""
    assert first.metrics == second.metrics
    assert first.notes == second.notes
    assert first.tables.keys() == second.tables.keys()
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name], check_exact=True)


# Dask


def test_two_dask_workers_share_an_audit_and_give_the_same_bytes(cluster, pair, alone, tmp_path, monkeypatch):
    name, client = cluster
    began = executed(client)
    code = shell(
        monkeypatch, "audit", *pair, "--only", "intruders", "--engine", name, "--out", tmp_path, "--quiet"
    )
    assert code == 0  # one intruder a matrix is a warning
    assert tables(tmp_path) == alone
    record = json.loads((tmp_path / "audit.json").read_text())
    assert record["options"]["engine"] == name
    assert record["analyses"]["intruders"]["metrics"]["intruders"] == 25
    vectors = pd.read_parquet(tmp_path / "tables" / "intruders.vectors.parquet")
    assert {"exact", "subspace"} <= set(vectors["tier"])
    ended = executed(client)
    assert all(ended[worker] > began[worker] for worker in ended)


def test_jobs_that_bring_many_rows_along_are_not_warned_of(cluster):
    name, _ = cluster
    with warnings.catch_warnings(record=True) as caught, engines.engine(name):
        warnings.simplefilter("always")
        assert list(jobs.run_jobs([partial(len, bytes(12_000_000))] * 2)) == [12_000_000] * 2
    assert not [warning for warning in caught if "large graph" in str(warning.message)]


def executed(client):
    """Seconds that each worker has spent on its tasks."""
    return client.run(lambda dask_worker: sum(dask_worker.state.task_counter.cumulative_elapsed().values()))


def test_a_worker_killed_in_the_middle_loses_nothing(cluster, pair):
    from diagnostics.analyses.intruders.analysis import intruder_dimensions
    from probes import CheckpointPair

    name, client = cluster
    killed, names = [], []

    def progress(done, total, what):
        names.append(what)
        if done == 4:
            killed.append(clusters.pids(client)[0])
            clusters.kill(killed[0])

    opened = CheckpointPair(*pair)
    with engines.engine(name):
        there = intruder_dimensions(opened, progress=progress)
    assert len(killed) == 1
    assert names == list(opened.matrices)
    same(intruder_dimensions(opened), there)


@pytest.mark.slow
def test_mitigate_writes_the_same_weights_on_a_cluster(cluster, pair, tmp_path, monkeypatch):
    name, _ = cluster
    for directory, options in (("here", ()), ("there", ("--engine", name))):
        assert shell(monkeypatch, "mitigate", *pair, "--out", tmp_path / directory, "--quiet", *options) == 0
    here, there = (
        [path.read_bytes() for path in sorted((tmp_path / directory).glob("*.safetensors"))]
        for directory in ("here", "there")
    )
    assert len(here) == 2
    assert here == there


def test_work_that_kills_its_worker_once_is_done_by_another(cluster, tmp_path):
    name, _ = cluster
    with engines.engine(name):
        calls = (partial(clusters.deadly, i, os.getpid(), tmp_path / "once") for i in range(8))
        assert list(jobs.run_jobs(calls)) == list(range(8))
    assert (tmp_path / "once").exists()


@pytest.mark.slow
def test_work_that_kills_every_worker_ends_as_one_error(monkeypatch):
    pytest.importorskip("distributed")
    import dask

    from diagnostics.execution import dask_backend

    monkeypatch.setattr(dask_backend, "NO_WORKER_SECONDS", 20)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        clusters.dask_cluster() as (name, _),
        engines.engine(name),
    ):
        calls = (partial(clusters.deadly, i, os.getpid()) for i in range(8))
        with pytest.raises(errors.EngineError, match="2 workers were lost one after another"):
            list(jobs.run_jobs(calls))
        # What is asked next is not disturbed by what was left over.
        assert list(jobs.run_jobs(partial(pow, i, 2) for i in range(6))) == [0, 1, 4, 9, 16, 25]


@pytest.mark.slow
def test_when_no_worker_is_left_it_ends(monkeypatch):
    pytest.importorskip("distributed")
    from diagnostics.execution import dask_backend

    monkeypatch.setattr(dask_backend, "NO_WORKER_SECONDS", 1)
    with clusters.dask_cluster() as (name, client), engines.engine(name):
        running = jobs.run_jobs(partial(clusters.slowly, i) for i in range(100))
        assert next(running)[0] == 0
        # `retire_workers` would spare a worker with a result that no other worker can take over.
        client.cluster.scale(0)
        with pytest.raises(errors.EngineError, match="no Dask worker for 1 s and work left to do"):
            list(running)


def test_an_error_of_a_call_comes_back_as_it_was_raised(cluster):
    name, _ = cluster
    with engines.engine(name):
        with pytest.raises(ValueError, match=r"matrix \d: is not to my liking"):
            list(jobs.run_jobs(partial(clusters.refusing, i) for i in range(5)))
        assert list(jobs.run_jobs(partial(pow, i, 2) for i in range(3))) == [0, 1, 4]


@pytest.mark.slow
def test_a_single_worker_does_the_work_and_not_this_process():
    pytest.importorskip("distributed")
    with clusters.dask_cluster(n_workers=1) as (name, _), engines.engine(name):
        done = list(jobs.run_jobs(partial(clusters.slowly, i) for i in range(3)))
    assert [number for number, _ in done] == [0, 1, 2]
    assert os.getpid() not in {pid for _, pid in done}


def test_workers_have_the_threads_of_whoever_asks(cluster):
    name, _ = cluster
    before = torch.get_num_threads()
    with engines.engine(name):
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            try:
                assert set(jobs.run_jobs(clusters.threads for _ in range(4))) == {count}
            finally:
                torch.set_num_threads(before)


def test_a_notebook_whose_loop_is_running_chooses_an_engine_too(cluster):
    name, _ = cluster

    async def cell():
        with engines.engine(name):
            return list(jobs.run_jobs(partial(clusters.refusing, index) for index in ()))

    # In a thread: browsers of other tests have a loop running in this one.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(asyncio.run, cell()).result() == []


def test_of_a_pair_of_files_only_paths_travel(pair):
    import pickle

    from diagnostics.analyses.intruders.examine import IntruderSettings, examine
    from probes import CheckpointPair

    opened = CheckpointPair(*pair)
    settings = IntruderSettings(
        k=10, depth=10, epsilon=0.5, side="left", method="exact", device="cpu", dtype="float32", seed=0
    )
    call = partial(examine, opened, [next(iter(opened.matrices))], settings, set())
    # A matrix of 192 x 192 in bfloat16 is 73,728 bytes; names of 25 matrices alone would be over 1,000.
    assert len(pickle.dumps(jobs.Job(call, 1, "cpu"))) < 2000


def test_a_checkpoint_that_the_workers_do_not_see_is_named_with_what_to_do(cluster, pair, monkeypatch):
    from probes import CheckpointPair

    name, _ = cluster
    opened = CheckpointPair(*pair)
    for side in (opened.base, opened.tuned):
        # As if the paths of this machine were not those of the workers.
        side.opened = side.opened[0].parent / "elsewhere", side.opened[1]
    with (
        engines.engine(name),
        pytest.raises(ValueError, match=r"elsewhere: not there on .*same files at the same"),
    ):
        list(jobs.run_jobs(partial(opened.read, matrix) for matrix in opened.matrices))


# Ray


@pytest.fixture(scope="module")
def ray_cluster():
    pytest.importorskip("ray", reason="needs tunescope[ray]")
    with clusters.ray_cluster() as name:
        yield name


# Ray itself leaves sockets and asks for what is deprecated.
of_ray = pytest.mark.filterwarnings("ignore")


@of_ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes_also_when_a_worker_is_killed(
    ray_cluster, pair, alone, tmp_path, monkeypatch
):
    command = ("audit", *pair, "--only", "intruders", "--engine", ray_cluster, "--out", tmp_path, "--quiet")
    assert shell(monkeypatch, *command) == 0
    assert tables(tmp_path) == alone
    with engines.engine(ray_cluster):
        calls = (partial(clusters.deadly, i, os.getpid(), tmp_path / "once") for i in range(8))
        assert list(jobs.run_jobs(calls)) == list(range(8))
    assert (tmp_path / "once").exists()


@of_ray
@pytest.mark.slow
def test_work_that_kills_every_ray_worker_ends_as_one_error(ray_cluster):
    with engines.engine(ray_cluster):
        with pytest.raises(errors.EngineError, match="Ray gave work up: The actor died unexpectedly"):
            list(jobs.run_jobs(partial(clusters.deadly, i, os.getpid()) for i in range(8)))
        with pytest.raises(ValueError, match=r"matrix \d: is not to my liking"):
            list(jobs.run_jobs(partial(clusters.refusing, i) for i in range(5)))
