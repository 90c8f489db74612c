"""Intruders of a pair of 1B shape, scores of rows, sharpness: by one and by two Dask workers."""

import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diagnostics.analyses.intruders.analysis import intruder_dimensions
from diagnostics.analyses.ood.analysis import likelihood_ratio_ood
from diagnostics.analyses.sharpness.analysis import layer_sharpness
from diagnostics.audit.demo import BUNDLED
from diagnostics.core.analysis import Result
from diagnostics.execution.engines import engine
from probes import CheckpointPair
from tests.benchmarks.rows import write_pair
from tests.benchmarks.seven_b import write

LAYERS = int(os.environ.get("BENCH_LAYERS", "20"))
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (2048, 2048),
    "self_attn.v_proj": (2048, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (5504, 2048),
    "mlp.up_proj": (5504, 2048),
    "mlp.down_proj": (2048, 5504),
}


# Of the model whose rows are scored, and how many of how many tokens these are.
WIDTH, DEPTH = 512, 8
ROWS, TOKENS, BATCH = 200, 128, 2048
# Of the sharpness that is measured.
SHARPNESS = {"rows": 32, "batches": 4, "batch_rows": 8, "steps": 5, "pairs": 1}


def timed(work: Callable[[], Result], workers: int, warm: Callable[[], object]) -> tuple[float, Result]:
    """Seconds of the work on so many workers of one thread, which have done something like it before."""
    from distributed import LocalCluster

    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1",
            dashboard_address="127.0.0.1:0", memory_limit=0, silence_logs=50,
        ) as cluster,
        engine(cluster.scheduler_address.replace("tcp", "dask")),
    ):  # fmt: skip
        for _ in range(2 * workers):  # imports and first calls
            warm()
        begun = time.perf_counter()
        result = work()
        return time.perf_counter() - begun, result


def compared(what: str, work: Callable[[], Result], warm: Callable[[], object]) -> None:
    """Print how much faster two workers are than one; they must agree bit for bit."""
    (alone, first), (paired, second) = (timed(work, workers, warm) for workers in (1, 2))
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name], check_exact=True)
    print(
        f"{what}: one Dask worker {alone:.0f} s, two {paired:.0f} s, {alone / paired:.2f} × as fast, "
        "bit for bit the same"
    )


def of_matrices(folder: Path) -> None:
    """The intruders of a pair of 1B shape, sharded bfloat16."""
    parameters = LAYERS * sum(rows * columns for rows, columns in SHAPES.values())
    folder.mkdir()
    for name in ("base", "tuned"):
        write(folder / name, tuned=name == "tuned", shapes=SHAPES, layers=LAYERS)
    pair = CheckpointPair(str(folder / "base"), str(folder / "tuned"))
    for side in (pair.base, pair.tuned):
        side.fingerprint()  # both runs find the files in the system's cache
    small = {"model.layers.0.self_attn.q_proj.weight": torch.randn(700, 700)}

    def warm() -> None:
        intruder_dimensions(CheckpointPair(small, {name: 2 * W for name, W in small.items()}))

    what = f"intruders of a pair of {parameters / 1e9:.2f} B parameters, {len(pair.matrices)} matrices"
    compared(what, lambda: intruder_dimensions(pair), warm)


def of_batches(folder: Path) -> None:
    """Likelihood scores of rows, by batches; each worker loads the pair, which counts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "base")
    write_pair(folder, width=WIDTH, layers=DEPTH, vocabulary=len(tokenizer))
    for name in ("base", "tuned"):
        tokenizer.save_pretrained(folder / name)
    pair = CheckpointPair(folder / "base", folder / "tuned")
    tokenizer.model_max_length = 10**6  # of the model that it was made for
    text = " ".join(json.loads(line)["text"] for line in (BUNDLED / "keep.jsonl").open(encoding="utf-8"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [tokenizer.decode(ids[i * 7 : i * 7 + TOKENS]) for i in range(2 * ROWS)]
    task, other = rows[:ROWS], rows[ROWS:]
    small = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r1")

    def score(pair: CheckpointPair, task: list[str], other: list[str]) -> Result:
        return likelihood_ratio_ood(pair, task, other, max_length=TOKENS, batch_tokens=BATCH, draws=2)

    compared(
        f"scores of {len(rows)} rows of {TOKENS} tokens by two models of {DEPTH} layers and width {WIDTH}",
        lambda: score(pair, task, other),
        lambda: score(small, task[:20], other[:20]),
    )


def of_layers() -> None:
    """Sharpness of a bundled pair, by layer, place and batch."""
    pair = CheckpointPair(BUNDLED / "base", BUNDLED / "full")

    def measure(**settings: Any) -> Result:
        return layer_sharpness(pair, BUNDLED / "task.jsonl", curvature=False, **settings)

    compared(
        f"sharpness of the bundled pair, {SHARPNESS['rows']} rows",
        lambda: measure(**SHARPNESS),
        lambda: measure(rows=4, batches=1, batch_rows=2, steps=2, pairs=0, alphas=(0.5,)),
    )


def main() -> None:
    if importlib.util.find_spec("distributed") is None:
        print("engines left out: distributed is not installed (pip install 'tunescope[dask]')")
        return
    folder = Path(tempfile.mkdtemp(prefix="tunescope-engines-", dir=os.environ.get("BENCH_DIR")))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        of_layers()
        of_batches(folder / "rows")
        of_matrices(folder / "matrices")
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
