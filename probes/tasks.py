"""Tasks: rows of text, as token ids with a mask of what is scored, in batches of like length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes.rows import Row, Shape

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows of one shape.

    Attributes:
        ref: as it was asked for.
        shape: which fields the rows have.
        fingerprint: blake2b of the rows, whatever file they came from.
    """

    ref: str
    rows: tuple[Row, ...]
    shape: Shape
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence for a model: a row, or one choice of a row.

    Attributes:
        ids: token ids, special tokens included.
        scored: for each of `ids`, whether its own likelihood counts, given what stands before it. Never the first.
        row: index into the task's rows.
        truncated: the row was longer than `max_length`.
        choice: which of the row's choices, from 0.
        doubled_bos: the row itself began with a BOS, so that none was added.
    """

    ids: list[int]
    scored: list[bool]
    row: int
    truncated: bool = False
    choice: int | None = None
    doubled_bos: bool = False


def encode(
    task: Task,
    tokenizer: Any,
    *,
    max_length: int | None,
    chat_template: bool = False,
    add_bos: bool | None = None,
    add_eos: bool = False,
    score_span: Literal["content", "all"] = "content",
) -> list[Example]:
    """Tokenise a task: one example a row, or one a choice, in the order of the rows."""
    examples = []
    bos = [tokenizer.bos_token_id] if add_bos else []
    for index, row in enumerate(task.rows):
        prompt = row.prompt or ""
        for choice, tail in enumerate(row.choices or (row.completion or row.text or "",)):
            body = tokenizer(
                prompt + tail, add_special_tokens=add_bos is None, return_offsets_mapping=True, verbose=False
            )
            ids = bos + list(body["input_ids"])
            ends = [0] * len(bos) + [end for _, end in body["offset_mapping"]]
            scored = [place > 0 and end > len(prompt) for place, end in enumerate(ends)]
            cut = max(0, len(ids) - (max_length or len(ids)))
            examples.append(
                Example(
                    ids=ids[cut:],
                    scored=[False, *scored[cut + 1 :]] if ids else [],
                    row=index,
                    truncated=cut > 0,
                    choice=choice if row.choices else None,
                )
            )
    return examples


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples padded to one length.

    Attributes:
        ids: token ids, `pad_id` where there is no token.
        attention_mask: 1 at tokens, 0 at padding.
        position_ids: place of each token in its own sequence, from 0; 0 at padding.
        scored: which of `ids` count: `ids[:, t]` is predicted at `t - 1`. False at padding and at first tokens.
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
            ValueError: there is only one row.
        """
        if len(self.indices) < 2:
            raise ValueError("a batch of one row cannot be split")
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
    side: Literal["left", "right"] = "right",
) -> Iterator[Batch]:
    """Examples in batches of like length, the longest first so that memory runs out at once or never.

    Args:
        tokens: most tokens in a batch, padding included; a longer example is a batch of its own.
        pad_id: the id at padding; any will do.
    """
    order = sorted(
        (i for i, example in enumerate(examples) if example.ids), key=lambda i: -len(examples[i].ids)
    )
    while order:
        length = len(examples[order[0]].ids)
        count = max(1, tokens // length)
        yield pad(examples, order[:count], length, pad_id, side)
        order = order[count:]


def pad(
    examples: Sequence[Example],
    indices: Sequence[int],
    length: int,
    pad_id: int,
    side: Literal["left", "right"],
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
    """Each batch with what `run` gives for it; a batch too large for memory is halved until it fits.

    Raises:
        ValueError: one row alone does not fit.
    """
    too_many = None  # entries of the smallest batch that did not fit
    for batch in batches:
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            fits = too_many is None or part.ids.numel() < too_many or len(part.indices) == 1
            if fits:
                try:
                    result = run(part)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    fits = False
            if fits:
                yield part, result
                continue
            too_many = min(part.ids.numel(), too_many or part.ids.numel())
            if len(part.indices) == 1:
                raise ValueError(
                    f"one row of {part.ids.shape[1]} tokens does not fit into memory; lower max_length"
                )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            waiting.extend(reversed(part.split()))


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what went wrong."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
