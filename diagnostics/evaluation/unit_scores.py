"""A model's score of every unit of a task: loss, right or wrong, confidence.

A unit is a scored token of texts and completions, or a row of choices and labels. Every model has the same
units in the same order, so models can be compared unit by unit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from diagnostics.evaluation.row_losses import EncodedTask
from probes.errors import InputError
from probes.passes.batched import measure_examples
from probes.passes.scores import masked_token_scores, token_scores
from probes.text.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Units:
    """One number for each unit, in the order of the rows."""

    nats: Float[np.ndarray, " units"]  # minus the log-probability of the truth
    right: Bool[np.ndarray, " units"]  # whether the truth is the likeliest; a tie counts as right
    confidence: Float[np.ndarray, " units"]  # probability of the likeliest
    row: Int[np.ndarray, " units"]  # index into the task's rows

    def by_row(self) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
        """Nats and number of units of each row with units."""
        _, indices, counts = np.unique(self.row, return_inverse=True, return_counts=True)
        return np.bincount(indices, weights=self.nats), counts.astype(float)

    @property
    def loss(self) -> float:
        """Mean nats of a unit."""
        return float(self.nats.mean())

    @property
    def accuracy(self) -> float:
        """Share of units that are right."""
        return float(self.right.mean())

    @property
    def error_confidence(self) -> float:
        """Mean confidence of the wrong answers; NaN without any."""
        return float(self.confidence[~self.right].mean()) if not self.right.all() else float("nan")


def unit_scores(encoded: EncodedTask, model: Any) -> Units:
    """Score every unit of a task; a `NonFiniteError` names the row of logits that are not finite."""
    units = {"label": _labels, "choices": _choices}.get(encoded.task.shape, _tokens)(encoded, model)
    if not len(units.nats):
        raise InputError(f"{encoded.task.ref}: none of its rows has a token to score")
    return units


def _labels(encoded: EncodedTask, model: Any) -> Units:
    logs = encoded.answered(model)
    scored = np.isfinite(logs).all(axis=1)
    classes, logs = np.array(encoded.classes)[scored], logs[scored]
    return Units(
        nats=-logs[np.arange(len(classes)), classes],
        right=logs.argmax(axis=1) == classes,
        confidence=np.exp(logs.max(axis=1)),
        row=np.flatnonzero(scored),
    )


def _choices(encoded: EncodedTask, model: Any) -> Units:
    rows = encoded.task.rows
    scored = [row for row in encoded.choices(model) if row.sum.isfinite().all()]
    logs = [row.sum.log_softmax(dim=0) for row in scored]
    answers = [rows[row.row].answer or 0 for row in scored]
    return Units(
        nats=np.array([-float(log[answer]) for log, answer in zip(logs, answers, strict=True)], float),
        right=np.array([row.best() == answer for row, answer in zip(scored, answers, strict=True)], bool),
        confidence=np.array([float(log.max().exp()) for log in logs], float),
        row=np.array([row.row for row in scored], int),
    )


def _tokens(encoded: EncodedTask, model: Any) -> Units:
    def measure(batch: Batch) -> dict[str, Any]:
        if encoded.mask_id is None:
            scores = token_scores(model, batch)
        else:
            scores = masked_token_scores(model, batch, encoded.mask_id)
        logs, hits, tops = (
            values.double().cpu().numpy() for values in (-scores.log_likelihoods, scores.hit, scores.top)
        )
        scored = batch.scored.cpu().numpy()
        return {
            name: [row[at] for row, at in zip(values, scored, strict=True)]
            for name, values in (("nats", logs), ("right", hits), ("confidence", tops))
        }

    measured = measure_examples(
        encoded.examples, measure, tokens=encoded.batch_tokens, where=encoded.task.where
    )
    nothing = np.zeros(0)
    nats, right, confidence = (
        [nothing if values is None else values for values in measured.get(name, [])]
        for name in ("nats", "right", "confidence")
    )
    rows = [example.row for example in encoded.examples][: len(nats)]
    return Units(
        nats=np.concatenate([nothing, *nats]),
        right=np.concatenate([nothing, *right]).astype(bool),
        confidence=np.concatenate([nothing, *confidence]),
        row=np.repeat(np.array(rows, int), list(map(len, nats))),
    )
