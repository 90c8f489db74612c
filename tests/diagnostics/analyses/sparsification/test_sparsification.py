"""Negligible weights over a run: what counts as negligible, and where it jumps."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from diagnostics.analyses.sparsification import analysis as module
from diagnostics.analyses.sparsification.analysis import (
    abrupt_sparsification,
    draw,
    find_jumps,
    measure_sparseness,
)
from probes.checkpoints.series import CheckpointSeries

NAME = "model.layers.0.self_attn.q_proj.weight"


def normal(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(directory, weights, name=NAME):
    directory.mkdir()
    tensors = {name: weights, "model.embed_tokens.weight": torch.zeros(9, 4)}
    save_file(tensors, directory / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def run(tmp_path, series, labels=(), **settings):
    refs = [saved(tmp_path / f"step-{index}", weights) for index, weights in enumerate(series)]
    return abrupt_sparsification(CheckpointSeries(refs, steps=labels), **settings)


def thinned(weights, share):
    """The smallest weights at 0."""
    limit = weights.abs().flatten().quantile(share)
    return torch.where(weights.abs() < limit, 0.0, weights)


# --- one matrix ---


def test_every_measure_by_hand():
    # rms = √(100 / 10) = √10, a tenth of it 0.316; l1 / l2 = 10.3 / √100 to three digits.
    weights = torch.tensor([0.0, 0.0, 5e-4, -0.2, 0.3, 0.0, 0.0, 0.0, 0.0, (100 - 0.13 - 2.5e-7) ** 0.5])
    sparseness = measure_sparseness(weights)
    assert (sparseness.entries, sparseness.zero, sparseness.near_zero, sparseness.small) == (10, 6, 7, 9)
    assert sparseness.rms == pytest.approx(math.sqrt(10))
    l1 = 0.5005 + math.sqrt(100 - 0.13 - 2.5e-7)
    assert sparseness.hoyer == pytest.approx((math.sqrt(10) - l1 / 10) / (math.sqrt(10) - 1))


def test_normal_weights_have_the_values_of_the_normal_distribution():
    # P(|z| < 0.1) = 0.0797; l1 / l2 = √n √(2 / π), so that Hoyer is about 1 - 0.798 = 0.202.
    sparseness = measure_sparseness(normal(1000, 1000))
    assert sparseness.small / sparseness.entries == pytest.approx(0.0797, abs=0.001)
    assert sparseness.hoyer == pytest.approx(0.202, abs=0.002)


@given(st.integers(0, 2**31), st.integers(-8, 8))
def test_a_common_scale_changes_the_absolute_measures_alone(seed, power):
    weights = normal(20, 20, seed=seed)
    first, second = measure_sparseness(weights), measure_sparseness(weights * 2.0**power)
    assert (first.zero, first.small) == (second.zero, second.small)
    assert first.hoyer == pytest.approx(second.hoyer)


def test_the_ends_of_the_hoyer_index():
    assert measure_sparseness(torch.tensor([0.0, 0.0, 3.0, 0.0])).hoyer == pytest.approx(1)
    assert measure_sparseness(torch.tensor([2.0, -2.0, 2.0, 2.0])).hoyer == pytest.approx(0)
    assert math.isnan(measure_sparseness(torch.zeros(4)).hoyer)
    assert math.isnan(measure_sparseness(torch.ones(1)).hoyer)
    assert measure_sparseness(torch.zeros(4)).small == 4


def test_parts_of_a_matrix_add_up(monkeypatch):
    weights = normal(50, 21)
    total = measure_sparseness(weights)
    monkeypatch.setattr(module, "CHUNK", 64)
    parts = measure_sparseness(weights)
    assert (parts.zero, parts.near_zero, parts.small) == (total.zero, total.near_zero, total.small)
    assert (parts.rms, parts.hoyer) == (pytest.approx(total.rms), pytest.approx(total.hoyer))


# --- the jump ---


def naive(series):
    d = [b - a for a, b in itertools.pairwise(series)]
    middle = np.median(d)
    spread = np.median([abs(x - middle) for x in d])
    scores = [0.6745 * (x - middle) / max(spread, 1e-300) for x in d]  # infinite where nothing else moves
    return [False, *(x >= 0.01 and score > 3.5 for x, score in zip(d, scores, strict=True))]


@given(st.lists(st.integers(0, 64), min_size=3, max_size=20).map(lambda v: [x / 64 for x in v]))
def test_a_jump_stands_out_among_the_differences_and_is_a_point_or_more(series):
    assert find_jumps(series).tolist() == naive(series)


def test_a_steady_rise_has_no_jump_and_a_step_in_it_has_one():
    steady = np.linspace(0.1, 0.5, 12) + 0.005 * np.random.default_rng(0).normal(size=12)
    assert not find_jumps(steady).any()
    step = steady + 0.2 * (np.arange(12) >= 7)
    assert np.flatnonzero(find_jumps(step)).tolist() == [7]
    # The same step as a fall is none.
    assert not find_jumps(steady - 0.2 * (np.arange(12) >= 7)).any()


def test_less_than_a_point_is_no_jump_however_it_stands_out():
    assert not find_jumps([0.1, 0.1, 0.1, 0.1, 0.1099, 0.1099]).any()
    assert find_jumps([0.1, 0.1, 0.1, 0.1, 0.1101, 0.1101]).tolist() == [False] * 4 + [True, False]


def test_what_is_not_known_is_no_jump():
    assert not find_jumps([math.nan] * 5).any()
    assert not find_jumps([0.1, 0.2]).any()


# --- a run ---


def test_a_jump_is_marked_at_its_checkpoint(tmp_path):
    weights = normal(40, 40)
    series = [thinned(weights, share) for share in (0.0, 0.01, 0.02, 0.031, 0.3, 0.305)]
    result = run(tmp_path, series, labels=[0, 1000, 2000, 3000, 4000, 5000])
    table = result.tables["checkpoints"]
    assert table["label"].tolist() == ["0", "1000", "2000", "3000", "4000", "5000"]
    np.testing.assert_allclose(table["zero"], [0, 0.01, 0.02, 0.031, 0.3, 0.305], atol=1e-3)
    assert table["small_jump"].tolist() == [False] * 4 + [True, False]
    assert (result.metrics["jumps"], result.metrics["jump"]) == (1, 4)
    assert result.metrics["zero_rise"] == pytest.approx(0.305, abs=1e-3)
    assert any("Sparsification at 4000" in note for note in result.notes)


def test_weights_that_only_shrink_are_told_from_sparsification(tmp_path):
    weights = normal(40, 40, scale=0.01)
    result = run(tmp_path, [weights * scale for scale in (1, 0.99, 0.98, 0.97, 0.3, 0.29)])
    table = result.tables["checkpoints"]
    assert table["near_zero_jump"].tolist() == [False] * 4 + [True, False]
    assert not table[["small_jump", "hoyer_jump", "zero_jump"]].any().any()
    assert result.metrics["jumps"] == 0
    assert "jump" not in result.metrics
    assert any("may be weight decay" in note for note in result.notes)


def test_only_the_matrices_of_the_chosen_parts_count(tmp_path):
    # The embedding is all zeros.
    weights = normal(20, 20)
    assert run(tmp_path, [weights] * 3).tables["checkpoints"]["zero"].tolist() == [0] * 3
    refs = [str(tmp_path / f"step-{index}") for index in range(3)]
    both = abrupt_sparsification(refs, parts=("block", "embedding")).tables["checkpoints"]
    assert both["zero"].tolist() == pytest.approx([36 / 436] * 3)
    assert both["hoyer"].tolist() == pytest.approx(
        [measure_sparseness(weights).hoyer] * 3
    )  # undefined for zeros


def test_progress_runs_through_all_checkpoints(tmp_path):
    reports = []
    run(tmp_path, [normal(4, 4)] * 3, progress=lambda *step: reports.append(step))
    assert [(done, total) for done, total, _ in reports] == [(0, 3), (1, 3), (2, 3)]


def test_the_picture_has_a_line_a_measure_and_a_star_at_a_jump(tmp_path):
    weights = normal(40, 40)
    shares = (0.0, 0.01, 0.02, 0.031, 0.3, 0.305)
    figure = draw(run(tmp_path, [thinned(weights, share) for share in shares]))["sparseness"]
    assert [line.name for line in figure.data] == ["zero", "near_zero", "small", "hoyer"]
    assert [list(line.x) for line in figure.data] == [list(range(6))] * 4
    assert list(figure.data[2].marker.symbol) == ["square"] * 4 + ["star", "square"]


# --- what cannot be measured ---


def test_fewer_than_three_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a series of 1 checkpoint: a jump needs at least 3; give more"):
        run(tmp_path, [normal(4, 4)])


def test_labels_belong_to_checkpoints_one_by_one_in_step_order(tmp_path):
    series = [normal(4, 4)] * 3
    with pytest.raises(ValueError, match="--steps: 2 steps for 3 checkpoints, the first included"):
        run(tmp_path, series, labels=["a", "b"])
    refs = [str(tmp_path / f"step-{index}") for index in range(3)]
    with pytest.raises(
        ValueError, match="step 500 comes after step 1000: give the checkpoints in step order"
    ):
        abrupt_sparsification(CheckpointSeries(refs, steps=[0, 1000, 500]))
    names = abrupt_sparsification(CheckpointSeries(refs, steps=["start", "middle", "end"])).tables[
        "checkpoints"
    ]
    assert names["label"].tolist() == ["start", "middle", "end"]
    uneven = abrupt_sparsification(CheckpointSeries(refs, steps=["0", "10", "500"]))
    assert any("not evenly spaced" in note for note in uneven.notes)


def test_weights_that_are_no_finite_numbers_are_refused_by_name(tmp_path):
    bad = normal(4, 4)
    bad[1, 1] = math.inf
    with pytest.raises(ValueError, match=rf"step-1: {NAME} holds a NaN or an infinity"):
        run(tmp_path, [normal(4, 4), bad, bad])


def test_a_scope_without_a_matrix_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step-0: has no matrix in router"):
        run(tmp_path, [normal(4, 4)] * 3, parts=("router",))
