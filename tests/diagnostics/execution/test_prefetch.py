"""Reading ahead and halving change when things happen and nothing else; errors come out in their place."""

import gc
import threading
import weakref

import joblib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.intruders import analysis as intruders
from diagnostics.analyses.intruders import decide, examine
from diagnostics.analyses.intruders.analysis import intruder_dimensions
from diagnostics.execution.engines import runs_in_this_process
from diagnostics.execution.prefetch import prefetch, run_halving_on_oom
from probes import CheckpointPair


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@given(st.lists(st.integers(), max_size=8))
def test_what_is_read_ahead_comes_in_order(keys):
    assert list(prefetch(lambda key: 2 * key, keys)) == [2 * key for key in keys]
    assert readers() == []


def test_the_next_is_read_while_one_is_worked_on_and_no_further():
    second, read = threading.Event(), []

    def reading(key):
        read.append(key)
        if key == 1:
            second.set()
        return key

    values = prefetch(reading, range(5))
    assert next(values) == 0
    assert second.wait(timeout=60)  # would never come if it were read only when it is asked for
    assert read == [0, 1]
    assert list(values) == [1, 2, 3, 4]


def test_an_error_of_the_reader_comes_in_its_turn_and_leaves_no_thread():
    def reading(key):
        if key == 2:
            raise ValueError("shard 2: truncated")
        return key

    values, seen = prefetch(reading, range(5)), []
    with pytest.raises(ValueError, match="shard 2: truncated"):
        seen.extend(values)
    assert seen == [0, 1]
    assert readers() == []


def test_a_reader_that_is_given_up_leaves_no_thread():
    values = prefetch(lambda key: key, range(5))
    next(values)
    assert len(readers()) == 1
    values.close()
    assert readers() == []


class Big:
    """What can be seen to be let go of."""


def test_what_was_worked_on_is_let_go_of_before_a_third_is_read():
    alive, most = weakref.WeakSet(), []

    def reading(key):
        gc.collect()
        big = Big()
        alive.add(big)
        most.append(len(alive))
        return big

    for value in prefetch(reading, range(6)):
        del value
    assert max(most) <= 2


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_group_too_large_for_memory_is_halved_until_it_fits(count, room):
    tried = []

    def run(items):
        tried.append(len(items))
        if len(items) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * item for item in items]

    assert run_halving_on_oom(run, list(range(count)), str) == [2 * item for item in range(count)]
    # All at first; no half is larger than half of it, rounded up.
    assert tried[0] == count
    assert sum(size for size in tried if size <= room) == count


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried")])
def test_one_item_that_does_not_fit_is_one_clear_error(error):
    def run(items):
        raise error

    with pytest.raises(
        ValueError, match=r"^q_proj: does not fit into memory; free some, or choose another --dev"
    ):
        run_halving_on_oom(run, ["q_proj", "k_proj"], str)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    tried = []

    def run(items):
        tried.append(items)
        raise RuntimeError("singular")

    with pytest.raises(RuntimeError, match="singular"):
        run_halving_on_oom(run, [1, 2], str)
    assert len(tried) == 1


@pytest.mark.parametrize(("engine", "here"), [({"n_jobs": 1}, True), ({"n_jobs": 2}, False)])
def test_only_jobs_of_this_process_have_a_next_one_to_read_ahead(engine, here):
    assert runs_in_this_process()
    with joblib.parallel_config(backend="loky", **engine):
        assert runs_in_this_process() is here


def pair(count=6, size=24):
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(size, size + 8, generator=generator) for _ in range(count)]
    tuned = [W + 30 * torch.outer(W[:, 0], torch.randn(size + 8, generator=generator)) for W in base]
    tuned[2] = base[2]
    named = [{f"model.layers.{i}.self_attn.q_proj.weight": W for i, W in enumerate(s)} for s in (base, tuned)]
    return CheckpointPair(*named)


def test_reading_ahead_changes_no_bit_of_the_result(monkeypatch):
    opened = pair()
    with_it = intruder_dimensions(opened, epsilon=0.9)
    monkeypatch.setattr(examine, "runs_in_this_process", lambda: False)
    without = intruder_dimensions(opened, epsilon=0.9)
    assert with_it.metrics == without.metrics
    assert all(table.equals(without.tables[name]) for name, table in with_it.tables.items())
    assert readers() == []


def test_a_damaged_matrix_is_named_whoever_reads_it():
    opened = pair()
    opened.tuned.source.read("model.layers.4.self_attn.q_proj.weight")[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.4\.self_attn\.q_proj\.weight holds 1 NaN"):
        intruder_dimensions(opened, epsilon=0.9)
    assert readers() == []


def test_an_interrupt_between_matrices_leaves_no_thread():
    def interrupt(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        intruder_dimensions(pair(), epsilon=0.9, progress=interrupt)
    assert readers() == []


def test_matrices_side_by_side_that_do_not_fit_are_halved_with_the_same_result(monkeypatch):
    opened, sizes = pair(), []
    alone = intruder_dimensions(opened, epsilon=0.9)
    decide_all = decide.decide_all

    def scarce(base, *given):
        sizes.append(len(base))
        if len(base) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decide_all(base, *given)

    monkeypatch.setattr(intruders, "groups_of", lambda pair, names, device: [names])
    monkeypatch.setattr(examine, "decide_all", scarce)
    together = intruder_dimensions(opened, epsilon=0.9)
    # 5 of 6 changed: 5 do not fit, 3 of them neither; 2, 1 and the other 2 do.
    assert sizes == [5, 3, 2, 1, 2]
    assert together.metrics == alone.metrics
    assert all(table.equals(alone.tables[name]) for name, table in together.tables.items())
