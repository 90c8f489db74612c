"""What docs/memory.md states: the anonymous memory that commands take, and what a cache of factors saves."""

import ctypes
import gc
import json
import math
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.contest import alone, status
from tests.benchmarks.decision import trained_like
from tests.diagnostics import frugal

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
# Of the commands; and of the matrices under the adapters.
SIZE = 4096
SHAPES = {"q_proj": (2048, 2048), "o_proj": (2048, 2048), "up_proj": (4096, 2048), "down_proj": (2048, 4096)}
RANK = 8
# Seconds between two looks at what a process holds.
LOOK = 0.002


def pair(folder: Path, size: int) -> None:
    """The pair of the streaming tests, in bfloat16, as small as it is there and with larger matrices."""
    for subfolder, matrix_size in (("small", frugal.SIZE), ("large", size)):
        (folder / subfolder).mkdir()
        resized(matrix_size)
        frugal.write_pair(folder / subfolder, torch.bfloat16)


def resized(size: int) -> None:
    """Let the commands know the size of the matrices that they read."""
    frugal.SIZE, frugal.LARGEST = size, 4 * size**2
    frugal.CHECKPOINT = frugal.LAYERS * len(frugal.PARTS) * frugal.LARGEST


def held(folder: Path, name: str, size: int) -> float:
    """The most that a command holds beyond the start, in float32 copies of its largest matrix.

    It has run on the small pair before, so that libraries which it loads are no part of that.
    """
    frugal.commands(folder / "small")[name]()
    resized(size)
    run = frugal.commands(folder / "large")[name]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used again unseen
    begun, most, over = status("RssAnon"), [0.0], threading.Event()

    def look() -> None:
        while not over.wait(LOOK):
            most[0] = max(most[0], status("RssAnon"))

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    run()
    over.set()
    watching.join()
    for subfolder in ("small", "large"):
        shutil.rmtree(folder / subfolder / "out", ignore_errors=True)
    return (most[0] - begun) / frugal.LARGEST


def commands(console: Console) -> None:
    """Each command beside what the page says of it."""
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d.]+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    table = Table(title=f"anonymous memory, in float32 copies of a matrix of {SIZE} x {SIZE} in bfloat16")
    for column in ("command", "measured", "stated", "at most"):
        table.add_column(column, justify="left" if column == "command" else "right")
    with tempfile.TemporaryDirectory() as folder:
        alone(pair, Path(folder), SIZE, threads=1)
        for name, stated, most in rows:
            copies = alone(held, Path(folder), name, SIZE, threads=1)
            table.add_row(name, f"{copies:.1f}", stated, most)
    console.print(table)


def adapters(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A base of four matrices, and two adapters on it."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    names = {
        part: f"model.layers.0.{'self_attn' if len(part) == 6 else 'mlp'}.{part}.weight" for part in shapes
    }
    base = {names[part]: trained_like(*shape, False, generator)[1] for part, shape in shapes.items()}
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for number in range(2):
        directory = folder / f"adapter-{number}"
        directory.mkdir()
        weights = {}
        for part, (rows, columns) in shapes.items():
            stem = f"base_model.model.{names[part].removesuffix('.weight')}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            weights[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / rows**0.5
        save_file(weights, directory / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(shapes)}
        (directory / "adapter_config.json").write_text(json.dumps(config))


def audited(folder: Path, number: int, cached: bool, method: str) -> tuple[float, dict[str, Any]]:
    """Processor seconds of an adapter's analysis, and what it found."""
    from diagnostics import intruder_dimensions
    from probes import CheckpointPair

    opened = CheckpointPair(folder / "base", folder / f"adapter-{number}")
    begun = time.process_time()
    result = intruder_dimensions(opened, method=method, cache=folder / f"cache-{method}" if cached else None)
    return time.process_time() - begun, dict(result.metrics)


def cache(console: Console) -> None:
    """The second adapter on a base, with what the first left in the cache and without."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(adapters, folder, SHAPES, threads=1)
        run: Callable[..., Any] = partial(alone, audited, folder, threads=1)
        for method in ("certified", "exact"):
            run(0, True, method)
            times: dict[bool, list[float]] = {False: [], True: []}
            results: dict[bool, dict[str, Any]] = {}
            for _ in range(2):
                for cached, spent in times.items():
                    seconds, metrics = run(1, cached, method)
                    spent.append(seconds)
                    results[cached] = metrics
                assert results[True] == results[False], "the cache changed what was found"
            least = {cached: min(spent) for cached, spent in times.items()}
            size = sum(
                file.stat().st_size for file in (folder / f"cache-{method}").rglob("*") if file.is_file()
            )
            total = sum(4 * math.prod(shape) for shape in SHAPES.values())
            console.print(
                f"second adapter, method {method}: {least[False]:.1f} s of one processor, with a cache "
                f"{least[True]:.1f} s: 1 / {least[False] / least[True]:.1f}; it has {size / total:.2f} of "
                "the base's bytes"
            )


def main() -> None:
    console = Console(width=150)
    commands(console)
    cache(console)


if __name__ == "__main__":
    main()
