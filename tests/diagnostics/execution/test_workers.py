"""Rows that are run on workers: the same bits, the right names in errors, one pair in memory."""

import math
import time
import weakref

import pandas as pd
import pytest
import torch

from diagnostics.analyses.drift.analysis import representation_drift
from diagnostics.analyses.ood.analysis import likelihood_ratio_ood
from diagnostics.execution import workers
from diagnostics.execution.engines import engine
from probes import CheckpointPair
from probes.checkpoints.opening import open_checkpoint
from probes.models.runnable import RunnablePair
from tests.diagnostics import clusters
from tests.diagnostics.chains import save_llama

LETTERS = "abcdefghij "
ROWS = [LETTERS[i % 7 :] * (1 + i % 5) for i in range(40)]
OTHER = ["jihgfedcba" * (1 + i % 3) for i in range(12)]
# Tokens of a batch: there are many, of several lengths.
FEW = 120


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, a full one tuned from it and an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    paths = {
        name: save_llama(root / name, seed=1, characters=LETTERS, shift=shift)
        for name, shift in (("base", 0.0), ("tuned", 0.2))
    }
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(paths["base"]),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(root / "adapter")
    return {**paths, "adapter": root / "adapter"}


def both(pair, rows=ROWS):
    """What is found of rows by each analysis that splits them."""
    return (
        likelihood_ratio_ood(pair, rows, OTHER, batch_tokens=FEW, draws=2),
        representation_drift(pair, rows, batch_tokens=FEW),
    )


def same(local, remote):
    """Two results, bit for bit."""
    assert local.notes == remote.notes
    assert local.tables.keys() == remote.tables.keys()
    for name, table in local.tables.items():
        pd.testing.assert_frame_equal(table, remote.tables[name], check_exact=True)


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_batches_on_workers_give_the_same_bits(places, simulated_workers, tuned, monkeypatch):
    pair = CheckpointPair(places["base"], places[tuned])
    there = both(pair)
    assert len(simulated_workers) > 4 * 20 * len(ROWS) / FEW  # four passes, rows of 20 tokens and more
    assert set(simulated_workers) == {"cpu"}
    monkeypatch.setattr(workers, "runs_in_this_process", lambda: True)
    for local, remote in zip(both(pair), there, strict=True):
        same(local, remote)


def test_processes_of_this_machine_give_the_same_bits(places):
    pair = CheckpointPair(places["base"], places["tuned"])
    steps = []
    with engine("local:2"):
        there = likelihood_ratio_ood(
            pair, ROWS, OTHER, batch_tokens=FEW, draws=2, progress=lambda *step: steps.append(step[:2])
        )
    same(likelihood_ratio_ood(pair, ROWS, OTHER, batch_tokens=FEW, draws=2), there)
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_rows_loses_nothing(places):
    pytest.importorskip("distributed", reason="needs tunescope[dask]")
    pair = CheckpointPair(places["base"], places["tuned"])
    killed = []
    with clusters.dask_cluster() as (name, client):

        def progress(done, total, what):
            if not killed and done > total / 3:
                killed.append(clusters.pids(client)[0])
                clusters.kill(killed[0])

        with engine(name):
            there = likelihood_ratio_ood(
                pair, ROWS, OTHER, batch_tokens=FEW, draws=2, progress=progress, windows=True, max_length=20
            )
    assert killed
    same(
        likelihood_ratio_ood(pair, ROWS, OTHER, batch_tokens=FEW, draws=2, windows=True, max_length=20), there
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray itself leaves sockets and asks for what is deprecated
def test_ray_gives_the_same_bits_of_rows(places):
    pytest.importorskip("ray", reason="needs tunescope[ray]")
    pair = CheckpointPair(places["base"], places["tuned"])
    with clusters.ray_cluster() as name, engine(name):
        there = both(pair)
    for local, remote in zip(both(pair), there, strict=True):
        same(local, remote)


def test_a_row_without_a_finite_likelihood_is_named_from_the_worker(places, simulated_workers, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(places["base"])
    with torch.no_grad():  # what only "j" is made of
        model.model.embed_tokens.weight[1 + LETTERS.index("j")] = math.inf
    broken = save_llama(tmp_path / "broken", seed=1, characters=LETTERS)
    model.save_pretrained(broken)
    rows = [row.replace("j", "a") for row in ROWS]
    rows[23] += "j"
    pair = CheckpointPair(places["base"], broken)
    with pytest.raises(ValueError, match=r"task:24 \(tuned\): its logits are NaN or infinite \(first at"):
        likelihood_ratio_ood(pair, rows, ["ab", "cd"], batch_tokens=FEW, draws=2)


def test_an_adapter_on_a_base_in_memory_runs_here(places, simulated_workers):
    from transformers import AutoModelForCausalLM

    base = open_checkpoint(AutoModelForCausalLM.from_pretrained(places["base"]))
    tuned = open_checkpoint(places["adapter"], base=base)
    with RunnablePair(CheckpointPair(places["base"], tuned)) as runnable:
        assert workers.pair_on_workers(runnable.pair, runnable.loading, workers._open_pair) is None


def test_models_in_memory_run_here_with_the_same_numbers(places, simulated_workers):
    from transformers import AutoModelForCausalLM

    models = {side: AutoModelForCausalLM.from_pretrained(places[side]) for side in ("base", "tuned")}
    inputs, logits = torch.tensor([[1, 2, 3]]), {}
    with RunnablePair(CheckpointPair(**models)) as runnable, torch.no_grad():
        for side in models:
            with workers.open_side(runnable, side) as running:
                logits[side] = running(inputs).logits
        for side, model in models.items():
            assert torch.equal(logits[side], model(inputs).logits)
    assert not torch.equal(logits["base"], logits["tuned"])
    assert simulated_workers == []


def test_a_worker_holds_one_pair_and_lets_it_go_when_idle(places, simulated_workers, monkeypatch):
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.2)
    sides = {}
    for tuned in ("tuned", "adapter"):
        with (
            RunnablePair(CheckpointPair(places["base"], places[tuned])) as runnable,
            workers.open_side(runnable, "tuned") as sides[tuned],
        ):
            assert not runnable._resident  # nothing is loaded here
    for side in sides.values():
        with workers._hold(side.pair.packed) as first:
            pass
        with workers._hold(side.pair.packed) as again:
            assert again is first
        assert list(workers._HELD) == [side.pair.packed]
    gone = weakref.ref(first)
    del first, again
    deadline = time.monotonic() + 30
    while workers._HELD and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers._HELD
    assert gone() is None
