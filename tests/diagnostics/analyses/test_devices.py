"""Every analysis says on a GPU what it says on a CPU, within bounds that are stated here."""

import warnings

import pytest
import torch

from diagnostics.audit.demo import BUNDLED
from diagnostics.core.registry import installed_analyses
from probes import CheckpointPair
from probes.checkpoints.series import CheckpointSeries
from probes.text.rows import read_task

GROKKING = BUNDLED / "grokking"
FILES = {"task": "task", "keep": "keep", "ood": "ood-code"}
# Losses are sums of float32 products, whose order a GPU changes. Climbing or differentiating several times
# amplifies that, and of 24 or 60 rows one may stand on an edge: hence the bounds of the registrations.
RECORDS = {
    name: record
    for name, record in installed_analyses().items()
    if record.function.__module__.startswith("diagnostics.") and "device" in record.parameters
}


def measured(name, device):
    """The metrics of an analysis of the bundled checkpoints, run on a device."""
    record = RECORDS[name]
    if "series" in record.inputs:
        steps = [GROKKING / "parity" / f"checkpoint-{step}" for step in (0, 150, 300, 400)]
        supplied = {"series": CheckpointSeries(steps), "task": read_task(GROKKING / "train.jsonl", limit=40)}
    else:
        supplied = {role: read_task(BUNDLED / f"{file}.jsonl", limit=60) for role, file in FILES.items()}
        supplied["pair"] = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8")
    inputs = {role: value for role, value in supplied.items() if role in (*record.inputs, *record.optional)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is too small to be answered
        return record.function(**inputs, **record.device_test.parameters, device=device).metrics


def apart(name, first, second):
    """The metrics by which two runs of an analysis differ more than they may."""
    bounds = RECORDS[name].device_test
    absolute = {
        metric
        for metric, bound in bounds.absolute.items()
        if not abs(first[metric] - second[metric]) <= bound + 1e-12
    }
    return absolute | {
        metric
        for metric, bound in bounds.relative.items()
        if not abs(first[metric] - second[metric]) <= bound * abs(first[metric])
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECORDS)
def test_an_analysis_says_on_a_gpu_what_it_says_on_a_cpu(name):
    assert apart(name, measured(name, "cpu"), measured(name, "cuda")) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamics", "intruders", "ood", "pathways", "trajectory"])
def test_an_analysis_says_the_same_twice(name):
    assert apart(name, measured(name, "cpu"), measured(name, "cpu")) == set()


@pytest.mark.parametrize("name", RECORDS)
def test_every_analysis_that_runs_on_a_device_is_compared(name):
    test = RECORDS[name].device_test
    assert test is not None, f"@analysis({name!r}, …) lacks device_test=DeviceTest(relative={{…}})"
    assert {**test.absolute, **test.relative}
    assert {*test.absolute, *test.relative} <= set(RECORDS[name].metrics)
    assert set(test.parameters) <= set(RECORDS[name].parameters)


def test_what_differs_by_more_than_its_bound_is_named():
    # 1e-4 of a distance of 20 is 0.002.
    first = {"distance": 20.0, "inefficiency": 1.0}
    assert apart("trajectory", first, {"distance": 20.001, "inefficiency": 1.0}) == set()
    assert apart("trajectory", first, {"distance": 20.003, "inefficiency": float("nan")}) == set(first)
    counts = dict.fromkeys(RECORDS["intruders"].device_test.absolute, 3)
    assert apart("intruders", counts, counts | {"intruders": 4}) == {"intruders"}
