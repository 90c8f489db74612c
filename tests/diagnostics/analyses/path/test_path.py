"""The path between two chains is known to the letter: a geometric mixture of what both ends say."""

import math

import numpy as np
import pytest
import torch

from diagnostics.analyses.path.analysis import interpolation_path
from diagnostics.evaluation.row_losses import encoded
from diagnostics.evaluation.unit_scores import unit_scores
from probes import CheckpointPair
from probes.checkpoints.opening import open_checkpoint
from probes.models.editable import Editable
from probes.text.rows import task_of
from tests.diagnostics.chains import constant, save_chain, save_llama

BASE, TUNED = (1 / 3, 1 / 3, 1 / 3), (0.98, 0.01, 0.01)
# Of the task 8 in 10 letters are a, so that tuned is too sure of it; of the rest none is a.
TASK = ["aaaabaaaca"] * 6 + ["aaaaaaaabc"] * 6
KEEP = ["bcbcbcbcbc"] * 5 + ["bbbbbccccc"] * 5
OOD = ["abcabcabca"] * 4 + ["ccbbaabbcc"] * 4
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("chains")
    base, tuned = (
        save_chain(root / name, constant(*chances)) for name, chances in (("base", BASE), ("tuned", TUNED))
    )
    return CheckpointPair(base, tuned)


@pytest.fixture(scope="module")
def result(pair):
    return interpolation_path(pair, TASK, KEEP, OOD, alphas=GRID)


def mixture(alpha):
    """Chances of a, b, c at α: logits are linear in it."""
    logits = [(1 - alpha) * math.log(p) + alpha * math.log(q) for p, q in zip(BASE, TUNED, strict=True)]
    total = sum(map(math.exp, logits))
    return {letter: math.exp(logit) / total for letter, logit in zip("abc", logits, strict=True)}


def naive(rows, alpha):
    chances = mixture(alpha)
    return float(np.mean([-math.log(chances[letter]) for row in rows for letter in row]))


def values(result, role, metric):
    path = result.tables["path"]
    part = path[(path["role"] == role) & (path["metric"] == metric)]
    return dict(zip(part["alpha"], part["value"], strict=True))


def test_losses_are_those_of_the_mixture_at_every_alpha(result):
    for role, rows in (("task", TASK), ("keep", KEEP), ("ood", OOD)):
        losses = values(result, role, "loss")
        assert list(losses) == list(GRID)
        for alpha, loss in losses.items():
            assert loss == pytest.approx(naive(rows, alpha), abs=1e-5), (role, alpha)


def test_a_tuned_end_that_went_too_far_is_dominated_and_it_is_said_by_what(result):
    assert result.metrics["dominated"] == 1
    alpha = result.metrics["best_alpha"]
    # Of the five only 0.25, 0.5 and 0.75 are no worse on the task than tuned; 0.25 keeps the most.
    assert naive(TASK, 0.0) > naive(TASK, 1.0) > naive(TASK, 0.25)
    assert alpha == 0.25
    assert result.metrics["kept_nats"] == pytest.approx(naive(KEEP, 1) - naive(KEEP, 0.25), abs=1e-5)
    assert result.metrics["task_cost_nats"] == pytest.approx(naive(TASK, 0.25) - naive(TASK, 1), abs=1e-5)
    assert any("tunescope interpolate BASE TUNED --alpha 0.25 --out DIR" in note for note in result.notes)
    assert "dominated" in result.summary()
    assert {finding.metric for finding in result.findings()} == {"dominated"}


def test_losses_that_are_convex_have_no_bump_and_a_dip_where_the_middle_is_best(result):
    m = result.metrics
    assert m["bump_task_nats"] == m["bump_keep_nats"] == m["barrier_task_nats"] == 0
    best = min(naive(TASK, alpha) for alpha in GRID)
    assert m["dip_task_nats"] == pytest.approx(naive(TASK, 1) - best, abs=1e-5)
    sets = result.tables["sets"].set_index("role")
    assert sets.loc["task", "outcome"] == "success"
    assert sets.loc["keep", "outcome"] == "weak"  # base, an end, is the best there


def test_the_ends_are_neither_false_false_true_nor_its_mirror(result):
    for role in ("task", "keep", "ood"):
        for metric in ("fft", "ttf"):
            curve = values(result, role, metric)
            assert curve[0.0] == curve[1.0] == 0
    shares = result.tables["patterns"].groupby(["role", "alpha"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(1)


def test_the_mixture_of_answers_is_that_of_the_chances(result):
    for alpha, loss in values(result, "ood", "ensemble_loss").items():
        chances = [(1 - alpha) * p + alpha * q for p, q in zip(BASE, TUNED, strict=True)]
        expected = np.mean([-math.log(chances["abc".index(letter)]) for row in OOD for letter in row])
        assert loss == pytest.approx(expected, abs=1e-5)


def test_confidence_is_the_chance_of_the_likeliest_letter(result):
    confidence = values(result, "keep", "confidence")
    assert confidence[0.5] == pytest.approx(mixture(0.5)["a"], abs=1e-5)
    # What is not a is wrong wherever a is the likeliest.
    assert values(result, "keep", "error_confidence")[1.0] == pytest.approx(0.98, abs=1e-5)
    assert values(result, "task", "accuracy")[1.0] == pytest.approx(0.8)


def test_ends_the_wrong_way_round_are_asked_about(pair, result):
    """Of a task that tuned has learned, base's loss is the greater, unless the two are swapped."""
    learned = ["a" * 10] * 12
    right, swapped = (
        interpolation_path(ends, learned, alphas=GRID)
        for ends in (pair, CheckpointPair(pair.tuned, pair.base))
    )
    assert (right.metrics["task_lost_nats"], result.metrics["task_lost_nats"]) == (0, 0)
    assert swapped.metrics["task_lost_nats"] == pytest.approx(math.log(0.98 / (1 / 3)), abs=1e-4)
    assert not [finding for finding in right.findings() if "swapped" in finding.message]
    assert [finding.metric for finding in swapped.findings() if "swapped" in finding.message] == [
        "task_lost_nats"
    ]


def test_swapped_ends_mirror_alpha(pair, result):
    mirrored = interpolation_path(CheckpointPair(pair.tuned, pair.base), TASK, alphas=GRID)
    losses, mirrored_losses = values(result, "task", "loss"), values(mirrored, "task", "loss")
    for alpha, loss in losses.items():
        assert mirrored_losses[1 - alpha] == pytest.approx(loss, abs=1e-6)


def test_a_model_with_itself_has_a_flat_path(tmp_path):
    checkpoint = save_llama(tmp_path / "same", seed=0, characters="abc")
    result = interpolation_path(CheckpointPair(checkpoint, checkpoint), TASK, KEEP, OOD, alphas=(0.3, 0.6))
    m = result.metrics
    assert not any(value for name, value in m.items() if name.split("_")[0] in ("bump", "dip", "barrier"))
    assert m["dominated"] == 0
    assert m["best_alpha"] == 1
    assert m["fft_ood"] == m["ttf_ood"] == m["strong_failures"] == m["successes"] == 0
    assert set(values(result, "task", "loss")) == {0.0, 0.3, 0.6, 1.0}
    assert len(set(values(result, "task", "loss").values())) == 1


def test_a_hole_between_equal_ends_is_a_strong_failure(tmp_path):
    base = save_llama(tmp_path / "base", seed=0, characters="abc", shift=0.7)
    model = open_checkpoint(base)
    # The sign of every value row and output column turned: the same function, and none half-way.
    from transformers import AutoModelForCausalLM

    turned = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in turned.model.layers:
            for matrix in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
                matrix.weight.neg_()
            layer.mlp.down_proj.weight.neg_()
    turned.save_pretrained(tmp_path / "turned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "turned" / name).write_bytes((base / name).read_bytes())
    # Rows that the model itself finds likely, so that losing its layers costs something.
    texts = [greedy(model, start) for start in ("a", "b", "c", "ab", "ba", "cb", "ac", "bc")]
    result = interpolation_path(CheckpointPair(base, tmp_path / "turned"), texts, ood=texts[:6], alphas=GRID)
    sets = result.tables["sets"].set_index("role")
    assert sets.loc["ood", "loss_base"] == sets.loc["ood", "loss_tuned"]
    assert result.metrics["bump_ood_nats"] == result.metrics["barrier_ood_nats"] > 0.1
    assert result.metrics["strong_failures"] == 1
    assert any("The path has a hole on the" in note for note in result.notes)
    assert {"bump_task_nats", "bump_ood_nats"} <= {finding.metric for finding in result.findings()}


def greedy(checkpoint, start, length=12):
    editable = Editable(checkpoint)
    text = start
    while len(text) < length:
        ids = editable.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = editable.model(ids).logits[0, -1, 1:]
        text += "abc"[int(logits.argmax())]
    return text


def test_a_loss_that_is_not_finite_is_kept_as_missing_and_named(pair, monkeypatch):
    from diagnostics.evaluation import interpolation
    from probes.passes.batched import NonFiniteError

    calls = []

    def broken(encoded, model):
        calls.append(1)
        if len(calls) == 3:  # 0, 1, then the first place between
            raise NonFiniteError(0, 0, "row 1")
        return unit_scores(encoded, model)

    monkeypatch.setattr(interpolation, "unit_scores", broken)
    result = interpolation_path(pair, TASK, alphas=(0.25, 0.5))
    losses = values(result, "task", "loss")
    assert math.isnan(losses[0.25])
    assert losses[0.5] == pytest.approx(naive(TASK, 0.5), abs=1e-5)
    assert result.metrics["missing"] == 1
    assert "alpha 0.25 (row 1: its logits are NaN or infinite" in result.notes[0]
    assert result.metrics["dip_task_nats"] > 0
    assert result.figures()


def test_an_end_that_is_not_finite_is_refused_by_row(tmp_path, pair):
    broken = save_chain(tmp_path / "broken", constant(*BASE))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(ValueError, match=r"row .*: its logits are NaN or infinite|task.*NaN or infinite"):
        interpolation_path(CheckpointPair(pair.base, broken), TASK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alphas": (0.0, 1.5)}, r"alphas holds 1.5; they go from 0, base, to 1, tuned"),
        ({"alphas": (0.0, 1.0)}, "alphas holds no value between 0, base, and 1, tuned"),
    ],
)
def test_settings_that_make_no_path_are_refused(pair, settings, message):
    with pytest.raises(ValueError, match=message):
        interpolation_path(pair, TASK, **settings)


def test_one_row_is_too_few(pair):
    with pytest.raises(ValueError, match="at least 2"):
        interpolation_path(pair, TASK[:1])


def test_every_picture_is_drawn_from_a_result(result):
    assert list(result.figures()) == ["loss", "accuracy", "trade", "sides", "patterns"]


# --- units ---


def test_units_of_choices_and_texts_are_those_of_a_naive_computation(pair):
    editable = Editable(pair.tuned)

    def units(rows):
        task = encoded(editable, task_of(rows), max_length=None, chat_template=False, batch_tokens=40)
        return unit_scores(task, editable.model)

    texts = units(["ab", "caa"])
    assert texts.row.tolist() == [0, 0, 1, 1, 1]
    assert texts.nats == pytest.approx(
        [-math.log(TUNED["abc".index(letter)]) for letter in "abcaa"], abs=1e-5
    )
    assert texts.right.tolist() == [True, False, False, True, True]
    assert texts.confidence == pytest.approx(0.98, abs=1e-5)
    assert texts.error_confidence == pytest.approx(0.98, abs=1e-5)
    nats, counts = texts.by_row()
    assert counts.tolist() == [2, 3]
    assert nats.sum() == pytest.approx(texts.nats.sum())
    choices = units(
        [
            {"prompt": "a", "choices": ["a", "bb"], "answer": 1},
            {"prompt": "a", "choices": ["b", "a"], "answer": 1},
        ]
    )
    # 0.98 against 0.01²; then 0.98 against 0.01
    first = math.log((0.98 + 1e-4) / 1e-4)
    assert choices.nats == pytest.approx([first, math.log(0.99 / 0.98)], abs=1e-4)
    assert choices.right.tolist() == [False, True]
    assert choices.confidence == pytest.approx([0.98 / 0.9801, 0.98 / 0.99], abs=1e-5)
