"""Models' answers to the rows of a task: accuracy, agreement, calibration.

A score is a mean over units, larger is better: accuracy where rows have choices or labels, else minus the
loss in nats per token. Models are compared on the same rows; intervals come from a bootstrap over these
rows, with the same draws for all models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from diagnostics.evaluation.row_losses import EncodedTask, Losses, losses_of
from diagnostics.numerics.calibration import brier, ece
from diagnostics.numerics.estimates import UNDEFINED, Estimate
from diagnostics.numerics.row_bootstrap import RowLosses
from probes.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers to the rows of one set."""

    losses: Losses  # of every row
    # Of each scored row, the log-probability of every choice or class, −∞ for choices that the row lacks;
    # None for texts and completions.
    logs: Float[np.ndarray, "rows answers"] | None
    truth: Int[np.ndarray, " rows"]  # index of the right one; empty for texts and completions

    @property
    def chosen(self) -> Int[np.ndarray, " rows"]:
        """The likeliest answer of each row."""
        assert self.logs is not None
        return self.logs.argmax(axis=1)

    @property
    def right(self) -> Float[np.ndarray, " rows"]:
        """1 where the likeliest answer is right."""
        return (self.chosen == self.truth).astype(float)

    @property
    def confidence(self) -> Float[np.ndarray, " rows"]:
        """Probability of the likeliest answer."""
        assert self.logs is not None
        # Above 1 by a rounding it would be no probability.
        return np.exp(self.logs.max(axis=1)).clip(max=1.0)

    def cooled(self, temperature: float) -> "Answers":
        """The answers with logits divided by a temperature; above 1 lowers the confidence."""
        from scipy.special import log_softmax

        assert self.logs is not None
        return replace(self, logs=np.asarray(log_softmax(self.logs / temperature, axis=1)))


def answers(encoded: EncodedTask, model: Any) -> Answers:
    """A model's answers to the rows of a task; `NonFiniteError` names a row of logits that are not finite."""
    if encoded.task.shape in ("text", "completion"):
        return Answers(losses=encoded.measure(model), logs=None, truth=np.zeros(0, dtype=int))
    logs, truth = encoded.answered(model), encoded.truth
    losses = losses_of(logs, truth)
    scored = losses.units > 0
    return Answers(losses=losses, logs=logs[scored], truth=truth[scored])


def score(answers: Answers) -> float:
    """Accuracy, or minus the loss in nats per token: larger is better."""
    if answers.logs is not None:
        return float(answers.right.mean())
    return -float(np.nansum(answers.losses.nats) / answers.losses.units.sum())


def agreement(first: Answers, second: Answers) -> float:
    """Share of rows to which two models give the same answer; NaN for texts and completions."""
    if first.logs is None or second.logs is None or not len(first.truth):
        return math.nan
    return float((first.chosen == second.chosen).mean())


def temperature(answers: Answers) -> float:
    """The temperature of the lowest mean loss, between 1/50 and 50; 1 where none lowers the loss.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(answers.truth))

    def nats(log_temperature: float) -> float:
        logs = answers.cooled(math.exp(log_temperature)).logs
        assert logs is not None
        return -float(logs[rows, answers.truth].mean())

    best = float(minimize_scalar(nats, bounds=(-math.log(50), math.log(50)), method="bounded").x)
    return math.exp(best) if nats(best) < nats(0.0) else 1.0


class Calibration(NamedTuple):
    """Expected calibration error, 15 bins of equal width (with interval) or of equal mass; Brier score."""

    ece: float
    ece_low: float
    ece_high: float
    ece_mass: float
    brier: float


def calibration(answers: Answers, *, draws: int, seed: int) -> Calibration:
    """Calibration of a model on a set."""
    assert answers.logs is not None
    low, high = np.quantile(drawn_ece([answers], draws=draws, seed=seed)[:, 0], [0.025, 0.975])
    stated, right = answers.confidence, answers.right
    return Calibration(
        ece=ece(stated, right), ece_low=float(low), ece_high=float(high),
        ece_mass=ece(stated, right, by="mass"), brier=brier(np.exp(answers.logs), answers.truth),
    )  # fmt: skip


def drawn_ece(several: Sequence[Answers], *, draws: int, seed: int) -> Float[np.ndarray, "draws models"]:
    """The calibration error of models on bootstrap draws of the rows, the same draws for all."""
    generator = np.random.default_rng(seed)
    pairs = [(answers.confidence, answers.right) for answers in several]
    count = len(pairs[0][0])
    errors = np.empty((draws, len(pairs)))
    for draw in range(draws):
        rows = generator.integers(count, size=count)
        errors[draw] = [ece(stated[rows], right[rows]) for stated, right in pairs]
    return errors


class AnswerScores:
    """The scores of several models on the same rows, with bootstrap intervals.

    A `value` is larger for a better model, so that a loss is negative; `drawn` has it for every draw.
    """

    def __init__(self, answers: Mapping[str, Answers], *, draws: int, seed: int, where: str):
        first = next(iter(answers.values()))
        units = first.losses.units
        scored = units > 0
        if scored.sum() < 2:
            raise InputError(f"{where}: {scored.sum()} rows have anything to score; at least 2 are needed")
        self.kind = "loss" if first.logs is None else "accuracy"  # the loss in nats per token
        values = np.stack([
            -model.losses.nats[scored] if model.logs is None else model.right for model in answers.values()
        ])  # fmt: skip
        weights = units[scored] if self.kind == "loss" else np.ones(values.shape[1])
        rows = RowLosses(nats=values, units=weights)
        self.value = dict(zip(answers, map(float, rows.loss), strict=True))
        drawn = rows.drawn(draws, np.random.default_rng(seed))
        self.drawn = {name: drawn[:, index] for index, name in enumerate(answers)}

    def shown(self, name: str) -> Estimate:
        """Accuracy, or the positive loss in nats, where smaller is better."""
        sign = -1.0 if self.kind == "loss" else 1.0
        low, high = sorted(sign * np.quantile(self.drawn[name], [0.025, 0.975]))
        return Estimate(sign * self.value[name], float(low), float(high))

    def difference(self, name: str, other: str) -> Estimate:
        """Score of one model minus that of another."""
        differences = self.drawn[name] - self.drawn[other]
        low, high = np.quantile(differences, [0.025, 0.975])
        error = float(differences.std(ddof=1))
        return Estimate(self.value[name] - self.value[other], float(low), float(high), error)

    @property
    def gained(self) -> bool:
        """Whether `tuned` is better than `base` by more than twice the standard error of the difference."""
        gain = self.difference("tuned", "base")
        return gain.value > 0 and gain.value > 2 * gain.error

    def rel(self, name: str) -> Estimate:
        """Share of tuning's gain that a model keeps: 0 is base, 1 tuned; undefined without a gain.

        Source: arXiv:2302.06600.
        """
        if not self.gained:
            return UNDEFINED
        base, tuned = self.drawn["base"], self.drawn["tuned"]
        gained = tuned > base
        low, high = np.quantile((self.drawn[name] - base)[gained] / (tuned - base)[gained], [0.025, 0.975])
        value = (self.value[name] - self.value["base"]) / (self.value["tuned"] - self.value["base"])
        return Estimate(value, float(low), float(high))

    def recovery(self, name: str) -> float:
        """Accuracy as a share of tuned's; it flatters where base is already good. NaN for losses."""
        undefined = self.kind == "loss" or not self.value["tuned"]
        return math.nan if undefined else self.value[name] / self.value["tuned"]
