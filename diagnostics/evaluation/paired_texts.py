"""The texts of rows, in the forms that are scored, read by base and tuned over the same tokens.

A row of text has one form, the whole. One with a prompt has more, those of the likelihood-ratio paper
(arXiv:2404.08679): the question, the answer by itself, both, and the answer given the question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from diagnostics.evaluation.likelihoods import NOTHING, ExampleScores, greedy, read
from diagnostics.evaluation.tokenizers import common, without_bos
from diagnostics.execution.workers import open_side
from probes.checkpoints.pair import Side as PairSide
from probes.errors import InputError
from probes.models.runnable import RunnablePair
from probes.text.batches import Example
from probes.text.encode import encode, encoding_notes
from probes.text.rows import Row, Task

Progress: TypeAlias = Callable[[int, int, str], None]
SIDES: tuple[PairSide, ...] = ("base", "tuned")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts are read.

    Attributes:
        max_length: most tokens of a text, or of a window; None: what both models take.
        windows: read longer texts to their end, in windows; else they are cut.
        chat_template: texts and prompts are a user's messages.
        approximate: let tokenizers differ.
        answers: to the prompts, `file` or `greedy`.
        longest_answer: of a greedy one, in tokens; at most half of `max_length`.
        batch_tokens: most tokens in a batch, padding included.
    """

    max_length: int | None = None
    windows: bool = False
    chat_template: bool = False
    approximate: bool = False
    answers: str = "file"
    longest_answer: int = 768
    batch_tokens: int = 16384

    @property
    def cut(self) -> int | None:
        """Most tokens of a text, where longer ones are cut."""
        return None if self.windows else self.max_length

    @property
    def window(self) -> int | None:
        """Most tokens of a window, where longer texts are read in windows."""
        return self.max_length if self.windows else None


@dataclass(frozen=True, kw_only=True)
class TokenForms:
    """The rows of one task as token ids.

    Attributes:
        question, answer: empty for rows of text.
        given: for each of `whole`, which of its scored tokens belong to the answer; empty for rows of text.
    """

    whole: list[Example]
    question: list[Example]
    answer: list[Example]
    given: list[list[bool]]


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """What one model makes of one row: of the whole, and log-likelihoods of the other forms; NaN: none."""

    whole: ExampleScores
    question: float = np.nan
    answer: float = np.nan
    conditional: float = np.nan


@dataclass(frozen=True, kw_only=True)
class PairedText:
    """One row as both models read it.

    Attributes:
        length: scored tokens, or bytes where tokenizers differ.
        ids: the scored tokens, in the tuned side's tokens.
    """

    row: Row
    base: RowScores
    tuned: RowScores
    length: int
    ids: tuple[int, ...]
    truncated: bool

    @property
    def content(self) -> str:
        """All of its text."""
        return content(self.row)


@dataclass(frozen=True, kw_only=True)
class PairedTexts:
    """The texts of several sets, and what a reader must know of how they were read.

    Attributes:
        noise: largest change of a log-likelihood when a row is read by itself, in nats.
    """

    sets: Mapping[str, Sequence[PairedText]]
    notes: tuple[str, ...]
    noise: float


def read_sets(
    runnable: RunnablePair, sets: Mapping[str, Task], settings: TextOptions, progress: Progress | None = None
) -> PairedTexts:
    """Read the rows of every set with both models, one model after the other.

    Raises:
        InputError: a model is no causal one, the tokenizers differ, or a likelihood is not finite.
    """
    kinds = list(dict.fromkeys((runnable.base_kind, runnable.kind)))
    if kinds != ["causal"]:
        raise InputError(f"{' and '.join(kinds)}: likelihood ratios need two causal language models")
    tokenizers = {"base": runnable.base_tokenizer, "tuned": runnable.tokenizer}
    shared, vocabulary, said = common(*tokenizers.values(), approximate=settings.approximate)
    lacking: list[str] = []
    if shared is not None:
        tokenizers = {"base": shared, "tuned": shared}
        # With a chat template that is the template's to decide, and said of the rows that lack it.
        lacking = [] if settings.chat_template else without_bos(runnable.base_tokenizer, shared)
        said += lacking
    if shared is not None and runnable.pair.resized:
        rows = min(map(min, runnable.pair.resized.values()))
        vocabulary = min(rows, vocabulary or rows)
    length = min((n for n in (settings.max_length, runnable.context) if n is not None), default=None)
    settings = replace(settings, max_length=length)
    tasks = {name: with_answers(task) for name, task in sets.items()}
    if settings.answers == "greedy":
        with runnable.tuned() as model:
            for name, task in tasks.items():
                tasks[name], more = answered(model, runnable.tokenizer, task, settings)
                said += more
    encoded = {
        side: {name: forms(task, tokenizer, settings) for name, task in tasks.items()}
        for side, tokenizer in tokenizers.items()
    }
    sides, noise = {}, 0.0
    for turn, side in enumerate(SIDES):
        ours: Progress | None = None
        if progress:

            def ours(done: int, total: int, what: str, turn: int = turn) -> None:
                progress(turn * total + done, 2 * total, what)

        with open_side(runnable, side) as model:
            sides[side], change = read_side(model, tasks, encoded[side], settings, vocabulary, side, ours)
        noise = max(noise, change)
    texts = {}
    for name, task in tasks.items():
        both = [encoded[side][name].whole for side in ("base", "tuned")]
        pairs = zip(sides["base"][name], sides["tuned"][name], *both, strict=True)
        texts[name] = [
            text_of(row, *pair, in_bytes=shared is None) for row, pair in zip(task.rows, pairs, strict=True)
        ]
        # Once for all sets is enough.
        expecting = None if lacking else runnable.base_tokenizer
        said += dict.fromkeys(
            note
            for side, own in zip(("base", "tuned"), both, strict=True)
            for note in encoding_notes(task, own, tokenizers[side] if shared is None else expecting)
        )
        said += in_windows(task, both[1], settings.window)
        moved = sum(not prefixed(each) for each in pieces(encoded["tuned"][name]))
        if moved:
            said.append(
                f"{task.ref}: in {moved} of {len(task.rows)} rows the question has other tokens before its "
                "answer than by itself, so that question and answer given question do not add up to the whole"
            )
    return PairedTexts(sets=texts, notes=tuple(said), noise=noise)


def with_answers(task: Task) -> Task:
    """The task with what follows each prompt in `completion`: of several choices the right one."""
    if task.shape != "choices":
        return task
    rows = (
        replace(row, completion=(row.choices or ())[row.answer or 0], choices=None, answer=None)
        for row in task.rows
    )
    return replace(task, rows=tuple(rows), shape="completion")


def in_windows(task: Task, examples: Sequence[Example], longest: int | None) -> list[str]:
    """What to say of rows that are read in windows."""
    if longest is None:
        return []
    long = [example.row for example in examples if len(example.ids) > longest]
    if not long:
        return []
    return [
        f"{task.ref}: {len(long)} of {len(task.rows)} rows have more than {longest} tokens and were read in "
        f"windows of so many that begin {longest // 2} apart, the first at {task.where(long[0])}"
    ]


def answered(model: Any, tokenizer: Any, task: Task, settings: TextOptions) -> tuple[Task, list[str]]:
    """The task with what the model itself writes after each prompt, and what to say of that."""
    if task.shape != "completion":
        return task, []
    length, longest = settings.max_length, settings.longest_answer
    if length is not None:
        longest = min(longest, length // 2)
    room = None if length is None else max(2, length - longest)
    asked = replace(task, rows=tuple(replace(row, completion="") for row in task.rows))
    prompts = encode(
        asked, tokenizer, max_length=room, chat_template=settings.chat_template, score_span="all"
    )
    written = greedy(model, tokenizer, [opened(prompt) for prompt in prompts], longest=longest)
    rows = (replace(row, completion=text) for row, text in zip(task.rows, written, strict=True))
    made = replace(task, rows=tuple(rows))
    cut = [prompt.row for prompt in prompts if prompt.truncated]
    if not cut:
        return made, []
    return made, [
        f"{task.ref}: of {len(cut)} of {len(task.rows)} prompts the model saw only the last {room} tokens, "
        f"to have room for an answer of {longest}, the first at {task.where(cut[0])}; a lower longest_answer "
        "leaves more"
    ]


def opened(prompt: Example) -> Example:
    """A prompt of which all is scored, without the special tokens that end a text."""
    ends = max((place + 1 for place, flag in enumerate(prompt.scored) if flag), default=1)
    return replace(prompt, ids=prompt.ids[:ends], scored=prompt.scored[:ends])


def forms(task: Task, tokenizer: Any, settings: TextOptions) -> TokenForms:
    """The rows as token ids."""

    def encoded(
        wanted: Task, *, chat: bool = settings.chat_template, everything: bool = False
    ) -> list[Example]:
        span: Literal["all", "content"] = "all" if everything else "content"
        return encode(wanted, tokenizer, max_length=settings.cut, chat_template=chat, score_span=span)

    if task.shape != "completion":
        return TokenForms(whole=encoded(task), question=[], answer=[], given=[])
    question = encoded(texts_of(task, [row.prompt or "" for row in task.rows]))
    # The answer by itself is nobody's message.
    answer = encoded(texts_of(task, [row.completion or "" for row in task.rows]), chat=False)
    conditional = encoded(task)
    if settings.chat_template:  # the template's own tokens do not count
        whole = [joined(one, two) for one, two in zip(conditional, question, strict=True)]
    else:
        whole = encoded(task, everything=True)
    given = [
        [flag for flag, counted in zip(one.scored, two.scored, strict=True) if counted]
        for one, two in zip(conditional, whole, strict=True)
    ]
    return TokenForms(whole=whole, question=question, answer=answer, given=given)


def texts_of(task: Task, contents: list[str]) -> Task:
    """A task of texts in place of its rows."""
    rows = (
        Row(number=row.number, text=text, group=row.group)
        for row, text in zip(task.rows, contents, strict=True)
    )
    return replace(task, rows=tuple(rows), shape="text")


def joined(conditional: Example, question: Example) -> Example:
    """The answer's example with the question's tokens scored too, where they stand before it unchanged."""
    size = max((place + 1 for place, flag in enumerate(question.scored) if flag), default=0)
    if conditional.ids[:size] != question.ids[:size]:
        return conditional
    return replace(conditional, scored=question.scored[:size] + conditional.scored[size:])


def pieces(of: TokenForms) -> Sequence[tuple[Example, Example]]:
    """Whole and question of each row that has one."""
    return list(zip(of.whole, of.question, strict=True)) if of.question else []


def prefixed(both: tuple[Example, Example]) -> bool:
    """Whether the tokens of the question begin those of the whole."""
    whole, question = both
    size = max((place + 1 for place, flag in enumerate(question.scored) if flag), default=0)
    return whole.ids[:size] == question.ids[:size]


def read_side(
    model: Any,
    tasks: Mapping[str, Task],
    encoded: Mapping[str, TokenForms],
    settings: TextOptions,
    vocabulary: int | None,
    side: str,
    progress: Progress | None,
) -> tuple[dict[str, list[RowScores]], float]:
    """What one model makes of every row, and how much a few rows change when they are read by themselves."""
    flat = [
        (name, example)
        for name, of in encoded.items()
        for examples in (of.whole, of.question, of.answer)
        for example in examples
    ]
    examples = [example for _, example in flat]

    def where(index: int) -> str:
        name, example = flat[index]
        return f"{tasks[name].where(example.row)} ({side})"

    def tell(done: int, total: int, _: str) -> None:
        if progress:
            progress(done, total, f"texts under {side}")

    made = read(
        model, examples, tokens=settings.batch_tokens, vocabulary=vocabulary, longest=settings.window,
        where=where, progress=tell,
    )  # fmt: skip
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    few = order[len(order) // 2 :][:4]
    alone = read(
        model, [examples[index] for index in few], tokens=1, vocabulary=vocabulary, longest=settings.window,
        where=where,
    )  # fmt: skip
    changes = [
        abs(a.log_likelihood - made[index].log_likelihood) for a, index in zip(alone, few, strict=True)
    ]
    reads = iter(made)
    sides = {}
    for name, of in encoded.items():
        whole, question, answer = ([next(reads) for _ in each] for each in (of.whole, of.question, of.answer))
        sides[name] = [RowScores(whole=each) for each in whole]
        if of.question:
            sides[name] = [
                RowScores(
                    whole=each,
                    question=question[place].log_likelihood,
                    answer=answer[place].log_likelihood,
                    conditional=float(each.tokens[mask].sum(dtype=np.float64)) if any(mask) else np.nan,
                )
                for place, (each, mask) in enumerate(zip(whole, map(np.array, of.given), strict=True))
            ]
    return sides, max((change for change in changes if np.isfinite(change)), default=0.0)


def text_of(
    row: Row, base: RowScores, tuned: RowScores, one: Example, two: Example, *, in_bytes: bool
) -> PairedText:
    """One row with what both models made of it."""
    truncated = one.truncated or two.truncated
    if in_bytes and truncated:  # what is left of it is not the same text
        base = tuned = RowScores(whole=NOTHING)
    return PairedText(
        row=row,
        base=base,
        tuned=tuned,
        length=len(content(row).encode()) if in_bytes else len(tuned.whole.tokens),
        ids=tuple(token for token, flag in zip(two.ids, two.scored, strict=True) if flag),
        truncated=truncated,
    )


def content(row: Row) -> str:
    """All of a row's text."""
    return row.text if row.text is not None else f"{row.prompt}{row.completion}"
