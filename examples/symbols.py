"""Symbols as words: shared by the miniatures that train transformers models."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word, in this order; words are separated by spaces.

    Unknown words are the first: `encode` tries a tokenizer on a letter before it uses it.
    """
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """Write a model with its tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def walks(chances: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """A walk through each Markov chain (walks, length), from a symbol drawn uniformly.

    Args:
        chances: transition probabilities of a chain for each walk (walks, symbols, symbols).
    """
    count, symbols, _ = chances.shape
    steps = torch.zeros(count, length, dtype=torch.long)
    steps[:, 0] = torch.randint(symbols, (count,), generator=generator)
    for step in range(1, length):
        now = chances[torch.arange(count), steps[:, step - 1]]
        steps[:, step] = torch.multinomial(now, 1, generator=generator)[:, 0]
    return steps


@dataclass(frozen=True)
class Claim:
    """A claim about a seed, and the numbers that decide it."""

    seed: int
    text: str
    holds: bool
    numbers: str


def claims_table(claims: Iterable[Claim], title: str = "What must hold") -> Table:
    """The claims as a table."""
    table = Table("seed", "claim", "numbers", "holds", title=title)
    for claim in claims:
        table.add_row(str(claim.seed), claim.text, claim.numbers, "yes" if claim.holds else "NO")
    return table
