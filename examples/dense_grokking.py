"""Grokking of a dense model in miniature: addition modulo 59, and the signs of it before the accuracy rises.

One attention block learns a + b mod 59 from 40 % of the pairs. The train rows are right within a few hundred
steps; a circuit of a few Fourier frequencies grows for thousands of steps while the loss hardly moves. Ground
truth are the restricted and excluded losses of Nanda et al. (arXiv:2301.05217); they are compared with what
`tunescope series` measures without knowledge of addition. Setting as in the paper (full-batch AdamW, weight
decay 1), except for the modulus, the share of pairs and 3,000 steps, which end before the accuracy rises.
With seed 0 the restricted loss is then about 1.2, and below 0.5 at step 4,250, with 3 % of held-out pairs
right.

    python examples/dense_grokking.py --seed 0

About 3 minutes on one core. `--steps 20` runs everything once in seconds and claims nothing.
"""

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from diagnostics import training_dynamics
from diagnostics.core.analysis import Result
from probes import open_checkpoint
from probes.checkpoints.series import CheckpointSeries

MODULUS, WIDTH, HEADS, INNER, SHARE = 59, 128, 4, 512, 0.4
KEY_FREQUENCIES = 5


class AdditionConfig(PretrainedConfig):
    """Configuration of the network for transformers."""

    model_type = "addition"

    def __init__(self, **settings: Any):
        super().__init__(
            **{"architectures": ["AdditionForCausalLM"], "tie_word_embeddings": False, **settings}
        )
        self.vocab_size, self.hidden_size = MODULUS + 1, WIDTH
        self.num_hidden_layers, self.max_position_embeddings = 1, 4


class Attention(nn.Module):
    """Causal attention, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, last: int) -> Tensor:
        """The block's contribution to the last positions of the residual stream (batch, length, width)."""
        q, k, v = (
            f(part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f, part in ((self.q_proj, x[:, -last:]), (self.k_proj, x), (self.v_proj, x))
        )
        scores = q @ k.mT / math.sqrt(WIDTH / HEADS)
        later = torch.ones(last, x.shape[1], dtype=torch.bool).triu(1 + x.shape[1] - last)
        return self.o_proj((scores.masked_fill(later, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a ReLU network, without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor, last: int) -> Tensor:
        """The last positions of the residual stream behind the block."""
        x = x[:, -last:] + self.self_attn(x, last)
        return x + self.mlp.fc2(self.mlp.fc1(x).relu())


class Body(nn.Module):
    """The network without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(MODULUS + 1, WIDTH), nn.Embedding(4, WIDTH)
        self.layers = nn.ModuleList([Block()])

    def forward(self, input_ids: Tensor, last: int | None = None) -> tuple[Tensor]:
        """Hidden states (batch, length, width), by default of all positions."""
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]
        return (self.layers[0](x, last or input_ids.shape[1]),)


class AdditionForCausalLM(PreTrainedModel):
    """The network as a transformers model, for the analyses."""

    config_class, base_model_prefix = AdditionConfig, "model"

    def __init__(self, config: AdditionConfig):
        super().__init__(config)
        self.model, self.lm_head = Body(), nn.Linear(WIDTH, MODULUS + 1, bias=False)
        # As small as 1/√width, so that the features must be learnt.
        for weight in (
            self.model.embed_tokens.weight,
            self.model.embed_positions.weight,
            self.lm_head.weight,
        ):
            nn.init.normal_(weight, std=WIDTH**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Logits of the next token; padding is on the right, where causal attention does not look."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))


@dataclass(frozen=True)
class Pairs:
    """All pairs of numbers, and which of them train.

    Attributes:
        ids: (59², 3): a, b, and the sign behind which the sum is asked for.
        trained: which pairs are trained on.
        held_out: which are scored: neither they nor their mirror (b, a) is trained on.
    """

    ids: Tensor
    sums: Tensor
    trained: Tensor
    held_out: Tensor

    @classmethod
    def drawn(cls, generator: torch.Generator) -> "Pairs":
        """40 % of the pairs train."""
        a, b = (grid.flatten() for grid in torch.meshgrid(*[torch.arange(MODULUS)] * 2, indexing="ij"))
        trained = torch.zeros(MODULUS**2, dtype=torch.bool)
        trained[torch.randperm(MODULUS**2, generator=generator)[: round(SHARE * MODULUS**2)]] = True
        mirrored = trained.view(MODULUS, MODULUS).T.flatten()
        ids = torch.stack([a, b, torch.full_like(a, MODULUS)], dim=1)
        return cls(ids, (a + b) % MODULUS, trained, ~trained & ~mirrored)

    def rows(self, selected: Tensor) -> list[dict[str, str]]:
        """Pairs as rows of a task."""
        return [
            {"prompt": f"{a} {b} =", "completion": f" {total}"}
            for (a, b, _), total in zip(
                self.ids[selected].tolist(), self.sums[selected].tolist(), strict=True
            )
        ]


def save_tokenizer(directory: Path) -> None:
    """One token a number, and one for the sign."""
    words = {str(number): number for number in range(MODULUS)} | {"=": MODULUS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="="))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="=").save_pretrained(directory)


def trained(pairs: Pairs, saved_at: Sequence[int], seed: int) -> dict[int, AdditionForCausalLM]:
    """The model at some steps of full-batch AdamW (rate and decay as in the paper)."""
    torch.manual_seed(seed)
    model = AdditionForCausalLM(AdditionConfig())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1.0, betas=(0.9, 0.98))
    ids, sums = pairs.ids[pairs.trained], pairs.sums[pairs.trained]
    kept = {}
    for step in range(max(saved_at) + 1):
        if step in saved_at:
            kept[step] = copy.deepcopy(model)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 10, 1)
        # Only what is asked for: it takes a third of the time.
        loss = cross_entropy(model.lm_head(model.model(ids, last=1)[0][:, 0]), sums)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return kept


def logits_of(model: AdditionForCausalLM, pairs: Pairs) -> Tensor:
    """Of the sum of every pair (59², 59), in float64."""
    with torch.no_grad():
        return model(pairs.ids).logits[:, -1, :MODULUS].double()


def waves(pairs: Pairs, frequency: int) -> Tensor:
    """cos and sin of a frequency of a + b, each of length 1 over all pairs: (59², 2)."""
    angle = 2 * math.pi * frequency * (pairs.ids[:, 0] + pairs.ids[:, 1]).double() / MODULUS
    both = torch.stack([angle.cos(), angle.sin()], dim=1)
    return both / both.norm(dim=0)


def key_frequencies(logits: Tensor, pairs: Pairs) -> list[int]:
    """The frequencies of a + b that hold most of the logits' energy."""
    energy = {k: float((waves(pairs, k).T @ logits).square().sum()) for k in range(1, MODULUS // 2 + 1)}
    return sorted(sorted(energy, key=lambda k: -energy[k])[:KEY_FREQUENCIES])


def restricted_and_excluded(logits: Tensor, pairs: Pairs, key: Sequence[int]) -> tuple[float, float]:
    """Loss on held-out pairs of the key frequencies alone, and on train pairs without them."""
    U = torch.cat([waves(pairs, frequency) for frequency in key], dim=1)
    part = U @ (U.T @ logits)
    alone = part + logits.mean(dim=0)
    held, trained_rows = pairs.held_out, pairs.trained
    return (
        float(cross_entropy(alone[held], pairs.sums[held])),
        float(cross_entropy((logits - part)[trained_rows], pairs.sums[trained_rows])),
    )


def measured(saved: dict[int, AdditionForCausalLM], pairs: Pairs, directory: Path, **settings: Any) -> Result:
    """What tunescope says of the run, held-out rows and train rows given."""
    save_tokenizer(directory)
    checkpoints = []
    for model in saved.values():
        checkpoint = open_checkpoint(model)
        checkpoint.directory = directory  # where the tokenizer lies
        checkpoints.append(checkpoint)
    series = CheckpointSeries(checkpoints, steps=list(saved))
    # Every train row counts: the run saw them all at once.
    settings = {"rows": 2000, "batch": 2000, "radius": 0.2} | settings
    return training_dynamics(series, pairs.rows(pairs.held_out), pairs.rows(pairs.trained), **settings)


def main() -> None:
    """Train, measure, and hold the order of events against the claims."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = Pairs.drawn(torch.Generator().manual_seed(arguments.seed))
    saved_at = sorted({round(share * arguments.steps) for share in (0, 0.05, *np.linspace(0.125, 1, 8))})
    saved = trained(pairs, saved_at, arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        result = measured(saved, pairs, Path(directory))
    rows = story(saved, pairs, result)
    show(rows)
    for note in result.notes:
        print(f"- {note}")
    if arguments.steps >= 3000:
        missed = [claim for claim, holds in claims(rows).items() if not holds]
        print("\n".join(f"{'missed' if claim in missed else 'holds '}  {claim}" for claim in claims(rows)))
        sys.exit(bool(missed))


def story(saved: dict[int, AdditionForCausalLM], pairs: Pairs, result: Result) -> list[dict[str, float]]:
    """Ground truth and measures side by side, a row a step."""
    logits = {step: logits_of(model, pairs) for step, model in saved.items()}
    key = key_frequencies(logits[max(saved)], pairs)
    rows = []
    for row in result.tables["steps"].to_dict("records"):
        restricted, excluded = restricted_and_excluded(logits[int(row["step"])], pairs, key)
        rows.append(
            {str(name): value for name, value in row.items()}
            | {"restricted": restricted, "excluded": excluded}
        )
    return rows


def claims(rows: Sequence[dict[str, float]]) -> dict[str, bool]:
    """The order of events: memorised, then the circuit; the accuracy comes after the end."""
    memorised = [row for row in rows if row["metric_train"] == 1]
    if not memorised:
        return {"the train rows are right": False}
    first, last = memorised[0], rows[-1]
    strongest = max(row["nlm_unembedding"] for row in memorised)
    return {
        "the train rows are right long before the end": len(memorised) >= len(rows) // 2,
        "no held-out pair in ten is right at the end": last["metric_task"] < 0.1,
        "yet of the key frequencies alone the loss has halved": last["restricted"] < first["restricted"] / 2,
        "and without them the train pairs are lost (excluded > 1)": last["excluded"] > 1,
        "soon the gradient runs along the unembedding (0.9 or more)": strongest >= 0.9,
        "later it does no more": last["nlm_unembedding"] < strongest - 0.1,
        "features move on: the kernel's CKA falls": last["kernel_cka"] < first["kernel_cka"],
        "fewer units switch near what is read": last["local_complexity"] < first["local_complexity"],
    }


def show(rows: Sequence[dict[str, float]]) -> None:
    """Print the table."""
    columns = {
        "step": "{:.0f}", "loss_train": "{:.1e}", "metric_train": "{:.2f}", "metric_task": "{:.2f}",
        "restricted": "{:.3g}", "excluded": "{:.3g}", "nlm_unembedding": "{:.2f}",
        "collapsed_train": "{:.2f}", "logit_scale_train": "{:.3g}", "local_complexity": "{:.1f}",
        "kernel_cka": "{:.2f}", "kernel_cka_debiased": "{:.2f}", "linearity_gap": "{:.2f}",
        "movement": "{:.2f}",
    }  # fmt: skip
    table = Table()
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*[text.format(row[name]) for name, text in columns.items()])
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
