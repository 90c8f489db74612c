"""The differentiable loss of a task: its gradients, a micro-batch at a time, without dropout.

It is the loss that rows are measured by. Texts and completions: minus the log-likelihood of a scored token; a
masked model sees all other tokens, in one forward pass a token. Choices: minus the log-probability of the
right choice among the row's choices, from the log-likelihoods of their tokens. Labels: minus the
log-probability of the class. In nats, as a mean over units: tokens, or rows of choices and labels.
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
    """A task in a model's tokens, such as `diagnostics.evaluation.row_losses.EncodedTask`."""

    @property
    def task(self) -> Task:
        """The rows."""

    @property
    def examples(self) -> Sequence[Example]:
        """One for each row or choice, in the order of the rows."""

    @property
    def classes(self) -> Sequence[int]:
        """The class of each row, for a classifier."""

    @property
    def mask_id(self) -> int | None:
        """The mask token of a masked language model."""


@dataclass(frozen=True)
class ScoringUnit:
    """Smallest unit that is scored together: the choices of a row, an example, or one masked copy of it.

    Attributes:
        row: index into the task's rows.
        sequences: indices of examples, each with its one scored position; None for all of the example.
        length: of the longest, in tokens.
    """

    row: int
    sequences: tuple[tuple[int, int | None], ...]
    length: int


class Objective:
    """The differentiable loss of a task; `rows` are those with something to score.

    Args:
        tokens: most tokens in a micro-batch, padding included; a larger unit is a batch of its own.
    """

    def __init__(self, encoded: EncodedRows, *, tokens: int = 16384):
        self._encoded, self._tokens = encoded, tokens
        self._too_many = float("inf")  # tokens of the smallest micro-batch that did not fit into memory
        self._units: dict[int, list[ScoringUnit]] = {}
        for unit in scoring_units(encoded):
            self._units.setdefault(unit.row, []).append(unit)
        self.rows: tuple[int, ...] = tuple(sorted(self._units))

    def units(self, rows: Sequence[int] | None = None) -> int:
        """Number of units of rows, by default of all; 0 where there is nothing to score."""
        chosen = self._chosen(rows)
        if self._encoded.task.shape in ("choices", "label"):
            return len(chosen)
        # Without masking a row is one example; a masked copy has one scored position.
        return sum(
            sum(self._encoded.examples[index].scored) if position is None else 1
            for row in chosen
            for unit in self._units[row]
            for index, position in unit.sequences
        )

    def backward(self, model: nn.Module, rows: Sequence[int] | None = None, *, scale: float = 1.0) -> float:
        """Mean loss of rows in nats; `scale` times its gradient is added to what requires one.

        A post-accumulation hook sees a gradient once for each micro-batch, and may clear it. A micro-batch
        that does not fit into memory is halved; nothing of it is added twice.

        Args:
            rows: indices into the task's rows, each as often as it counts; by default all with something to
                score. Rows with nothing to score are skipped.

        Raises:
            InputError: no row has anything to score, or one row does not fit into memory.
            NonFiniteError: the message names the row; micro-batches before it have been added.
        """
        task, units = self._encoded.task, self.units(rows)
        if not units:
            which = "rows" if rows is None else f"{len(rows)} rows asked for"
            raise InputError(f"{task.ref}: none of the {which} has anything to score")
        waiting = [unit for row in self._chosen(rows) for unit in self._units[row]]
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            accumulator = stack.enter_context(GradientAccumulator(model))
            try:
                parts = micro_batches(waiting, self._tokens)
                return sum(self._accumulate(accumulator, part, scale / units) for part in parts) / units
            except NonFiniteError as error:
                name = task.where(self._encoded.examples[error.example].row)
                raise NonFiniteError(error.example, error.layer, name) from error

    def _chosen(self, rows: Sequence[int] | None) -> Sequence[int]:
        return self.rows if rows is None else [row for row in rows if row in self._units]

    def _accumulate(self, accumulator: GradientAccumulator, part: list[ScoringUnit], weight: float) -> float:
        """Add `weight` times a micro-batch's gradient, halving it until it fits; its loss in nats, summed."""
        size, alone = tokens_of(part), len(part) == 1
        if alone or size < self._too_many:
            try:
                return self._run(accumulator, part, weight)
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
            torch.cuda.empty_cache()
        half = (len(part) + 1) // 2
        with accumulator.rest():
            return sum(self._accumulate(accumulator, some, weight) for some in (part[:half], part[half:]))

    def _run(self, accumulator: GradientAccumulator, part: list[ScoringUnit], weight: float) -> float:
        """Add `weight` times the gradient of a micro-batch in one pass; its loss in nats, summed."""
        encoded, rows = self._encoded, [unit.row for unit in part]
        batch, targets = batch_of(encoded, part)
        if encoded.task.shape == "label":
            return accumulator.classes(batch, torch.tensor([encoded.classes[row] for row in rows]), weight)
        masked = encoded.mask_id is not None
        if encoded.task.shape != "choices":
            return accumulator.tokens(batch, targets, weight, masked=masked)
        owner = torch.tensor([
            (row_index, encoded.examples[index].choice or 0)
            for row_index, unit in enumerate(part) for index, _ in unit.sequences
        ])  # fmt: skip
        answers = torch.tensor([encoded.task.rows[row].answer or 0 for row in rows])
        return accumulator.choices(batch, targets, weight, owner, answers, masked=masked)


def scoring_units(encoded: EncodedRows) -> Iterator[ScoringUnit]:
    """The units of a task, row by row."""
    shape, masked = encoded.task.shape, encoded.mask_id is not None
    choices: dict[int, list[int]] = {}
    for index, example in enumerate(encoded.examples):
        if shape == "choices":
            choices.setdefault(example.row, []).append(index)
        elif shape != "label" and masked:
            for position in scored_positions(example):
                yield ScoringUnit(example.row, ((index, position),), len(example.ids))
        elif example.ids if shape == "label" else any(example.scored):
            yield ScoringUnit(example.row, ((index, None),), len(example.ids))
    for row, indices in choices.items():
        examples = [encoded.examples[index] for index in indices]
        if all(any(example.scored) for example in examples):
            sequences = tuple(
                (index, position)
                for index in indices
                for position in (scored_positions(encoded.examples[index]) if masked else (None,))
            )
            yield ScoringUnit(row, sequences, max(len(example.ids) for example in examples))


def scored_positions(example: Example) -> list[int]:
    """The scored positions of an example."""
    return [position for position, scored in enumerate(example.scored) if scored]


def tokens_of(part: Sequence[ScoringUnit]) -> int:
    """Number of tokens of a micro-batch, padding included."""
    return max(unit.length for unit in part) * sum(len(unit.sequences) for unit in part)


def micro_batches(waiting: Iterable[ScoringUnit], tokens: int) -> Iterator[list[ScoringUnit]]:
    """Units of similar length together, the longest first so that memory runs out at once or never."""
    part: list[ScoringUnit] = []
    count = empty = 0
    for unit in sorted(waiting, key=lambda unit: -unit.length):
        length, more = (part or [unit])[0].length, len(unit.sequences)
        empty += more * (length - unit.length)
        room = (count + more) * length
        if part and (room > tokens or empty > max(EMPTY, EMPTY_SHARE * room)):
            yield part
            part, count, empty = [], 0, 0
        part.append(unit)
        count += more
    if part:
        yield part


def batch_of(encoded: EncodedRows, part: Sequence[ScoringUnit]) -> tuple[Batch, Int[Tensor, " scored"]]:
    """A micro-batch with its sequences in order, and its scored tokens, row by row."""
    sequences = [sequence for unit in part for sequence in unit.sequences]
    indices = [index for index, _ in sequences]
    batch = pad(encoded.examples, indices, max(unit.length for unit in part), 0, "right")
    if encoded.mask_id is None or encoded.task.shape == "label":
        return batch, batch.ids[batch.scored]
    scored = torch.zeros_like(batch.scored)
    scored[range(len(sequences)), [position for _, position in sequences]] = True
    hidden = batch.ids.masked_fill(scored, encoded.mask_id)
    return replace(batch, ids=hidden, scored=scored), batch.ids[scored]
