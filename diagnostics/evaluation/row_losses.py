"""The loss of every row of a task under one model, in the unit of the task's shape.

Texts and completions: nats summed over the scored tokens, and their number. Choices and labels: minus the
log-probability of the right choice or class; one unit a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from probes.errors import InputError
from probes.models.editable import Editable
from probes.passes.scores import (
    ChoiceScores,
    SequenceScores,
    choice_scores,
    classify_examples,
    score_examples,
)
from probes.text.batches import Example
from probes.text.encode import encode, encoding_notes
from probes.text.rows import Task, by_number, class_ids


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of rows; NaN where there is nothing to score."""

    nats: Float[np.ndarray, " rows"]
    units: Float[np.ndarray, " rows"]  # scored tokens of each row, or 1; 0 where there is nothing to score
    # 1 where the right choice or label is the likeliest, else 0; of text the share of such tokens.
    right: Float[np.ndarray, " rows"]


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task as token ids of a model."""

    task: Task
    examples: Sequence[Example]
    classes: tuple[int, ...]  # of each row, for a classifier
    mask_id: int | None
    batch_tokens: int
    notes: tuple[str, ...]  # on rows that were cut, and on rows with nothing to score
    labels: tuple[str, ...] = ()  # names of a classifier's classes, in the order that `classes` counts

    @property
    def unit(self) -> str:
        """The unit of the loss."""
        return "row" if self.task.shape in ("choices", "label") else "token"

    @property
    def bytes(self) -> Float[np.ndarray, " rows"]:
        """Bytes of the scored text of each row; 0 where it was cut."""
        cut = {example.row for example in self.examples if example.truncated}
        texts = (row.text if row.completion is None else row.completion for row in self.task.rows)
        counts = [0 if i in cut else len((text or "").encode()) for i, text in enumerate(texts)]
        return np.array(counts, dtype=float)

    @property
    def truncated(self) -> int:
        """Number of rows that were cut."""
        return len({example.row for example in self.examples if example.truncated})

    def under(self, editable: Editable) -> "EncodedTask":
        """The same rows for another model, which may have the same classes in another order, or other ones.

        As many classes with other names are the same classes in the same order.
        """
        labels = tuple(editable.labels)
        if reordered(self.labels, labels):
            refuse_numbers(self.task, self.labels, labels)
        elif len(labels) == len(self.labels):
            return self
        return replace(self, classes=tuple(class_ids(self.task, labels)), labels=labels)

    def measure(self, model: Any) -> Losses:
        """The losses under a model; a `NonFiniteError` names the row of logits that are not finite."""
        if self.unit == "row":
            return losses_of(self.answered(model), self.truth)
        scores = self._scored(model)
        units = scores.tokens.double().numpy()
        return Losses(nats=-scores.log_likelihoods.numpy(), units=units, right=scores.hit.numpy())

    @property
    def truth(self) -> Int[np.ndarray, " rows"]:
        """The right choice or class of each row, from 0."""
        if self.task.shape == "label":
            return np.array(self.classes)
        return np.array([row.answer or 0 for row in self.task.rows])

    def answered(self, model: Any) -> Float[np.ndarray, "rows answers"]:
        """The log-probability of every choice or class; NaN in rows with nothing to score.

        −∞ for the choices that a row has fewer than the widest one.
        """
        if self.task.shape == "label":
            tokens, where = self.batch_tokens, self.task.where
            logits = classify_examples(model, self.examples, tokens=tokens, where=where)
            return logits.double().log_softmax(dim=1).numpy()
        assert self.task.shape == "choices"
        widest = max(len(row.choices or ()) for row in self.task.rows)
        logs = np.full((len(self.task.rows), widest), np.nan)
        for choices in self.choices(model):
            if choices.sum.isfinite().all():
                logs[choices.row] = -np.inf
                logs[choices.row, : len(choices.sum)] = choices.sum.log_softmax(dim=0).numpy()
        return logs

    def choices(self, model: Any) -> list[ChoiceScores]:
        """The scores of the choices of every row."""
        return choice_scores(self._scored(model), self.examples, self.task.rows)

    def _scored(self, model: Any) -> SequenceScores:
        return score_examples(
            model, self.examples, tokens=self.batch_tokens, mask_id=self.mask_id, where=self.task.where
        )


def reordered(labels: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two models have the same classes in different orders; case aside."""
    ours, theirs = ([name.strip().casefold() for name in names] for names in (labels, other))
    return ours != theirs and sorted(ours) == sorted(theirs)


def refuse_numbers(task: Task, labels: Sequence[str], other: Sequence[str]) -> None:
    """Refuse labels that are numbers where two models have the same classes in different orders."""
    if reordered(labels, other) and by_number(task, other):
        raise InputError(
            f"{task.ref}: its labels are numbers, and the models number their classes differently "
            f"({', '.join(labels)} and {', '.join(other)}); give the names of the classes"
        )


def losses_of(logs: Float[np.ndarray, "rows answers"], truth: Int[np.ndarray, " rows"]) -> Losses:
    """The losses of rows from `EncodedTask.answered` and the right answers."""
    nats = -logs[np.arange(len(logs)), truth]
    scored = ~np.isnan(nats)
    right = np.where(scored, logs.argmax(axis=1) == truth, np.nan)
    return Losses(nats=nats, units=scored.astype(float), right=right)


def encoded(
    editable: Editable, task: Task, *, max_length: int | None, chat_template: bool, batch_tokens: int
) -> EncodedTask:
    """A task as token ids of a model."""
    classifier = editable.kind == "classifier"
    if classifier != (task.shape == "label"):
        wanted = '{"text", "label"}' if classifier else "texts, completions or choices"
        raise InputError(
            f"{task.ref}: holds rows of {task.shape}, and a {editable.kind} model scores {wanted}"
        )
    tokenizer = editable.tokenizer
    length = min((n for n in (max_length, editable.context) if n is not None), default=None)
    examples = encode(task, tokenizer, max_length=length, chat_template=chat_template)
    if editable.kind == "masked" and tokenizer.mask_token_id is None:
        raise InputError(f"{editable.checkpoint.ref}: is a masked model, but its tokenizer has no mask token")
    return EncodedTask(
        task=task, examples=examples, batch_tokens=batch_tokens,
        classes=tuple(class_ids(task, editable.labels)) if classifier else (),
        labels=tuple(editable.labels),
        mask_id=tokenizer.mask_token_id if editable.kind == "masked" else None,
        notes=encoding_notes(task, examples, tokenizer),
    )  # fmt: skip
