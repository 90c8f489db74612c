"""Likelihood-ratio OOD in miniature: a tiny base, tuned on voice-assistant commands of five intents.

The base has read short queries (CLINC150) and the documentation of Python's library; it is tuned on SNIPS
without the commands about weather and restaurants. Which texts was the tuned model not made for?
Source of the claims: arXiv:2404.08679; the setting is ours, ten thousand times smaller.

    python examples/ood_miniature.py DATA

DATA holds `snips_train.csv`, `snips_valid.csv`, `snips_test.csv` (a header `text,label`) and `clinc150.json`
(splits of [text, intent]). About 10 minutes on one core.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from library_text import SEED, documentation, held_out, library, shuffled
from make_bundled import descend, make_tokenizer
from pandas import DataFrame
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diagnostics import likelihood_ratio_ood
from probes import CheckpointPair

HELD_OUT = {"GetWeather", "BookRestaurant"}
# Of SNIPS, seven billion weights: seen on a page of benchmark results that names neither model nor score.
PAPER = 0.9798
SCORES = {
    "ratio": "ratio",
    "ratio_per_token": "per token",
    "tuned_likelihood": "tuned likelihood",
    "tuned_loss": "tuned loss",
    "base_likelihood": "base likelihood",
    "length": "length",
}
SETS = {"near": "the intents held out", "queries": "read by base", "documentation": "read by base"}


@dataclass(frozen=True)
class Budget:
    """Sizes of training and measurement.

    Attributes:
        pretraining: steps of the base, of 64 texts each.
        tuning: steps after which the tuned model is measured.
        rows: most rows of a set.
    """

    pretraining: int = 1200
    tuning: tuple[int, ...] = (50, 100)
    rows: int = 400


QUICK = Budget(pretraining=20, tuning=(5,), rows=20)


@dataclass(frozen=True)
class Texts:
    """Training texts of base and tuned, and held-out texts of the task and out of its distribution."""

    base: list[str]
    task: list[str]
    inside: list[str]
    outside: dict[str, list[str]]

    @classmethod
    def read(cls, data: Path, rows: int) -> "Texts":
        """Read the texts from the data folder and from the library."""
        snips = {split: list(read_csv(data / f"snips_{split}.csv")) for split in ("train", "valid", "test")}
        clinc = json.loads((data / "clinc150.json").read_text(encoding="utf-8"))
        paragraphs = [
            (" ".join(part.split())[:300], held_out(text))
            for texts in documentation(list(library())).values()
            for text in texts
            for part in text.split("\n\n")
            if len(part.split()) > 3
        ]
        seen = {"queries": [text for text, _ in clinc["train"]]}
        seen["documentation"] = [text for text, unseen in paragraphs if not unseen]
        read = {*seen["documentation"]}
        test = [*snips["test"], *snips["valid"]]
        outside = {
            "near": [text for text, intent in test if intent in HELD_OUT],
            "queries": [text for text, _ in clinc["test"]],
            # A paragraph may stand in several places, of which the base has read some.
            "documentation": [t for t, unseen in paragraphs if unseen and t not in read],
        }
        return cls(
            base=[text for texts in seen.values() for text in texts],
            task=[text for text, intent in snips["train"] if intent not in HELD_OUT],
            inside=shuffled(text for text, intent in test if intent not in HELD_OUT)[:rows],
            outside={name: shuffled(texts)[:rows] for name, texts in outside.items()},
        )


def read_csv(path: Path) -> Iterator[tuple[str, str]]:
    """Text and label of each row."""
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield row["text"].strip(), row["label"]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Three layers of width 128."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=96,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of 64 texts: ids, and labels without padding."""
    ids = [torch.tensor(tokenizer(text, truncation=True, max_length=96).input_ids) for text in texts]
    generator = torch.Generator().manual_seed(SEED)
    while True:
        for chosen in torch.randperm(len(ids), generator=generator).split(64):
            some = [ids[index] for index in chosen]
            yield (
                pad_sequence(some, batch_first=True),
                pad_sequence(some, batch_first=True, padding_value=-100),
            )


def trained(
    model: nn.Module, stream: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float, *, decay: bool
) -> float:
    """Train a model in place by AdamW, its rate falling with a cosine if `decay`; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.tensor(torch.nan)
    for _, (ids, labels) in zip(range(steps), stream, strict=False):
        loss = model(ids, labels=labels).loss
        descend(loss, model, optimizer)
        if decay:
            schedule.step()
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """Write a model with its tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def measure(data: Path, budget: Budget, out: Path) -> dict[int, DataFrame]:
    """Train base and tuned into `out`; AUROC by score and OOD set, for each number of tuning steps."""
    texts = Texts.read(data, budget.rows)
    tokenizer = make_tokenizer(texts.base)
    model = make_model(tokenizer)
    loss = trained(model, batches(texts.base, tokenizer), budget.pretraining, 1e-3, decay=True)
    print(f"base: {loss:.2f} nats per token after {budget.pretraining} steps", file=sys.stderr)
    base, stream, done, tables = save(model, tokenizer, out / "base"), batches(texts.task, tokenizer), 0, {}
    for steps in budget.tuning:
        loss = trained(model, stream, steps - done, 5e-4, decay=False)
        print(f"tuned: {loss:.2f} nats per token after {steps} steps", file=sys.stderr)
        done, tuned = steps, save(model, tokenizer, out / f"tuned-{steps}")
        result = likelihood_ratio_ood(CheckpointPair(base, tuned), texts.inside, texts.outside, draws=50)
        detection = result.tables["detection"]
        pooled = detection[detection["group"].isna()]
        tables[steps] = pooled.pivot(index="score", columns="ood", values="auroc")
    return tables


@dataclass(frozen=True)
class Claim:
    """A claim, and the numbers that decide it."""

    text: str
    holds: bool
    numbers: str


def claims(tables: dict[int, DataFrame]) -> list[Claim]:
    """The paper's claims about ratio and likelihood that can be tested here."""
    claims = []
    for steps, table in tables.items():
        ratio, likelihood = table.loc["ratio"], table.loc["tuned_likelihood"]
        numbers = f"{ratio['near']:.3f} and {likelihood['near']:.3f} after {steps} steps"
        claims += [
            Claim("near: the ratio's AUROC is 0.90 or more", ratio["near"] >= 0.9, numbers),
            Claim(
                "near: it is 0.10 or more above the tuned likelihood's",
                ratio["near"] >= likelihood["near"] + 0.1,
                numbers,
            ),
        ]
    steps, table = next(iter(tables.items()))
    ratio, likelihood = table["queries"]["ratio"], table["queries"]["tuned_likelihood"]
    numbers = f"{ratio:.3f} and {likelihood:.3f} after {steps} steps"
    claims += [
        Claim("queries: the ratio is above 0.95", ratio > 0.95, numbers),
        Claim("queries: the tuned likelihood is worse than chance", likelihood < 0.5, numbers),
    ]
    return claims


def show(tables: dict[int, DataFrame], console: Console) -> None:
    """AUROC of each score on each set, and the paper's."""
    shown = Table(title="AUROC, in-distribution: SNIPS of five intents")
    for column in ("OOD", "steps", *SCORES.values(), "paper"):
        shown.add_column(column, justify="left" if column == "OOD" else "right")
    for name, about in SETS.items():
        for steps, table in tables.items():
            values = [f"{table[name][score]:.3f}" for score in SCORES]
            paper = f"{PAPER:.3f}" if name == "near" else ""
            shown.add_row(f"{name} ({about})", str(steps), *values, paper)
    console.print(shown)
    console.print(
        "The paper's is of SNIPS and models of seven billion weights; which score it is of is not known."
    )
    for claim in claims(tables):
        console.print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.numbers}")


def main() -> int:
    """Train, measure and print; 1 if a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of SNIPS and CLINC150")
    parser.add_argument("--quick", action="store_true", help="run everything in seconds, and claim nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small, more threads only wait for each other
    with tempfile.TemporaryDirectory() as out:
        tables = measure(arguments.data, QUICK if arguments.quick else Budget(), Path(out))
    show(tables, Console(width=150))
    return 0 if arguments.quick or all(claim.holds for claim in claims(tables)) else 1


if __name__ == "__main__":
    sys.exit(main())
