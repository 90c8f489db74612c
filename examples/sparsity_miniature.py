"""Essential sparsity in miniature: a tiny Llama, tuned on two of the six Markov chains that it has learnt.

Each chain has four successors a symbol; a sequence does not name its chain. The two chains of the tuning have
a quarter of their rows drawn again. How many of the smallest weights can go?
Source of the claims: Jaiswal et al. 2023, arXiv:2306.03805; the setting is ours, a thousand times smaller.

    python examples/sparsity_miniature.py --seeds 0 1 2

About 3 minutes a seed on one core. `--quick` runs everything once in seconds and claims nothing.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from pandas import DataFrame
from rich.console import Console
from rich.table import Table
from symbols import Claim, claims_table, make_tokenizer, save, walks, write_rows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from diagnostics import essential_sparsity
from diagnostics.core.analysis import Result
from probes import CheckpointPair

SYMBOLS, LENGTH = "abcdefghijklmnopqrstuvwx", 24
CHAINS, TUNED_ON, REDRAWN = 6, 2, 0.25
SUCCESSORS = (0.55, 0.25, 0.15, 0.05)
PATTERNS = ("1:2", "2:4", "4:8")
# Sparsities in the claims about zero-shot pruning.
LITTLE, HALF = 0.2, 0.5


@dataclass(frozen=True)
class Budget:
    """Sizes of training and measurement.

    Attributes:
        pretraining, tuning: steps of 32 sequences.
        sequences: training sequences of base, and of each tuned model.
        held_out: sequences of each kind to measure on.
        grid: sparsities.
    """

    pretraining: int = 900
    tuning: int = 250
    sequences: int = 6000
    held_out: int = 512
    grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


QUICK = Budget(pretraining=5, tuning=2, sequences=64, held_out=16, grid=(0.2, 0.3, 0.5, 0.9))


def chain(generator: torch.Generator) -> Tensor:
    """Probabilities of the next symbol given the last: four random successors of each symbol."""
    chances = torch.zeros(len(SYMBOLS), len(SYMBOLS))
    for row in chances:
        row[torch.randperm(len(SYMBOLS), generator=generator)[: len(SUCCESSORS)]] = torch.tensor(SUCCESSORS)
    return chances


def redrawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """The chain with other successors after some of the symbols."""
    rows = torch.randperm(len(SYMBOLS), generator=generator)[: int(REDRAWN * len(SYMBOLS))]
    return chances.index_put((rows,), chain(generator)[rows])


def sampled(chains: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Sequences (count, LENGTH), each of a chain drawn for it."""
    drawn = torch.randint(len(chains), (count,), generator=generator)
    return walks(torch.stack(chains)[drawn], LENGTH, generator)


def make_model(seed: int) -> LlamaForCausalLM:
    """Three blocks of width 48 with 82,944 weights in their matrices, and a tied embedding."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            # About what 48 inputs ask for; transformers' own 0.02 is made for inputs fifty times as many.
            initializer_range=0.12,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(
    model: LlamaForCausalLM,
    sequences: Tensor,
    steps: int,
    lr: float,
    generator: torch.Generator,
    *,
    decay: bool,
) -> None:
    """Train in place by AdamW on batches of 32, its rate falling to zero if `decay`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if decay else 1.0)
    for _ in range(steps):
        batch = sequences[torch.randint(len(sequences), (32,), generator=generator)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Outcome:
    """The result of one seed."""

    seed: int
    result: Result

    def points(self, role: str, model: str, regime: str = "zero_shot") -> dict[str, float]:
        """The row of a curve in the table of points."""
        table = self.result.tables["points"]
        rows = (table["role"] == role) & (table["model"] == model) & (table["regime"] == regime)
        return table[rows].iloc[0].to_dict()

    def curve(
        self, role: str, model: str, regime: str = "zero_shot", pattern: str = "magnitude"
    ) -> dict[float, float]:
        """Accuracy by sparsity."""
        table = self.result.tables["curve"]
        rows = (table["role"] == role) & (table["model"] == model) & (table["regime"] == regime)
        rows &= (table["pattern"] == pattern) & (table["metric"] == "accuracy")
        return {round(float(s), 6): float(v) for s, v in table.loc[rows, ["sparsity", "value"]].to_numpy()}

    def drop(self, sparsity: float, *curve: str) -> float:
        """Cost of a sparsity, in points of accuracy."""
        return 100 * (self.curve(*curve[:3])[0.0] - self.curve(*curve)[sparsity])

    def patterns(self, role: str, model: str) -> list[float]:
        """Accuracy at each N:M pattern, then at half the weights pruned by magnitude."""
        return [self.curve(role, model, "zero_shot", pattern)[HALF] for pattern in (*PATTERNS, "magnitude")]

    @property
    def overlap(self) -> DataFrame:
        """Overlap of the masks of base and tuned, by sparsity."""
        return self.result.tables["overlap"].set_index("sparsity")


def measure(seed: int, budget: Budget, out: Path) -> Outcome:
    """Train base and tuned, write them and their rows into `out`, and measure the pair."""
    generator = torch.Generator().manual_seed(seed)
    chains = [chain(generator) for _ in range(CHAINS)]
    task_chains = [redrawn(chances, generator) for chances in chains[:TUNED_ON]]
    pretraining, lesson = (sampled(kind, budget.sequences, generator) for kind in (chains, task_chains))
    keep, task = (sampled(kind, budget.held_out, generator) for kind in (chains, task_chains))

    def rows(sequences: Tensor, name: str) -> Path:
        texts = (" ".join(SYMBOLS[symbol] for symbol in sequence) for sequence in sequences)
        return write_rows(({"text": text} for text in texts), out / f"{name}.jsonl")

    tokenizer = make_tokenizer(SYMBOLS)
    model = make_model(seed)
    train(model, pretraining, budget.pretraining, 2e-3, generator, decay=False)
    base = save(model, tokenizer, out / "base")
    order = torch.Generator().manual_seed(seed)
    train(model, lesson, budget.tuning, 1e-3, order, decay=True)
    tuned = save(model, tokenizer, out / "tuned")
    # The analysis splits off the rows to tune on, and measures on the rest.
    result = essential_sparsity(
        CheckpointPair(base, tuned),
        rows(torch.cat([lesson, task]), "task"),
        rows(keep, "keep"),
        metric="accuracy",
        grid=budget.grid,
        patterns=PATTERNS,
        finetune_steps=budget.tuning,
        finetune_lr=1e-3,
        finetune_share=budget.sequences / (budget.sequences + budget.held_out),
        seed=seed,
    )
    return Outcome(seed, result)


BASE, TUNED = ("keep", "base"), ("task", "tuned")
MASKED = ("task", "base", "masked_finetune")
RANDOM = ("zero_shot", "random")


def claims(outcome: Outcome) -> list[Claim]:
    """What must hold of one seed."""
    claims = []

    def claim(text: str, holds: bool, numbers: str) -> None:
        claims.append(Claim(outcome.seed, text, bool(holds), numbers))

    half = outcome.drop(HALF, *BASE)
    claim("base, zero-shot: 0.5 costs more than 5 points", half > 5, f"{half:.1f}")
    for name, curve in (("base", BASE), ("tuned", TUNED)):
        little, random = outcome.drop(LITTLE, *curve), outcome.drop(LITTLE, *curve, *RANDOM)
        claim(f"{name}, zero-shot: 0.2 costs less than 1 point", little < 1, f"{little:.2f}")
        claim(f"{name}, zero-shot: 0.2 at random costs 10 or more", random >= 10, f"{random:.1f}")
        values = outcome.patterns(*curve)
        claim(
            f"{name}, zero-shot, half the weights: 1:2 < 2:4 < 4:8 < one threshold for all",
            all(a < b for a, b in pairwise(values)),
            ", ".join(f"{value:.3f}" for value in values),
        )
    masked = outcome.points(*MASKED)
    for name, curve in (("base", BASE), ("tuned", TUNED)):
        at = outcome.points(*curve)["robust_at"]
        claim(
            f"tuned behind the mask tolerates 0.2 more than {name} zero-shot",
            masked["robust_at"] - at >= 0.2 - 1e-9,
            f"{masked['robust_at']:.2f} and {at:.2f}",
        )
    before, after = masked["slope_before"], masked["slope_after"]
    claim(
        "tuned behind the mask: a hinge (dBIC > 10), 3 times as steep beyond it",
        masked["dbic"] > 10 and after < 0 and -after >= 3 * abs(before),
        f"dBIC {masked['dbic']:.1f}, slopes {before:.2f} and {after:.2f}",
    )
    kappa = outcome.overlap["kappa"].min()
    claim("masks of base and tuned: kappa above 0.5 from 0.1 on", kappa > 0.5, f"{kappa:.2f} at least")
    return claims


def measured(outcomes: list[Outcome], grid: tuple[float, ...]) -> Table:
    """Accuracy by sparsity, a seed each."""
    table = Table(
        "sparsity", "base, zero-shot", "tuned, zero-shot", "tuned behind the mask", "random, zero-shot",
        "random, tuned behind it", "mask cosine", "kappa", title="Accuracy; seeds / by /",
    )  # fmt: skip
    columns: list[Callable[[Outcome, float], float]] = [
        lambda o, s: o.curve(*BASE)[s],
        lambda o, s: o.curve(*TUNED)[s],
        lambda o, s: o.curve(*MASKED)[s],
        lambda o, s: o.curve(*BASE, *RANDOM)[s] if s else o.curve(*BASE)[s],
        lambda o, s: o.curve(*MASKED, "random")[s] if s else o.curve(*MASKED)[s],
        lambda o, s: o.overlap["cosine"][s] if s else math.nan,
        lambda o, s: o.overlap["kappa"][s] if s else math.nan,
    ]
    for sparsity in (0.0, *grid):
        cells = (" / ".join(f"{column(o, sparsity):.3f}" for o in outcomes) for column in columns)
        table.add_row(f"{sparsity:g}", *(cell.replace("nan", "–") for cell in cells))
    return table


def published(outcomes: list[Outcome]) -> Table:
    """The paper's figures, from models a thousand times larger, and ours."""
    table = Table("what", "published", "ours (seeds / by /)", title="Published figures and ours")

    def row(name: str, theirs: str, ours: Callable[[Outcome], str]) -> None:
        table.add_row(name, theirs, " / ".join(ours(outcome) for outcome in outcomes))

    row(
        "tolerated when tuned behind the mask",
        "0.3 to 0.5 (the paper's text); 0.215 of BERT-base on every task, about 0.4 of OPT-1.3B",
        lambda o: f"{o.points(*MASKED)['robust_at']:.2f}",
    )
    row(
        "turning point of that curve",
        "about 0.6 (BERT-base, RTE); not beyond 0.4 (OPT-1.3B, RTE)",
        lambda o: f"{o.points(*MASKED)['hinge']:.2f}",
    )
    row(
        "tolerated without any training: base, tuned",
        "none given; loss at times already at 0.25 to 0.3 (abstract of arXiv:2310.01382)",
        lambda o: f"{o.points(*BASE)['robust_at']:.2f}, {o.points(*TUNED)['robust_at']:.2f}",
    )
    row(
        "cosine of two masks inside the range",
        "above 0.96 or 0.98 (lottery ticket and one-shot; the paper gives both), without chance taken off",
        lambda o: f"{o.overlap['cosine'].iloc[0]:.3f} to {o.overlap['cosine'].iloc[-1]:.3f}",
    )
    row(
        "half the weights without training: none pruned, global, 4:8, 2:4, 1:2",
        "perplexity 5.12, 14.89, 16.48, 54.59, – (LLaMA-2-7B; repository of arXiv:2306.11695)",
        lambda o: (
            "accuracy " + ", ".join(f"{v:.2f}" for v in (o.curve(*BASE)[0.0], *reversed(o.patterns(*BASE))))
        ),
    )
    row(
        "share of the squared change in base's lowest 30 %",
        "none given; chance is 0.3",
        lambda o: f"{o.result.metrics['delta_low_at_0_3']:.3f}",
    )
    return table


def show(outcomes: list[Outcome], grid: tuple[float, ...], console: Console) -> None:
    """Everything that is not claimed."""
    console.print(measured(outcomes, grid), published(outcomes))
    verdicts = ", ".join(str(outcome.points(*MASKED)["verdict"]) for outcome in outcomes)
    keep_accuracy = ", ".join(f"{outcome.curve('keep', 'tuned')[0.0]:.2f}" for outcome in outcomes)
    behind = ", ".join(
        f"{100 * (o.curve(*MASKED)[HALF] - o.curve(*MASKED, 'random')[HALF]):.1f}" for o in outcomes
    )
    console.print(
        "Base is measured on the chains that it was trained on, what is tuned on its own; tuned gets "
        f"{keep_accuracy} on the base's. The curve behind the mask is {verdicts}.\n"
        "Shown, not claimed: tuned behind a mask, the smallest weights are hardly better to prune than any: "
        f"at 0.5 they lose {behind} points less than random ones. Without training it is they that matter."
    )


def main() -> int:
    """Measure, print, and say with the exit code whether all that must hold does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="everything once, too short to claim anything")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small, more threads only wait for each other
    transformers.logging.disable_progress_bar()
    budget, console, outcomes = QUICK if arguments.quick else Budget(), Console(width=180), []
    for seed in arguments.seeds:
        console.print(f"seed {seed} …")
        with tempfile.TemporaryDirectory() as out:
            outcomes.append(measure(seed, budget, Path(out)))
    show(outcomes, budget.grid, console)
    if arguments.quick:
        return 0
    claimed = [claim for outcome in outcomes for claim in claims(outcome)]
    console.print(claims_table(claimed))
    return 0 if all(claim.holds for claim in claimed) else 1


if __name__ == "__main__":
    sys.exit(main())
