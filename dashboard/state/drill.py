"""One matrix, or one cell of a layer × component map: everything that an audit knows of it."""

import html as markup
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dashboard.state.query import Query
from diagnostics.core.analysis import Result
from diagnostics.plotting.layer_axes import layer_name
from diagnostics.store.audit_store import Audit

if TYPE_CHECKING:
    import pandas as pd

CELL = {"layer", "component"}


@dataclass(frozen=True)
class OpenedMatrices:
    """What was opened: matrices by name, and the cell of the map that they stand in."""

    matrices: tuple[str, ...] = ()
    layer: str = ""
    component: str = ""

    @property
    def title(self) -> str:
        """What it is called on the page."""
        if len(self.matrices) == 1:
            return self.matrices[0]
        place = "outside the layers" if self.layer == "none" else f"layer {self.layer}"
        return f"{self.component} of {place}" if self.layer != "none" else f"{self.component} {place}"

    def rows(self, frame: "pd.DataFrame") -> "pd.DataFrame | None":
        """The rows of a table that are about it; None if the table has nothing that tells."""
        if "matrix" in frame and self.matrices:
            return frame[frame["matrix"].astype(str).isin(self.matrices)].reset_index(drop=True)
        if set(frame.columns) >= CELL and self.component:
            here = (frame["component"].astype(str) == self.component) & (
                frame["layer"].map(layer_name) == self.layer
            )
            return frame[here].reset_index(drop=True)
        return None

    def of(self, result: Result) -> Result:
        """The part of a result that is about it, without tables that cannot tell or hold no row of it."""
        kept = {}
        for name, frame in result.tables.items():
            rows = self.rows(frame)
            if rows is not None and len(rows):
                kept[name] = rows
        return replace(result, tables=kept)


def spot(audit: Audit, query: Query) -> OpenedMatrices | None:
    """What an address opens, by `matrix=NAME` or `cell=LAYER/COMPONENT`; None if nothing, or unknown."""
    frames = [frame for result in audit.results.values() for frame in result.tables.values()]
    matrix, cell = query.one("matrix"), query.one("cell")
    if matrix:
        for frame in frames:
            if "matrix" not in frame:
                continue
            found = frame[frame["matrix"].astype(str) == matrix]
            if len(found) and set(frame.columns) >= CELL:
                first = found.iloc[0]
                return OpenedMatrices((matrix,), layer_name(first["layer"]), str(first["component"]))
        named = any("matrix" in frame and (frame["matrix"].astype(str) == matrix).any() for frame in frames)
        return OpenedMatrices((matrix,)) if named else None
    if not cell:
        return None
    layer, _, component = cell.partition("/")
    at = OpenedMatrices((), layer, component)
    parts = [rows for frame in frames if set(frame.columns) >= CELL and (rows := at.rows(frame)) is not None]
    if not any(len(rows) for rows in parts):
        return None
    names = dict.fromkeys(str(name) for rows in parts if "matrix" in rows for name in rows["matrix"])
    return replace(at, matrices=tuple(names))


def matrices(result: Result) -> list[str]:
    """The names of the matrices that a result speaks of, in the order of its tables."""
    return list(
        dict.fromkeys(
            str(n) for frame in result.tables.values() if "matrix" in frame for n in frame["matrix"]
        )
    )


def pointed(point: Mapping[str, Any], axes: tuple[str, str], known: set[str]) -> dict[str, str]:
    """What a click on a figure opens, as changes of the address; empty when it opens nothing.

    Args:
        point: the first of plotly's `clickData` points.
        axes: the titles of the figure's x and y axis; a map has `layer` on one and `component` on the other.
        known: the names of matrices, one of which a mark may carry among its `customdata`.
    """
    if set(axes) == CELL:
        at = dict(zip(axes, (point.get("x"), point.get("y")), strict=True))
        return {"cell": f"{at['layer']}/{markup.unescape(str(at['component']))}"}
    carried = point.get("customdata")
    for value in carried if isinstance(carried, list) else [carried, point.get("x"), point.get("y")]:
        name = markup.unescape(str(value))
        if name in known:
            return {"matrix": name}
    return {}
