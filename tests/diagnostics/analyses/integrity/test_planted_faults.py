"""Every planted fault is found, and nothing on intact pairs: counted over architectures and dtypes."""

import sys

import pytest
import torch

from diagnostics import checkpoint_integrity
from probes import CheckpointPair
from tests.diagnostics.planted_faults import ARCHITECTURES, DTYPES, FAULTS, intact, planted

PAIRS = [(architecture, dtype) for architecture in ARCHITECTURES for dtype in DTYPES]


def findings(pair, *, adapter=True):
    result = checkpoint_integrity(
        CheckpointPair(pair / "base", pair / "tuned"), *([pair / "adapter"] if adapter else [])
    )
    return {finding.metric for finding in result.findings()}


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """fault -> the (architecture, dtype) in which it was found; and what intact pairs were accused of."""
    folder = tmp_path_factory.mktemp("planted")
    detected = {fault: [] for fault in FAULTS}
    alarms = {}
    for architecture, dtype in PAIRS:
        pair = intact(folder / f"{architecture}-{dtype}", architecture, dtype)
        for merge_checked in (True, False):
            if metrics := findings(pair, adapter=merge_checked):
                alarms[architecture, dtype, merge_checked] = metrics
        for fault, (_, metric) in FAULTS.items():
            copy = planted(pair, fault, folder / f"{architecture}-{dtype}-{fault}")
            if metric in findings(copy):
                detected[fault].append((architecture, dtype))
    width = max(map(len, FAULTS))
    lines = [f"{fault:<{width}}  found in {len(pairs)} of {len(PAIRS)}" for fault, pairs in detected.items()]
    lines.append(f"{'intact':<{width}}  {len(alarms)} false alarms in {2 * len(PAIRS)} checks")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
    return detected, alarms


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_found_in_every_pair(counts, fault):
    detected, _ = counts
    assert sorted(set(PAIRS) - set(detected[fault])) == []


def test_an_intact_pair_is_accused_of_nothing(counts):
    _, alarms = counts
    assert alarms == {}


def test_a_fault_of_one_layer_is_named_by_its_layer(tmp_path):
    pair = planted(intact(tmp_path / "pair", "llama", "bfloat16"), "one layer unmerged", tmp_path / "faulty")
    result = checkpoint_integrity(CheckpointPair(pair / "base", pair / "tuned"), pair / "adapter")
    merge = result.tables["merge"]
    assert merge[merge["verdict"] == "unmerged"]["layer"].unique().tolist() == [1]
    assert result.metrics["unmerged"] == 3
    assert any("layer 1 q_proj" in note for note in result.notes)


def test_the_planted_merges_are_pefts_own(tmp_path):
    pair = intact(tmp_path / "pair", "gpt2", "float32")
    merged = CheckpointPair(pair / "base", pair / "adapter")
    for name in merged.tuned.headers:
        tuned = CheckpointPair(pair / "base", pair / "tuned").tuned.tensor(name)
        torch.testing.assert_close(merged.tuned.tensor(name).float(), tuned)
