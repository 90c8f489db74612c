"""Every analysis says on a GPU what it says on a CPU, within bounds that are stated here."""

import warnings

import pytest
import torch

import diagnostics
from diagnostics.audit.demo import BUNDLED
from diagnostics.core.analysis import REGISTRY
from probes import CheckpointPair
from probes.checkpoints.series import CheckpointSeries
from probes.text.rows import read_task

GROKKING = BUNDLED / "grokking"
FILES = {"task": "task", "keep": "keep", "ood": "ood-code"}
# Few rows and steps: what is compared is the arithmetic, not the answer.
SMALL = {
    "drift": {"rows": 40},
    "dynamics": {"rows": 24, "probes": 4, "outputs": 4, "batch": 16, "vertices": 4},
    "intruders": {},
    "mitigation": {"scales": (0.5,), "draws": 100},
    "ood": {"draws": 100},
    "path": {"alphas": (0.0, 0.5, 1.0)},
    "pathways": {"samples": 24, "permutations": 100, "draws": 100},
    "sharpness": {
        "alphas": (0.0, 0.5, 1.0), "layer_alphas": (0.5,), "sharpness_alphas": (1.0,), "rhos": (0.5,),
        "steps": 3, "batches": 1, "batch_rows": 8, "rows": 24, "curvature": False,
    },
    "skills": {"search": "movement", "budgets": (0.001, 0.1), "seeds": 1, "draws": 100},
    "sparsity": {
        "grid": (0.0, 0.3, 0.5, 0.8), "refine": 0.0, "patterns": ("2:4",), "random": False, "draws": 100,
    },
    "trajectory": {"rows": 40},
}  # fmt: skip
# By how much a metric may differ: absolutely where it is a share or an accuracy (one of the 24 or 60 rows may
# stand on an edge), relatively otherwise. Losses are sums of float32 products, whose order a GPU changes, and
# what is climbed or differentiated several times over amplifies that.
ABSOLUTE = {
    "drift": {"lowest_rsa_keep": 1e-3, "lowest_cka_keep": 1e-3, "lowest_cka_task": 1e-3, "layers": 0},
    "dynamics": {"kernel_cka": 1e-2, "linearity_gap": 1e-2, "stalled": 0},
    "intruders": {"intruders": 0, "matrices": 0, "changed": 0, "frozen": 0},
    "mitigation": {"task_accuracy_base": 1 / 60, "task_accuracy_tuned": 1 / 60, "intruders": 0, "edited": 0},
    "ood": {"auroc": 1e-3, "auroc_tuned_likelihood": 1e-3, "keep_gain_nats": 1e-3, "gain_nats": 1e-3},
    "path": {"barrier_task_nats": 1e-3},
    "pathways": {},
    "sharpness": {"layers": 0},
    "skills": {"base_metric": 1 / 24, "tuned_metric": 1 / 24, "region": 0, "entries": 0, "moved": 0},
    "sparsity": {"value_base": 1 / 60, "value_tuned": 1 / 60, "kappa_at_0_3": 0, "delta_low_at_0_3": 1e-6},
    "trajectory": {},
}
RELATIVE = {
    "dynamics": {"logit_scale": 1e-3, "movement": 1e-4},
    "mitigation": {"keep_loss_base": 1e-4, "keep_loss_tuned": 1e-4, "task_loss_tuned": 1e-4},
    "path": {"base_task_nats": 1e-4, "tuned_keep_nats": 1e-4, "tuned_ood_nats": 1e-4},
    "pathways": {"distance_first": 1e-2},
    "sharpness": {"sharpness_tuned": 0.05, "average_tuned": 0.05},
    "trajectory": {"distance": 1e-4, "inefficiency": 1e-4},
}


def measured(name, device):
    """The metrics of an analysis of the bundled checkpoints, run on a device."""
    for export in diagnostics.EXPORTS:
        getattr(diagnostics, export)
    one = REGISTRY[name]
    if "series" in one.inputs:
        steps = [GROKKING / "parity" / f"checkpoint-{step}" for step in (0, 150, 300, 400)]
        given = {"series": CheckpointSeries(steps), "task": read_task(GROKKING / "train.jsonl", limit=40)}
    else:
        given = {role: read_task(BUNDLED / f"{file}.jsonl", limit=60) for role, file in FILES.items()}
        given["pair"] = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8")
    given = {role: value for role, value in given.items() if role in (*one.inputs, *one.optional)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is too small to be answered
        return one.function(**given, **SMALL[name], device=device).metrics


def apart(name, first, second):
    """The metrics by which two runs of an analysis differ more than they may."""
    absolute = {
        metric
        for metric, bound in ABSOLUTE[name].items()
        if not abs(first[metric] - second[metric]) <= bound + 1e-12
    }
    return absolute | {
        metric
        for metric, bound in RELATIVE.get(name, {}).items()
        if not abs(first[metric] - second[metric]) <= bound * abs(first[metric])
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SMALL)
def test_an_analysis_says_on_a_gpu_what_it_says_on_a_cpu(name):
    assert apart(name, measured(name, "cpu"), measured(name, "cuda")) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamics", "intruders", "ood", "pathways", "trajectory"])
def test_an_analysis_says_the_same_twice(name):
    assert apart(name, measured(name, "cpu"), measured(name, "cpu")) == set()


def test_every_analysis_that_runs_on_a_device_is_compared():
    for export in diagnostics.EXPORTS:
        getattr(diagnostics, export)
    ours = {name for name, one in REGISTRY.items() if one.function.__module__.startswith("diagnostics")}
    assert {name for name in ours if "device" in REGISTRY[name].parameters} == set(SMALL) == set(ABSOLUTE)
    assert all(ABSOLUTE[name] or RELATIVE[name] for name in SMALL)


def test_what_differs_by_more_than_its_bound_is_named():
    # 1e-4 of a distance of 20 is 0.002.
    first = {"distance": 20.0, "inefficiency": 1.0}
    assert apart("trajectory", first, {"distance": 20.001, "inefficiency": 1.0}) == set()
    assert apart("trajectory", first, {"distance": 20.003, "inefficiency": float("nan")}) == set(first)
    counts = dict.fromkeys(ABSOLUTE["intruders"], 3)
    assert apart("intruders", counts, counts | {"intruders": 4}) == {"intruders"}
