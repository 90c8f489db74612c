"""What models answer: scores, what is kept of a gain, agreement, confidence."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from diagnostics.evaluation.answers import (
    Answers,
    AnswerScores,
    agreement,
    calibration,
    drawn_ece,
    score,
    temperature,
)
from diagnostics.evaluation.row_losses import Losses, losses_of


def answers_of(logits, truth):
    """The answers of a model with these logits."""
    logs, truth = log_softmax(np.asarray(logits, float), axis=1), np.asarray(truth)
    return Answers(losses=losses_of(logs, truth), logs=logs, truth=truth)


def choosing(choices, truth, sure=1.0):
    """The answers of a model that chooses these."""
    return answers_of(sure * np.eye(2)[choices], truth)


def text_answers(nats, units):
    """The losses of texts."""
    nats, units = np.asarray(nats, float), np.asarray(units, float)
    losses = Losses(nats=nats, units=units, right=np.full(len(nats), np.nan))
    return Answers(losses=losses, logs=None, truth=np.zeros(0, dtype=int))


TRUTH = np.tile([0, 1, 1, 0], 25)
RIGHT = [75, 90, 60]  # of 100


def model(right, seed=0):
    """A model that is right on so many of 100 rows."""
    wrong = np.random.default_rng(seed).permutation(100)[: 100 - right]
    choices = TRUTH.copy()
    choices[wrong] = 1 - choices[wrong]
    return choosing(choices, TRUTH)


def compared(**models):
    return AnswerScores(models, draws=400, seed=0, where="rows")


def test_what_is_kept_is_0_for_base_1_for_tuned_and_linear_between():
    scores = compared(base=model(60), tuned=model(90, 1), graft=model(75, 2))
    assert scores.gained
    assert scores.rel("base")[:3] == (0, 0, 0)
    assert scores.rel("tuned")[:3] == (1, 1, 1)
    rel = scores.rel("graft")
    assert rel.value == pytest.approx((75 - 60) / (90 - 60))
    assert rel.low < rel.value < rel.high
    assert scores.recovery("graft") == pytest.approx(75 / 90)
    assert scores.shown("graft").value == 0.75


def test_without_a_gain_beyond_twice_its_error_nothing_is_said_to_be_kept():
    scores = compared(base=model(60), tuned=model(64, 1), graft=model(62, 2))
    # 100 rows: the error of a difference of two shares is about sqrt(2 x 0.24 / 100) = 0.07.
    assert scores.difference("tuned", "base").error == pytest.approx(0.07, abs=0.015)
    assert not scores.gained
    assert math.isnan(scores.rel("graft").value)
    assert not compared(base=model(90), tuned=model(60, 1)).gained
    same = model(60)
    assert not compared(base=same, tuned=same).gained


def test_a_strong_base_flatters_recovery_and_not_what_is_kept():
    scores = compared(base=model(80), tuned=model(99, 1))
    assert scores.recovery("base") == pytest.approx(80 / 99)
    assert scores.rel("base").value == 0


def test_of_texts_the_loss_is_what_counts_and_long_rows_count_for_more():
    units = [10, 30, 20, 0]
    base, tuned, graft = ([n * u for u in units[:3]] + [math.nan] for n in (3.0, 1.0, 1.5))
    graft[1] = 2.0 * 30
    scores = compared(
        base=text_answers(base, units), tuned=text_answers(tuned, units), graft=text_answers(graft, units)
    )
    assert scores.kind == "loss"
    # (10 x 1.5 + 30 x 2 + 20 x 1.5) / 60 = 1.75 nats: 3 - 1.75 of the 3 - 1 that tuning took off.
    assert scores.shown("graft").value == pytest.approx(1.75)
    assert scores.rel("graft").value == pytest.approx(0.625)
    assert score(text_answers(graft, units)) == pytest.approx(-1.75)
    assert math.isnan(scores.recovery("graft"))
    assert math.isnan(agreement(text_answers(graft, units), text_answers(base, units)))
    assert scores.shown("graft").low <= 1.75 <= scores.shown("graft").high


def test_the_same_rows_are_drawn_for_all_so_that_equal_models_never_differ():
    scores = compared(base=model(60), tuned=model(90, 1), other=model(90, 1))
    assert scores.difference("other", "tuned") == (0, 0, 0, 0)
    assert scores.difference("other", "tuned").error == 0


def test_one_row_is_too_few_to_compare():
    with pytest.raises(ValueError, match="rows: 1 rows have anything to score; at least 2 are needed"):
        compared(base=text_answers([1.0, math.nan], [3, 0]), tuned=text_answers([1.0, math.nan], [3, 0]))


def test_agreement_is_the_share_of_rows_answered_alike_right_or_wrong():
    assert agreement(choosing([0, 1, 1, 0], [0, 0, 0, 0]), choosing([0, 1, 0, 1], [0, 0, 0, 0])) == 0.5


def test_choices_that_a_row_does_not_have_are_never_chosen_and_carry_no_probability():
    logits = np.array([[1.0, 0.0, -np.inf], [0.0, 0.0, 2.0]])
    both = answers_of(logits, [0, 2])
    assert both.chosen.tolist() == [0, 2]
    assert both.confidence[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert both.cooled(2.0).confidence[0] == pytest.approx(1 / (1 + math.exp(-0.5)))


@given(st.sampled_from([0.3, 1.0, 4.0, 9.0]), st.integers(0, 5))
@settings(deadline=None, max_examples=10)
def test_the_temperature_that_was_used_is_found_again(used, seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(4000, 3))
    gumbel = generator.gumbel(size=logits.shape)
    truth = (logits + gumbel).argmax(axis=1)  # drawn by the probabilities that the logits state
    assert temperature(answers_of(used * logits, truth)) == pytest.approx(used, rel=0.15)


def test_what_nothing_cools_keeps_its_temperature_of_1():
    assert temperature(answers_of([[0.0, 0.0]] * 6, [0, 1] * 3)) == 1.0


def test_one_temperature_changes_confidence_and_no_answer():
    generator = np.random.default_rng(0)
    answers = answers_of(5 * generator.normal(size=(50, 4)), generator.integers(4, size=50))
    cool = answers.cooled(3.0)
    assert (cool.chosen == answers.chosen).all()
    assert (cool.confidence < answers.confidence).all()


def test_calibration_is_that_of_the_stated_confidence():
    # 80 rows at 0.9, of which 60 right: an error of |0.75 - 0.9|.
    logits = np.tile([math.log(9), 0.0], (80, 1))
    truth = np.repeat([0, 1], [60, 20])
    result = calibration(answers_of(logits, truth), draws=300, seed=0)
    assert result.ece == pytest.approx(0.15)
    assert result.ece_mass == pytest.approx(0.15)
    # Squared error over both classes: 2 x 0.1² where right, 2 x 0.9² where wrong.
    assert result.brier == pytest.approx(0.75 * 0.02 + 0.25 * 1.62)
    # The share that is right has a standard error of sqrt(0.75 x 0.25 / 80) = 0.048.
    assert result.ece_low == pytest.approx(0.15 - 1.96 * 0.048, abs=0.03)
    assert result.ece_high == pytest.approx(0.15 + 1.96 * 0.048, abs=0.03)
    both = drawn_ece([answers_of(logits, truth)] * 2, draws=5, seed=1)
    assert (both[:, 0] == both[:, 1]).all()
