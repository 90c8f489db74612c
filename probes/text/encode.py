"""Tasks as token ids with a mask of the scored tokens.

A token is scored when it holds any character of the row's text, completion or choice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from typing import Any, Literal

from jinja2 import TemplateError

from probes.errors import InputError
from probes.text.batches import Example
from probes.text.rows import Row, Task

# Texts tokenised at a time: a tokenizer's record of a text is many times the size of its ids.
CHUNK = 1024
# Rendered in place of a text, to learn what a chat template puts around it.
MARK = "⌜text⌝"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The text of an example, of which the characters from `start` to before `stop` are scored."""

    row: int
    choice: int | None
    text: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """A piece as tokens, with special tokens around its ids."""

    piece: Piece
    prefix: list[int]
    ids: list[int]
    suffix: list[int]
    scored: list[bool]  # whether each of `ids` is
    start: int  # how many of `ids` precede the scored text
    doubled_bos: bool

    def __len__(self) -> int:
        return len(self.prefix) + len(self.ids) + len(self.suffix)

    def example(self, cut: int, max_length: int | None) -> Example:
        """The example without its first `cut` ids, and at most `max_length` long."""
        room = len(self.ids) if max_length is None else max_length - len(self.prefix) - len(self.suffix)
        if room < 1 and self.ids:
            raise InputError(f"max_length is {max_length}; special tokens alone fill that")
        kept = slice(cut, cut + room)
        scored = [False] * len(self.prefix) + self.scored[kept] + [False] * len(self.suffix)
        return Example(
            ids=self.prefix + self.ids[kept] + self.suffix, scored=[False, *scored[1:]] if scored else [],
            row=self.piece.row, choice=self.piece.choice, truncated=len(self.ids[kept]) < len(self.ids),
            doubled_bos=self.doubled_bos, head=len(self.prefix),
        )  # fmt: skip


def encode(
    task: Task,
    tokenizer: Any,
    *,
    max_length: int | None,
    chat_template: bool = False,
    add_bos: bool | None = None,
    add_eos: bool = False,
    score_span: Literal["content", "all"] = "content",
    template: Any = None,
) -> list[Example]:
    """Tokenise a task: one example a row, or one a choice, in the order of the rows.

    A text that is too long loses its end. A prompt loses its beginning first, equally for each choice of a
    row; only when none of it is left does the completion or choice lose its end.

    Args:
        max_length: most tokens of an example, special ones included; None: any number.
        chat_template: the prompt or text is a user's message in the tokenizer's template.
        add_bos: whether sequences begin with one BOS; None: as the tokenizer or template does.
        add_eos: end each sequence with an EOS, which is scored, and which a cut removes first.
        score_span: `all` scores prompts and templates too.
        template: a tokenizer whose chat template is used; None: the tokenizer's own.

    Raises:
        InputError: the tokenizer lacks a token or template, its template changes a row's text, or
            `max_length` leaves no room.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_checkpoint, read_task
    >>> from probes.models.loading import tokenizer_of
    >>> task = read_task(BUNDLED / "keep.jsonl", limit=1)
    >>> [example] = encode(task, tokenizer_of(open_checkpoint(BUNDLED / "base")), max_length=8)
    >>> len(example.ids), example.truncated
    (8, True)
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length is {max_length}; a token and one before it need 2")
    pieces = list(chat_pieces(task, template or tokenizer) if chat_template else plain_pieces(task))
    texts = [piece.text for piece in pieces[:CHUNK]]
    outer = ([], []) if chat_template else special_tokens(tokenizer, texts)
    special = SpecialTokens(tokenizer, *outer, add_bos, add_eos, everything=score_span == "all")
    prompted = task.shape in ("completion", "choices")
    examples = []
    wrapped = (special.around(*tokens) for tokens in tokenised(tokenizer, pieces))
    for _, of_row in groupby(wrapped, key=lambda sequence: sequence.piece.row):
        sequences = list(of_row)
        excess = 0 if max_length is None else max(map(len, sequences)) - max_length
        # Without BOS the last token of the prompt stays, or the first that follows could not be scored.
        spare = min(sequence.start - (not sequence.prefix) for sequence in sequences) if prompted else 0
        cut = max(0, min(excess, spare))
        examples += [sequence.example(cut, max_length) for sequence in sequences]
    return examples


class SpecialTokens:
    """The special tokens of a tokenizer under the options of `encode`."""

    def __init__(
        self,
        tokenizer: Any,
        prefix: list[int],
        suffix: list[int],
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
        # The tokenizer's own EOS gives way to the scored one.
        self.suffix = [token for token in suffix if not (add_eos and token == self.eos)]

    def around(self, piece: Piece, ids: list[int], start: int, stop: int) -> Tokenised:
        """A piece with its special tokens; they include the BOS tokens that its text begins with."""
        written = count_leading(token == self.bos for token in ids)
        bos_count = written + self.brings_bos
        begins = bos_count > 0 if self.add_bos is None else self.add_bos
        scored = [self.everything or start <= index < stop for index in range(written, len(ids))]
        return Tokenised(
            piece=piece, prefix=[self.bos] * begins + self.prefix, suffix=self.suffix,
            ids=ids[written:] + [self.eos] * self.add_eos, scored=scored + [True] * self.add_eos,
            start=max(0, start - written), doubled_bos=bos_count > 1,
        )  # fmt: skip


def special_tokens(tokenizer: Any, texts: Iterable[str] = ()) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text; any text with a token tells."""
    for text in chain("a", texts):
        full, inner = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
        starts = range(len(full) - len(inner) + 1)
        start = next((start for start in starts if full[start : start + len(inner)] == inner), None)
        if start is None:
            raise InputError("the tokenizer gives a text other ids when it adds special tokens to it")
        if inner:
            return full[:start], full[start + len(inner) :]
    return tokenizer("")["input_ids"], []


def tokenised(tokenizer: Any, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, list[int], int, int]]:
    """Each piece with its ids, without special tokens, and the first and last + 1 of those that are scored.

    The ids of a prompt need not begin those of the prompt with its completion. A fast tokenizer tells the
    characters of each token, and one across the boundary is scored; with a slow one the prompt's tokens are
    those that it shares with the ids of the prompt alone.
    """
    fast = getattr(tokenizer, "is_fast", False)

    def shared_with(text: str, ids: list[int]) -> int:
        alone = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return count_leading(a == b for a, b in zip(alone, ids, strict=False))

    for first in range(0, len(pieces), CHUNK):
        chunk = pieces[first : first + CHUNK]
        encoded = tokenizer(
            [piece.text for piece in chunk], add_special_tokens=False, return_attention_mask=False,
            return_token_type_ids=False, return_offsets_mapping=fast, verbose=False,
        )  # fmt: skip
        for index, (piece, ids) in enumerate(zip(chunk, encoded["input_ids"], strict=True)):
            spans = encoded["offset_mapping"][index] if fast else []
            start, stop = 0, len(ids)
            if piece.start:
                leading = count_leading(end <= piece.start for _, end in spans)
                start = leading if fast else shared_with(piece.text[: piece.start], ids)
            if piece.stop < len(piece.text):
                leading = count_leading(begin < piece.stop for begin, _ in spans)
                stop = leading if fast else shared_with(piece.text[: piece.stop], ids)
            yield piece, list(ids), start, stop


def count_leading(flags: Iterable[bool]) -> int:
    """How many flags precede the first false one."""
    return sum(1 for _ in takewhile(bool, flags))


def plain_pieces(task: Task) -> Iterator[Piece]:
    """The rows without a template: a completion or choice follows its prompt without a space."""
    for index, row in enumerate(task.rows):
        yield from continued(index, row, row.prompt or "")


def chat_pieces(task: Task, tokenizer: Any) -> Iterator[Piece]:
    """The rows in a chat template: prompt or text as the user's message, the rest as the assistant's."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template; leave --chat-template out")

    def render(content: str, row_name: str) -> str:
        try:
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=prompted
            )
        except TemplateError as error:
            raise InputError(f"{row_name}: the chat template refuses a user's message ({error})") from error

    prompted = task.shape in ("completion", "choices")
    before, mark, after = render(MARK, task.ref).partition(MARK)
    if not mark or MARK in after:
        raise InputError("the tokenizer's chat template does not hold a user's message once, as it is")
    for index, row in enumerate(task.rows):
        content = row.prompt if row.text is None else row.text
        text = render(content or "", task.where(index))
        inner = text.removeprefix(before).removesuffix(after)
        if before + inner + after != text or inner.strip() != (content or "").strip():
            raise InputError(f"{task.where(index)}: the template changes this row's text")
        if row.text is not None:
            yield Piece(row=index, choice=None, text=text, start=len(before), stop=len(text) - len(after))
        else:
            yield from continued(index, row, text)


def continued(index: int, row: Row, prompt: str) -> Iterator[Piece]:
    """A prompt with each scored text of a row: its choices, its completion or its text."""
    text = row.text if row.completion is None else row.completion
    for choice, target in [(None, text or "")] if row.choices is None else enumerate(row.choices):
        stop = len(prompt) + len(target)
        yield Piece(row=index, choice=choice, text=prompt + target, start=len(prompt), stop=stop)


def encoding_notes(task: Task, examples: Sequence[Example], tokenizer: Any = None) -> tuple[str, ...]:
    """Notes on rows that were cut, rows without a token to score, and BOS that `tokenizer` would add."""
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if bos is not None and bos not in special_tokens(tokenizer)[0]:
        bos = None
    noted: dict[str, Callable[[Example], bool]] = {
        "longer than the longest sequence and cut": lambda example: example.truncated,
        "without a token to score": lambda example: not any(example.scored),
        "with a second BOS, which was left out": lambda example: example.doubled_bos,
        "without the BOS that the tokenizer puts before a text": lambda example: (
            bos is not None and example.ids[:1] != [bos]
        ),
    }
    rows = {what: {example.row for example in examples if noted[what](example)} for what in noted}
    return tuple(
        f"{task.ref}: {len(cut)} of {len(task.rows)} rows {what}, the first at {task.where(min(cut))}"
        for what, cut in rows.items()
        if cut
    )
