"""Sharpness of every layer of a 12-layer model: blocks before a layer run once, against full passes."""

import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diagnostics.analyses.sharpness.layer_sharpness import RowBatch, SharpnessSettings, batch_sharpness
from diagnostics.evaluation.row_losses import EncodedTask
from probes.models.interpolated import layers_of
from probes.passes.objective import Objective
from probes.text.batches import Example
from probes.text.rows import task_of

LAYERS, WIDTH, ROWS, LENGTH, STEPS = 12, 256, 16, 32, 10


def model() -> Any:
    """A random Llama of 12 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH * 8 // 3, num_hidden_layers=LAYERS, num_attention_heads=4,
        vocab_size=1024, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def task() -> EncodedTask:
    """One batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(
            ids=torch.randint(1024, (LENGTH,), generator=generator).tolist(),
            scored=[False] + [True] * (LENGTH - 1), row=row,
        )
        for row in range(ROWS)
    ]  # fmt: skip
    return EncodedTask(
        task=task_of(["x"] * ROWS), examples=examples, classes=(), mask_id=None, batch_tokens=2**14, notes=()
    )


def timed(llama: Any, batch: RowBatch, *, cached: bool, frozen: bool) -> tuple[float, dict[str, float]]:
    """Seconds of every block, and the worst rises.

    Args:
        cached: blocks before a layer run once.
        frozen: gradients are taken of the layer alone; else of all weights, as a plain backward pass does.
    """
    settings = SharpnessSettings(rhos=(0.5,), steps=STEPS, pairs=0, cached=cached)
    blocks = [layer for layer in layers_of(llama) if layer.name.startswith("block")]
    rises: dict[str, float] = {}
    llama.requires_grad_(not frozen)
    begun = time.perf_counter()
    for (name, _), row in batch_sharpness(llama, blocks, batch, 0, settings, joint=False).items():
        rises[name] = row["worst"]
    seconds = time.perf_counter() - begun
    llama.requires_grad_(False)
    llama.zero_grad(set_to_none=True)
    return seconds, rises


def main() -> None:
    console, llama = Console(width=150), model()
    batch = RowBatch(Objective(task()), tuple(range(ROWS)))
    ways = {
        "full passes forward and back": {"cached": False, "frozen": False},
        "full passes, other weights frozen": {"cached": False, "frozen": True},
        "blocks before the layer once": {"cached": True, "frozen": True},
    }
    timed(llama, batch, cached=True, frozen=True)  # warm up
    rounds = [{name: timed(llama, batch, **how) for name, how in ways.items()} for _ in range(3)]
    table = Table(
        title=f"Worst rise of each of {LAYERS} blocks: {STEPS} steps, {ROWS} rows of {LENGTH} tokens"
    )
    for column in ("", "seconds, best of 3", "ratio", "largest relative difference"):
        table.add_column(column, justify="right" if column else "left")
    first = min(timings["full passes forward and back"][0] for timings in rounds)
    exact = rounds[0]["full passes forward and back"][1]
    for name in ways:
        seconds = min(timings[name][0] for timings in rounds)
        values = rounds[0][name][1]
        apart = max(abs(values[block] / exact[block] - 1) for block in exact)
        target = " (target 1.8)" if name.startswith("blocks") else ""
        table.add_row(name, f"{seconds:.2f}", f"{first / seconds:.2f} ×{target}", f"{apart:.1e} (limit 1e-5)")
    console.print(table)
