"""Tables, metrics and notes of `intruders`."""

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analyses.intruders.examine import LARGEST_FLOOR, ON_THRESHOLD, MatrixResult, floor_of
from diagnostics.core.analysis import Result
from probes.files.layout import Matrix

EPSILONS = tuple(round(0.05 * i, 2) for i in range(2, 19))
# A cosine between the entries of base and tuned below this means unrelated matrices.
UNRELATED = 0.1
VECTOR_COLUMNS = [
    "matrix", "layer", "component", "rank", "singular_value", "cosine_low", "cosine_high", "tier", "intruder",
    "on_threshold",
]  # fmt: skip


def summarise(
    results: list[MatrixResult], *, k: int, epsilon: float, side: str, full_finetune: bool
) -> Result:
    """Metrics, tables and notes of the matrices of one pair."""
    matrices = pd.DataFrame([_matrix_row(result, k, epsilon, side) for result in results])
    vector_rows = [row for result in results for row in _vector_rows(result, k, epsilon)]
    vectors = pd.DataFrame(vector_rows, columns=VECTOR_COLUMNS)
    tables = {"matrices": matrices, "vectors": vectors}
    counted = matrices[matrices["status"] != "not applicable"]
    measured = matrices[matrices["status"] == "measured"]
    metrics: dict[str, float | int] = {
        "matrices": len(counted),
        "changed": len(measured),
        "frozen": len(counted) - len(measured),
        "not_applicable": len(matrices) - len(counted),
    }
    notes = []
    if metrics["not_applicable"]:
        notes.append(
            f"{metrics['not_applicable']} matrices are too small and not counted: they have fewer than "
            f"k = {k} vectors, or the random floor exceeds {LARGEST_FLOOR:g} of epsilon = {epsilon:g}. A "
            "larger epsilon admits more."
        )
    checked = [result.verified for result in results if result.verified is not None]
    if checked:
        metrics |= {"verified": len(checked), "disagreements": checked.count(False)}
        notes.append(
            f"{len(checked)} of {len(measured)} changed matrices were decided again by the full "
            f"decomposition in float64; {checked.count(False) or 'none'} differed."
        )
    metrics["descendant"] = int(_descends(measured, vectors, k))
    if not metrics["descendant"]:
        notes.append(
            "Tuned is not a descendant of this base: its entries do not correlate with the base's, and the "
            "cosines of its leading directions are at the random floor. Intruders are not counted; give the "
            "base that it was tuned from."
        )
        return Result(metrics=metrics, tables=tables, notes=tuple(notes))
    if len(counted):
        intruders, examined = int(measured["intruders"].sum()), int(measured["examined"].sum())
        metrics |= {
            "intruders": intruders,
            "intruders_per_matrix": intruders / len(counted),
            "intruders_per_changed_matrix": intruders / len(measured) if len(measured) else 0.0,
            "rate": intruders / examined if examined else 0.0,
            "on_threshold": int(vectors["on_threshold"].sum()),
        }
        if full_finetune:
            metrics["intruders_in_full_finetune"] = intruders
    tables |= {f"{column}s": _grouped(counted, column) for column in ("layer", "component")}
    tables |= _flagged_tables(results, k, epsilon) | {"sweep": _sweep(results, epsilon)}
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


def _matrix_row(result: MatrixResult, k: int, epsilon: float, side: str) -> dict[str, Any]:
    matrix, decision, update = result.matrix, result.decision, result.update
    intruders = result.below(k, epsilon)[0] if result.status != "not applicable" else math.nan
    row = _location(matrix) | {
        "rows": matrix.rows, "columns": matrix.columns, "status": result.status, "intruders": intruders,
        "examined": 0, "floor": floor_of(matrix, side),
    }  # fmt: skip
    if decision is not None and update is not None:
        row |= {
            "examined": int((~np.isnan(decision.low[:k])).sum()) if result.status == "measured" else 0,
            "min_cosine_low": np.nanmin(decision.low[:k], initial=1.0),
            "min_cosine_high": np.nanmin(decision.high[:k], initial=1.0),
            "leading_ratio": decision.singular_values[0] / decision.base_values[0],
            "update_norm": update.norm,
            "relative_update": update.norm / update.base_norm if update.base_norm else math.nan,
            "alignment": update.alignment, "update_spectral_norm": update.spectral_norm,
            "effective_rank": update.effective_rank, "effective_rank_low": update.effective_rank_low,
            "effective_rank_high": update.effective_rank_high, "critical_spike": decision.critical,
            "critical_ratio": update.spectral_norm / decision.critical if decision.critical else math.nan,
        }  # fmt: skip
    return row


def _location(matrix: Matrix) -> dict[str, Any]:
    layer = math.nan if matrix.layer is None else matrix.layer
    return {"matrix": matrix.name, "layer": layer, "component": matrix.component}


def _vector_rows(result: MatrixResult, k: int, epsilon: float) -> Iterable[dict[str, Any]]:
    if result.decision is None:
        return
    d, measured = result.decision, result.status == "measured"
    for j, (low, high) in enumerate(zip(d.low, d.high, strict=True)):
        yield _location(result.matrix) | {
            "rank": j + 1, "singular_value": d.singular_values[j], "cosine_low": low, "cosine_high": high,
            "tier": d.tier[j], "intruder": bool(high < epsilon and j < k and measured),
            "on_threshold": bool(low == high and abs(low - epsilon) < ON_THRESHOLD and measured),
        }  # fmt: skip


def _descends(measured: pd.DataFrame, vectors: pd.DataFrame, k: int) -> bool:
    """Whether tuned descends from base."""
    if not len(measured):
        return True
    # A ratio below 2 alone would reject a small model whose adapter put intruders in most slots: there twice
    # the floor is above epsilon. Unrelated matrices also have uncorrelated entries.
    leading = vectors[vectors["rank"] <= k].merge(measured[["matrix", "floor"]], on="matrix")
    ratio = (leading["cosine_low"] / leading["floor"]).median()
    return not (ratio < 2 and measured["alignment"].median() < UNRELATED)


def _grouped(counted: pd.DataFrame, column: str) -> pd.DataFrame:
    groups = counted.groupby(column, sort=column == "layer")
    table = groups.agg(
        intruders=("intruders", "sum"), examined=("examined", "sum"), matrices=("matrix", "size")
    ).reset_index()
    rate = (table["intruders"] / table["examined"].where(table["examined"] > 0)).fillna(0.0)
    return table.assign(intruders_per_matrix=table["intruders"] / table["matrices"], rate=rate)


def _flagged_tables(results: list[MatrixResult], k: int, epsilon: float) -> dict[str, pd.DataFrame]:
    """Singular values and cosines of the matrices with intruders."""
    spectra, cosines = [], []
    for result in results:
        if result.decision is None or result.status != "measured" or not result.below(k, epsilon)[0]:
            continue
        d, name = result.decision, result.matrix.name
        size = min(len(d.base_values), len(d.tuned_values))
        values = {"rank": np.arange(size) + 1, "base": d.base_values[:size], "tuned": d.tuned_values[:size]}
        spectra.append(pd.DataFrame({"matrix": name, **values}))
        rows, columns = np.indices(d.overlap.shape).reshape(2, -1) + 1
        cells = {"matrix": name, "tuned_rank": rows, "base_rank": columns, "cosine": d.overlap.ravel()}
        cosines.append(pd.DataFrame(cells))
    if not spectra:
        return {}
    return {
        "spectra": pd.concat(spectra, ignore_index=True),
        "cosines": pd.concat(cosines, ignore_index=True),
    }


def _sweep(results: list[MatrixResult], epsilon: float) -> pd.DataFrame:
    """Bounds on the number of intruders for other k and epsilon."""
    measured = [result for result in results if result.status == "measured"]
    depth = max((len(result.decision.low) for result in measured if result.decision), default=0)
    rows = [
        (k, threshold, *np.sum([result.below(k, threshold) for result in measured], axis=0))
        for k, threshold in product(range(1, depth + 1), sorted({*EPSILONS, epsilon}))
    ]
    return pd.DataFrame(rows, columns=["k", "epsilon", "intruders_low", "intruders_high"])
