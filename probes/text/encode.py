"""Tasks: rows of text as token ids with a mask of what is scored, in batches of like length.

Lengths are in tokens. A token is scored when it holds any character of what the row asks for, its text,
completion or choice; its prompt, the template around it and the tokenizer's special tokens are not scored.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from typing import Any, Literal

from jinja2 import TemplateError

from probes.errors import InputError
from probes.text.batches import Batch as Batch
from probes.text.batches import Example as Example
from probes.text.batches import batches as batches
from probes.text.batches import halving as halving
from probes.text.batches import windows as windows
from probes.text.rows import Row as Row
from probes.text.rows import Shape as Shape
from probes.text.rows import Task as Task
from probes.text.rows import class_ids as class_ids
from probes.text.rows import read_task as read_task
from probes.text.rows import task_of as task_of

# Texts tokenised at a time: a tokenizer's own record of a text is many times its ids.
CHUNK = 1024
# Stands where a row's text will, to learn what a chat template puts around it.
MARK = "⌜text⌝"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The text of an example, and the characters of it, from `start` to before `stop`, that are scored."""

    row: int
    choice: int | None
    text: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """A piece as tokens.

    Attributes:
        prefix, suffix: special tokens around `ids`.
        scored: which of `ids` are.
        start: how many of `ids` stand before what the row asks for.
    """

    piece: Piece
    prefix: list[int]
    ids: list[int]
    suffix: list[int]
    scored: list[bool]
    start: int
    doubled_bos: bool

    def __len__(self) -> int:
        return len(self.prefix) + len(self.ids) + len(self.suffix)

    def example(self, cut: int, max_length: int | None) -> Example:
        """It without the first `cut` of its ids, and not longer than `max_length`."""
        room = len(self.ids) if max_length is None else max_length - len(self.prefix) - len(self.suffix)
        if room < 1 and self.ids:
            raise InputError(f"max_length is {max_length}; special tokens alone fill that")
        kept = slice(cut, cut + room)
        scored = [False] * len(self.prefix) + self.scored[kept] + [False] * len(self.suffix)
        return Example(
            ids=self.prefix + self.ids[kept] + self.suffix,
            scored=[False, *scored[1:]] if scored else [],
            row=self.piece.row,
            truncated=len(self.ids[kept]) < len(self.ids),
            choice=self.piece.choice,
            doubled_bos=self.doubled_bos,
            head=len(self.prefix),
        )


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
    """Tokenise a task: one example a row, or one a choice, in the order of the rows.

    A text that is too long loses its end. Where there is a prompt, the prompt loses its beginning, as much
    for each choice of a row, and only when none of it is left what follows loses its end.

    Args:
        max_length: most tokens of an example, special ones included; None: any number.
        chat_template: the prompt or text is a user's message, written as the tokenizer's template has it.
        add_bos: whether sequences begin with BOS, and then with one; None: as the tokenizer or template does.
        add_eos: put an EOS, which is scored, behind each sequence; it is the first to go when one is cut.
        score_span: `all` scores prompts and templates too.

    Raises:
        InputError: the tokenizer lacks what is asked for, its template changes a row's text, or `max_length`
            leaves no room.
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length is {max_length}; a token and one before it need 2")
    pieces = list(chats(task, tokenizer) if chat_template else plain(task))
    outer = ([], []) if chat_template else frame(tokenizer, [piece.text for piece in pieces[:CHUNK]])
    special = Special(tokenizer, *outer, add_bos=add_bos, add_eos=add_eos, everything=score_span == "all")
    prompted = task.shape in ("completion", "choices")
    examples = []
    around = (special.around(*each) for each in tokenised(tokenizer, pieces))
    for _, several in groupby(around, key=lambda sequence: sequence.piece.row):
        sequences = list(several)
        excess = 0 if max_length is None else max(map(len, sequences)) - max_length
        # Without BOS the last token of the prompt stays, or the first that follows could not be scored.
        spare = min(sequence.start - (not sequence.prefix) for sequence in sequences) if prompted else 0
        cut = max(0, min(excess, spare))
        examples += [sequence.example(cut, max_length) for sequence in sequences]
    return examples


class Special:
    """The special tokens of a tokenizer, and what the options make of them."""

    def __init__(
        self,
        tokenizer: Any,
        prefix: list[int],
        suffix: list[int],
        *,
        add_bos: bool | None,
        add_eos: bool,
        everything: bool,
    ):
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        for wanted, token, name in ((add_bos, self.bos, "bos"), (add_eos, self.eos, "eos")):
            if wanted and token is None:
                raise InputError(f"the tokenizer has no {name.upper()} token; leave add_{name} out")
        self.add_bos, self.add_eos, self.everything = add_bos, add_eos, everything
        self.brings_bos = self.bos in prefix
        self.prefix = [token for token in prefix if token != self.bos]
        # An EOS that is scored is not put there a second time by the tokenizer.
        self.suffix = [token for token in suffix if not (add_eos and token == self.eos)]

    def around(self, piece: Piece, ids: list[int], start: int, stop: int) -> Tokenised:
        """A piece between its special tokens; a BOS that it began with itself is one of these."""
        own = leading(token == self.bos for token in ids)
        there = own + self.brings_bos
        begins = there > 0 if self.add_bos is None else self.add_bos
        scored = [self.everything or start <= place < stop for place in range(own, len(ids))]
        return Tokenised(
            piece=piece,
            prefix=[self.bos] * begins + self.prefix,
            ids=ids[own:] + [self.eos] * self.add_eos,
            suffix=self.suffix,
            scored=scored + [True] * self.add_eos,
            start=max(0, start - own),
            doubled_bos=there > 1,
        )


def frame(tokenizer: Any, texts: Iterable[str]) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text; `texts` are to learn it from."""
    for text in chain("a", texts):
        whole, inner = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
        places = range(len(whole) - len(inner) + 1)
        place = next((place for place in places if whole[place : place + len(inner)] == inner), None)
        if place is None:
            raise InputError("the tokenizer writes a text otherwise when it adds special tokens to it")
        if inner:
            return whole[:place], whole[place + len(inner) :]
    return tokenizer("")["input_ids"], []


def tokenised(tokenizer: Any, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, list[int], int, int]]:
    """Each piece with its ids, special tokens left out, and which are scored: from one to before another.

    The tokens of a prompt need not begin those of the prompt and what follows it. By the characters that
    each token stands for, one across the boundary is scored. A tokenizer in Python does not tell these; then
    the tokens that the prompt alone has in common with the whole are the prompt's.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))

    def in_common(text: str, ids: list[int]) -> int:
        alone = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return leading(a == b for a, b in zip(alone, ids, strict=False))

    for first in range(0, len(pieces), CHUNK):
        chunk = pieces[first : first + CHUNK]
        encoded = tokenizer(
            [piece.text for piece in chunk], add_special_tokens=False, return_attention_mask=False,
            return_token_type_ids=False, return_offsets_mapping=fast, verbose=False,
        )  # fmt: skip
        for place, (piece, ids) in enumerate(zip(chunk, encoded["input_ids"], strict=True)):
            spans = encoded["offset_mapping"][place] if fast else []
            start, stop = 0, len(ids)
            if piece.start and fast:
                start = leading(end <= piece.start for _, end in spans)
            elif piece.start:
                start = in_common(piece.text[: piece.start], ids)
            if piece.stop < len(piece.text) and fast:
                stop = leading(begin < piece.stop for begin, _ in spans)
            elif piece.stop < len(piece.text):
                stop = in_common(piece.text[: piece.stop], ids)
            yield piece, list(ids), start, stop


def leading(true: Iterable[bool]) -> int:
    """How many stand before the first that is false."""
    return sum(1 for _ in takewhile(bool, true))


def plain(task: Task) -> Iterator[Piece]:
    """The rows as they are: what follows a prompt is put right behind it."""
    for index, row in enumerate(task.rows):
        prompt = row.prompt or ""
        for choice, text in answers(row):
            whole = prompt + text
            yield Piece(row=index, choice=choice, text=whole, start=len(prompt), stop=len(whole))


def chats(task: Task, tokenizer: Any) -> Iterator[Piece]:
    """The rows as a user's message, and completions and choices as what the assistant writes next."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template; leave --chat-template out")

    def render(content: str, where: str) -> str:
        try:
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=prompted
            )
        except TemplateError as error:
            raise InputError(f"{where}: the chat template refuses a user's message ({error})") from error

    prompted = task.shape in ("completion", "choices")
    before, mark, after = render(MARK, task.ref).partition(MARK)
    if not mark or MARK in after:
        raise InputError("the tokenizer's chat template does not hold a user's message once, as it is")
    for index, row in enumerate(task.rows):
        content = row.prompt if row.text is None else row.text
        whole = render(content or "", task.where(index))
        inner = whole.removeprefix(before).removesuffix(after)
        if before + inner + after != whole or inner.strip() != (content or "").strip():
            raise InputError(f"{task.where(index)}: the template changes this row's text")
        if row.text is not None:
            yield Piece(row=index, choice=None, text=whole, start=len(before), stop=len(whole) - len(after))
        else:
            for choice, text in answers(row):
                yield Piece(
                    row=index, choice=choice, text=whole + text, start=len(whole), stop=len(whole + text)
                )


def answers(row: Row) -> list[tuple[int | None, str]]:
    """What a row asks a model for, by choice."""
    if row.choices is not None:
        return list(enumerate(row.choices))
    return [(None, row.completion if row.completion is not None else row.text or "")]


def notes(task: Task, examples: Sequence[Example], tokenizer: Any = None) -> tuple[str, ...]:
    """What a reader must know of how the task was encoded: rows cut, rows with nothing to score, BOS.

    Args:
        tokenizer: given, it is also said when sequences lack the BOS that it puts before texts.
    """
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if bos is not None and bos not in frame(tokenizer, ())[0]:
        bos = None
    found: list[tuple[str, set[int]]] = [
        (what, {example.row for example in examples if holds(example)})
        for what, holds in (
            ("longer than the longest sequence and cut", lambda example: example.truncated),
            ("without a token to score", lambda example: not any(example.scored)),
            ("with a second BOS, which was left out", lambda example: example.doubled_bos),
            (
                "without the BOS that the tokenizer puts before a text",
                lambda example: bos is not None and example.ids[:1] != [bos],
            ),
        )
    ]
    return tuple(
        f"{task.ref}: {len(rows)} of {len(task.rows)} rows {what}, the first at {task.where(min(rows))}"
        for what, rows in found
        if rows
    )
