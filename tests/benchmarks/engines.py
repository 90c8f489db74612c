"""The intruders of a pair of 1B shape, sharded bfloat16, by one and by two Dask workers of one thread."""

import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from diagnostics.analysis import Result
from diagnostics.engines import engine
from diagnostics.intruders import intruder_dimensions
from probes import CheckpointPair
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


def timed(pair: CheckpointPair, workers: int) -> tuple[float, Result]:
    """Seconds of the analysis on so many workers, which have done some of it before."""
    from distributed import LocalCluster

    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1",
            dashboard_address="127.0.0.1:0", memory_limit=0, silence_logs=50,
        ) as cluster,
        engine(cluster.scheduler_address.replace("tcp", "dask")),
    ):  # fmt: skip
        small = {"model.layers.0.self_attn.q_proj.weight": torch.randn(700, 700)}
        for _ in range(2 * workers):  # imports and first calls
            intruder_dimensions(CheckpointPair(small, {name: 2 * W for name, W in small.items()}))
        begun = time.perf_counter()
        result = intruder_dimensions(pair)
        return time.perf_counter() - begun, result


def main() -> None:
    if importlib.util.find_spec("distributed") is None:
        print("engines left out: distributed is not installed (pip install 'tunescope[dask]')")
        return
    parameters = LAYERS * sum(rows * columns for rows, columns in SHAPES.values())
    folder = Path(tempfile.mkdtemp(prefix="tunescope-engines-", dir=os.environ.get("BENCH_DIR")))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("base", "tuned"):
            write(folder / name, tuned=name == "tuned", shapes=SHAPES, layers=LAYERS)
        pair = CheckpointPair(str(folder / "base"), str(folder / "tuned"))
        for side in (pair.base, pair.tuned):
            side.fingerprint()  # both runs find the files in the system's cache
        (one, first), (two, second) = timed(pair, 1), timed(pair, 2)
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(folder)
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, second.tables[name], check_exact=True)
    print(
        f"intruders of a pair of {parameters / 1e9:.2f} B parameters, {first.metrics['matrices']} matrices: "
        f"one Dask worker {one:.0f} s, two {two:.0f} s, {one / two:.2f} × as fast, bit for bit the same"
    )


if __name__ == "__main__":
    main()
