"""Examples for a model: padded batches of similar length, halved when memory runs out, and windows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.errors import InputError

T = TypeVar("T")
PaddingSide: TypeAlias = Literal["left", "right"]
# Padding that a batch may hold: as many positions as an extra pass costs, or this share of it.
EMPTY, EMPTY_SHARE = 64, 0.05


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence for a model: a row, or one choice of a row.

    Attributes:
        ids: token ids, special tokens included.
        scored: whether the likelihood of each token counts. The first never does: nothing precedes it.
        row: index into the task's rows.
        truncated: the row was longer than `max_length`.
        choice: which of the row's choices, from 0.
        doubled_bos: a second BOS, from the row or the template, was left out.
        head: how many special tokens it begins with.

    >>> Example(ids=[1, 7, 9], scored=[False, True, True], row=0).truncated
    False
    """

    ids: list[int]
    scored: list[bool]
    row: int
    truncated: bool = False
    choice: int | None = None
    doubled_bos: bool = False
    head: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples padded to one length.

    Attributes:
        ids: token ids, `pad_id` where there is no token.
        attention_mask: 1 at tokens, 0 at padding.
        position_ids: index of each token in its own sequence, from 0; 0 at padding. Models that count
            differently, such as RoBERTa, make their own.
        scored: which of `ids` count; a causal model predicts `ids[:, t]` at `t - 1`. False at padding and at
            the first token.
        indices: of the examples.

    >>> Batch.of({"input_ids": [[5, 6, 7], [8, 9, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}).scored
    tensor([[False,  True,  True],
            [False,  True, False]])
    """

    ids: Int[Tensor, "rows length"]
    attention_mask: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    scored: Bool[Tensor, "rows length"]
    indices: Int[Tensor, " rows"]

    @classmethod
    def of(cls, encoding: "Batch | Mapping[str, Any]") -> "Batch":
        """A batch from the output of a tokenizer: a `BatchEncoding`, or a dict of tensors or lists.

        All tokens but the first of a sequence are scored. Lists without a mask may be of unequal length.

        Args:
            encoding: `input_ids` and, where it holds padding, `attention_mask`; `position_ids` if it has any.
                One sequence, or several.

        Raises:
            InputError: it has no `input_ids`, or its parts differ in shape.
        """
        if isinstance(encoding, Batch):
            return encoding
        if "input_ids" not in encoding:
            listed = ", ".join(encoding) or "nothing"
            raise InputError(f"has {listed}, no input_ids; give a tokenizer's output")
        names = [name for name in ("input_ids", "attention_mask", "position_ids")
                 if encoding.get(name) is not None]  # fmt: skip
        parts = {name: _two_dimensional(name, encoding[name]) for name in names}
        ids, lengths = parts["input_ids"]
        tokens = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        mask = parts.get("attention_mask", (tokens, lengths))[0].long()
        positions = parts.get("position_ids", ((mask.cumsum(dim=1) - 1) * mask, lengths))[0]
        for name, values in (("attention_mask", mask), ("position_ids", positions)):
            if values.shape != ids.shape:
                shapes = f"{tuple(values.shape)} and input_ids {tuple(ids.shape)}"
                raise InputError(f"{name} is of shape {shapes}; give what one call of a tokenizer returns")
        if not mask.any(dim=1).all():
            raise InputError("a sequence has no token; leave it out")
        scored = mask.bool() & (mask.cumsum(dim=1) > 1)
        return cls(
            ids=ids, attention_mask=mask, position_ids=positions, scored=scored,
            indices=torch.arange(len(ids)),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})

    def split(self) -> tuple["Batch", "Batch"]:
        """Two batches of half the rows each; raises InputError for one row."""
        if len(self.indices) < 2:
            raise InputError("a batch of one row cannot be split")
        half = (len(self.indices) + 1) // 2
        return self._take(slice(None, half)), self._take(slice(half, None))

    def _take(self, rows: slice) -> "Batch":
        # The longest row may be in the other half.
        used = self.attention_mask[rows].any(dim=0)
        return Batch(
            **{name: value[rows][:, used] for name, value in vars(self).items() if name != "indices"},
            indices=self.indices[rows],
        )


def batches(
    examples: Sequence[Example], *, tokens: int = 16384, pad_id: int, side: PaddingSide = "right"
) -> Iterator[Batch]:
    """Examples in batches of similar length, the longest first so that memory runs out at once or never.

    Examples without tokens are left out; `Batch.indices` tells which examples a batch holds.

    Args:
        tokens: most tokens in a batch, padding included; a longer example is a batch of its own.
        pad_id: the id at padding; any id will do.

    >>> rows = [Example(ids=[1] * length, scored=[False] * length, row=0) for length in (2, 400)]
    >>> [tuple(batch.ids.shape) for batch in batches(rows, pad_id=0)]
    [(1, 400), (1, 2)]
    """
    sizes = {index: len(example.ids) for index, example in enumerate(examples) if example.ids}
    order = sorted(sizes, key=lambda index: -sizes[index])
    while order:
        length = sizes[order[0]]
        count, empty = 1, 0
        for index in order[1 : max(1, tokens // length)]:
            empty += length - sizes[index]
            if empty > max(EMPTY, EMPTY_SHARE * length * (count + 1)):
                break
            count += 1
        yield pad(examples, order[:count], length, pad_id, side)
        del order[:count]


def pad(
    examples: Sequence[Example], indices: Sequence[int], length: int, pad_id: int, side: PaddingSide
) -> Batch:
    """The examples at `indices` as one batch."""
    rows = [examples[index] for index in indices]

    def padded(values: Iterable[Sequence[int]], value: int) -> Tensor:
        empty = [[value] * (length - len(row.ids)) for row in rows]
        return torch.tensor([[*row, *rest] if side == "right" else [*rest, *row]
                             for row, rest in zip(values, empty, strict=True)])  # fmt: skip

    return Batch(
        ids=padded((row.ids for row in rows), pad_id),
        attention_mask=padded(([1] * len(row.ids) for row in rows), 0),
        position_ids=padded((range(len(row.ids)) for row in rows), 0),
        scored=padded((row.scored for row in rows), 0).bool(), indices=torch.tensor(indices),
    )  # fmt: skip


def _two_dimensional(name: str, values: Any) -> tuple[Tensor, list[int]]:
    """Values of one sequence or several as a tensor padded with 0, and their lengths."""
    if hasattr(values, "ndim"):  # numpy's too
        table = torch.atleast_2d(torch.as_tensor(values))
        if values.ndim not in (1, 2):
            raise InputError(f"{name} has {values.ndim} axes; it is (rows, tokens)")
        return table, [table.shape[1]] * len(table)
    rows = [values] if values and not isinstance(values[0], Sequence | Tensor) else values
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    if not rows or any(row.ndim != 1 for row in rows):
        raise InputError(f"{name} holds no sequences of token ids; give a tokenizer's output")
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(row) for row in rows]


def halving(run: Callable[[Batch], T], batches: Iterable[Batch]) -> Iterator[tuple[Batch, T]]:
    """Each batch with the result of `run`; a batch too large for memory is halved until it fits.

    Later batches of a size that did not fit are halved without a trial. One row that does not: InputError.
    """
    too_many = float("inf")  # entries of the smallest batch that did not fit
    for batch in batches:
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            alone = len(part.indices) == 1
            if alone or part.ids.numel() < too_many:
                try:
                    result = run(part)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    too_many = min(too_many, part.ids.numel())
                else:
                    yield part, result
                    del result  # or it would stay while the next runs
                    continue
                if alone:
                    row = f"one row of {part.ids.shape[1]} tokens"
                    raise InputError(f"{row} does not fit into memory; lower max_length")
                # Only here: until the handler above was left, the error kept what had been allocated.
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            waiting.extend(reversed(part.split()))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    typed = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return typed or any(sign in str(error) for sign in signs)


def windows(example: Example, longest: int) -> list[Example]:
    """The example in windows of at most `longest` tokens; a short example is returned unchanged.

    Windows begin `longest` // 2 tokens apart, each with the special tokens that begin the sequence, which a
    model trained with a BOS needs. A token is scored in the first window that holds it, which gives it the
    most context. Special tokens, which count, that leave no room are an InputError.
    """
    if len(example.ids) <= longest:
        return [example]
    head = example.ids[: example.head]
    ids, scored = example.ids[len(head) :], example.scored[len(head) :]
    room = longest - len(head)
    # A window's first token can only be scored behind another.
    step = min(longest // 2, room if head else room - 1)
    if step < 1:
        raise InputError(f"windows of {longest} tokens leave no room for a scored token")
    parts: list[Example] = []
    done = 0
    while done < len(ids):
        start = len(parts) * step
        stop = start + room
        fresh = [False] * (len(head) + done - start) + scored[done:stop]
        parts.append(replace(example, ids=head + ids[start:stop], scored=fresh))
        done = stop
    return parts
