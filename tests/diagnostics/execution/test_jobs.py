import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from diagnostics.execution import gpus, jobs
from tests.diagnostics.clusters import MOST, crowd, refusing, threads


def there(call, threads=1, device="cpu"):
    """The call as a worker gets it."""
    return pickle.loads(pickle.dumps(jobs.Job(call, threads, device)))


def test_calls_give_their_results_in_order_and_in_this_process_unless_an_engine_is_chosen():
    assert list(jobs.run_jobs(partial(pow, i, 2) for i in range(5))) == [0, 1, 4, 9, 16]
    assert set(jobs.run_jobs(os.getpid for _ in range(3))) == {os.getpid()}


def test_a_call_on_a_worker_has_the_threads_of_whoever_asked():
    before = torch.get_num_threads()
    try:
        assert there(threads, threads=3)() == 3
        assert there(threads, threads=1)() == 1
    finally:
        torch.set_num_threads(before)


def test_jobs_of_several_threads_take_turns_in_one_process():
    before = torch.get_num_threads()
    MOST.clear()
    try:
        running = [threading.Thread(target=there(crowd, threads=2)) for _ in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert MOST == [1, 1, 1, 1]


def test_what_cannot_be_sent_is_an_error_of_the_call_and_not_of_the_engine():
    with pytest.raises(TypeError, match="this work cannot be sent to a worker: cannot pickle"):
        there(partial(print, threading.Lock()))()


def test_a_refusal_is_the_same_on_a_worker():
    with pytest.raises(ValueError, match="matrix 7: is not to my liking"):
        there(partial(refusing, 7))()


def test_a_job_can_be_handed_on():
    again = pickle.loads(pickle.dumps(there(partial(pow, 2, 5))))
    assert again() == 32


# GPUs


def test_every_process_takes_a_gpu_of_its_own_and_shares_when_there_are_no_more(tmp_path):
    first, lock = gpus.claim_gpu(["a", "b"], tmp_path, process=10)
    second, other = gpus.claim_gpu(["a", "b"], tmp_path, process=11)
    assert (first, second) == (0, 1)
    # 13 mod 2 = 1
    assert gpus.claim_gpu(["a", "b"], tmp_path, process=13) == (1, None)
    lock.release()
    third, lock = gpus.claim_gpu(["a", "b"], tmp_path, process=12)
    assert third == 0
    lock.release()
    other.release()


def test_a_worker_that_was_shown_its_own_gpu_first_takes_that_one(tmp_path):
    # dask-cuda gives worker 0 the order a, b and worker 1 the order b, a.
    (first, first_lock), (second, second_lock) = (
        gpus.claim_gpu("ab", tmp_path, 1),
        gpus.claim_gpu("ba", tmp_path, 2),
    )
    assert "ab"[first] == "a"
    assert "ba"[second] == "b"
    first_lock.release()
    second_lock.release()


def test_the_gpu_of_a_process_that_was_killed_is_free_again(tmp_path):
    script = (
        "import os, sys, pathlib; from diagnostics.execution import gpus; "
        "print(gpus.claim_gpu(['a', 'b'], pathlib.Path(sys.argv[1]), 1)[0], flush=True); sys.stdin.read()"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    with held:
        assert held.stdout.readline() == "0\n"
        index, lock = gpus.claim_gpu(["a", "b"], tmp_path, process=2)
        assert index == 1
        held.kill()
    again, freed = gpus.claim_gpu(["a", "b"], tmp_path, process=3)
    assert again == 0
    lock.release()
    freed.release()


def test_a_worker_stays_with_its_gpu_and_one_that_sees_one_gpu_takes_that(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"gpu{i}"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpus.worker_gpu() == 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    try:
        for _ in range(2):
            there(os.getpid, device="cuda")()
        there(os.getpid, device="cpu")()
        there(os.getpid, device="cuda:1")()
        assert chosen == [0, 0]
    finally:
        gpus.claimed_gpu.cache_clear()
        for lock in gpus._LOCKS:
            lock.release(force=True)
