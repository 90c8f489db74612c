"""What `integrity` costs against reading both checkpoints once.

Reading is what an audit does in any case, to fingerprint both: every byte is hashed, on all cores. Beside it
stands the least that a program can do with every byte, adding them up. Files are in the page cache: a disk
only slows the readers, and this analysis no more than them.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tests.benchmarks import inputs

WIDTH, LAYERS, RUNS = 2048, 8, 3
DTYPES = (torch.bfloat16, torch.float32)
PAIRS = {"same": "equal", "tuned": "every entry changed", "other": "the same in the other dtype"}


def write(folder: Path, dtype: torch.dtype) -> None:
    """A base, one that equals it, one of which every entry moved, and this in the other dtype."""
    generator = torch.Generator().manual_seed(0)
    config = inputs.llama(WIDTH, LAYERS)
    config.architectures = ["LlamaForCausalLM"]
    inner = WIDTH * 11 // 4
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (inner, WIDTH),
        "mlp.up_proj": (inner, WIDTH),
        "mlp.down_proj": (WIDTH, inner),
    }
    base = {
        f"model.layers.{layer}.{name}.weight": 0.02 * torch.randn(shape, generator=generator)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = 0.02 * torch.randn(inputs.VOCABULARY, WIDTH, generator=generator)
    tuned = {name: weights + 1e-3 * weights.flip(0) for name, weights in base.items()}
    norms = ["model.norm"]
    for layer in range(LAYERS):
        norms += [f"model.layers.{layer}.{part}_layernorm" for part in ("input", "post_attention")]
    other = next(other for other in DTYPES if other != dtype)
    for side, tensors in {"base": base, "same": base, "tuned": tuned, "other": tuned}.items():
        (folder / side).mkdir(parents=True)
        kind = other if side == "other" else dtype
        stored = {name: weights.to(kind) for name, weights in tensors.items()}
        stored |= {f"{name}.weight": torch.ones(WIDTH, dtype=kind) for name in norms}
        save_file(stored, folder / side / "model.safetensors", metadata={"format": "pt"})
        config.dtype = dtype
        config.save_pretrained(folder / side)


def least(run: Callable[[], Any]) -> float:
    """Processor seconds of the cheapest of some runs: other work on the machine does not count."""
    seconds = []
    for _ in range(RUNS):
        begun = time.process_time()
        run()
        seconds.append(time.process_time() - begun)
    return min(seconds)


def add_up(pair: Any) -> None:
    """Add up all bytes of both sides, eight at a time."""
    for side in (pair.base, pair.tuned):
        for name in side.headers:
            side.source.read(name).view(-1).view(torch.int64).sum()


def hash_both(folder: Path, tuned: str) -> None:
    """The fingerprints of both sides, as an audit takes them."""
    from probes import open_checkpoint

    for side in ("base", tuned):
        open_checkpoint(folder / side).fingerprint()


def main() -> None:
    """Print the processor seconds and the ratios.

    Raises:
        SystemExit: the analysis takes longer than hashing both checkpoints once.
    """
    from diagnostics.analyses.integrity.reading import PairReader
    from probes import CheckpointPair

    table = Table(title=f"integrity against reading both once, {torch.get_num_threads()} threads")
    for column in ("pair", "GB", "added up, CPU s", "hashed, CPU s", "integrity, CPU s", "of hashing"):
        table.add_column(column, justify="left" if column == "pair" else "right")
    slower = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, dtype)
            for tuned, what in PAIRS.items():
                pair = CheckpointPair(folder / "base", folder / tuned)
                size = sum(
                    header.bytes for side in (pair.base, pair.tuned) for header in side.headers.values()
                )
                added = least(lambda pair=pair: add_up(pair))
                hashed = least(lambda folder=folder, tuned=tuned: hash_both(folder, tuned))
                spent = least(lambda pair=pair: PairReader(pair, None).run())
                label = f"{str(dtype).removeprefix('torch.')}, {what}"
                row = [f"{value:.2f}" for value in (size / 1e9, added, hashed, spent, spent / hashed)]
                table.add_row(label, *row)
                slower += [label] if spent > hashed else []
    Console(width=120).print(table)
    if slower:
        raise SystemExit(f"longer than hashing both once: {'; '.join(slower)}")


if __name__ == "__main__":
    main()
