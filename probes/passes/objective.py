"""The loss of a task as something to descend: its gradients, a micro-batch at a time, without dropout.

The loss is the one that rows are measured by. Texts and completions: minus the log-likelihood of a scored
token; a masked model is given all the others, one forward pass a token. Choices: minus the log-probability of
the right one among the row's choices, each as likely as its tokens together. Labels: minus the
log-probability among the classes. In nats, as a mean over units: tokens, or rows of choices and labels.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.errors import InputError
from probes.models.body import evaluating
from probes.passes.backward import GradientAccumulator
from probes.passes.batched import NonFiniteError
from probes.text.batches import EMPTY, EMPTY_SHARE, Batch, Example, out_of_memory, pad
from probes.text.rows import Task


@runtime_checkable
class EncodedRows(Protocol):
    """A task in a model's tokens, as `diagnostics.evaluation.row_losses` makes it."""

    @property
    def task(self) -> Task:
        """The rows."""

    @property
    def examples(self) -> Sequence[Example]:
        """One a row, or one a choice, in the order of the rows."""

    @property
    def classes(self) -> Sequence[int]:
        """Of each row, for a classifier."""

    @property
    def mask_id(self) -> int | None:
        """The mask token of a masked language model."""


@dataclass(frozen=True)
class ScoringUnit:
    """What stays in one micro-batch: the choices of a row, an example, or one masked copy of an example.

    Attributes:
        row: index into the task's rows.
        sequences: examples, each with the one place that is scored; None: all that the example has.
        length: of the longest, in tokens.
    """

    row: int
    sequences: tuple[tuple[int, int | None], ...]
    length: int


class Objective:
    """The differentiable loss of a task.

    Attributes:
        rows: indices of the rows that have something to score, in order.
    """

    def __init__(self, encoded: EncodedRows, *, tokens: int = 16384):
        """Prepare the rows.

        Args:
            tokens: most tokens in a micro-batch, padding included; what cannot be divided is one of its own.
        """
        self._encoded, self._tokens = encoded, tokens
        self._too_many = float("inf")  # tokens of the smallest micro-batch that did not fit into memory
        self._wholes: dict[int, list[ScoringUnit]] = {}
        for whole in wholes(encoded):
            self._wholes.setdefault(whole.row, []).append(whole)
        self.rows: tuple[int, ...] = tuple(sorted(self._wholes))

    @property
    def unit(self) -> str:
        """What the loss is counted per."""
        return "row" if self._encoded.task.shape in ("choices", "label") else "token"

    def units(self, rows: Sequence[int] | None = None) -> int:
        """How many units rows have, by default all rows; 0 where there is nothing to score."""
        chosen = self._chosen(rows)
        if self.unit == "row":
            return len(chosen)
        # Without masking a row is one example, and with it a copy is scored in one place.
        return sum(
            sum(self._encoded.examples[index].scored) if place is None else 1
            for row in chosen
            for whole in self._wholes[row]
            for index, place in whole.sequences
        )

    def backward(self, model: nn.Module, rows: Sequence[int] | None = None, *, scale: float = 1.0) -> float:
        """Mean loss of rows in nats; `scale` times its gradient is added to what requires one.

        A hook behind the accumulation of a gradient sees it once for each micro-batch, and may take it away.
        A micro-batch that does not fit into memory is halved; nothing of it is added twice.

        Args:
            rows: indices into the task's rows, each as often as it counts; by default all that have something
                to score. Others are passed over.

        Raises:
            InputError: no row has anything to score, or one alone does not fit into memory.
            NonFiniteError: logits that are NaN or infinite; the message names the row. Gradients of the
                micro-batches before it have been added.
        """
        task, units = self._encoded.task, self.units(rows)
        if not units:
            which = "rows" if rows is None else f"{len(rows)} rows asked for"
            raise InputError(f"{task.ref}: none of the {which} has anything to score")
        waiting = [whole for row in self._chosen(rows) for whole in self._wholes[row]]
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            descent = stack.enter_context(GradientAccumulator(model))
            try:
                parts = micro_batches(waiting, self._tokens)
                return sum(self._descend(descent, part, scale / units) for part in parts) / units
            except NonFiniteError as error:
                name = task.where(self._encoded.examples[error.example].row)
                raise NonFiniteError(error.example, error.layer, name) from error

    def _chosen(self, rows: Sequence[int] | None) -> Sequence[int]:
        return self.rows if rows is None else [row for row in rows if row in self._wholes]

    def _descend(self, descent: GradientAccumulator, part: list[ScoringUnit], weight: float) -> float:
        """Add `weight` times a micro-batch's gradient, halving it until it fits; its loss in nats, summed."""
        size, alone = tokens_of(part), len(part) == 1
        if alone or size < self._too_many:
            try:
                return self._whole(descent, part, weight)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._too_many = min(self._too_many, size)
            if alone:
                raise InputError(
                    f"{self._encoded.task.where(part[0].row)}: its {size} tokens do not fit into memory; "
                    "lower max_length"
                )
            # Only here: until the handler above was left, the error kept what had been allocated.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = (len(part) + 1) // 2
        with descent.rest():
            return sum(self._descend(descent, some, weight) for some in (part[:half], part[half:]))

    def _whole(self, descent: GradientAccumulator, part: list[ScoringUnit], weight: float) -> float:
        """The same, not halved."""
        encoded, rows = self._encoded, [whole.row for whole in part]
        batch, targets = batch_of(encoded, part)
        if encoded.task.shape == "label":
            return descent.classes(batch, torch.tensor([encoded.classes[row] for row in rows]), weight)
        masked = encoded.mask_id is not None
        if encoded.task.shape != "choices":
            return descent.tokens(batch, targets, weight, masked=masked)
        owner = [
            (place, encoded.examples[index].choice or 0)
            for place, whole in enumerate(part)
            for index, _ in whole.sequences
        ]
        answers = torch.tensor([encoded.task.rows[row].answer or 0 for row in rows])
        return descent.choices(batch, targets, weight, torch.tensor(owner), answers, masked=masked)


def wholes(encoded: EncodedRows) -> Iterator[ScoringUnit]:
    """Everything that can be scored, row by row."""
    shape, masked = encoded.task.shape, encoded.mask_id is not None
    choices: dict[int, list[int]] = {}
    for index, example in enumerate(encoded.examples):
        if shape == "choices":
            choices.setdefault(example.row, []).append(index)
        elif shape == "label":
            if example.ids:
                yield ScoringUnit(example.row, ((index, None),), len(example.ids))
        elif masked:
            for place in places(example):
                yield ScoringUnit(example.row, ((index, place),), len(example.ids))
        elif any(example.scored):
            yield ScoringUnit(example.row, ((index, None),), len(example.ids))
    for row, indices in choices.items():
        examples = [encoded.examples[index] for index in indices]
        if all(any(example.scored) for example in examples):
            sequences = (
                (index, place)
                for index, example in zip(indices, examples, strict=True)
                for place in (places(example) if masked else (None,))
            )
            yield ScoringUnit(row, tuple(sequences), max(len(example.ids) for example in examples))


def places(example: Example) -> Iterable[int]:
    """Where an example is scored."""
    return (place for place, scored in enumerate(example.scored) if scored)


def tokens_of(part: Sequence[ScoringUnit]) -> int:
    """Tokens of a micro-batch, padding included."""
    return max(whole.length for whole in part) * sum(len(whole.sequences) for whole in part)


def micro_batches(waiting: Iterable[ScoringUnit], tokens: int) -> Iterator[list[ScoringUnit]]:
    """Wholes of like length together, the longest first so that memory runs out at once or never."""
    part: list[ScoringUnit] = []
    count = empty = 0
    for whole in sorted(waiting, key=lambda whole: -whole.length):
        length, more = (part or [whole])[0].length, len(whole.sequences)
        empty += more * (length - whole.length)
        room = (count + more) * length
        if part and (room > tokens or empty > max(EMPTY, EMPTY_SHARE * room)):
            yield part
            part, count, empty = [], 0, 0
        part.append(whole)
        count += more
    if part:
        yield part


def batch_of(encoded: EncodedRows, part: Sequence[ScoringUnit]) -> tuple[Batch, Int[Tensor, " scored"]]:
    """A micro-batch, its sequences in order, and the tokens that are scored in it, row by row."""
    sequences = [sequence for whole in part for sequence in whole.sequences]
    indices = [index for index, _ in sequences]
    batch = pad(encoded.examples, indices, max(whole.length for whole in part), 0, "right")
    if encoded.mask_id is None or encoded.task.shape == "label":
        return batch, batch.ids[batch.scored]
    scored = torch.zeros_like(batch.scored)
    scored[range(len(sequences)), [place for _, place in sequences]] = True
    hidden = batch.ids.masked_fill(scored, encoded.mask_id)
    return replace(batch, ids=hidden, scored=scored), batch.ids[scored]
