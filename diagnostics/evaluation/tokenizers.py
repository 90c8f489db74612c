"""Whether base and tuned split the same rows alike.

Equal vocabularies do not tell: rules, merges and special tokens decide too. The rows themselves do.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from diagnostics.core.analysis import NotApplicableError
from diagnostics.core.row_options import RowOptions
from probes import CheckpointPair
from probes.models.loading import has_tokenizer, tokenizer_of
from probes.text.batches import Example
from probes.text.encode import encode, special_tokens
from probes.text.rows import Task

# Tokens of either side that a message shows.
SHOWN = 4


@dataclass(frozen=True)
class SplitRows:
    """Rows that base and tuned split differently.

    Attributes:
        count, total: of rows.
        where: the first of them.
        base, tuned: its tokens from the first difference on.
    """

    count: int
    total: int
    where: str
    base: tuple[str, ...]
    tuned: tuple[str, ...]

    def __str__(self) -> str:
        base, tuned = (" ".join(tokens) or "nothing" for tokens in (self.base, self.tuned))
        return (
            f"base and tuned split {self.count} of {self.total} rows differently, the first at {self.where} "
            f"({base} in base, {tuned} in tuned)"
        )


def same_rules(base: Any, tuned: Any) -> bool:
    """Whether two tokenizers are written alike, so that every text becomes the same ids.

    Compared are normalizer, pre-tokenizer, model with merges, post-processor, added and special tokens, and
    chat template; of slow tokenizers class, vocabulary and special tokens.
    """
    return base is tuned or _rules(base) == _rules(tuned)


def _rules(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = type(tokenizer).__name__, tokenizer.get_vocab()
    else:
        rules = json.loads(backend.to_str())
        # They change with every call; rows are cut and padded elsewhere.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    special = getattr(tokenizer, "special_tokens_map", {})
    template = getattr(tokenizer, "chat_template", None)
    return rules, special, template, getattr(tokenizer, "split_special_tokens", False)


def template_of(base: Any, tuned: Any) -> Any:
    """The tokenizer whose chat template base's rows are written in: its own, or tuned's if it has none."""
    return base if getattr(base, "chat_template", None) else tuned


def split_rows(
    readings: Iterable[tuple[Task, Sequence[Example], Sequence[Example]]], base: Any, tuned: Any
) -> SplitRows | None:
    """The rows of tasks that two tokenizers split differently; None if there are none.

    Args:
        readings: each task with its examples under base's and under tuned's tokenizer.
    """
    rows: dict[tuple[str, int], tuple[str, Example, Example]] = {}
    total = 0
    for task, ours, theirs in readings:
        total += len(task.rows)
        for example, other in zip(ours, theirs, strict=True):
            if (example.ids, example.scored) != (other.ids, other.scored):
                rows.setdefault((task.ref, example.row), (task.where(example.row), example, other))
    if not rows:
        return None
    where, first, second = next(iter(rows.values()))
    pairs = zip(first.ids, second.ids, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first.ids), len(second.ids)))
    ids = [example.ids[start : start + SHOWN] for example in (first, second)]
    tokens = [
        list(map(repr, tokenizer.convert_ids_to_tokens(part)))
        for tokenizer, part in zip((base, tuned), ids, strict=True)
    ]
    if tokens[0] == tokens[1]:  # with other ids
        tokens = [
            [f"{token} = {index}" for token, index in zip(*side, strict=True)]
            for side in zip(tokens, ids, strict=True)
        ]
    return SplitRows(len(rows), total, where, *map(tuple, tokens))


def refuse_other_splits(pair: CheckpointPair, tasks: Iterable[Task], options: RowOptions) -> None:
    """Raise NotApplicableError if base and tuned split any of the rows differently.

    One model with the weights of both, or between them, reads its rows with one tokenizer.
    """
    if not (has_tokenizer(pair.base) and has_tokenizer(pair.tuned)):
        return
    base, tuned = (
        tokenizer_of(side, trust_remote_code=options.trust_remote_code) for side in (pair.base, pair.tuned)
    )
    if same_rules(base, tuned):
        return

    def reading(task: Task, tokenizer: Any, template: Any) -> list[Example]:
        chat = options.chat_template
        return encode(task, tokenizer, max_length=None, chat_template=chat, template=template)

    template = template_of(base, tuned)
    rows = split_rows(
        ((task, reading(task, base, template), reading(task, tuned, tuned)) for task in tasks), base, tuned
    )
    if rows is not None:
        raise NotApplicableError(
            f"{rows}, so no tokenizer fits a model that has weights of both; `ood` reads each side with its "
            "own"
        )


def per_byte_notes(rows: SplitRows, base: Any, tuned: Any) -> list[str]:
    """The notes that each side reads with its own tokenizer."""
    notes = [
        f"{rows}: each side reads with its own tokenizer, lengths are bytes, and means are per byte of the "
        "same texts"
    ]
    framed = [bool(special_tokens(tokenizer)[0]) for tokenizer in (base, tuned)]
    if framed[0] != framed[1]:
        scoring, other = ("base", "tuned") if framed[0] else ("tuned", "base")
        notes.append(
            f"only {scoring} scores the first token of each text, because the tokenizer of {other} puts no "
            "token in front of it; if that is a mistake, save the tokenizer of base with tuned"
        )
    return notes
