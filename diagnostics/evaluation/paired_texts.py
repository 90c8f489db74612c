"""The texts of rows in every scored form, with base and tuned log-likelihoods of the same tokens.

A row of text has one form, the full text. A row with a prompt has four, those of the likelihood-ratio paper
(arXiv:2404.08679): the question, the answer alone, the full text, and the answer given the question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, islice
from typing import Any, Literal, TypeAlias

import numpy as np

from diagnostics.evaluation.likelihoods import NOTHING, ExampleScores, greedy, score_texts
from diagnostics.evaluation.one_function import apart_notes
from diagnostics.evaluation.tokenizers import per_byte_notes, same_rules, split_rows, template_of
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
    """How texts are read."""

    max_length: int | None = None  # most tokens of a text, or of a window; None: what both models take
    windows: bool = False  # read longer texts to the end in windows; else they are cut
    chat_template: bool = False  # texts and prompts are a user's messages
    in_bytes: bool = False  # lengths are bytes even where both tokenizers split every row alike
    answers: str = "file"  # source of the answers to prompts, `file` or `greedy`
    longest_answer: int = 768  # most tokens of a greedy answer; at most half of `max_length`
    batch_tokens: int = 16384  # most tokens in a batch, padding included

    @property
    def window(self) -> int | None:
        """Most tokens of a window if longer texts are read in windows."""
        return self.max_length if self.windows else None


@dataclass(frozen=True, kw_only=True)
class TokenForms:
    """The rows of one task as token ids; all forms but the first are empty for rows of text."""

    full: list[Example]
    question: list[Example]
    answer: list[Example]
    in_answer: list[list[bool]]  # for each of `full`, which scored tokens belong to the answer

    @property
    def examples(self) -> list[Example]:
        """The examples of all forms, one form after another."""
        return [*self.full, *self.question, *self.answer]

    @property
    def moved(self) -> int:
        """Rows where the question has other tokens inside the full text than alone."""
        pairs = zip(self.full, self.question, strict=bool(self.question))
        return sum(not _begins_with(full, question) for full, question in pairs)


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """One model's scores of the full text of a row, and log-likelihoods of its other forms; NaN: none."""

    full: ExampleScores
    question: float = np.nan
    answer: float = np.nan
    conditional: float = np.nan


@dataclass(frozen=True, kw_only=True)
class PairedText:
    """One row with the scores of both models."""

    row: Row
    content: str  # the full text
    base: RowScores
    tuned: RowScores
    length: int  # scored tokens; bytes of the text if lengths are
    ids: tuple[int, ...]  # the scored tokens, of the tuned tokenizer
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class PairedTexts:
    """The scored texts of several sets."""

    sets: Mapping[str, Sequence[PairedText]]
    notes: tuple[str, ...]
    noise: float  # largest change of a log-likelihood in nats when a row is scored alone, not in a batch
    in_bytes: bool  # the tokenizers split rows differently, so that lengths are bytes


def read_sets(
    runnable: RunnablePair, sets: Mapping[str, Task], options: TextOptions, progress: Progress | None = None
) -> PairedTexts:
    """Score the rows of every set with both models, one model after the other.

    Each model reads with its own tokenizer. Lengths are bytes if these split any row differently.
    """
    kinds = list(dict.fromkeys((runnable.base_kind, runnable.kind)))
    if kinds != ["causal"]:
        raise InputError(f"{' and '.join(kinds)}: likelihood ratios need two causal language models")
    # Before the tokenizers, which would be blamed for a malformed config.json.
    length = min((n for n in (options.max_length, runnable.context) if n is not None), default=None)
    options = replace(options, max_length=length)
    base, tuned = runnable.base_tokenizer, runnable.tokenizer
    remarks = apart_notes(runnable.pair)
    tasks = {name: with_answers(task) for name, task in sets.items()}
    if options.answers == "greedy":
        with runnable.tuned() as model:
            for name, task in tasks.items():
                tasks[name], cut = with_greedy_answers(model, tuned, task, options)
                remarks += cut
    encoded = {"tuned": {name: encode_forms(task, tuned, options) for name, task in tasks.items()}}
    encoded["base"] = encoded["tuned"]
    if not same_rules(base, tuned):
        template = template_of(base, tuned)
        encoded["base"] = {name: encode_forms(task, base, options, template) for name, task in tasks.items()}
    readings = [
        (task, encoded["base"][name].examples, encoded["tuned"][name].examples)
        for name, task in tasks.items()
    ]
    differing = split_rows(readings, base, tuned)
    in_bytes = options.in_bytes or differing is not None
    if differing is not None:
        remarks += per_byte_notes(differing, base, tuned)
    scores, noise = {}, 0.0
    for turn, side in enumerate(SIDES):

        def tell(done: int, total: int, _: str, turn: int = turn, side: str = side) -> None:
            if progress:
                progress(turn * total + done, 2 * total, f"texts under {side}")

        with open_side(runnable, side) as model:
            scores[side], change = score_side(model, tasks, encoded[side], options, side, tell)
        noise = max(noise, change)
    texts = {}
    for name, task in tasks.items():
        examples = {side: encoded[side][name].full for side in SIDES}
        columns = zip(scores["base"][name], scores["tuned"][name], *examples.values(), strict=True)
        texts[name] = [
            paired_text(row, *values, in_bytes=in_bytes)
            for row, values in zip(task.rows, columns, strict=True)
        ]
        remarks += dict.fromkeys((
            *encoding_notes(task, examples["base"], base), *encoding_notes(task, examples["tuned"], tuned),
        ))  # fmt: skip
        remarks += window_notes(task, examples["tuned"], options.window)
        if moved := encoded["tuned"][name].moved:
            remarks.append(
                f"{task.ref}: in {moved} of {len(task.rows)} rows the question has other tokens in front of "
                "its answer than alone, so question and answer given question do not add up to the full text"
            )
    return PairedTexts(sets=texts, notes=tuple(remarks), noise=noise, in_bytes=in_bytes)


def with_answers(task: Task) -> Task:
    """The task with the right choice of each row as its completion."""
    if task.shape != "choices":
        return task
    rows = (
        replace(row, completion=(row.choices or ())[row.answer or 0], choices=None, answer=None)
        for row in task.rows
    )
    return replace(task, rows=tuple(rows), shape="completion")


def window_notes(task: Task, examples: Sequence[Example], longest: int | None) -> list[str]:
    """The note on rows that are read in windows; empty without any."""
    long = [example.row for example in examples if longest is not None and len(example.ids) > longest]
    if longest is None or not long:
        return []
    return [
        f"{task.ref}: {len(long)} of {len(task.rows)} rows have more than {longest} tokens and were read in "
        f"windows of {longest} tokens, one every {longest // 2}; the first is {task.where(long[0])}"
    ]


def with_greedy_answers(
    model: Any, tokenizer: Any, task: Task, options: TextOptions
) -> tuple[Task, list[str]]:
    """The task with the model's greedy answer to each prompt, and a note on cut prompts."""
    if task.shape != "completion":
        return task, []
    length, longest = options.max_length, options.longest_answer
    if length is not None:
        longest = min(longest, length // 2)
    room = None if length is None else max(2, length - longest)
    prompts_only = replace(task, rows=tuple(replace(row, completion="") for row in task.rows))
    chat = options.chat_template
    prompts = encode(prompts_only, tokenizer, max_length=room, chat_template=chat, score_span="all")
    answers = greedy(model, tokenizer, [without_ending(prompt) for prompt in prompts], longest=longest)
    rows = (replace(row, completion=text) for row, text in zip(task.rows, answers, strict=True))
    cut = [prompt.row for prompt in prompts if prompt.truncated]
    remarks = [
        f"{task.ref}: the model saw only the last {room} tokens of {len(cut)} of {len(task.rows)} prompts, "
        f"to have room for an answer of {longest}; the first is {task.where(cut[0])}. A lower longest_answer "
        "leaves more room"
    ] if cut else []  # fmt: skip
    return replace(task, rows=tuple(rows)), remarks


def _scored_length(example: Example) -> int:
    """Number of tokens up to the last scored one."""
    return max((index + 1 for index, scored in enumerate(example.scored) if scored), default=0)


def without_ending(prompt: Example) -> Example:
    """A prompt without the special tokens that end a text."""
    size = max(1, _scored_length(prompt))
    return replace(prompt, ids=prompt.ids[:size], scored=prompt.scored[:size])


def encode_forms(task: Task, tokenizer: Any, options: TextOptions, template: Any = None) -> TokenForms:
    """The rows as token ids, in the chat template of another tokenizer if one is given."""

    def encoded(
        form: Task, *, chat: bool = options.chat_template, span: Literal["all", "content"] = "content"
    ) -> list[Example]:
        cut = None if options.windows else options.max_length
        return encode(form, tokenizer, max_length=cut, chat_template=chat, score_span=span, template=template)

    if task.shape != "completion":
        return TokenForms(full=encoded(task), question=[], answer=[], in_answer=[])
    question = encoded(texts_task(task, "prompt"))
    # The answer alone is nobody's message.
    answer = encoded(texts_task(task, "completion"), chat=False)
    conditional = encoded(task)
    if options.chat_template:  # the template's own tokens do not count
        full = [with_question(*pair) for pair in zip(conditional, question, strict=True)]
    else:
        full = encoded(task, span="all")
    in_answer = [
        [flag for flag, counted in zip(answered.scored, text.scored, strict=True) if counted]
        for answered, text in zip(conditional, full, strict=True)
    ]
    return TokenForms(full=full, question=question, answer=answer, in_answer=in_answer)


def texts_task(task: Task, part: Literal["prompt", "completion"]) -> Task:
    """The prompts or completions of a task as a task of texts."""
    rows = (Row(number=row.number, text=getattr(row, part) or "", group=row.group) for row in task.rows)
    return replace(task, rows=tuple(rows), shape="text")


def _begins_with(text: Example, question: Example) -> bool:
    size = _scored_length(question)
    return text.ids[:size] == question.ids[:size]


def with_question(conditional: Example, question: Example) -> Example:
    """The example of an answer with the question's tokens scored too, if it begins with them."""
    if not _begins_with(conditional, question):
        return conditional
    size = _scored_length(question)
    return replace(conditional, scored=question.scored[:size] + conditional.scored[size:])


def score_side(
    model: Any, tasks: Mapping[str, Task], encoded: Mapping[str, TokenForms], options: TextOptions,
    side: str, progress: Progress | None,
) -> tuple[dict[str, list[RowScores]], float]:  # fmt: skip
    """One model's scores of every row, and their largest change when a few rows are scored alone."""
    names = [name for name, forms in encoded.items() for _ in forms.examples]
    examples = [example for forms in encoded.values() for example in forms.examples]

    def where(index: int) -> str:
        return f"{tasks[names[index]].where(examples[index].row)} ({side})"

    score = partial(score_texts, model, longest=options.window, where=where)
    scores = score(examples, tokens=options.batch_tokens, progress=progress)
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    few = by_length[len(by_length) // 2 :][:4]
    alone = score([examples[index] for index in few], tokens=1)
    changes = [
        abs(single.log_likelihood - scores[index].log_likelihood)
        for single, index in zip(alone, few, strict=True)
    ]
    remaining, by_set = iter(scores), {}
    for name, forms in encoded.items():
        full, *parts = (
            list(islice(remaining, len(form))) for form in (forms.full, forms.question, forms.answer)
        )
        by_set[name] = [RowScores(full=text) for text in full]
        if forms.question:
            rows = zip(full, *parts, map(np.array, forms.in_answer), strict=True)
            by_set[name] = [
                RowScores(
                    full=text, question=prompt.log_likelihood, answer=reply.log_likelihood,
                    conditional=float(text.tokens[mask].sum(dtype=np.float64)) if any(mask) else np.nan,
                )
                for text, prompt, reply, mask in rows
            ]  # fmt: skip
    return by_set, max(filter(np.isfinite, changes), default=0.0)


def paired_text(
    row: Row, base: RowScores, tuned: RowScores, example_base: Example, example_tuned: Example, *,
    in_bytes: bool,
) -> PairedText:  # fmt: skip
    """One row with the scores of both models."""
    truncated = example_base.truncated or example_tuned.truncated
    if in_bytes and truncated:  # the two models saw different texts
        base = tuned = RowScores(full=NOTHING)
    content = row.text if row.text is not None else f"{row.prompt}{row.completion}"
    return PairedText(
        row=row, content=content, base=base, tuned=tuned, truncated=truncated,
        length=len(content.encode()) if in_bytes else len(tuned.full.tokens),
        ids=tuple(compress(example_tuned.ids, example_tuned.scored)),
    )  # fmt: skip
