"""The miniature of dense grokking: its pairs, its ground truth, and, slowly, the order of events."""

import math
from pathlib import Path

import dense_grokking as miniature
import pytest
import torch
from torch.nn.functional import cross_entropy

P = miniature.MODULUS


@pytest.fixture(scope="module")
def pairs() -> miniature.Pairs:
    return miniature.Pairs.drawn(torch.Generator().manual_seed(0))


def test_what_is_held_out_is_trained_on_in_neither_order(pairs):
    trained = {tuple(pair) for pair in pairs.ids[pairs.trained, :2].tolist()}
    held = {tuple(pair) for pair in pairs.ids[pairs.held_out, :2].tolist()}
    assert len(trained) == round(0.4 * P**2)
    assert not held & (trained | {(b, a) for a, b in trained})
    # Of what is not trained, about 0.6, the mirror is not trained either in about 0.6.
    assert len(held) == pytest.approx(0.36 * P**2, rel=0.1)


def test_rows_ask_for_the_sum(pairs):
    rows = pairs.rows(pairs.held_out)
    assert len(rows) == int(pairs.held_out.sum())
    a, b, _ = rows[0]["prompt"].split()
    assert int(rows[0]["completion"]) == (int(a) + int(b)) % P


def test_waves_are_of_length_1_and_at_right_angles(pairs):
    both = torch.cat([miniature.waves(pairs, frequency) for frequency in (1, 4, 29)], dim=1)
    torch.testing.assert_close(both.T @ both, torch.eye(6, dtype=torch.float64))


def test_logits_made_of_one_frequency_are_nothing_without_it(pairs):
    total = (pairs.ids[:, 0] + pairs.ids[:, 1])[:, None]
    logits = 20 * (2 * math.pi * 7 * (total - torch.arange(P)).double() / P).cos()
    assert 7 in miniature.key_frequencies(logits, pairs)
    alone, without = miniature.restricted_and_excluded(logits, pairs, [7])
    held = pairs.held_out
    assert alone == pytest.approx(float(cross_entropy(logits[held], pairs.sums[held])))
    assert without == pytest.approx(math.log(P))  # nothing is left to tell the 59 sums by


def test_the_network_is_measured_as_any_model_is(pairs, tmp_path):
    saved = miniature.trained(pairs, [0, 2], seed=0)
    few = {"probes": 4, "vertices": 4, "batch": 50}
    result = miniature.measured(saved, pairs, tmp_path, **few)
    assert list(result.tables["steps"]["step"]) == [0, 2]
    assert {"nlm_unembedding", "kernel_cka", "linearity_gap", "local_complexity", "movement"} <= set(
        result.metrics
    )
    assert result.tables["layers"]["units"].unique().tolist() == [miniature.INNER]
    logits = miniature.logits_of(saved[2], pairs)
    right = (logits[pairs.trained].argmax(dim=1) == pairs.sums[pairs.trained]).double().mean()
    assert result.tables["steps"]["metric_train"].iloc[1] == pytest.approx(float(right), abs=1e-9)


@pytest.mark.slow
def test_the_circuit_forms_before_the_accuracy_shows_it(pairs, tmp_path: Path):
    saved = miniature.trained(pairs, range(0, 3001, 375), seed=0)
    rows = miniature.story(saved, pairs, miniature.measured(saved, pairs, tmp_path))
    assert all(miniature.claims(rows).values()), miniature.claims(rows)
