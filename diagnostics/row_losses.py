"""The loss of every row of a task under one model, in the unit that its shape allows.

Texts and completions: nats over the scored tokens, and how many these are. Choices: minus the log-probability
of the right one among the row's choices, and a label's minus its log-probability among the classes; these
count as one unit a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from probes.editable import Editable
from probes.forward import choice_scores, classify_examples, score_examples
from probes.tasks import Example, Task, class_ids, encode, notes


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of rows.

    Attributes:
        nats: of each row; NaN where there is nothing to score.
        units: scored tokens of each row, or 1; 0 where there is nothing to score.
        right: 1 where the right choice or label is the likeliest, else 0; of text the share of its scored
            tokens that are the likeliest in their place. NaN where there is nothing to score.
    """

    nats: Float[np.ndarray, " rows"]
    units: Float[np.ndarray, " rows"]
    right: Float[np.ndarray, " rows"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A task in a model's tokens, encoded once and measured often.

    Attributes:
        classes: of each row, for a classifier.
        notes: what a reader must know: rows cut, rows with nothing to score.
    """

    task: Task
    examples: Sequence[Example]
    classes: tuple[int, ...]
    mask_id: int | None
    batch_tokens: int
    notes: tuple[str, ...]

    @property
    def unit(self) -> str:
        """What the loss is counted per."""
        return "row" if self.task.shape in ("choices", "label") else "token"

    @property
    def truncated(self) -> int:
        """Rows that were cut."""
        return len({example.row for example in self.examples if example.truncated})

    def measure(self, model: Any) -> Losses:
        """The losses under a model.

        Raises:
            NonFiniteError: logits that are NaN or infinite; the message names the row.
        """
        count = len(self.task.rows)
        nats, units, right = np.full(count, np.nan), np.zeros(count), np.full(count, np.nan)
        if self.task.shape == "label":
            logits = classify_examples(
                model, self.examples, tokens=self.batch_tokens, where=self.task.where
            ).double()
            nats = -logits.log_softmax(dim=1)[torch.arange(count), list(self.classes)].numpy()
            right = (logits.argmax(dim=1).numpy() == np.array(self.classes)).astype(float)
            return Losses(nats=nats, units=np.isfinite(nats).astype(float), right=right)
        scores = score_examples(
            model, self.examples, tokens=self.batch_tokens, mask_id=self.mask_id, where=self.task.where
        )
        if self.task.shape != "choices":
            units = scores.tokens.double().numpy()
            return Losses(nats=-scores.log_likelihoods.numpy(), units=units, right=scores.hit.numpy())
        for choices in choice_scores(scores, self.examples, self.task.rows):
            answer = self.task.rows[choices.row].answer or 0
            if choices.sum.isfinite().all():
                nats[choices.row] = -float(choices.sum.log_softmax(dim=0)[answer])
                units[choices.row] = 1.0
                right[choices.row] = float(choices.best() == answer)
        return Losses(nats=nats, units=units, right=right)


def encoded(
    editable: Editable, task: Task, *, max_length: int | None, chat_template: bool, batch_tokens: int
) -> Encoded:
    """A task in the tokens of a model.

    Raises:
        ValueError: rows that a model of this kind cannot score, labels that it does not know.
    """
    classifier = editable.kind == "classifier"
    if classifier != (task.shape == "label"):
        wanted = '{"text", "label"}' if classifier else "texts, completions or choices"
        raise ValueError(
            f"{task.ref}: holds rows of {task.shape}, and a {editable.kind} model scores {wanted}"
        )
    tokenizer = editable.tokenizer
    length = min((n for n in (max_length, editable.context) if n is not None), default=None)
    examples = encode(task, tokenizer, max_length=length, chat_template=chat_template)
    if editable.kind == "masked" and tokenizer.mask_token_id is None:
        raise ValueError(f"{editable.checkpoint.ref}: is a masked model, but its tokenizer has no mask token")
    return Encoded(
        task=task,
        examples=examples,
        classes=tuple(class_ids(task, editable.labels)) if classifier else (),
        mask_id=tokenizer.mask_token_id if editable.kind == "masked" else None,
        batch_tokens=batch_tokens,
        notes=notes(task, examples, tokenizer),
    )
