"""Figures made small enough for a page: crowds of points thinned, numbers in single precision."""

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

LIMIT = 5_000  # points of one figure; a browser draws these as SVG without delay


def thin_traces(figure: "go.Figure", limit: int = LIMIT) -> tuple[list[dict[str, Any]], int, int]:
    """The traces of a figure with at most `limit` scatter points, the points drawn, and the points before.

    The points are put on a grid over the visible area, and each cell gives up its points in turn: crowds are
    thinned, outliers and the course of a line stay.
    """
    thinned = [trace.to_plotly_json() for trace in figure.data]
    sizes = [scatter_points(trace) for trace in thinned]
    for i, (trace, size, room) in enumerate(zip(thinned, sizes, points_per_trace(sizes, limit), strict=True)):
        kept = np.arange(size)
        if size:
            # WebGL needs `eval`, which the report forbids; few points draw fast without it.
            trace["type"] = "scatter"
            if room < size:
                kept = choose_points([axis_positions(figure, trace, axis, size) for axis in "xy"], room)
        thinned[i] = thin_trace(trace, kept, size)
    return thinned, sum(map(scatter_points, thinned)), sum(sizes)


def pack_arrays(value: Any) -> Any:
    """A part of a trace with its arrays as base64 of their bytes, which plotly.js reads."""
    if isinstance(value, dict):
        return {key: pack_arrays(item) for key, item in value.items()}
    if not isinstance(value, np.ndarray) or not value.size or value.dtype.kind not in "fiu":
        return value
    if value.dtype.kind != "f":
        as_int32 = value.astype(np.int32)
        if (as_int32 != value).any():
            return value.tolist()
        value = as_int32
    dtype = "f4" if value.dtype.kind == "f" else "i4"
    text = base64.b64encode(np.ascontiguousarray(value, dtype="<" + dtype).tobytes()).decode()
    shape = {"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {}
    return {"dtype": dtype, "bdata": text, **shape}


def points_per_trace(sizes: list[int], limit: int) -> list[int]:
    """How many points each trace may keep: small traces all, large ones equal parts of the rest."""
    room = [0] * len(sizes)
    for rank, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        room[i] = min(sizes[i], max(1, (limit - sum(room)) // (len(sizes) - rank)))
    return room


def scatter_points(trace: dict[str, Any]) -> int:
    """The number of points of a scatter trace; 0 for other traces, which are not thinned."""
    if trace["type"] not in ("scatter", "scattergl"):
        return 0
    return max(len(trace[axis]) if trace.get(axis) is not None else 0 for axis in "xy")


def axis_positions(figure: "go.Figure", trace: dict[str, Any], axis: str, size: int) -> np.ndarray:
    """Positions of the points along an axis of the page, from 0 to 1."""
    import pandas as pd

    values = trace.get(axis)
    if values is None:
        return np.linspace(0, 1, size)
    try:
        positions = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        positions = pd.factorize(pd.Series(list(values)))[0].astype(float)
    if figure.layout[axis + "axis" + trace.get(axis + "axis", axis)[1:]].type == "log":
        positions = np.log(positions, out=np.full(size, np.nan), where=positions > 0)
    finite = np.isfinite(positions)
    if not finite.any():
        return np.zeros(size)
    low, high = positions[finite].min(), positions[finite].max()
    return np.where(finite, (positions - low) / (high - low or 1.0), 0.0)


def choose_points(positions: list[np.ndarray], limit: int) -> np.ndarray:
    """Indices of the points to keep: the first of each cell of a grid, then the second, and so on."""
    import pandas as pd

    side = max(1, int(limit**0.5))  # no more cells than points, so that each can keep one
    column, row = (np.minimum((coordinates * side).astype(int), side - 1) for coordinates in positions)
    turn = pd.Series(column * side + row).groupby(column * side + row).cumcount().to_numpy()
    return np.sort(np.argsort(turn, kind="stable")[:limit])


def thin_trace(value: Any, kept: np.ndarray, size: int) -> Any:
    """A trace, or a part of one: lists of its length keep the chosen points, numbers are rounded."""
    if isinstance(value, dict):
        return {key: thin_trace(item, kept, size) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        array = value if isinstance(value, np.ndarray) else None
        if len(kept) < size and len(value) == size:
            value = value[kept] if array is not None else [value[i] for i in kept]
        if array is not None and array.dtype.kind == "f":
            return value.astype(np.float32)
        if array is not None and array.dtype.kind != "O":
            return value
        return [thin_trace(item, kept, -1) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
