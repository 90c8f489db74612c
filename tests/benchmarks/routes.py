"""Routes of a mixture of experts: capturing them against the plain forward pass."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from probes.experts.routes import capture_routes
from probes.models.body import run
from probes.text.batches import Example, batches

LAYERS, WIDTH, EXPERTS, CHOSEN, ROWS, LENGTH, ROUNDS = 4, 256, 64, 8, 128, 128, 3


def model() -> Any:
    """A random OLMoE with the experts of the released one, narrower and with a quarter of its layers."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH // 2, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_experts=EXPERTS, num_experts_per_tok=CHOSEN, vocab_size=1024, max_position_embeddings=LENGTH,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return OlmoeForCausalLM(config).eval()


def examples() -> list[Example]:
    """Rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example(
            ids=torch.randint(1024, (LENGTH,), generator=generator).tolist(),
            scored=[False] + [True] * (LENGTH - 1), row=row,
        )
        for row in range(ROWS)
    ]  # fmt: skip


def plain(olmoe: Any, rows: list[Example], *, logits: bool) -> None:
    """The forward pass alone, with or without logits."""
    for batch in batches(rows, tokens=2048, pad_id=0):
        if logits:
            with torch.no_grad():
                olmoe(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        else:
            run(olmoe, batch)


def timed(way: Callable[[], Any]) -> float:
    """Seconds of processor time, of which others that run beside take none."""
    begun = time.process_time()
    way()
    return time.process_time() - begun


def main() -> None:
    console, olmoe, rows = Console(width=150), model(), examples()
    ways: dict[str, Callable[[], Any]] = {
        "plain forward": partial(plain, olmoe, rows, logits=True),
        "plain forward without logits": partial(plain, olmoe, rows, logits=False),
        "capture through the bridge": partial(capture_routes, olmoe, rows, tokens=2048),
        "capture at the routers themselves": partial(capture_routes, olmoe, rows, tokens=2048, bridge=False),
    }
    assert capture_routes(olmoe, rows[:1]).via == "bridge"
    for way in ways.values():
        way()  # warm up
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(ROUNDS)]
    table = Table(
        title=f"Routes of {ROWS} rows of {LENGTH} tokens: {LAYERS} layers, {CHOSEN} of {EXPERTS} experts"
    )
    for column in ("", f"processor seconds, best of {ROUNDS}", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    best = {name: min(timings[name] for timings in rounds) for name in ways}
    for name, seconds in best.items():
        ratio = f"{seconds / best['plain forward']:.2f} ×" + (" (target 1.2)" if "capture" in name else "")
        table.add_row(name, f"{seconds:.2f}", ratio)
    console.print(table)
