"""Which rows of an analysis' tables a page shows: filters by layer, component and group."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dashboard.state.query import Query
from diagnostics.core.analysis import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Filters:
    """The rows that a page keeps; None or empty keeps every value of that column."""

    layers: tuple[float, float] | None = None
    components: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != Filters()

    def rows(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """The rows of a table that pass; a filter keeps all rows of a table without its column."""
        import pandas as pd

        if not self:
            return frame
        kept = pd.Series(True, index=frame.index)
        if self.layers is not None and "layer" in frame and pd.api.types.is_numeric_dtype(frame["layer"]):
            kept &= frame["layer"].between(*self.layers)
        if self.components and "component" in frame:
            kept &= frame["component"].astype(str).isin(self.components)
        if self.groups and "group" in frame:
            # A row without a group covers all groups, or is what the groups are compared with.
            kept &= frame["group"].isna() | frame["group"].astype(str).isin(self.groups)
        return frame[kept].reset_index(drop=True)

    def only(self, result: Result) -> Result:
        """The result with the rows that pass."""
        if not self:
            return result
        return replace(result, tables={name: self.rows(frame) for name, frame in result.tables.items()})


def filters_of(query: Query) -> Filters:
    """The filters that an address sets."""
    return Filters(query.span("layer"), query.many("component"), query.many("group"))


def values(tables: "Mapping[str, pd.DataFrame]", column: str) -> list[str]:
    """The distinct values of a column over all tables: components in the order of a forward pass."""
    from diagnostics.plotting.layer_axes import FLOW

    columns = [frame[column] for frame in tables.values() if column in frame]
    names = {str(value) for values in columns for value in values.dropna().unique()}
    return sorted(names, key=lambda name: (*(name != component for component in FLOW), name))


def layer_range(tables: "Mapping[str, pd.DataFrame]") -> tuple[int, int] | None:
    """The first and the last layer in any table."""
    import pandas as pd

    columns = [frame["layer"].dropna() for frame in tables.values() if "layer" in frame]
    layers = [column for column in columns if len(column) and pd.api.types.is_numeric_dtype(column)]
    return (int(min(c.min() for c in layers)), int(max(c.max() for c in layers))) if layers else None
