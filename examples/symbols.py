"""Symbols as words: what the miniatures that train models of transformers have in common."""

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


def made_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token for each word, in this order, and none besides; words stand between spaces.

    What is no word reads as the first: `encode` tries a tokenizer on a letter before it uses it.
    """
    places = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(places, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, place: Path) -> Path:
    """Write a model with its tokenizer, as people do."""
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def write_rows(rows: Iterable[Mapping[str, Any]], place: Path) -> Path:
    """Write rows as JSONL."""
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def walks(chances: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """A walk through each Markov chain (walks, length), from a symbol drawn uniformly.

    Args:
        chances: of the next symbol given the last, of a chain for each walk (walks, symbols, symbols).
    """
    count, symbols, _ = chances.shape
    found = torch.zeros(count, length, dtype=torch.long)
    found[:, 0] = torch.randint(symbols, (count,), generator=generator)
    for place in range(1, length):
        now = chances[torch.arange(count), found[:, place - 1]]
        found[:, place] = torch.multinomial(now, 1, generator=generator)[:, 0]
    return found


@dataclass(frozen=True)
class Claim:
    """What must hold on a seed, and the numbers that decide it."""

    seed: int
    text: str
    holds: bool
    numbers: str


def judged(claims: Iterable[Claim], title: str = "What must hold") -> Table:
    """The claims as a table."""
    table = Table("seed", "claim", "numbers", "holds", title=title)
    for claim in claims:
        table.add_row(str(claim.seed), claim.text, claim.numbers, "yes" if claim.holds else "NO")
    return table
