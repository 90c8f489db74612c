"""Edit distances between all pairs of pathways, against a plain Python dynamic programme."""

import time

import numpy as np
from rich.console import Console
from rich.table import Table

from diagnostics.analyses.pathways.pathway import distances, lengths, pathways

PATHWAYS, LAYERS, EXPERTS, KEPT = 1000, 8, 32, 8
# The plain programme takes minutes for all pairs; it is timed on these and scaled by their number.
FEW = 400


def plainly(first: str, second: str) -> int:
    """Levenshtein's distance, one row of the table at a time."""
    above = list(range(len(second) + 1))
    for row, a in enumerate(first, start=1):
        current = [row]
        for column, b in enumerate(second, start=1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (a != b)))
        above = current
    return above[-1]


def random_pathways() -> list[str]:
    """Pathways of 64 symbols: 8 layers, in each of which 8 of 32 experts hold 0.7 alike."""
    generator = np.random.default_rng(0)
    weights = np.full((PATHWAYS, LAYERS, EXPERTS), 0.2 / (EXPERTS - KEPT), dtype=np.float32)
    for sample in range(PATHWAYS):
        for layer in range(LAYERS):
            chosen = generator.permutation(EXPERTS)[:KEPT]
            # 7 of 8 reach 0.7 exactly where they are alike, so that these fall a little.
            weights[sample, layer, chosen] = 0.1 - 0.001 * np.arange(KEPT)
    words = pathways(weights).strings()
    assert (lengths(words) == LAYERS * KEPT).all()
    return words


def main() -> None:
    console = Console(width=150)
    words = random_pathways()
    begun = time.perf_counter()
    matrix = distances(words)
    ours = time.perf_counter() - begun
    generator = np.random.default_rng(1)
    pairs = generator.integers(PATHWAYS, size=(FEW, 2))
    begun = time.perf_counter()
    expected = [plainly(words[row], words[column]) for row, column in pairs]
    per_pair = (time.perf_counter() - begun) / FEW
    assert expected == matrix[pairs[:, 0], pairs[:, 1]].tolist()
    count = PATHWAYS * (PATHWAYS - 1) // 2
    table = Table(title=f"Edit distances of {PATHWAYS:,} pathways of {LAYERS * KEPT} symbols, one thread")
    for column in ("", "pairs timed", "microseconds a pair", "all pairs, seconds", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    naive = per_pair * count
    table.add_row("plain Python", f"{FEW}", f"{per_pair * 1e6:.0f}", f"{naive:.0f} (scaled)", "")
    table.add_row(
        "tunescope", f"{count:,}", f"{ours / count * 1e6:.2f}", f"{ours:.2f}",
        f"{naive / ours:.0f} × (target 100)",
    )  # fmt: skip
    console.print(table)
    console.print(f"Pairs on which the two differ, of {FEW}: 0")


if __name__ == "__main__":
    main()
