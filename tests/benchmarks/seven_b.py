"""An audit of a pair of 7B shape, sharded bfloat16: time, bytes, peak memory, and how the time splits."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS = int(os.environ.get("BENCH_LAYERS", "32"))
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
MEASURE = """
import json, resource, sys, time
from probes import CheckpointPair
reading, size = 0.0, 0  # in a thread of its own, beside the arithmetic
read = CheckpointPair.read
def timed(self, name):
    global reading, size
    begun = time.perf_counter()
    pair = read(self, name)
    reading += time.perf_counter() - begun
    size += sum(W.numel() * W.element_size() for W in pair)
    return pair
CheckpointPair.read = timed
from diagnostics.analyses.intruders.analysis import intruder_dimensions
begun = time.perf_counter()
result = intruder_dimensions(CheckpointPair(*sys.argv[1:3]), device=sys.argv[3])
total = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"total": total, "reading": reading, "bytes": size, "peak_gb": peak,
                  "tiers": result.tables["vectors"]["tier"].value_counts().to_dict(), **result.metrics}))
"""


def spectral(rows: int, columns: int, tuned: bool, generator: torch.Generator) -> torch.Tensor:
    """A matrix with the spectrum of a trained one, bfloat16; tuned adds four directions to these draws."""

    def unit(length: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(length, generator=generator), dim=0)

    W = torch.randn(rows, columns, generator=generator) / columns**0.5
    W *= torch.logspace(0, -0.4, columns)
    for i in range(40):
        W += 4 * (1 + i) ** -0.7 * torch.outer(unit(rows), unit(columns))
    for size in (3.5, 2.2, 1.7, 1.4):
        spike = torch.outer(unit(rows), unit(columns))
        if tuned:
            W += size * spike
    return W.bfloat16()


def write(directory: Path, tuned: bool, shapes: Mapping[str, tuple[int, int]], layers: int) -> None:
    """One shard a layer; layers share their draws, rolled, so that writing takes less than auditing."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    drawn = {name: spectral(*shape, tuned, generator) for name, shape in shapes.items()}
    for layer in range(layers):
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {
            f"model.layers.{layer}.{name}.weight": W.roll(97 * layer, 0).contiguous()
            for name, W in drawn.items()
        }
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )


def audited(shapes: Mapping[str, tuple[int, int]], layers: int, device: str = "cpu") -> dict[str, Any] | None:
    """What the intruders of a pair of some shape cost, in a process of its own; None without room for it."""
    needed = 2 * 2 * layers * sum(rows * columns for rows, columns in shapes.values())
    folder = Path(tempfile.mkdtemp(prefix="tunescope-pair-", dir=os.environ.get("BENCH_DIR")))
    try:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * needed:
            print(f"left out: it needs {needed / 1e9:.0f} GB of disk, {folder} has {free / 1e9:.0f}")
            return None
        for name in ("base", "tuned"):
            write(folder / name, tuned=name == "tuned", shapes=shapes, layers=layers)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder / "base"), str(folder / "tuned"), device],
            check=True,
            capture_output=True,
            text=True,
        )
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    return seen


def cost_text(seen: Mapping[str, Any]) -> str:
    """The cost in words."""
    return (
        f"{seen['total']:.0f} s; reading {seen['bytes'] / 1e9:.1f} GB took {seen['reading']:.0f} s of them, "
        f"beside the arithmetic, beyond which there are {seen['total'] - seen['reading']:.0f} s; peak RSS "
        f"{seen['peak_gb']:.2f} GB\n"
        f"  {seen['intruders']} intruders in {seen['matrices']} matrices; vectors by tier: {seen['tiers']}; "
        f"{seen.get('verified', 0)} matrices decided again, {seen.get('disagreements', 0)} differed"
    )


def main() -> None:
    seen = audited(SHAPES, LAYERS)
    if seen is None:
        return
    parameters = LAYERS * sum(rows * columns for rows, columns in SHAPES.values())
    shape = f"pair of {parameters / 1e9:.1f} B parameters, {LAYERS} bfloat16 shards each"
    print(f"{shape} (limit 3 GB): {cost_text(seen)}")


if __name__ == "__main__":
    main()
