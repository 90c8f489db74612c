"""Every benchmark: `make bench`, or `python -m tests.benchmarks [--quick] NAME…` for some of them.

A section that fails says why, and the others go on; the exit code is then 1. The one table, each analysis
against what a user would run instead, is the last that is printed.
"""

import argparse
import time
import traceback
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from tests.benchmarks import (
    against,
    dashboard,
    decision,
    engines,
    gpu,
    grafts,
    growth,
    integrity,
    masks,
    memory,
    pathways,
    routes,
    rows,
    seven_b,
    sharpness,
    startup,
    stated,
)

ALL: dict[str, ModuleType] = {
    "dashboard": dashboard,
    "decision": decision,
    "engines": engines,
    "gpu": gpu,
    "grafts": grafts,
    "integrity": integrity,
    "masks": masks,
    "memory": memory,
    "pathways": pathways,
    "routes": routes,
    "rows": rows,
    "sharpness": sharpness,
    "startup": startup,
    "stated": stated,
    "7b": seven_b,
    "growth": growth,
    "against": against,
}
# Small sizes, for whether a section works and not for what it measures.
QUICK: dict[str, dict[str, Any]] = {
    "dashboard": {"RUNS": 1, "LAYERS": 12, "ROWS": 300},
    "decision": {"SHAPES": ((256, 256),), "TALL": (512, 256), "SIZE": 64, "WIDTH": 256},
    "engines": {
        "LAYERS": 2,
        "SHAPES": {"self_attn.q_proj": (512, 512), "mlp.up_proj": (1376, 512)},
        "WIDTH": 64,
        "DEPTH": 2,
        "ROWS": 20,
        "SHARPNESS": {"rows": 8, "batches": 1, "batch_rows": 4, "steps": 2, "pairs": 0},
    },
    "integrity": {"WIDTH": 512, "LAYERS": 2},
    "masks": {"WIDTH": 64, "DEPTH": 2, "LEVELS": [0.3, 0.6, 0.9]},
    "memory": {
        "SIZE": 1024,
        "SHAPES": {
            "q_proj": (256, 256),
            "o_proj": (256, 256),
            "up_proj": (512, 256),
            "down_proj": (256, 512),
        },
    },
    "pathways": {"PATHWAYS": 50, "FEW": 20},
    "routes": {"LAYERS": 2, "WIDTH": 64, "ROWS": 16, "LENGTH": 32, "ROUNDS": 1},
    "rows": {
        "SIZES": ((64, 2),),
        "HEAVY": (256, 2),
        "WATCHED": (64, 2),
        "ROWS": 10,
        "CAPTURED": (10, 20),
        "DETECTED": 10**4,
    },
    "sharpness": {"LAYERS": 3, "WIDTH": 64, "ROWS": 4, "STEPS": 3},
    "startup": {"RUNS": 1},
    "stated": {"PASSES": False},
    "7b": {"LAYERS": 1, "SHAPES": {"self_attn.q_proj": (512, 512), "mlp.up_proj": (1376, 512)}},
}
# Those that take it as an argument.
SMALL: dict[str, dict[str, Any]] = {
    "grafts": {"width": 128, "layers": 2},
    "growth": {"quick": True},
    "against": {"quick": True},
}


def sections(names: list[str], quick: bool) -> dict[str, Callable[[], None]]:
    """What is to be run, in the order of `ALL`."""
    chosen = {}
    for name, module in ALL.items():
        if names and name not in names:
            continue
        if quick:
            for constant, value in QUICK.get(name, {}).items():
                assert hasattr(module, constant), (name, constant)
                setattr(module, constant, value)
        chosen[name] = partial(module.main, **(SMALL.get(name, {}) if quick else {}))
    return chosen


def run(chosen: dict[str, Callable[[], None]]) -> list[str]:
    """Run the sections one after another, and give those that failed."""
    failed = []
    for name, section in chosen.items():
        print(f"\n== {name}", flush=True)
        begun = time.perf_counter()
        try:
            section()
        except (Exception, SystemExit) as error:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            print(f"{name} FAILED: {error}", flush=True)
            failed.append(name)
        print(f"-- {name}: {time.perf_counter() - begun:.0f} s", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(ALL)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in ALL]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}; known: {', '.join(ALL)}")
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads; ratios are of one run on one machine")
    failed = run(sections(given.names, given.quick))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
