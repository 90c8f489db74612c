"""Make the bundled series: a mixture of experts that generalises after it memorised.

    python examples/make_grokking_series.py --out grokking

A language of thirty words, of which each is secretly even or odd. A row is three words, and the answer is
whether the number of odd ones is odd: parity of three bits that no token shows. An OLMoE of three layers
reads 850 of the 27,000 rows. It knows them by heart within 100 steps while rows that it has not seen stay at
chance, and 200 steps later it has found out which words are alike. The control is the same in all but that
its answers are drawn at random, so that there is nothing to find out.

Saved in half precision, and run in single: their config.json says so.
Both take a few minutes on one core. The same torch and processor make the same files.
"""

import argparse
import copy
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pandas as pd
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from diagnostics.analyses.pathways.analysis import grokking_pathways

SEED = 0
WORDS, LENGTH, TRAIN, HELD_OUT = 30, 3, 850, 500
ANSWERS = ("even", "odd")
WIDTH, INNER, LAYERS, EXPERTS, CHOSEN = 64, 12, 3, 8, 2
# Large initial weights make a network that memorises first. Decay then removes what rows do not share;
# smoothed answers keep a loss that balances it.
SPREAD, RATE, DECAY, SMOOTH, BALANCE = 0.1, 2e-3, 1.0, 0.05, 3e-4
STEPS = (0, 50, 100, 150, 200, 225, 250, 275, 300, 325, 350, 400)
CONTROL_STEPS = (0, 100, 200, 300, 400)
# Bounds of the checks; sizes as in the miniature of the method's documentation.
MEMORISED, GENERALISED, FALL, RANK, RATIO = 0.99, 0.95, 0.08, -0.8, 5

Row = dict[str, Any]


# Rows


def language(draw: random.Random) -> dict[str, int]:
    """Words of two syllables and their parity; half are odd."""
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(pair) for pair in product(syllables, syllables)]
    chosen = sorted(draw.sample([word for word in words if word not in ANSWERS], WORDS))
    odd = set(draw.sample(chosen, WORDS // 2))
    return {word: int(word in odd) for word in chosen}


def rows_of(bits: dict[str, int], draw: random.Random) -> tuple[list[Row], list[Row], list[Row]]:
    """Training rows, the same rows with random answers, and held-out rows."""
    every = draw.sample(list(product(bits, repeat=LENGTH)), TRAIN + HELD_OUT)
    rows: list[Row] = [
        {
            "prompt": " ".join(words),
            "choices": [f" {answer}" for answer in ANSWERS],
            "answer": sum(bits[word] for word in words) % 2,
            "group": "".join(str(bits[word]) for word in words),
        }
        for words in every
    ]
    train = rows[:TRAIN]
    return train, [{**row, "answer": draw.randrange(2)} for row in train], rows[TRAIN:]


def save_rows(path: Path, rows: list[Row]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# The model


def make_tokenizer(bits: dict[str, int]) -> PreTrainedTokenizerFast:
    """A token a word."""
    words = {word: number for number, word in enumerate(["<unk>", *bits, *ANSWERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=8)


def make_model(size: int) -> OlmoeForCausalLM:
    """Three layers of eight experts, of which two are chosen."""
    torch.manual_seed(SEED)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=size,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            norm_topk_prob=True,
            max_position_embeddings=8,
            initializer_range=SPREAD,
            router_aux_loss_coef=BALANCE,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@dataclass(frozen=True)
class Encoded:
    """Rows as token ids, and the ids of the answers."""

    ids: Tensor
    answers: Tensor
    right: Tensor

    @classmethod
    def of(cls, rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> "Encoded":
        """Rows of as many tokens each."""
        return cls(
            ids=torch.tensor([tokenizer(row["prompt"]).input_ids for row in rows]),
            answers=torch.tensor(tokenizer.convert_tokens_to_ids(list(ANSWERS))),
            right=torch.tensor([row["answer"] for row in rows]),
        )

    def accuracy(self, model: nn.Module) -> float:
        """Share of rows whose likelier answer is the right one."""
        with torch.no_grad():
            logits = model(input_ids=self.ids).logits[:, -1, self.answers]
        return float((logits.argmax(dim=1) == self.right).float().mean())


def trained(model: OlmoeForCausalLM, rows: Encoded) -> Iterator[int]:
    """Train on all rows at every step; yields each step before it is taken, and the last."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=DECAY)
    targets = rows.answers[rows.right]
    for step in range(max(STEPS) + 1):
        yield step
        output = model(input_ids=rows.ids, output_router_logits=True)
        loss = (
            cross_entropy(output.logits[:, -1], targets, label_smoothing=SMOOTH) + BALANCE * output.aux_loss
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def make_series(
    out: Path,
    train: list[Row],
    held_out: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    steps: tuple[int, ...],
) -> dict[int, tuple[float, float]]:
    """Train, save the model at the steps, and give its accuracies there on rows of training and others."""
    model = make_model(len(tokenizer))
    training, others = (Encoded.of(rows, tokenizer) for rows in (train, held_out))
    accuracies = {}
    for step in trained(model, training):
        if step not in steps:
            continue
        save(model, tokenizer, out / f"checkpoint-{step}")
        saved = OlmoeForCausalLM.from_pretrained(out / f"checkpoint-{step}").eval()
        on_training, on_others = training.accuracy(saved), others.accuracy(saved)
        print(
            f"{out.name}, step {step}: {on_training:.3f} of training, {on_others:.3f} of others", flush=True
        )
        accuracies[step] = on_training, on_others
    return accuracies


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Halve the size of a checkpoint; transformers loads it in the training precision."""
    copy.deepcopy(model).half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    settings = directory / "config.json"
    config = {**json.loads(settings.read_text()), "dtype": "float32", "output_router_logits": False}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# What must hold


def followed(out: Path, name: str, train: str) -> pd.DataFrame:
    """tunescope's measurements of a series, a row a checkpoint."""
    result = grokking_pathways(
        [str(out / name)], out / "held-out.jsonl", out / train, weights="top", permutations=200
    )
    print(f"{name}: {result.tables['verdict'].iloc[0]['verdict']}", flush=True)
    return result.tables["steps"].set_index("step")


def checks(
    series: pd.DataFrame, control: pd.DataFrame, accuracies: dict[int, tuple[float, float]]
) -> list[tuple[str, float, bool]]:
    """The checks, their values, and whether each holds."""
    memorised = next(step for step, (train, _) in accuracies.items() if train >= MEMORISED)
    after = series.loc[memorised:]
    fall = after.distance.iloc[0] - after.distance.iloc[-1]
    widening = after.gap.iloc[-1] - after.gap.iloc[0]
    apart = control.loc[memorised:].gap
    ratio = widening / max(abs(apart.iloc[-1] - apart.iloc[0]), 1e-9)
    rank = spearmanr(after.distance, after.held_out).statistic
    chance = max(held for step, (_, held) in accuracies.items() if step <= memorised)
    moved = after.loss.iloc[0] - after.loss.iloc[-1]
    return [
        ("step by which the rows of training are known by heart", memorised, memorised < max(STEPS) / 3),
        ("accuracy on others up to then", chance, chance < 0.6),
        ("accuracy on others at the end", accuracies[max(STEPS)][1], accuracies[max(STEPS)][1] >=
        GENERALISED), ("fall of the training loss since, nats", moved, abs(moved) < 0.05),
        ("fall of the distance within groups since", fall, fall >= FALL),
        ("widening of the gap since", widening, widening > 0),
        ("rank correlation of distance and accuracy on others since", rank, rank <= RANK),
        ("widening of the gap over that of the control", ratio, ratio >= RATIO),
    ]  # fmt: skip


README = """\
# A series that generalises long after it memorised

An OLMoE of {parameters:,} weights (3 layers, width {width}, 8 experts of which 2 are chosen; saved in half
precision and run in single) that learns a made-up language: {words} words, each secretly even or odd. A row
is {length} words, and its answer is whether the number of odd ones is odd; `group` says which of them are.
Of {all:,} rows it reads {train:,}, all at every step. `parity` is that run; `random` is the control, whose
answers are drawn at random.

| step | train accuracy | held-out accuracy | train loss | distance | gap | control: train accuracy | gap |
|---|---|---|---|---|---|---|---|
{table}

Distance is that of pathways within groups, as a share of the longer one; gap is how much farther apart those
of different groups are (`tunescope series parity --only pathways --task held-out.jsonl --train train.jsonl
--set pathways.weights=top`; the weights of the chosen experts, tau = 0.7, symbols tagged by layer).

| file | rows | what |
|---|---|---|
| `train.jsonl` | {train} | the rows that `parity` was trained on |
| `train-random.jsonl` | {train} | the same with answers at random: those of `random` |
| `held-out.jsonl` | {held_out} | rows that neither has seen |

Made by `examples/make_grokking_series.py`, which runs in minutes on one core.
"""


def described(
    runs: dict[str, dict[int, tuple[float, float]]], series: pd.DataFrame, control: pd.DataFrame
) -> str:
    """The README, with measurements of the saved files."""
    model = make_model(WORDS + len(ANSWERS) + 1)
    lines = []
    for step, (train, held_out) in runs["parity"].items():
        row = series.loc[step]
        cells = [
            f"{train:.3f}",
            f"{held_out:.3f}",
            f"{row.loss:.4f}",
            f"{row.distance:.3f}",
            f"{row.gap:.3f}",
        ]
        if step in control.index:
            cells += [f"{runs['random'][step][0]:.3f}", f"{control.loc[step].gap:.3f}"]
        else:
            cells += ["", ""]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return README.format(
        parameters=sum(weight.numel() for weight in model.parameters()), width=model.config.hidden_size,
        words=WORDS, length=LENGTH, all=WORDS**LENGTH, train=TRAIN, held_out=HELD_OUT, table="\n".join(lines),
    )  # fmt: skip


def main() -> None:
    """Make both series with their rows, measure them, and check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the series; must not exist")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    disable_progress_bar()
    torch.set_num_threads(1)  # so small, more threads only wait for each other
    draw = random.Random(SEED)
    bits = language(draw)
    train, at_random, held_out = rows_of(bits, draw)
    for name, rows in (("train", train), ("train-random", at_random), ("held-out", held_out)):
        save_rows(out / f"{name}.jsonl", rows)
    tokenizer = make_tokenizer(bits)
    runs = {
        "parity": make_series(out / "parity", train, held_out, tokenizer, STEPS),
        "random": make_series(out / "random", at_random, held_out, tokenizer, CONTROL_STEPS),
    }
    series, control = followed(out, "parity", "train.jsonl"), followed(out, "random", "train-random.jsonl")
    (out / "README.md").write_text(described(runs, series, control), encoding="utf-8")
    print(series[["loss", "held_out", "distance", "gap", "consistency"]].round(4).to_string())
    print(control[["loss", "held_out", "distance", "gap", "consistency"]].round(4).to_string())
    outcomes = checks(series, control, runs["parity"])
    for check, value, holds in outcomes:
        print(f"{check}: {value:.4g}{'' if holds else ' — THIS SHOULD NOT BE'}")
    if not all(holds for *_, holds in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
