"""Models that are led or pruned from place to place on workers: the same bits, and nothing is lost."""

import pandas as pd
import pytest

from diagnostics.analyses.dynamics.analysis import training_dynamics
from diagnostics.analyses.path.analysis import interpolation_path
from diagnostics.analyses.pathways.analysis import grokking_pathways
from diagnostics.analyses.sharpness.analysis import layer_sharpness
from diagnostics.analyses.sparsity.analysis import essential_sparsity
from diagnostics.analyses.trajectory.analysis import training_trajectory
from diagnostics.execution import workers
from diagnostics.execution.engines import engine
from probes import CheckpointPair
from probes.checkpoints.series import CheckpointSeries, one_by_one
from probes.models.loading import Loading
from tests.diagnostics import clusters
from tests.diagnostics.analyses.mitigation.test_mitigation import EVEN, TASK_CHANCES, judge, letters, spike
from tests.diagnostics.analyses.mitigation.test_mitigation import save as save_letters
from tests.diagnostics.analyses.pathways.test_pathways import TASK as OF_LETTERS
from tests.diagnostics.analyses.pathways.test_pathways import mixture
from tests.diagnostics.analyses.pathways.test_pathways import save as save_routed
from tests.diagnostics.analyses.sharpness.test_sharpness import QUICK, model_of, moved, planted, written
from tests.diagnostics.analyses.sharpness.test_sharpness import save as save_deep
from tests.diagnostics.chains import save_llama
from tests.diagnostics.pruned import half_idle, leaning, sampled, save

ROWS = sampled(half_idle(), 16)
SHORT = {**QUICK, "rhos": (0.1,), "steps": 2, "pairs": 0}
FEW = {**SHORT, "batches": 1, "curvature": False}
LETTERS = "abcdef"
TASK = ["abcab", "fedcba", "acbd", "badef", "aabbcc", "cafe"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A pair of four blocks of which one is relabelled, and rows that tuned writes."""
    root = tmp_path_factory.mktemp("deep")
    base = model_of()
    tuned = moved(base, 0.02)
    pair = CheckpointPair(
        save_deep(root / "base", base), save_deep(root / "tuned", planted(tuned, 1, "neurons"))
    )
    return pair, written(tuned, 12), written(base, 12, seed=1)


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    root = tmp_path_factory.mktemp("idle")
    return CheckpointPair(save(root / "base", half_idle()), save(root / "tuned", leaning()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four checkpoints of a run."""
    root = tmp_path_factory.mktemp("run")
    return [save_llama(root / f"step{5 * i}", seed=1, characters=LETTERS, shift=0.02 * i) for i in range(4)]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A pair with one intruder, which spoils the keep rows."""
    root = tmp_path_factory.mktemp("spoiled")
    base, tuned = letters(EVEN), letters(EVEN, first=TASK_CHANCES)
    spike(tuned, 60.0, 20, "ef")
    return CheckpointPair(save_letters(root / "base", base), save_letters(root / "tuned", tuned))


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Two random mixtures of experts."""
    root = tmp_path_factory.mktemp("routed")
    return [save_routed(root / f"step{step}", mixture(seed=step)) for step in range(2)]


def pruned(pair, **settings):
    return essential_sparsity(pair, ROWS, **{"draws": 100, "grid": (0.0, 0.2, 0.4, 0.6, 0.8), **settings})


def followed(run):
    """What is found of a run by each analysis that measures checkpoint by checkpoint."""
    return (
        training_trajectory(CheckpointSeries(run), TASK),
        training_dynamics(CheckpointSeries(run), TASK, TASK[:3], probes=4, vertices=4, outputs=2, batch=2),
    )


def same(local, remote):
    """Two results, bit for bit."""
    assert local.notes == remote.notes
    assert dict(local.metrics) == dict(remote.metrics)
    assert local.tables.keys() == remote.tables.keys()
    for name, table in local.tables.items():
        pd.testing.assert_frame_equal(table, remote.tables[name], check_exact=True)


def test_layers_and_batches_on_workers_give_the_same_bits(deep, simulated_workers, monkeypatch):
    pair, task, ood = deep
    there = layer_sharpness(pair, task, ood=ood, **SHORT)
    assert there.metrics["stragglers"] == 1
    # 5 places, 3 legs of each of 6 layers, 2 batches at each of 3 or 4 places, 3 layers' spectra at both ends
    assert 5 + 3 * 6 + 2 * 3 + 2 * 3 <= len(simulated_workers) <= 5 + 3 * 6 + 2 * 4 + 2 * 6
    monkeypatch.setattr(workers, "runs_in_this_process", lambda: True)
    same(layer_sharpness(pair, task, ood=ood, **SHORT), there)


def test_what_is_not_finite_on_a_worker_is_missed_here(deep, simulated_workers, monkeypatch):
    from diagnostics.evaluation import interpolation
    from diagnostics.evaluation.unit_scores import unit_scores
    from probes.passes.batched import NonFiniteError

    pair, task, ood = deep
    calls = []

    def broken(encoded, model):
        calls.append(1)
        if len(calls) == 5:  # two sets at 0 and at 1, then the first place between
            raise NonFiniteError(0, 0, "row 1")
        return unit_scores(encoded, model)

    monkeypatch.setattr(interpolation, "unit_scores", broken)
    result = interpolation_path(pair, task, ood=ood, alphas=(0.25, 0.5))
    assert result.metrics["missing"] == 1
    assert "alpha 0.25 (row 1: its logits are NaN or infinite" in result.notes[0]
    assert len(simulated_workers) == 4


@pytest.mark.parametrize("patterns", [None, ()])
def test_masks_on_workers_give_the_same_bits(idle, simulated_workers, monkeypatch, patterns):
    steps = []
    there = pruned(idle, patterns=patterns, progress=lambda *step: steps.append(step))
    # Both sides: 5 sparsities, 4 more at random, and the patterns; what refines the grid is run here.
    assert len(simulated_workers) == 2 * (5 + 4 + (3 if patterns is None else 0))
    assert [done for done, _, _ in steps] == list(range(1, len(steps) + 1))
    monkeypatch.setattr(workers, "runs_in_this_process", lambda: True)
    here = []
    same(pruned(idle, patterns=patterns, progress=lambda *step: here.append(step)), there)
    assert len(here) == len(steps)


def test_checkpoints_on_workers_give_the_same_bits(run, simulated_workers, monkeypatch):
    there = followed(run)
    assert len(simulated_workers) == 2 * len(run)
    monkeypatch.setattr(workers, "runs_in_this_process", lambda: True)
    for local, remote in zip(followed(run), there, strict=True):
        same(local, remote)


def test_strengths_on_workers_give_the_same_bits(spoiled, simulated_workers, monkeypatch):
    there = judge(spoiled)
    # The factors of one matrix; then five strengths of the update, and four more of top, which is all here,
    # and of neighbour: 1 is tuned in each.
    assert len(simulated_workers) == 1 + 5 + 4 + 4
    monkeypatch.setattr(workers, "runs_in_this_process", lambda: True)
    same(judge(spoiled), there)


def test_routes_on_workers_give_the_same_bits(routed, simulated_workers, monkeypatch):
    there = grokking_pathways(routed, OF_LETTERS, permutations=100, draws=100)
    assert len(simulated_workers) == len(routed)
    monkeypatch.setattr(workers, "runs_in_this_process", lambda: True)
    same(grokking_pathways(routed, OF_LETTERS, permutations=100, draws=100), there)


def test_checkpoints_that_are_known_are_not_measured_again_on_workers(run, simulated_workers, tmp_path):
    for _ in range(2):
        training_trajectory(CheckpointSeries(run, cache=tmp_path), TASK)
    assert len(simulated_workers) == len(run)


def test_models_in_memory_stay_here(deep, run, simulated_workers):
    from transformers import AutoModelForCausalLM

    pair = deep[0]
    model = AutoModelForCausalLM.from_pretrained(pair.base.ref)
    loading = Loading(None, None, None, False)
    for tuned, travels in ((pair.tuned, True), (model, False)):
        remote_pair = workers.pair_on_workers(CheckpointPair(pair.base, tuned), loading, workers._open_pair)
        assert (remote_pair is not None) == travels
    assert workers.checkpoint_runner(CheckpointSeries([run[0], model]), "cpu") is one_by_one
    assert workers.checkpoint_runner(CheckpointSeries(run), "cpu") is not one_by_one


def every(deep, idle, run):
    pair, task, ood = deep
    return (
        interpolation_path(pair, task, ood=ood),
        layer_sharpness(pair, task, ood=ood, **FEW),
        pruned(idle, patterns=()),
        *followed(run),
    )


def test_processes_of_this_machine_give_the_same_bits(deep, idle, run):
    with engine("local:2"):
        there = every(deep, idle, run)
    for local, remote in zip(every(deep, idle, run), there, strict=True):
        same(local, remote)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_layers_loses_nothing(deep):
    pytest.importorskip("distributed", reason="needs tunescope[dask]")
    pair, task, ood = deep
    killed = []
    with clusters.dask_cluster() as (name, client):

        def progress(done, total, what):
            if not killed and what.endswith("from tuned"):
                killed.append(clusters.pids(client)[0])
                clusters.kill(killed[0])

        with engine(name):
            there = layer_sharpness(pair, task, ood=ood, progress=progress, **FEW)
    assert killed
    same(layer_sharpness(pair, task, ood=ood, **FEW), there)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray itself leaves sockets and asks for what is deprecated
def test_ray_gives_the_same_bits(deep, idle, run):
    pytest.importorskip("ray", reason="needs tunescope[ray]")
    with clusters.ray_cluster() as name, engine(name):
        there = every(deep, idle, run)
    for local, remote in zip(every(deep, idle, run), there, strict=True):
        same(local, remote)
