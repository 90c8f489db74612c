"""Batches: examples of like length side by side, padded, and halved when memory runs out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.errors import InputError

T = TypeVar("T")
PaddingSide: TypeAlias = Literal["left", "right"]
# Padding that a batch may hold: as many places as a pass of its own would cost, or this share of it.
EMPTY, EMPTY_SHARE = 64, 0.05


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence for a model: a row, or one choice of a row.

    Attributes:
        ids: token ids, special tokens included.
        scored: for each of `ids`, whether its likelihood given what stands before it counts. Never the first,
            which has nothing before it.
        row: index into the task's rows.
        truncated: the row was longer than `max_length`.
        choice: which of the row's choices, from 0.
        doubled_bos: there would have been a second BOS: the row or the template brought one besides.
        head: how many of `ids` are the special tokens that it begins with.
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
        position_ids: place of each token in its own sequence, from 0; 0 at padding. Models that count
            otherwise, RoBERTa among them, make their own.
        scored: which of `ids` count; `ids[:, t]` is what a causal model predicts at `t - 1`. False at padding
            and at the first token.
        indices: which examples these are.
    """

    ids: Int[Tensor, "rows length"]
    attention_mask: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    scored: Bool[Tensor, "rows length"]
    indices: Int[Tensor, " rows"]

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})

    def split(self) -> tuple["Batch", "Batch"]:
        """Two batches of half the rows each.

        Raises:
            InputError: there is only one row.
        """
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
    examples: Sequence[Example],
    *,
    tokens: int = 16384,
    pad_id: int,
    side: PaddingSide = "right",
) -> Iterator[Batch]:
    """Examples in batches of like length, the longest first so that memory runs out at once or never.

    Those without any token are in none; `Batch.indices` says which are.

    Args:
        tokens: most tokens in a batch, padding included; a longer example is a batch of its own.
        pad_id: the id at padding; any will do.
    """
    order = sorted(
        (i for i, example in enumerate(examples) if example.ids), key=lambda i: -len(examples[i].ids)
    )
    while order:
        length = len(examples[order[0]].ids)
        count, empty = 1, 0
        for i in order[1 : max(1, tokens // length)]:
            empty += length - len(examples[i].ids)
            if empty > max(EMPTY, EMPTY_SHARE * length * (count + 1)):
                break
            count += 1
        yield pad(examples, order[:count], length, pad_id, side)
        del order[:count]


def pad(
    examples: Sequence[Example],
    indices: Sequence[int],
    length: int,
    pad_id: int,
    side: PaddingSide,
) -> Batch:
    """Some of the examples as one batch."""
    ids = torch.full((len(indices), length), pad_id)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for place, index in enumerate(indices):
        example = examples[index]
        size = len(example.ids)
        where = slice(0, size) if side == "right" else slice(length - size, length)
        ids[place, where] = torch.tensor(example.ids)
        scored[place, where] = torch.tensor(example.scored)
        positions[place, where] = torch.arange(size)
        mask[place, where] = 1
    return Batch(
        ids=ids, attention_mask=mask, position_ids=positions, scored=scored, indices=torch.tensor(indices)
    )


def halving(run: Callable[[Batch], T], batches: Iterable[Batch]) -> Iterator[tuple[Batch, T]]:
    """Each batch with what `run` gives for it; one too large for memory is halved until it fits.

    Later batches of a size that did not fit are halved without a trial.

    Raises:
        InputError: one row alone does not fit.
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
                    raise InputError(
                        f"one row of {part.ids.shape[1]} tokens does not fit into memory; lower max_length"
                    )
                # Only here: until the handler above was left, the error kept what had been allocated.
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            waiting.extend(reversed(part.split()))


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what went wrong, on whichever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def windows(example: Example, longest: int) -> list[Example]:
    """The example in windows that a model takes; one that is short enough is the only one, as it is.

    Windows begin `longest` // 2 tokens apart, each with the special tokens that begin the sequence: a model
    that was trained with a BOS does not do without. A token is scored in the first window that holds it,
    which of all that do has the most tokens before it; so each is scored once.

    Args:
        longest: most tokens of a window, special ones included.

    Raises:
        InputError: the special tokens leave no room.
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
    made: list[Example] = []
    done = 0
    while done < len(ids):
        start = len(made) * step
        stop = start + room
        fresh = [False] * (len(head) + done - start) + scored[done:stop]
        made.append(replace(example, ids=head + ids[start:stop], scored=fresh))
        done = stop
    return made
