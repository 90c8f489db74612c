"""Every benchmark in one command: `make bench`, or `python -m tests.benchmarks NAME…` for some of them."""

import sys

import torch

from tests.benchmarks import (
    dashboard,
    decision,
    engines,
    grafts,
    masks,
    pathways,
    routes,
    rows,
    seven_b,
    sharpness,
    startup,
)

ALL = {
    "dashboard": dashboard.main,
    "decision": decision.main,
    "engines": engines.main,
    "grafts": grafts.main,
    "masks": masks.main,
    "pathways": pathways.main,
    "routes": routes.main,
    "rows": rows.main,
    "sharpness": sharpness.main,
    "startup": startup.main,
    "7b": seven_b.main,
}


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}; known: {', '.join(ALL)}")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratios are of one run on one machine"
    )
    for name in names:
        ALL[name]()


if __name__ == "__main__":
    main()
