"""The one table: each analysis against what a user would run instead, with time, memory and agreement."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import of_gradients, of_rows, of_weights
from tests.benchmarks.contest import Contest, Line, held, peer_version

CONTESTS: list[Contest] = [*of_weights.CONTESTS, *of_rows.CONTESTS, *of_gradients.CONTESTS]
COLUMNS = (
    "analysis", "measured", "instead", "theirs, s", "ours, s", "ratio", "theirs, GB", "ours, GB", "agreement",
)  # fmt: skip


def row(line: Line) -> list[str]:
    """A line in words."""
    contest = line.contest
    peer = contest.peer
    if line.theirs is not None:
        peer = " ".join([peer, *(str(peer_version(package)) for package in contest.packages)])
    agreement = line.agreement.text + (f" ({contest.apart})" if contest.apart and line.ours else "")
    if line.theirs is None or line.ours is None:
        return [contest.analysis, contest.what, peer, *["–"] * 5, agreement]
    return [
        contest.analysis, contest.what, peer, f"{line.theirs.seconds:.2f}", f"{line.ours.seconds:.2f}",
        f"{line.theirs.seconds / line.ours.seconds:.1f} ×", f"{line.theirs.memory / 1e9:.2f}",
        f"{line.ours.memory / 1e9:.2f}", agreement,
    ]  # fmt: skip


def table_of(lines: list[Line], threads: int, quick: bool) -> Table:
    """All lines, as they are shown."""
    size = "quick: small inputs, whose ratios say little" if quick else "full size"
    table = Table(
        title=f"tunescope against what a user would run instead: same files, {threads} threads each, {size}; "
        "least of the runs; memory beyond the start",
        show_lines=True,
    )
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if 3 <= index <= 7 else "left", overflow="fold")
    for line in lines:
        table.add_row(*row(line))
    return table


def main(quick: bool = False, only: str = "") -> None:
    """Hold every contest and print the table.

    Raises:
        SystemExit: a side failed, or two answers do not agree.
    """
    console = Console(width=190)
    threads = torch.get_num_threads()
    lines = []
    for contest in CONTESTS:
        if only and only not in f"{contest.analysis} {contest.peer}":
            continue
        lines.append(held(contest, quick=quick, threads=threads, rounds=1 if quick else 2))
        console.print(" | ".join(row(lines[-1])), highlight=False, soft_wrap=True)
    console.print(table_of(lines, threads, quick))
    failed = [f"{line.contest.analysis} against {line.contest.peer}" for line in lines if line.failed]
    if failed:
        raise SystemExit(f"{len(failed)} contests failed or do not agree: {'; '.join(failed)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    main(given.quick, given.only)
