"""Layer-wise sharpness in miniature: planted stragglers on the path between two tiny decoders.

The base learns six Markov chains; tuned learns two of them with half of their rows redrawn. What is planted
into tuned changes no function: the signs of one block's attention turned, or its feed-forward neurons
permuted. Blends with base then have a hole, and one block is to blame. The paper (arXiv:2410.16476) has no
code and no numbers that could be read: the setting and its claims are ours.

    python examples/sharpness_miniature.py --seed 0

About 6 minutes on one core. `--quick` runs everything once in seconds and claims nothing.
"""

import argparse
import copy
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import torch
from make_bundled import descend
from pandas import DataFrame
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diagnostics import layer_sharpness
from diagnostics.analyses.sharpness.stragglers import LEAST as BARRIER
from diagnostics.core.analysis import Result
from diagnostics.numerics.rank_correlation import correlations
from probes import CheckpointPair

SYMBOLS, CONTEXT, BLOCKS, WIDTH, HEADS, INNER = 24, 24, 6, 48, 4, 96
LETTERS = ascii_letters[:SYMBOLS]
MAIN = {
    "plain": None,
    "signs of block 0": 0,
    "signs of block 1": 1,
    "signs of block 3": 3,
    "neurons of block 3": 3,
}
# Few alphas: the claims pin layers half-way.
MEASURED = {
    "alphas": (0.0, 0.25, 0.5, 0.75, 1.0),
    "layer_alphas": (0.0, 0.5, 1.0),
    "curvature": False,
    "pairs": 0,
    "rhos": (0.5,),
}
LIGHT = {**MEASURED, "alphas": (0.5,)}


@dataclass(frozen=True)
class Budget:
    """Sizes of training and measurement.

    Attributes:
        pretraining, tuning: steps, of 32 sequences each.
        rows: of each set.
        plants: heads of each block that are turned, from the first.
        natural: tunings with other rates and lengths.
        settings: of the analysis.
    """

    pretraining: int = 900
    tuning: int = 250
    rows: int = 128
    plants: tuple[int, ...] = (1, 2, 3, 4)
    natural: int = 16
    settings: dict[str, Any] = field(default_factory=lambda: {"steps": 8, "batches": 2, "batch_rows": 32})


QUICK = Budget(
    pretraining=5, tuning=2, rows=6, plants=(4,), natural=2,
    settings={"steps": 2, "batches": 1, "batch_rows": 4},
)  # fmt: skip


class Chains:
    """Markov chains; each sequence is from one of them."""

    def __init__(self, tables: Tensor):
        self.tables = tables

    @classmethod
    def drawn(cls, count: int, generator: torch.Generator) -> "Chains":
        """Normal logits of standard deviation 3 (ours)."""
        return cls((3 * torch.randn(count, SYMBOLS, SYMBOLS, generator=generator)).softmax(-1))

    def redrawn(self, chains: tuple[int, ...], generator: torch.Generator) -> "Chains":
        """Some of the chains with half of their rows drawn again."""
        tables, fresh = self.tables[list(chains)].clone(), Chains.drawn(len(chains), generator).tables
        for table, new in zip(tables, fresh, strict=True):
            rows = torch.randperm(SYMBOLS, generator=generator)[: SYMBOLS // 2]
            table[rows] = new[rows]
        return Chains(tables)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sequences (count, CONTEXT)."""
        chains = torch.randint(len(self.tables), (count,), generator=generator)
        symbols = torch.randint(SYMBOLS, (count, CONTEXT), generator=generator)
        for t in range(1, CONTEXT):
            chances = self.tables[chains, symbols[:, t - 1]]
            symbols[:, t] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return symbols

    def texts(self, count: int, generator: torch.Generator) -> list[str]:
        """The same as letters."""
        return ["".join(LETTERS[i] for i in row) for row in self.sample(count, generator).tolist()]


def make_model() -> LlamaForCausalLM:
    """Six blocks of width 48."""
    config = LlamaConfig(
        vocab_size=SYMBOLS, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, chains: Chains, steps: int, groups: list[dict[str, Any]], seed: int
) -> LlamaForCausalLM:
    """Train in place by AdamW, gradients clipped at 1."""
    optimizer, generator = torch.optim.AdamW(groups), torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ids = chains.sample(32, generator)
        descend(model(ids, labels=ids).loss, model, optimizer)
    return model.eval()


def planted(model: LlamaForCausalLM, name: str) -> LlamaForCausalLM:
    """The same function with one block permuted.

    Args:
        name: `plain`, `signs of block 0`, `neurons of block 3`, or `values 2 of block 4`: of 2 heads.
    """
    model_with_plant = copy.deepcopy(model)
    if name == "plain":
        return model_with_plant
    change, _, block = name.partition(" of block ")
    kind, _, count = change.partition(" ")
    layer = model_with_plant.model.layers[int(block)]
    attention, feed = layer.self_attn, layer.mlp
    with torch.no_grad():
        if kind == "neurons":
            order = torch.randperm(INNER, generator=torch.Generator().manual_seed(0))
            for rows in (feed.up_proj, feed.gate_proj):
                rows.weight.copy_(rows.weight[order])
            feed.down_proj.weight.copy_(feed.down_proj.weight[:, order])
            return model_with_plant
        heads = int(count) if count else HEADS
        signs = torch.where(torch.arange(WIDTH) < heads * (WIDTH // HEADS), -1.0, 1.0)
        turned = [attention.v_proj]
        if kind == "signs":
            turned += [attention.q_proj, attention.k_proj]
        for rows in turned:
            rows.weight.mul_(signs[:, None])
        attention.o_proj.weight.mul_(signs)
    return model_with_plant


def save(model: LlamaForCausalLM, directory: Path) -> Path:
    """Write a model with a tokenizer of single letters."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class World:
    """Base and tuned, and rows of all three roles."""

    base: LlamaForCausalLM
    tuned: LlamaForCausalLM
    task_chains: Chains
    task: list[str]
    keep: list[str]
    ood: list[str]

    @classmethod
    def trained(cls, budget: Budget, seed: int) -> "World":
        """Train both."""
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        chains = Chains.drawn(6, generator)
        task = chains.redrawn((0, 1), generator)
        ood = Chains((chains.tables[:2] + task.tables) / 2)
        model = make_model()
        base = train(model, chains, budget.pretraining, [{"params": model.parameters(), "lr": 3e-3}], seed)
        tuned = copy.deepcopy(base)
        train(tuned, task, budget.tuning, [{"params": tuned.parameters(), "lr": 5e-4}], seed + 1)
        rows = [distribution.texts(budget.rows, generator) for distribution in (task, chains, ood)]
        return cls(base, tuned, task, *rows)

    def measure(self, tuned: LlamaForCausalLM, out: Path, **settings: Any) -> Result:
        """The analysis of base and one tuned model."""
        pair = CheckpointPair(save(self.base, out / "base"), save(tuned, out / "tuned"))
        return layer_sharpness(pair, self.task, self.keep, {"shift": self.ood}, **settings)


@dataclass(frozen=True)
class Measurements:
    """All measurements.

    Attributes:
        main: results by plant.
        ranked: a row a plant of heads: block, named, barrier, loss, accuracy, whole and own sharpness.
        models: a row a natural tuning.
    """

    main: dict[str, Result]
    ranked: DataFrame
    models: DataFrame


def measure(budget: Budget, seed: int, out: Path) -> Measurements:
    """Train, plant and measure."""
    world = World.trained(budget, seed)
    main = {
        name: world.measure(planted(world.tuned, name), out, **MEASURED, **budget.settings) for name in MAIN
    }
    light = {**LIGHT, **budget.settings, "batches": 1}
    ranked = []
    for block in range(BLOCKS):
        for heads in budget.plants:
            print(f"plant: {heads} heads of block {block}", file=sys.stderr)
            model = planted(world.tuned, f"values {heads} of block {block}")
            ranked.append({"block": block, **of_plant(world.measure(model, out, **light), block)})
    models_ = [
        natural(world, budget, number, out, {**light, "sharpen": "all"}) for number in range(budget.natural)
    ]
    return Measurements(main, DataFrame(ranked), DataFrame(models_))


def at_half(result: Result, metric: str) -> float:
    """An OOD metric of the blend at α = 0.5."""
    path = result.tables["path"]
    rows = (path["role"] == "ood") & (path["metric"] == metric) & (path["alpha"] == 0.5)
    return float(path.loc[rows, "value"].iloc[0])


def sharpness_at_half(result: Result) -> dict[str, float]:
    """Worst rises at α = 0.5 by measured layer."""
    table = result.tables["sharpness"]
    rows = table[(table["alpha"] == 0.5) & (table["rho"] == 0.5)]
    return dict(zip(rows["name"], rows["worst"], strict=True))


def of_plant(result: Result, block: int) -> dict[str, float]:
    """What a plant of heads gave."""
    layers, sharpness = result.tables["layers"].set_index("name"), sharpness_at_half(result)
    return {
        "named": layers["barrier"].idxmax() == f"block {block}",
        "barrier": layers["barrier"].max(),
        "loss": at_half(result, "loss"),
        "accuracy": at_half(result, "accuracy"),
        "whole": sharpness["all blocks"],
        "own": sharpness.get(f"block {block}", np.nan),
    }


def natural(
    world: World, budget: Budget, number: int, out: Path, settings: dict[str, Any]
) -> dict[str, float]:
    """Settings and results of a tuning with its own rate, length and one faster block."""
    print(f"natural tuning {number}", file=sys.stderr)
    rng = np.random.default_rng(number)
    rate, faster, block = 10 ** rng.uniform(-3.7, -2.7), 10 ** rng.uniform(0, 1), int(rng.integers(BLOCKS))
    steps = int(budget.tuning * rng.uniform(0.3, 1.5))
    tuned = copy.deepcopy(world.base)
    block_parameters = {id(parameter) for parameter in tuned.model.layers[block].parameters()}
    groups = [
        {
            "params": [
                parameter for parameter in tuned.parameters() if (id(parameter) in block_parameters) == chosen
            ],
            "lr": lr,
        }
        for chosen, lr in ((False, rate), (True, rate * faster))
    ]
    result = world.measure(train(tuned, world.task_chains, steps, groups, number), out, **settings)
    layers = result.tables["layers"]
    return {
        "displacement": float(np.sqrt((layers["displacement"] ** 2).sum())),
        "rate": rate,
        "accuracy": at_half(result, "accuracy"),
        **sharpness_at_half(result),
    }


@dataclass(frozen=True)
class Claim:
    """A claim, and the numbers that decide it."""

    text: str
    holds: bool
    numbers: str


def claims(measured: Measurements) -> list[Claim]:
    """The claims about planted stragglers."""
    plain, first = measured.main["plain"], measured.main["signs of block 0"]
    claims = [
        Claim("plain: some blend is surely better than both ends", plain.metrics["successes"] == 1,
              f"best alpha {plain.metrics['best_alpha']:g}"),
        Claim("plain: no straggler", plain.metrics["stragglers"] == 0, f"{plain.metrics['stragglers']}"),
        Claim("signs of block 0: a strong failure mode", first.metrics["strong_failures"] == 1,
              f"{at_half(first, 'loss'):.3f} nats half-way"),
    ]  # fmt: skip
    for name, block in MAIN.items():
        if block is None:
            continue
        result = measured.main[name]
        layers = result.tables["layers"].set_index("name")
        flagged = layers.index[layers["straggler"]].tolist()
        only = flagged == [f"block {block}"]
        claims.append(Claim(f"{name}: the planted block is the only straggler", only, f"{flagged}"))
        apart = max(abs(end(result, alpha) - end(plain, alpha)) for alpha in (0.0, 1.0))
        claims.append(Claim(f"{name}: both ends are as they were", apart < 1e-5, f"{apart:.2g} nats"))
        again = abs(realigned_at_half(result) - at_half(plain, "loss"))
        claims.append(Claim(f"{name}: realigning restores the plain path", again < 1e-5, f"{again:.2g} nats"))
    layers = first.tables["layers"].set_index("name")
    repairs = layers[["repair_base", "repair_tuned"]]
    pinned, others = repairs.loc["block 0"], repairs.drop(index="block 0")
    claims += [
        Claim("signs of block 0: pinning it repairs at least 1 nat from either end", pinned.min() >= 1,
              f"{pinned['repair_base']:.2f} and {pinned['repair_tuned']:.2f}"),
        Claim("signs of block 0: pinning another layer repairs at most 0.05", others.to_numpy().max() <= 0.05,
              f"{others.to_numpy().max():.3f}"),
    ]  # fmt: skip
    ranked = measured.ranked
    seen = ranked[ranked["barrier"] >= BARRIER]
    rank = spearmanr(ranked["barrier"], ranked["loss"]).statistic
    claims += [
        # A single head of a late block may hardly matter: what makes no barrier cannot be named by one.
        Claim(f"plants of heads: from {BARRIER:g} nats on, the largest barrier names the block",
              bool(seen["named"].all()) and len(seen) > 0,
              f"{seen['named'].sum()} of {len(seen)} ({ranked['named'].sum()} of all {len(ranked)})"),
        Claim("plants of heads: it ranks the OOD loss half-way with Spearman 0.8 or more", rank >= 0.8,
              f"{rank:.2f}"),
    ]  # fmt: skip
    return claims


def end(result: Result, alpha: float) -> float:
    """OOD loss at an end."""
    sets = result.tables["sets"].set_index("role")
    return float(sets.loc["ood", "loss_tuned" if alpha else "loss_base"])


def realigned_at_half(result: Result) -> float:
    """OOD loss at α = 0.5 once the flagged blocks are realigned; NaN where none was flagged."""
    table = result.tables["remedies"]
    rows = (table["remedy"] == "realign") & (table["alpha"] == 0.5) & (table["role"] == "ood")
    return float(table.loc[rows, "loss"].iloc[0]) if rows.any() else float("nan")


def show(measured: Measurements, console: Console) -> None:
    """Print the table of plants, the claims, and what sharpness predicts (no claim)."""
    shown = Table(title="OOD loss along the path, and barriers of single layers (nats)")
    for column in ("tuned", "base", "best", "at", "half-way", "tuned", "planted block", "largest other"):
        shown.add_column(column, justify="left" if not shown.columns else "right")
    for name, result in measured.main.items():
        path = result.tables["path"]
        curve = path[(path["role"] == "ood") & (path["metric"] == "loss")].set_index("alpha")["value"]
        layers = result.tables["layers"].set_index("name")
        planted_layer = layers.loc[f"block {MAIN[name]}"] if MAIN[name] is not None else None
        others = layers if planted_layer is None else layers.drop(index=str(planted_layer.name))
        shown.add_row(
            name, f"{curve[0.0]:.3f}", f"{curve.min():.3f}", f"{curve.idxmin():g}", f"{curve[0.5]:.3f}",
            f"{curve[1.0]:.3f}",
            "" if planted_layer is None
            else f"{planted_layer['barrier_tuned']:.3f}, {planted_layer['barrier_base']:.3f}",
            f"{others['barrier'].max():.3f}",
        )  # fmt: skip
    console.print(shown)
    for claim in claims(measured):
        console.print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.numbers}")
    ranked = measured.ranked
    for column, text in (("whole", "all blocks'"), ("own", "the planted block's own")):
        defined = ranked.dropna(subset=[column])
        value = spearmanr(defined[column], defined["loss"]).statistic if len(defined) > 2 else float("nan")
        console.print(
            f"reported  plants: Spearman of {text} sharpness with OOD loss {value:.2f} (n {len(defined)})"
        )
    if not len(measured.models):
        return
    names = [name for name in measured.models if name.startswith(("block", "all"))]
    for covariate in ("displacement", "rate"):
        table = correlations(
            measured.models, outcome="accuracy", predictors=names, given=covariate, permutations=2000
        )
        console.print(f"reported  natural tunings: sharpness with OOD accuracy, raw and given {covariate}")
        console.print(table[["predictor", "models", "raw", "raw_holm", "partial", "partial_holm"]].round(2))


def main() -> int:
    """Train, measure and print; 1 if a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="run everything in seconds, and claim nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small, more threads only wait for each other
    with tempfile.TemporaryDirectory() as out:
        measured = measure(QUICK if arguments.quick else Budget(), arguments.seed, Path(out))
    show(measured, Console(width=150))
    return 0 if arguments.quick or all(claim.holds for claim in claims(measured)) else 1


if __name__ == "__main__":
    sys.exit(main())
