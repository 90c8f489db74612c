"""One matrix, or one cell of a layer × component heat map: every row of an audit about it."""

import html as markup
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dashboard.state.query import Query
from diagnostics.core.analysis import Result
from diagnostics.store.audit_store import Audit

if TYPE_CHECKING:
    import pandas as pd

CELL = {"layer", "component"}


@dataclass(frozen=True)
class OpenedMatrices:
    """The opened matrices by name, and their cell of the heat map."""

    matrices: tuple[str, ...] = ()
    layer: str = ""
    component: str = ""

    @property
    def title(self) -> str:
        """Its name on the page."""
        if len(self.matrices) == 1:
            return self.matrices[0]
        location = "outside the layers" if self.layer == "none" else f"of layer {self.layer}"
        return f"{self.component} {location}"

    def rows(self, frame: "pd.DataFrame") -> "pd.DataFrame | None":
        """The rows of a table about it; None if the table has no column that names matrices or cells."""
        from diagnostics.plotting.layer_axes import layer_name

        if "matrix" in frame and self.matrices:
            kept = frame["matrix"].astype(str).isin(self.matrices)
        elif set(frame.columns) >= CELL and self.component:
            layers = frame["layer"].map(layer_name)
            kept = (frame["component"].astype(str) == self.component) & (layers == self.layer)
        else:
            return None
        return frame[kept].reset_index(drop=True)

    def of(self, result: Result) -> Result:
        """The part of a result about it, without tables that have no row of it."""
        rows = {name: self.rows(frame) for name, frame in result.tables.items()}
        kept = {name: frame for name, frame in rows.items() if frame is not None and len(frame)}
        return replace(result, tables=kept)


def opened(audit: Audit, query: Query) -> OpenedMatrices | None:
    """What an address opens, by `matrix=NAME` or `cell=LAYER/COMPONENT`; None for nothing known."""
    from diagnostics.plotting.layer_axes import layer_name

    frames = [frame for result in audit.results.values() for frame in result.tables.values()]
    if matrix := query.value("matrix"):
        named = [frame[frame["matrix"].astype(str) == matrix] for frame in frames if "matrix" in frame]
        named = [rows for rows in named if len(rows)]
        for rows in named:
            if set(rows.columns) >= CELL:
                first = rows.iloc[0]
                return OpenedMatrices((matrix,), layer_name(first["layer"]), str(first["component"]))
        return OpenedMatrices((matrix,)) if named else None
    layer, _, component = query.value("cell").partition("/")
    cell = OpenedMatrices((), layer, component)
    parts = [cell.rows(frame) for frame in frames if set(frame.columns) >= CELL]
    cells = [part for part in parts if part is not None and len(part)]
    if not cells:
        return None
    names = dict.fromkeys(str(name) for part in cells if "matrix" in part for name in part["matrix"])
    return replace(cell, matrices=tuple(names))


def matrices(result: Result) -> list[str]:
    """The names of the matrices in a result, in the order of its tables."""
    frames = [frame for frame in result.tables.values() if "matrix" in frame]
    return list(dict.fromkeys(str(name) for frame in frames for name in frame["matrix"]))


def pointed(point: Mapping[str, Any], axes: tuple[str, str], names: set[str]) -> dict[str, str]:
    """The keys of the query that a click on a figure sets; empty when it opens nothing.

    Args:
        point: the first point of plotly's `clickData`.
        axes: the titles of the x and y axis; a heat map has `layer` on one and `component` on the other.
        names: the names of matrices; a mark may carry one in its `customdata`.
    """
    if set(axes) == CELL:
        cell = dict(zip(axes, (point.get("x"), point.get("y")), strict=True))
        return {"cell": f"{cell['layer']}/{markup.unescape(str(cell['component']))}"}
    carried = point.get("customdata")
    for value in carried if isinstance(carried, list) else [carried, point.get("x"), point.get("y")]:
        name = markup.unescape(str(value))
        if name in names:
            return {"matrix": name}
    return {}
