"""Every table and metric of the bundled pairs and series, of two versions of the code, compared bit for bit.

A change that moves code or renames it changes no number. To show it, write the numbers before and after:

    python -m tests.reference write before/      # in a checkout of the version before, on the same machine
    python -m tests.reference write after/       # in this one; `write after/ skills ood` runs only these two
    python -m tests.reference compare before/ after/

Only exported names are used, so that this file also runs when copied into a checkout that lacks it. Rows and
search steps are few: the code that runs is the same, and all of it takes two minutes on two cores.
"""

import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import diagnostics
from probes import CheckpointPair
from probes.checkpoints.series import CheckpointSeries

BUNDLED = Path(diagnostics.__file__).parent / "bundled"
TUNED = ("full", "lora-r1", "lora-r8")
SERIES = ("parity", "random")

# analysis -> (exported function, roles that it reads, parameters)
OF_PAIRS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "integrity": ("checkpoint_integrity", (), {}),
    "intruders": ("intruder_dimensions", (), {"sweep": True}),
    "drift": ("representation_drift", ("task", "keep"), {"rows": 40}),
    "path": ("interpolation_path", ("task", "keep", "ood"), {"alphas": (0.0, 0.5, 1.0)}),
    "ood": ("likelihood_ratio_ood", ("task", "ood", "keep"), {"draws": 50}),
    "mitigation": ("judged_mitigation", ("task", "keep"), {"scales": (0.0, 0.7, 1.0), "draws": 100}),
    "sparsity": (
        "essential_sparsity", ("task", "keep"),
        {"grid": (0.0, 0.3, 0.6, 0.9), "refine": 0.1, "draws": 100},
    ),
    "skills": ("skill_localization", ("task", "keep"), {"steps": 5, "seeds": 1, "draws": 100}),
    "sharpness": (
        "layer_sharpness",
        ("task", "keep"),
        {
            "alphas": (0.0, 0.5, 1.0), "layer_alphas": (0.0, 0.5, 1.0), "sharpness_alphas": (0.0, 1.0),
            "rhos": (0.5,), "steps": 3, "pairs": 1, "batches": 1, "batch_rows": 8, "rows": 16,
        },
    ),
}  # fmt: skip
OF_SERIES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "pathways": ("grokking_pathways", ("task", "train"), {"samples": 60, "permutations": 100, "draws": 100}),
    "sparsification": ("abrupt_sparsification", (), {}),
    "trajectory": ("training_trajectory", ("task", "train"), {"rows": 60}),
    "dynamics": ("training_dynamics", ("task", "train"), {"rows": 40, "probes": 4, "vertices": 8}),
}


def rows(file: str, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a bundled file."""
    lines = (BUNDLED / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def results(only: Collection[str] = ()) -> Iterator[tuple[str, str, Any]]:
    """(model, analysis, its result) for every analysis, or those named, on every bundled pair and series."""
    for name in TUNED:
        given = {
            # skills splits its rows into search, choice and test; with fewer it finds nothing to search for.
            "task": {"task": rows("task.jsonl", 96 if name == "full" else 48)},
            "keep": {"keep": rows("keep.jsonl", 24)},
            "ood": {"words": rows("ood-words.jsonl", 24), "code": rows("ood-code.jsonl", 24)},
        }
        pair = CheckpointPair(BUNDLED / "base", BUNDLED / name)
        for analysis, (function, roles, parameters) in OF_PAIRS.items():
            if only and analysis not in only:
                continue
            inputs = {role: given[role] for role in roles}
            yield name, analysis, getattr(diagnostics, function)(pair, **inputs, **parameters)
    for name in SERIES:
        steps = (0, 100, 200, 300, 400)
        series = CheckpointSeries(
            [BUNDLED / "grokking" / name / f"checkpoint-{step}" for step in steps], steps=steps
        )
        train = "train.jsonl" if name == "parity" else "train-random.jsonl"
        given = {
            "task": {"task": rows("grokking/held-out.jsonl", 60)},
            "train": {"train": rows(f"grokking/{train}", 60)},
        }
        for analysis, (function, roles, parameters) in OF_SERIES.items():
            if only and analysis not in only:
                continue
            inputs = {role: given[role] for role in roles}
            yield name, analysis, getattr(diagnostics, function)(series, **inputs, **parameters)


def write(out: Path, only: Collection[str] = ()) -> None:
    """Run everything, or the analyses named, and keep metrics and tables below `out`."""
    torch.set_num_threads(2)
    for model, analysis, result in results(only):
        directory = out / model / analysis
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "metrics.json").write_text(json.dumps(dict(result.metrics), indent=1), encoding="utf-8")
        for name, table in result.tables.items():
            table.to_parquet(directory / f"{name}.parquet")
        print(f"{model} {analysis}: {len(result.metrics)} metrics, {len(result.tables)} tables", flush=True)


def differences(before: Path, after: Path) -> list[str]:
    """What is not bit for bit the same in two directories that `write` made, a line each."""
    lines = []
    files = {file.relative_to(root) for root in (before, after) for file in root.rglob("*") if file.is_file()}
    for file in sorted(files):
        if not (after / file.parent).is_dir():
            lines.append(f"{file.parent}: not written")
            continue
        old, new = before / file, after / file
        if not (old.exists() and new.exists()):
            lines.append(f"{file}: only in {before if old.exists() else after}")
        elif file.suffix == ".json":
            metrics = [json.loads(path.read_text(encoding="utf-8")) for path in (old, new)]
            lines += [
                f"{file}: {name} {metrics[0].get(name)} -> {metrics[1].get(name)}"
                for name in {**metrics[0], **metrics[1]}
                if json.dumps(metrics[0].get(name)) != json.dumps(metrics[1].get(name))
            ]
        else:
            tables = [pd.read_parquet(path) for path in (old, new)]
            try:
                pd.testing.assert_frame_equal(*tables, check_exact=True, obj=str(file))
            except AssertionError as error:
                lines.append(" ".join(str(error).split()))
    return lines


def main(arguments: list[str]) -> int:
    """`write DIR`, or `compare BEFORE AFTER`: 1 where they differ."""
    if len(arguments) > 1 and arguments[0] == "write":
        write(Path(arguments[1]), arguments[2:])
        return 0
    if len(arguments) == 3 and arguments[0] == "compare":
        before, after = map(Path, arguments[1:])
        lines = differences(before, after)
        files = sum(file.is_file() for file in before.rglob("*"))
        print("\n".join(dict.fromkeys(lines)) or f"bit for bit the same: {files} files")
        return 1 if lines or not files else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
