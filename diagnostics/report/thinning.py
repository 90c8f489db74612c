"""Figures light enough to travel inside a page: crowds of points thinned, numbers in single precision."""

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

LIMIT = 5_000  # points of one figure; a browser draws these as SVG without a pause


def light(figure: "go.Figure", limit: int = LIMIT) -> tuple["go.Figure", int, int]:
    """The figure with at most `limit` scatter points.

    Points are laid on a grid of what is seen, and its cells are emptied in turns: crowds are thinned, while
    outliers and the course of a line stay.

    Returns:
        The figure, the points drawn, and the points there were.
    """
    import plotly.graph_objects as go

    data, drawn, total = traces(figure, limit)
    return go.Figure(data=data, layout=figure.layout), drawn, total


def traces(figure: "go.Figure", limit: int = LIMIT) -> tuple[list[dict[str, Any]], int, int]:
    """As `light`, the traces alone, as plotly.js takes them: building a figure of them anew takes long."""
    made = [trace.to_plotly_json() for trace in figure.data]
    sizes = [points(trace) for trace in made]
    for i, (trace, size, room) in enumerate(zip(made, sizes, shares(sizes, limit), strict=True)):
        kept = np.arange(size)
        if size:
            # WebGL needs `eval`, which the report forbids; so few points do without.
            trace["type"] = "scatter"
            if room < size:
                kept = spread([place(figure, trace, axis, size) for axis in "xy"], room)
        made[i] = slim(trace, kept, size)
    return made, sum(map(points, made)), sum(sizes)


def packed(value: Any) -> Any:
    """A part of a trace with its arrays in the short form that plotly.js reads: base64 of their bytes."""
    if isinstance(value, dict):
        return {key: packed(item) for key, item in value.items()}
    if not isinstance(value, np.ndarray) or not value.size or value.dtype.kind not in "fiu":
        return value
    if value.dtype.kind != "f":
        small = value.astype(np.int32)
        if (small != value).any():
            return value.tolist()
        value = small
    dtype = "f4" if value.dtype.kind == "f" else "i4"
    text = base64.b64encode(np.ascontiguousarray(value, dtype="<" + dtype).tobytes()).decode()
    shape = {"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {}
    return {"dtype": dtype, "bdata": text, **shape}


def shares(sizes: list[int], limit: int) -> list[int]:
    """How many points each trace may keep: small traces all of theirs, large ones equal parts of the rest."""
    room = [0] * len(sizes)
    for rank, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        room[i] = min(sizes[i], max(1, (limit - sum(room)) // (len(sizes) - rank)))
    return room


def points(trace: dict[str, Any]) -> int:
    """How many points a scatter trace has; 0 for other traces, which are never thinned."""
    if trace["type"] not in ("scatter", "scattergl"):
        return 0
    return max(len(trace[axis]) if trace.get(axis) is not None else 0 for axis in "xy")


def place(figure: "go.Figure", trace: dict[str, Any], axis: str, size: int) -> np.ndarray:
    """Where the points lie along an axis of the page, from 0 to 1."""
    import pandas as pd

    values = trace.get(axis)
    if values is None:
        return np.linspace(0, 1, size)
    try:
        where = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        where = pd.factorize(pd.Series(list(values)))[0].astype(float)
    if figure.layout[axis + "axis" + trace.get(axis + "axis", axis)[1:]].type == "log":
        where = np.log(where, out=np.full(size, np.nan), where=where > 0)
    finite = np.isfinite(where)
    if not finite.any():
        return np.zeros(size)
    low, high = where[finite].min(), where[finite].max()
    return np.where(finite, (where - low) / (high - low or 1.0), 0.0)


def spread(places: list[np.ndarray], limit: int) -> np.ndarray:
    """Which points to keep, in order: the first of each cell of a grid, then the second, and so on."""
    import pandas as pd

    side = max(1, int(limit**0.5))  # no more cells than points wanted, so that none goes empty
    column, row = (np.minimum((where * side).astype(int), side - 1) for where in places)
    turn = pd.Series(column * side + row).groupby(column * side + row).cumcount().to_numpy()
    return np.sort(np.argsort(turn, kind="stable")[:limit])


def slim(value: Any, kept: np.ndarray, size: int) -> Any:
    """A trace, or a part of one, with the kept points of every list as long as the trace, numbers rounded."""
    if isinstance(value, dict):
        return {key: slim(item, kept, size) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        array = value if isinstance(value, np.ndarray) else None
        if len(kept) < size and len(value) == size:
            value = value[kept] if array is not None else [value[i] for i in kept]
        if array is not None and array.dtype.kind == "f":
            return value.astype(np.float32)
        if array is not None and array.dtype.kind != "O":
            return value
        return [slim(item, kept, -1) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
