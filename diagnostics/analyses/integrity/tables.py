"""The tables of `integrity`."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from diagnostics.analyses.integrity.direction import Evidence
from diagnostics.analyses.integrity.file_changes import Change
from diagnostics.analyses.integrity.reading import Compared, Measured, Merged, TensorHealth
from probes.files.layout import Matrix

CHANGES = ["where", "what", "base", "tuned", "judged", "meaning"]


def placed(matrix: Matrix | None, name: str) -> dict[str, Any]:
    """The layer and component of a tensor; of norms and biases the end of their name."""
    if matrix is not None:
        return {"layer": matrix.layer, "component": matrix.component}
    parts = name.removesuffix(".weight").split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    return {"layer": numbers[0] if numbers else None, "component": parts[-1]}


def compared_table(rows: Sequence[Compared]) -> pd.DataFrame:
    """A row for each stored tensor of tuned."""
    table = pd.DataFrame(
        [
            {
                "tensor": row.tensor, **placed(row.matrix, row.tensor), "part": row.part,
                "entries": row.entries, "compared": row.compared, "changed": row.changed,
                "changed_share": row.changed / row.compared if row.compared else math.nan,
            }
            for row in rows
        ],
        columns=["tensor", "layer", "component", "part", "entries", "compared", "changed", "changed_share"],
    )  # fmt: skip
    return table.astype({"layer": "Int64"})


def health_table(rows: Sequence[TensorHealth]) -> pd.DataFrame:
    """A row for each stored tensor of either side, those with something unusual first."""
    table = pd.DataFrame(
        [
            {
                "side": row.side, "tensor": row.tensor, **placed(row.matrix, row.tensor), "dtype": row.dtype,
                "entries": row.health.entries, "nan": row.health.nan, "infinite": row.health.infinite,
                "subnormal": row.health.subnormal, "zero": row.health.zero, "dead_rows": row.dead,
                "overflow": row.overflow, "largest": row.health.largest,
            }
            for row in rows
        ],
        columns=[
            "side", "tensor", "layer", "component", "dtype", "entries", "nan", "infinite", "subnormal",
            "zero", "dead_rows", "overflow", "largest",
        ],
    )  # fmt: skip
    unusual = ["nan", "infinite", "overflow", "dead_rows"]
    ordered = table.sort_values(unusual, ascending=False, kind="stable")
    return ordered.reset_index(drop=True).astype({"layer": "Int64"})


def merge_table(measured: Measured) -> pd.DataFrame:
    """A row for each matrix that the adapter changes, and for each other that changed."""
    rows = [merge_row(row) for row in measured.merges]
    rows += [{"matrix": name, **placed(None, name), "verdict": "not in tuned"} for name in measured.unread]
    columns = [
        "matrix", "layer", "component", "factor", "low", "high", "residual", "outside", "kept", "verdict",
        "scheme",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})


def merge_row(row: Merged) -> dict[str, Any]:
    """The row of one matrix."""
    where = {"matrix": row.name, **placed(row.matrix, row.name)}
    if row.fit is None:
        return {**where, "factor": math.nan, "verdict": "outside", "scheme": row.scheme}
    fit = row.fit
    return {
        **where, "factor": fit.factor, "low": fit.low, "high": fit.high, "residual": fit.residual,
        "outside": fit.outside, "kept": fit.kept, "verdict": fit.verdict, "scheme": fit.scheme,
    }  # fmt: skip


def changes_table(changes: Sequence[Change]) -> pd.DataFrame:
    """A row for each difference outside the weights."""
    return pd.DataFrame(
        [{name: getattr(change, name) for name in CHANGES} for change in changes], columns=CHANGES
    )


def template_table(lines: Sequence[str]) -> pd.DataFrame:
    """A row for each line of a unified diff."""
    rows = [
        {"line": number, "mark": line[:1].strip(), "text": line[1:] if line[:1] in "+- " else line}
        for number, line in enumerate(lines, start=1)
    ]
    return pd.DataFrame(rows, columns=["line", "mark", "text"])


def direction_table(evidence: Sequence[Evidence]) -> pd.DataFrame:
    """A row for each fact."""
    columns = ["evidence", "says", "weight"]
    return pd.DataFrame(
        [{name: getattr(fact, name) for name in columns} for fact in evidence], columns=columns
    )
