"""Which rows of an analysis' tables a page shows: filters that follow the columns that tables have."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dashboard.components import choose
from dashboard.state.query import Query
from diagnostics.core.analysis import Result
from diagnostics.plotting.layer_axes import FLOW

if TYPE_CHECKING:
    import pandas as pd

NAMED = ("component", "group")


@dataclass(frozen=True)
class Filters:
    """What a page leaves in; None or empty leaves all of that column."""

    layers: tuple[float, float] | None = None
    components: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != Filters()

    def mask(self, frame: "pd.DataFrame") -> "pd.Series[bool]":
        """Which rows of a table stay; a table without the column of a filter keeps all for it."""
        import pandas as pd

        kept = pd.Series(True, index=frame.index)
        if self.layers is not None and "layer" in frame and pd.api.types.is_numeric_dtype(frame["layer"]):
            kept &= frame["layer"].between(*self.layers)
        if self.components and "component" in frame:
            kept &= frame["component"].astype(str).isin(self.components)
        if self.groups and "group" in frame:
            # What is of no group is said of all of them, or stands beside them to be compared with.
            kept &= frame["group"].isna() | frame["group"].astype(str).isin(self.groups)
        return kept

    def only(self, result: Result) -> Result:
        """The result with the rows that stay."""
        if not self:
            return result
        return replace(result, tables={name: only(self, frame) for name, frame in result.tables.items()})


def only(filters: Filters, frame: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of a table that stay, numbered anew."""
    return frame[filters.mask(frame)].reset_index(drop=True) if filters else frame


def filters(query: Query) -> Filters:
    """What an address asks for."""
    return Filters(query.span("layer"), query.many("component"), query.many("group"))


def values(tables: "Mapping[str, pd.DataFrame]", column: str) -> list[str]:
    """What a column holds over all tables: components as a model computes them, others by name."""
    found = {
        str(value)
        for frame in tables.values()
        if column in frame
        for value in frame[column].dropna().unique()
    }
    return sorted(found, key=lambda name: (*(name != each for each in FLOW), name))


def layers(tables: "Mapping[str, pd.DataFrame]") -> tuple[int, int] | None:
    """The first and the last layer that tables speak of."""
    import pandas as pd

    seen = [
        frame["layer"].dropna()
        for frame in tables.values()
        if "layer" in frame and pd.api.types.is_numeric_dtype(frame["layer"])
    ]
    seen = [each for each in seen if len(each)]
    return (int(min(map(min, seen))), int(max(map(max, seen)))) if seen else None


def controls(result: Result, query: Query) -> list[Any]:
    """A control for each column that can be filtered by; none where there is no choice."""
    made: list[Any] = []
    ends = layers(result.tables)
    if ends and ends[0] < ends[1]:
        made.append(choose.span(query, "layer", "Layers", *ends))
    for column in NAMED:
        options = values(result.tables, column)
        if len(options) > 1:
            made.append(choose.many(query, column, column.capitalize() + "s", options))
    return made
