"""How much base and tuned tolerate: against plants and naive pruning, and withheld where rows are few."""

import json
import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.analyses.sparsity.analysis import METRICS, essential_sparsity
from diagnostics.analyses.sparsity.dropping_point import estimate_dropping_point
from diagnostics.core.policy import default_policy, not_measured
from diagnostics.core.registry import find
from diagnostics.evaluation.row_losses import EncodedTask, encoded
from probes import CheckpointPair
from probes.models.editable import Editable
from probes.models.two_sided import TwoSidedModel
from probes.text.rows import task_of
from tests.diagnostics.pruned import (
    LETTERS,
    SCOPE,
    guessed,
    half_idle,
    leaning,
    matrices,
    pruned_naively,
    sampled,
    save,
)
from tests.probes.runnable import assert_same, make, state_of

ROWS = sampled(half_idle(), 60)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Base can lose half of its weights; tuned, the same function, what its idle values are."""
    root = tmp_path_factory.mktemp("pair")
    return CheckpointPair(save(root / "base", half_idle()), save(root / "tuned", leaning()))


@pytest.fixture(scope="module")
def result(pair):
    return essential_sparsity(pair, ROWS, draws=200)


def quick(pair, task=ROWS[:20], keep=None, **settings):
    about = {"grid": (0.0, 0.2, 0.4, 0.6, 0.8), "refine": 0.0, "random": False, "patterns": (), "draws": 100}
    return essential_sparsity(pair, task, keep, **{**about, **settings})


def curve(result, model, *, pattern="magnitude", role="task", regime="zero_shot"):
    table = result.tables["curve"]
    rows = table[(table["model"] == model) & (table["pattern"] == pattern) & (table["role"] == role)]
    return rows[rows["regime"] == regime].set_index("sparsity")["value"]


def loss_of(directory, model, rows=ROWS):
    """The loss of a model that is written to a file and read again."""
    editable = Editable(CheckpointPair(*[save(directory, model)] * 2).tuned)
    losses = encoded(
        editable, task_of(rows), max_length=None, chat_template=False, batch_tokens=9999
    ).measure(editable.model)
    return losses.nats.sum() / losses.units.sum()


# --- masks ---


def test_the_mask_at_the_dropping_point_is_what_graft_takes(pair, tmp_path, monkeypatch):
    from diagnostics.audit.run import audit
    from diagnostics.core import registry
    from diagnostics.edits.graft import graft
    from diagnostics.store.audit_store import load

    # Whatever else is installed.
    monkeypatch.setattr(registry, "entry_points", lambda **_: [])
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS[:20]))
    refs = pair.base.ref, pair.tuned.ref
    settings = {"grid": (0.0, 0.2, 0.4, 0.6), "refine": 0.0, "random": False, "patterns": (), "draws": 100}
    audit(
        *refs, out=tmp_path / "audit", only=("sparsity",), task=[str(tmp_path / "task.jsonl")],
        settings={"sparsity": {**settings, "masks": True}},
    )  # fmt: skip
    saved = load(tmp_path / "audit").results["sparsity"]
    # Base drops at 0.4 of the grid, tuned at 0: its mask would keep every weight.
    assert saved.metrics["dropping_point_base"] == 0.4
    assert {name: path.name for name, path in saved.masks.items()} == {"base": "sparsity.base.safetensors"}
    assert any("No mask of tuned is given" in note for note in saved.notes)
    graft(*refs, saved.masks["base"], tmp_path / "graft")
    grafted = CheckpointPair(pair.base, tmp_path / "graft").tuned
    kept = matrices(pruned_naively(half_idle(), 0.4))
    for name in pair.tuned.headers:
        base, tuned = pair.base.tensor(name), pair.tuned.tensor(name)
        where = kept[name] != 0 if name in kept else torch.zeros(base.shape, dtype=torch.bool)
        assert torch.equal(grafted.tensor(name), torch.where(where, tuned, base)), name


def test_masks_are_given_on_request_alone(result):
    assert result.masks == {}


# --- plants ---


def test_a_planted_point_is_found_on_either_side_with_how_far_it_moved(result):
    m = result.metrics
    # Half of base's weights are idle. In tuned the values are the smallest of all: the idle ones are 128 of
    # 4608 = 0.028, of which 0.02 and not 0.04 is within.
    assert (m["dropping_point_base"], m["dropping_point_tuned"]) == (0.5, 0.02)
    points = result.tables["points"].set_index("model")
    assert points.loc["base", "until"] == 0.52
    assert points.loc["tuned", "until"] == 0.04
    assert points.loc["base", "rho"] == pytest.approx(0.02 / 0.5)
    for side, at, until in (("base", 0.5, 0.52), ("tuned", 0.02, 0.04)):
        low, point, high = (m[f"robust_point_{side}{end}"] for end in ("_low", "", "_high"))
        assert at <= low <= point <= high < until
    assert m["shift"] == pytest.approx(m["robust_point_tuned"] - m["robust_point_base"])
    assert -0.5 < m["shift_low"] <= m["shift"] <= m["shift_high"] < -0.46
    assert points["verdict"].to_dict() == {"base": "sharp", "tuned": "no plateau"}
    assert (m["reached_base"], m["reached_tuned"]) == (1, 1)


def test_what_is_wrong_is_found_by_the_default_policy(result):
    flagged = {finding.metric for finding in result.findings()}
    # tuned tolerates less than 0.1, and 0.48 less than base; likeness and change are as in the tests below.
    assert {"dropping_point_tuned", "shift"} <= flagged
    assert flagged <= {"dropping_point_tuned", "shift", "delta_low_at_0_3", "kappa_at_0_3"}


def test_the_summary_and_the_notes_say_it_with_its_regime(result):
    assert "zero-shot, loss within 0.01 of its value: tuned tolerates 0.02" in result.summary()
    assert "base tolerates 0.5 (0.5 to 0.5, sharp)" in result.summary()
    notes = "\n".join(result.notes)
    assert "The paper's 30 to 50 % are of masked fine-tuning" in notes
    assert "base, task rows, zero-shot: sharp. Within the tolerance up to 0.5, beyond it at 0.52" in notes
    assert "save no time on ordinary hardware" in notes
    assert set(result.tables["curve"]["regime"]) == {"zero_shot"}


# --- naive pruning ---


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6])
def test_the_curve_is_that_of_files_with_the_smallest_weights_at_zero(result, tmp_path, sparsity):
    for side, model in (("base", half_idle()), ("tuned", leaning())):
        expected = loss_of(tmp_path / side, pruned_naively(model, sparsity))
        assert curve(result, side)[sparsity] == pytest.approx(expected, abs=1e-5)
        realised = result.tables["curve"].query("model == @side and pattern == 'magnitude'")
        assert realised.set_index("sparsity")["realised"][sparsity] == round(sparsity * SCOPE) / SCOPE


def test_a_pattern_is_that_of_a_file_with_the_smallest_of_each_group_at_zero(result, tmp_path):
    model = leaning()
    with torch.no_grad():
        for weight in matrices(model).values():  # the two smallest of each four consecutive inputs
            groups = weight.view(weight.shape[0], -1, 4)
            groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0.0)
    expected = loss_of(tmp_path / "out", model)
    assert result.metrics["value_2_4_tuned"] == pytest.approx(expected, abs=1e-5)
    dense = result.metrics["value_tuned"]
    assert result.metrics["drop_2_4_tuned"] == pytest.approx(expected - dense, abs=1e-5)
    ratio = math.exp(expected) / math.exp(dense)
    assert result.metrics["perplexity_ratio_2_4_tuned"] == pytest.approx(ratio, rel=1e-4)


def test_freer_patterns_keep_more_of_the_weights(result):
    for _, part in result.tables["patterns"].groupby("model"):
        kept = part.set_index("pattern")
        for column in ("kept_l1", "kept_l2"):
            order = [kept[column][name] for name in ("magnitude", "4:8", "2:4", "1:2")]
            assert order == sorted(order, reverse=True)
            assert kept[column]["random"] == pytest.approx(0.5, abs=0.1)
        assert set(part["sparsity"]) == {0.5}


def test_scopes_share_sparsity_in_their_own_ways(pair):
    tables = {scope: quick(pair, scope=scope).tables["layers"].query("model == 'base'")
              for scope in ("global", "block", "tensor")}  # fmt: skip
    for scope, table in tables.items():
        at = table["at"].iloc[0]
        assert (table["sparsity"] * table["entries"]).sum() == pytest.approx(at * SCOPE, abs=len(table))
        by_layer = [
            (p["sparsity"] * p["entries"]).sum() / p["entries"].sum() for _, p in table.groupby("layer")
        ]
        assert (np.ptp(by_layer) < 1e-3) == (scope != "global")
        assert (np.ptp(table["sparsity"]) < 0.01) == (scope == "tensor")


# --- what does not change ---


def test_a_model_in_memory_is_left_as_it_was(pair):
    base = half_idle()
    before = state_of(base)
    result = quick(CheckpointPair(base, pair.tuned.ref))
    assert_same(before, state_of(base))
    np.testing.assert_allclose(curve(result, "base"), curve(quick(pair), "base"), atol=1e-6)


def test_a_run_that_fails_leaves_the_model_as_tuned(pair, monkeypatch):
    entered = []
    enter = TwoSidedModel.__enter__
    monkeypatch.setattr(
        TwoSidedModel, "__enter__", lambda two_sided: entered.append(two_sided) or enter(two_sided)
    )
    measure, calls = EncodedTask.measure, []

    def fails(self, model):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return measure(self, model)

    monkeypatch.setattr(EncodedTask, "measure", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        quick(pair)
    tuned_state = Editable(pair.tuned).model.state_dict()
    assert all(
        torch.equal(tensor, tuned_state[name]) for name, tensor in entered[0].model.state_dict().items()
    )


def test_the_same_arguments_give_the_same_result_and_batches_change_nothing(pair):
    first, second = (quick(pair, random=True, patterns=("2:4",)) for _ in range(2))
    for name in first.tables:
        pd.testing.assert_frame_equal(first.tables[name], second.tables[name])
    small = quick(pair, random=True, patterns=("2:4",), batch_tokens=40)
    np.testing.assert_allclose(first.tables["curve"]["value"], small.tables["curve"]["value"], atol=1e-5)
    other = quick(pair, random=True, patterns=("2:4",), seed=1)
    assert not np.allclose(curve(first, "base", pattern="random"), curve(other, "base", pattern="random"))
    np.testing.assert_array_equal(curve(first, "base"), curve(other, "base"))


def test_a_checkpoint_against_itself_has_not_moved(pair):
    result = quick(CheckpointPair(pair.base.ref, pair.base.ref))
    m = result.metrics
    assert m["dropping_point_base"] == m["dropping_point_tuned"]
    assert (m["shift"], m["shift_low"], m["shift_high"]) == (0, 0, 0)
    assert m["kappa_at_0_3"] == pytest.approx(1)
    assert m["revived_at_0_3"] == 0
    assert "delta_low_at_0_3" not in m
    assert "change" not in result.figures()


# --- the grid ---


def test_at_most_four_further_evaluations_refine_a_curve(pair):
    coarse = quick(pair, grid=tuple(np.arange(10) / 10))
    fine = quick(pair, grid=tuple(np.arange(10) / 10), refine=0.02)
    assert coarse.metrics["evaluations"] == 20
    assert coarse.metrics["evaluations"] < fine.metrics["evaluations"] <= 28
    assert (coarse.metrics["dropping_point_base"], coarse.metrics["dropping_point_tuned"]) == (0.5, 0.0)
    for side in ("base", "tuned"):
        asked = sorted(set(curve(fine, side).index) - set(curve(coarse, side).index))
        assert 1 <= len(asked) <= 4
        assert all(abs(s / 0.02 - round(s / 0.02)) < 1e-9 for s in asked)


def test_zero_is_always_measured_and_random_pruning_shares_it(pair):
    result = quick(pair, grid=(0.3, 0.6, 0.9), random=True)
    assert list(curve(result, "base").index) == [0, 0.3, 0.6, 0.9]
    assert curve(result, "base", pattern="random")[0.0] == curve(result, "base")[0.0]
    assert result.metrics["evaluations"] == 2 * (4 + 3)


def test_random_pruning_hurts_where_that_of_small_weights_does_not(result):
    for side, at in (("base", 0.3), ("tuned", 0.02)):
        small = curve(result, side)[at] - curve(result, side)[0]
        assert small < 1e-4
        if at in curve(result, side, pattern="random").index:
            assert curve(result, side, pattern="random")[at] - curve(result, side)[0] > 0.5


def test_where_random_pruning_costs_nothing_either_it_is_said(pair):
    # Any letter is as good as any other where all seven are completions of one row each.
    rows = [{"text": letter} for letter in LETTERS]
    result = quick(pair, rows, grid=(0.0, 0.02, 0.04, 0.06), random=True, tolerance=0.9)
    assert any("random pruning of 0.02 stays within the tolerance too" in note for note in result.notes)


# --- what rows can tell ---


def test_too_few_rows_withhold_the_point_and_say_how_many_would_do(pair):
    result = quick(CheckpointPair(pair.base.ref, pair.base.ref), guessed(half_idle(), 20))
    points = result.tables["points"]
    # One row of 20 is 5 points: 1 point needs (1.96 / 20 / 0.01)² x 20 = 1921 rows at the least.
    assert not points["decided"].any()
    assert points["dropping_point"].isna().all()
    assert result.metrics["rows_needed"] >= 1921
    assert not {"dropping_point_base", "dropping_point_tuned", "robust_point_base", "shift"} & set(
        result.metrics
    )
    assert "dropping_point_tuned" in not_measured(result, default_policy())
    notes = "\n".join(result.notes)
    assert re.search(
        r"tuned, task rows, zero-shot: withheld\. 20 rows measure the drop to within .* tolerance is 0\.01",
        notes,
    )
    assert "The dropping point of base is withheld; its layers are shown at 0.5" in notes
    assert "No shift between base and tuned is given" in notes
    assert "are needed" in result.summary()


def test_accuracy_is_absolute_and_the_default_of_choices(pair):
    rows = guessed(half_idle(), 60)
    result = quick(pair, rows, tolerance=0.2)
    assert result.metrics["value_base"] == result.metrics["value_tuned"] == 1  # the model's own answers
    points = result.tables["points"].set_index("model")
    assert set(points["metric"]) == {"accuracy"}
    assert (points["rule"] == "0.2 absolute").all()
    assert (points["allowed"] == 0.2).all()
    assert result.metrics["dropping_point_base"] == 0.4
    assert "perplexity_ratio_2_4_base" not in quick(pair, rows, tolerance=0.2, patterns=("2:4",)).metrics


def test_accuracy_of_texts_is_the_share_of_tokens_that_are_the_likeliest(pair):
    model, right, count = half_idle(), 0, 0
    texts = [
        text[: 4 + index % 9] for index, text in enumerate(ROWS)
    ]  # a long text counts more than a short one
    for text in texts:
        ids = torch.tensor([[0, *(1 + LETTERS.index(letter) for letter in text)]])
        with torch.no_grad():
            right += int((model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
        count += len(text)
    result = quick(pair, texts, metric="accuracy", tolerance=0.1)
    assert result.metrics["value_base"] == pytest.approx(right / count)
    assert set(result.tables["points"]["metric"]) == {"accuracy"}
    # Perplexity is of the loss, whatever the metric.
    assert "perplexity_ratio_2_4_base" in quick(pair, texts, metric="accuracy", patterns=("2:4",)).metrics


def test_a_loss_is_tolerated_as_a_share_of_itself(result):
    points = result.tables["points"]
    np.testing.assert_allclose(points["allowed"], 0.01 * points["value"])


def test_the_estimates_are_those_of_the_curve_in_the_table(result):
    for row in result.tables["points"].to_dict("records"):
        series = curve(result, row["model"])
        values = -series.to_numpy()
        alone = estimate_dropping_point(
            series.index.to_numpy(dtype=float), values, np.repeat(values[None], 100, 0), tolerance=0.01,
            relative=True, step=0.1, rows=len(ROWS),
        )  # fmt: skip
        assert (row["dropping_point"], row["until"]) == (alone.paper.at, alone.paper.until)
        assert row["robust_point"] == pytest.approx(alone.point)
        assert (row["hinge"], row["verdict"]) == (alone.hinge.at, alone.verdict)


def test_a_curve_that_does_not_fall_within_the_grid_gives_a_lower_bound(pair):
    result = quick(pair, grid=(0.0, 0.01, 0.015, 0.02))
    m = result.metrics
    assert (m["dropping_point_tuned"], m["reached_tuned"], m["reached_base"]) == (0.02, 0, 0)
    assert "shift" not in m
    assert "No shift is given: neither side falls within the grid." in result.notes
    assert "tolerates 0.02 and more" in result.summary()
    wider = quick(pair, grid=(0.0, 0.1, 0.2, 0.3))
    assert (wider.metrics["reached_tuned"], wider.metrics["reached_base"]) == (1, 0)
    assert any("The shift is an upper bound" in note for note in wider.notes)


def test_keep_rows_have_a_point_of_their_own(pair):
    result = quick(
        pair, keep={"mine": sampled(half_idle(), 30, seed=5), "other": sampled(half_idle(), 30, seed=6)}
    )
    assert result.metrics["rows_keep"] == 60
    assert result.metrics["dropping_point_keep_base"] == 0.4
    alone = [quick(pair, sampled(half_idle(), 30, seed=seed)) for seed in (5, 6)]
    both = np.mean([curve(file_result, "base") for file_result in alone], axis=0)
    np.testing.assert_allclose(curve(result, "base", role="keep"), both, atol=1e-6)  # each file counts alike


# --- masks and layers ---


def test_the_masks_of_both_sides_are_compared_over_the_grid(pair):
    overlap = quick(pair).tables["overlap"].set_index("sparsity")
    assert list(overlap.index) == [0.2, 0.3, 0.4, 0.6, 0.8]
    masks = {}
    for side, model in (("base", half_idle()), ("tuned", leaning())):
        flat = torch.cat([weight.detach().abs().flatten() for weight in matrices(model).values()]).numpy()
        masks[side] = np.argsort(np.argsort(flat, kind="stable")) >= round(0.4 * SCOPE)
    cosine = (masks["base"] & masks["tuned"]).sum() / masks["base"].sum()
    assert overlap.loc[0.4, "cosine"] == pytest.approx(cosine)
    assert overlap.loc[0.4, "cosine_chance"] == pytest.approx(0.6, abs=1e-3)
    revived = (~masks["base"] & masks["tuned"]).sum() / (~masks["base"]).sum()
    assert overlap.loc[0.4, "revived"] == pytest.approx(revived)


def test_scale_alone_predicts_the_sparsity_of_normal_matrices(tmp_path):
    model = half_idle()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, weight in enumerate(matrices(model).values()):
            weight.copy_((0.5 + index / 10) * torch.randn(weight.shape, generator=generator))
    save(tmp_path / "model", model)
    result = quick(CheckpointPair(tmp_path / "model", tmp_path / "model"), sampled(model, 20), tolerance=0.5)
    layers = result.tables["layers"]
    assert np.ptp(layers["sparsity"]) > 0.1
    # Of 512 weights a share has a standard deviation of at most 0.022, of 128 of 0.044.
    assert (layers["excess"].abs() < 4 * 0.5 / np.sqrt(layers["entries"])).all()
    np.testing.assert_allclose(layers["density"], 1 - layers["sparsity"])


def test_the_share_of_the_whole_model_is_that_of_all_parameters(result, pair):
    total = sum(p.numel() for p in half_idle().parameters())
    assert result.metrics["scope_share"] == pytest.approx(SCOPE / total)
    assert result.metrics["whole_model_share_base"] == pytest.approx(0.5 * SCOPE / total)
    layers = result.tables["layers"].query("model == 'base'")
    assert (layers["at"] == 0.5).all()
    assert result.metrics["fullest_base"] == layers["sparsity"].max()


def test_zeros_that_are_there_already_are_reported(tmp_path):
    base, tuned = half_idle(), half_idle()
    with torch.no_grad():
        for weight in matrices(tuned).values():
            weight[weight.abs() < 1e-3] = 0
    pair = CheckpointPair(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned))
    result = quick(pair)
    assert (result.metrics["zeros_base"], result.metrics["zeros_tuned"]) == (0, 0.5)
    assert any(note.startswith("0.5 of tuned's scope is zero before pruning") for note in result.notes)
    assert curve(result, "tuned")[0.4] == curve(result, "tuned")[0.0]


# --- other models ---


def test_experts_that_are_never_routed_to_are_warned_of(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        save(tmp_path / name, make("mixtral", seed))
    result = quick(CheckpointPair(tmp_path / "base", tmp_path / "tuned"), ["abcdef", "fedcba", "aabbcc"])
    assert any("never routed to" in note for note in result.notes)
    # 5 experts in each of 2 layers, of each three matrices; beside q, k, v and o
    assert len(result.tables["layers"].query("model == 'tuned'")) == 2 * (5 * 3 + 4)


def test_the_head_that_base_lacks_is_tuneds_and_said_to_be(tmp_path):
    base, tuned = make("bert_classes", 0), make("bert_classes", 1)
    for name, model in (("base", base.bert), ("tuned", tuned)):
        save(tmp_path / name, model)
    rows = [{"text": text, "label": index % 3} for index, text in enumerate(["abc", "bca", "cab", "aab"])]
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    result = quick(pair, rows, metric="loss")
    assert any(re.search(r"Base lacks \d+ tensors, such as classifier", note) for note in result.notes)
    assert set(result.tables["layers"]["component"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj",
                                                        "down_proj"}  # fmt: skip


# --- masked fine-tuning ---


def test_what_is_left_is_tuned_behind_every_mask_alike(pair, tmp_path):
    result = quick(
        pair,
        sampled(half_idle(), 80),
        finetune_steps=30,
        finetune_lr=1e-2,
        grid=(0.0, 0.3, 0.6, 0.8),
        random=True,
    )
    zero_shot, tuned = (curve(result, "base", regime=regime) for regime in ("zero_shot", "masked_finetune"))
    assert tuned[0.6] < zero_shot[0.6] - 0.5  # nats that tuning wins back
    assert list(tuned.index) == [0, 0.3, 0.6, 0.8]
    control = curve(result, "base", pattern="random", regime="masked_finetune")
    assert control[0.0] == tuned[0.0]
    assert control[0.3] != tuned[0.3]
    assert result.metrics["rows_task"] == 40  # the others were split off
    assert any("tuned for 30 steps of 32 rows, alike at every sparsity" in note for note in result.notes)
    regimes = result.tables["points"].set_index(["model", "regime"])
    assert ("base", "masked_finetune") in regimes.index
    names = [trace.name for trace in result.figures()["task_curve"].data]
    assert {"base, zero-shot", "tuned, zero-shot", "base, masked fine-tuning"} <= set(names)


def test_tuning_behind_a_mask_starts_from_base_every_time(pair):
    # 0.3 is measured behind 0.0 in one run and alone in the other.
    settings = {"finetune_steps": 5, "finetune_lr": 1e-2, "grid": (0.0, 0.3, 0.6, 0.8)}
    first = quick(pair, **settings)
    second = quick(pair, **{**settings, "grid": (0.0, 0.3, 0.7, 0.8)})
    tuned = [curve(result, "base", regime="masked_finetune") for result in (first, second)]
    assert tuned[0][0.3] == tuned[1][0.3]
    assert tuned[0][0.8] == tuned[1][0.8]
    assert curve(first, "tuned")[0.3] == curve(second, "tuned")[0.3]


def test_tuning_needs_one_task_and_rows_on_either_side(pair):
    with pytest.raises(ValueError, match=r"there are 2 tasks \(a, b\); give one to tune on"):
        quick(pair, {"a": ROWS, "b": ROWS}, finetune_steps=1)
    with pytest.raises(
        ValueError, match=r"finetune_share=0\.5, its 3 rows leave 2 to tune on and 1 to measure"
    ):
        quick(pair, ROWS[:3], finetune_steps=1)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": (0.0, 0.5, 0.9, 1.0)}, r"grid holds 1\.0; a sparsity is a share, from 0 to below 1"),
        ({"grid": (-0.1, 0.5, 0.9)}, r"grid holds -0\.1; a sparsity is a share"),
        ({"grid": (0.0, 0.5)}, "grid has 2 sparsities, 0 included; at least 4 are needed"),
        ({"tolerance": 0.0}, "tolerance is 0.0; it is between 0 and 1"),
        ({"refine": -1.0}, "refine is -1.0; it is the width of a bracket"),
        ({"draws": 10}, "draws is 10; at least 100"),
        ({"patterns": ("2-4",)}, "patterns holds '2-4'; write N:M"),
        ({"patterns": ("4:2",)}, "patterns holds '4:2'; write N:M"),
        (
            {"patterns": ("4:7",)},
            r"model\.layers\.0\.mlp\.down_proj\.weight: its 32 inputs are not groups of 7",
        ),
        ({"parts": ("router",)}, "has no router matrix; there is nothing to prune"),
        ({"finetune_steps": 1, "finetune_share": 1.5}, "finetune_share is 1.5; it is between 0 and 1"),
        ({"finetune_steps": -1}, "finetune_steps is -1; it is at least 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(pair, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        quick(pair, **settings)
    assert "\n" not in str(refused.value)


def test_usual_patterns_that_do_not_fit_are_left_out_and_said_to_be(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        save(tmp_path / name, make("llama", seed))  # 28 inputs of the last matrix: 4 divides them, 8 does not
    result = quick(
        CheckpointPair(tmp_path / "base", tmp_path / "tuned"), ["abc", "cab", "bba"], patterns=None
    )
    assert set(result.tables["patterns"]["pattern"]) == {"1:2", "2:4"}
    assert any(
        note.startswith("4:8 is not measured: model.layers.0.mlp.down_proj.weight: its 28 inputs are not")
        for note in result.notes
    )


def test_one_row_is_too_few(pair):
    with pytest.raises(ValueError, match="has 1 row, and essential sparsity needs at least 2"):
        quick(pair, ROWS[:1])
    with pytest.raises(ValueError, match="at least 2 are needed"):
        quick(pair, [ROWS[0], {"text": ""}])


def test_files_without_a_metric_in_common_are_refused(pair):
    rows = {"a": guessed(half_idle(), 3), "b": ROWS}
    with pytest.raises(ValueError, match="--task: a choices and b text have no metric in common; set metric"):
        quick(pair, rows)
    assert set(quick(pair, rows, metric="loss").tables["points"]["metric"]) == {"loss"}


def test_integer_weights_are_refused_by_name(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "tuned"
    save(source, leaning())
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, source / "model.safetensors")
    with pytest.raises(ValueError, match="int8"):
        quick(CheckpointPair(pair.base.ref, source))


# --- what readers get ---


def test_the_tables_have_the_columns_that_scripts_rely_on(result):
    wanted = {
        "curve": "model pattern sparsity role metric value regime",
        "layers": "model layer component sparsity gaussian excess density",
    }
    for name, columns in wanted.items():
        assert set(columns.split()) <= set(result.tables[name].columns)
    assert set(result.metrics) <= set(METRICS)
    assert all(type(value) in (int, float) for value in result.metrics.values())
    json.dumps(result.parameters, allow_nan=False)


def test_every_rule_of_the_policy_names_a_metric_and_its_source():
    rules = default_policy().rules["sparsity"]
    record = find("sparsity")
    assert set(rules) <= set(record.metrics)
    assert all(rule.source and rule.message for rule in rules.values())


def test_what_2_4_costs_is_judged_only_where_it_is_to_be_shipped(pair):
    # Half of each four are not the idle half: perplexity grows by far more than 1.5 times.
    for deploy in (False, True):
        result = quick(pair, patterns=("2:4",), deploy_2_4=deploy)
        assert result.metrics["perplexity_ratio_2_4_tuned"] > 2
        severities = {f.metric: f.severity for f in result.findings()}
        assert (severities.get("perplexity_ratio_2_4_tuned") == "fail") == deploy


def test_progress_ends_at_its_total(pair):
    reports = []
    quick(pair, random=True, patterns=("2:4",), progress=lambda *step: reports.append(step))
    done, total, what = reports[-1]
    assert done == total
    assert what == "tuned, random at 0.8"


def test_an_audit_keeps_it_and_shows_it(pair, tmp_path, monkeypatch, capsys):
    from diagnostics.cli.main import main
    from diagnostics.store.audit_store import load

    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    monkeypatch.chdir(tmp_path)
    arguments = (
        f"audit {pair.base.ref} {pair.tuned.ref} --task task.jsonl --only sparsity --device cpu --out a"
    )
    arguments += " --set sparsity.grid=0,0.2,0.4,0.6,0.8 --set sparsity.draws=100 --set sparsity.patterns=2:4"
    monkeypatch.setattr(sys, "argv", ["tunescope", *arguments.split()])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (None, 0)
    assert "zero-shot, loss within 0.01 of its value" in " ".join(capsys.readouterr().out.split())
    saved = load(tmp_path / "a").analyses["sparsity"].result
    assert saved.parameters["patterns"] == ["2:4"]
    assert set(saved.figures()) == {"task_close", "task_curve", "patterns", "layers", "overlap", "change"}
    report = (tmp_path / "a" / "report.html").read_text()
    assert 'id="analysis-sparsity"' in report
    assert "its figures cannot be drawn" not in report
