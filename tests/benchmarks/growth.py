"""How cost grows: time and memory of four analyses against the parameters of a pair.

`python -m tests.benchmarks.growth` measures and prints; `--write docs` also writes cost.csv, what was
measured, and from it cost.md and cost.png; `--from docs` writes these two again from what was measured.
"""

import argparse
import csv
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tests.benchmarks import inputs
from tests.benchmarks.contest import SideError, alone, measured
from tests.benchmarks.seven_b import spectral

# Width and layers of Llamas with 12.25 width² parameters a layer: 10 M, 32 M, 101 M, 308 M, 1.03 B; on a GPU
# also one of 8 B shape.
SIZES = ((256, 12), (512, 10), (768, 14), (1024, 24), (2048, 20))
LARGE = (4096, 34)
ROWS, LEVELS = 64, tuple(round(0.04 * level, 2) for level in range(1, 24))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an analysis of a pair cost.

    Attributes:
        parameters: in the matrices of the blocks.
        work: operations of `intruders`, `drift` and `ood`, bytes read of `sparsity`: see `work_of`.
        memory: the most beyond the start, in bytes; on a GPU what torch allocated there.
        largest: entries of the largest matrix.
        model: bytes of all weights of one model, in float32.
        load: of the machine over the last minute when it ended, its own included.
    """

    analysis: str
    device: str
    threads: int
    parameters: int
    tokens: int
    work: float
    seconds: float
    memory: float
    largest: int
    model: int
    load: float


def work_of(analysis: str, parameters: int, tokens: int, head: int) -> float:
    """What an analysis does at least, counted.

    Args:
        parameters: in the matrices of the blocks.
        tokens: that both models read.
        head: parameters of the output matrix.
    """
    return {
        # 7 products W (Wᵀ X) of base and 5 of tuned with 32 columns, 12 direct steps with 16.
        "intruders": (12 * 32 + 12 * 16) * 4.0 * parameters,
        # Two passes over both sides, 2 bytes a weight: one counts bit patterns, one what equals a threshold.
        "sparsity": 2 * 2 * 2.0 * parameters,
        # A multiplication and an addition a weight and token, for base and for tuned.
        "drift": 2 * 2.0 * parameters * tokens,
        "ood": 2 * 2.0 * (parameters + head) * tokens,
    }[analysis]


def write_pair(folder: Path, width: int, layers: int) -> None:
    """A pair in bfloat16, a shard a layer; layers share their draws, rolled."""
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (width * 11 // 4, width) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (width, width * 11 // 4)
    for side in ("base", "tuned"):
        (folder / side).mkdir()
        generator = torch.Generator().manual_seed(0)
        drawn = {name: spectral(*shape, side == "tuned", generator) for name, shape in shapes.items()}
        gain = torch.ones(width, dtype=torch.bfloat16)
        table = 0.02 * torch.randn(inputs.VOCABULARY, width, generator=torch.Generator().manual_seed(1))
        shards = {"model-ends": {"model.norm.weight": gain}}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            shards["model-ends"][name] = table.bfloat16().clone()
        weight_map = dict.fromkeys(shards["model-ends"], "model-ends.safetensors")
        for layer in range(layers):
            tensors = {f"{name}.weight": W.roll(97 * layer, 0).contiguous() for name, W in drawn.items()}
            tensors |= {"input_layernorm.weight": gain, "post_attention_layernorm.weight": gain.clone()}
            tensors = {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
            save_file(tensors, folder / side / f"model-{layer}.safetensors", metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
        save_file(shards["model-ends"], folder / side / "model-ends.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / side / "model.safetensors.index.json").write_text(json.dumps(index))
        config = inputs.llama(width, layers)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / side)
        inputs.words(folder / side)
    inputs.texts(folder / "rows.jsonl", ROWS)


def tokens_of(folder: Path) -> int:
    """Tokens of the rows: a word is one."""
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(len(json.loads(line)["text"].split()) for line in lines)


def intruders(device: str, folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.intruders.analysis import intruder_dimensions
    from probes import CheckpointPair

    return lambda: intruder_dimensions(
        CheckpointPair(folder / "base", folder / "tuned"), device=device
    ).metrics["intruders"]


def sparsity(device: str, folder: Path) -> Callable[[], Any]:
    """The cuts of 23 levels of both sides; it does not use a device."""
    from probes import CheckpointPair
    from probes.checkpoints.prune import magnitude_order

    def run() -> int:
        pair = CheckpointPair(folder / "base", folder / "tuned")
        return sum(len(magnitude_order(side).cuts(LEVELS)) for side in (pair.base, pair.tuned))

    return run


def drift(device: str, folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.drift.analysis import representation_drift
    from probes import CheckpointPair

    return lambda: representation_drift(
        CheckpointPair(folder / "base", folder / "tuned"),
        str(folder / "rows.jsonl"),
        device=device,
        dtype="float32",
    ).metrics["layers"]


def ood(device: str, folder: Path) -> Callable[[], Any]:
    """The likelihood ratios of all rows; what is made of them does not grow with the model."""
    from probes.checkpoints.pair import CheckpointPair
    from probes.models.runnable import RunnablePair
    from probes.text.encode import encode
    from probes.text.rows import read_task
    from tests.benchmarks.rows import ours

    def run() -> int:
        pair = CheckpointPair(folder / "base", folder / "tuned")
        with RunnablePair(pair, device=device, dtype="float32") as runnable:
            task = read_task(str(folder / "rows.jsonl"))
            return len(ours(runnable, encode(task, runnable.tokenizer, max_length=runnable.context)))

    return run


SIDES = {"intruders": intruders, "sparsity": sparsity, "drift": drift, "ood": ood}


def on_gpu(side: Callable[[Path], Callable[[], Any]], folder: Path) -> tuple[tuple[float, float], Any]:
    """As `measured`, with what torch allocated on the GPU; a first run warms up."""
    run = side(folder)
    run()

    def timed() -> Any:
        answer = run()
        torch.cuda.synchronize()
        return answer

    torch.cuda.reset_peak_memory_stats()
    spent, answer = measured(lambda _: timed, folder)
    return (spent.seconds, torch.cuda.max_memory_allocated()), answer


def costs(width: int, layers: int, device: str, threads: int, folder: Path) -> list[Cost]:
    """All analyses of one pair."""
    tokens = tokens_of(folder)
    parameters, head = (4 + 3 * 11 / 4) * width**2 * layers, inputs.VOCABULARY * width
    pair_costs = []
    for name, side in SIDES.items():
        if name == "sparsity" and device != "cpu":
            continue
        how = measured if device == "cpu" else on_gpu
        try:
            (seconds, memory), _ = alone(how, partial(side, device), folder, threads=threads)
        except SideError as error:
            print(f"{name} of {parameters / 1e6:.0f} M parameters on {device} FAILED: {error}", flush=True)
            continue
        read = tokens if name in ("drift", "ood") else 0
        pair_costs.append(
            Cost(
                analysis=name, device=device, threads=threads, parameters=round(parameters), tokens=read,
                work=work_of(name, round(parameters), read, head), seconds=seconds, memory=memory,
                largest=width * (width * 11 // 4), model=round(4 * (parameters + 2 * head)),
                load=os.getloadavg()[0],
            )
        )  # fmt: skip
    return pair_costs


def measure(sizes: Sequence[tuple[int, int]], console: Console) -> list[Cost]:
    """All sizes that the disk holds, on the CPU and on a GPU where there is one."""
    threads, all_costs = torch.get_num_threads(), []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if len(devices) == 1:
        console.print("no GPU is at hand: the CPU alone is measured")
    for width, layers in (*sizes, *([LARGE] if len(devices) > 1 and sizes == SIZES else [])):
        with tempfile.TemporaryDirectory(prefix="tunescope-growth-") as name:
            needed = 4 * 12.25 * width**2 * layers
            if shutil.disk_usage(name).free < 1.2 * needed:
                console.print(f"{width} × {layers} left out: it needs {needed / 1e9:.0f} GB of disk")
                continue
            alone(write_pair, Path(name), width, layers, threads=threads)
            for device in devices:
                if (width, layers) == LARGE and device == "cpu":
                    continue
                pair_costs = costs(width, layers, device, threads, Path(name))
                all_costs += pair_costs
                times = ", ".join(f"{cost.analysis} {cost.seconds:.1f} s" for cost in pair_costs)
                console.print(f"width {width}, {layers} layers, on {device}: {times}", highlight=False)
    return all_costs


def table_of(measurements: Sequence[Cost]) -> Table:
    """What was measured."""
    table = Table(title=f"How cost grows: {ROWS} rows, {len(LEVELS)} levels")
    for column in ("analysis", "device", "threads", "parameters, M", "seconds", "G of work a second", "GB"):
        table.add_column(column, justify="right" if column not in ("analysis", "device") else "left")
    for cost in sorted(measurements, key=lambda cost: (cost.analysis, cost.device, cost.parameters)):
        table.add_row(
            cost.analysis, cost.device, f"{cost.threads}", f"{cost.parameters / 1e6:.2g}",
            f"{cost.seconds:.2f}", f"{cost.work / cost.seconds / 1e9:.1f}",
            "" if math.isnan(cost.memory) else f"{cost.memory / 1e9:.2f}",
        )  # fmt: skip
    return table


def save(measurements: Sequence[Cost], file: Path) -> None:
    """What was measured, a row each."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(Cost)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            asdict(cost)
            | {
                "load": f"{cost.load:.2f}",
                "work": f"{cost.work:.6g}",
                "seconds": f"{cost.seconds:.4g}",
                "memory": f"{cost.memory:.4g}",
            }
            for cost in measurements
        )


def load(file: Path) -> list[Cost]:
    """What `save` wrote."""
    kinds = {field.name: field.type for field in fields(Cost)}
    with file.open(newline="", encoding="utf-8") as given:
        return [
            Cost(**{name: kinds[name](value) for name, value in row.items()})  # type: ignore[operator]
            for row in csv.DictReader(given)
        ]


def main(quick: bool = False, write: Path | None = None, sizes: int = len(SIZES)) -> None:
    """Measure, print, and write the page and its figure where that is asked for.

    Args:
        sizes: how many of the sizes, the smallest first.

    Raises:
        SystemExit: an analysis could not be measured.
    """
    from tests.benchmarks import cost

    console = Console(width=150)
    chosen = ((64, 2), (128, 2)) if quick else SIZES[:sizes]
    measurements = measure(chosen, console)
    console.print(table_of(measurements))
    console.print(cost.page(measurements), highlight=False, markup=False, soft_wrap=True)
    if write is not None:
        save(measurements, write / "cost.csv")
        cost.write(measurements, write)
    missing = len(chosen) * len(SIDES) - sum(measurement.device == "cpu" for measurement in measurements)
    if missing > 0:
        raise SystemExit(f"{missing} were not measured, see above")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", type=Path, metavar="DIR", help="measure, and write the page there")
    parser.add_argument("--from", type=Path, metavar="DIR", dest="again", help="write the page there again")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many, the smallest first")
    given = parser.parse_args()
    if given.again is not None:
        from tests.benchmarks import cost

        cost.write(load(given.again / "cost.csv"), given.again)
    else:
        main(given.quick, given.write, given.sizes)
