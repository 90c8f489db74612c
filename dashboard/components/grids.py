"""Tables of a page: the browser holds the rows that are seen, the server sorts and filters all of them."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dash_ag_grid as dag

from diagnostics.report import content

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

BLOCK = 100  # rows that the browser asks for at once
SEEN = 12  # rows that a long table shows without scrolling
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet calculates
ROW, HEAD = 32, 36  # pixels


def grid(frame: "pd.DataFrame", known: Mapping[str, str], label: str) -> dag.AgGrid:
    """A table that asks for its rows; its id is `{"role": "grid", …known}`."""
    columns = [
        {
            "field": str(i),  # a name from a file may hold anything
            "headerName": str(name),
            "filter": "agNumberColumnFilter" if numeric else "agTextColumnFilter",
            "type": "rightAligned" if numeric else None,
            "width": width(frame[name], str(name), numeric),
            **({"cellClass": "opens"} if name == "matrix" else {}),
        }
        for i, name in enumerate(frame.columns)
        for numeric in [is_number(frame[name])]
    ]
    return dag.AgGrid(
        id={"role": "grid", **known},
        columnDefs=columns,
        rowModelType="infinite",
        defaultColDef={"sortable": True, "resizable": True, "minWidth": 80, "floatingFilter": False},
        dashGridOptions={
            "cacheBlockSize": BLOCK,
            "maxBlocksInCache": 20,
            "rowHeight": ROW,
            "headerHeight": HEAD,
            "suppressFieldDotNotation": True,
            "enableCellTextSelection": True,
            "animateRows": False,
            "localeText": {"noRowsToShow": "No row matches.", "ariaLabel": label},
        },
        style={"height": HEAD + ROW * max(2, min(len(frame), SEEN)) + 18, "width": "100%"},
        className="grid",
    )


def is_number(column: "pd.Series[Any]") -> bool:
    """Whether a column is sorted and filtered by size."""
    import pandas as pd

    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def width(column: "pd.Series[Any]", name: str, numeric: bool) -> int:
    """Pixels that a column wants, by its first rows."""
    longest = 8 if numeric else max([4, *(len(str(value)) for value in column.head(50))])
    return int(min(420, max(90, 8 * longest + 24, 8 * len(name) + 56)))


def selected(frame: "pd.DataFrame", request: Mapping[str, Any] | None) -> "pd.DataFrame":
    """The rows that a grid's own filters leave, in the order that its heads ask for.

    Args:
        request: what AG Grid calls `IGetRowsParams`: filterModel and sortModel.
    """
    request = request or {}
    for field, model in (request.get("filterModel") or {}).items():
        column = column_of(frame, field)
        if column is not None:
            frame = frame[matches(frame[column], model)]
    sorts = [
        (column, each.get("sort") == "asc")
        for each in request.get("sortModel") or []
        if (column := column_of(frame, each.get("colId", ""))) is not None
    ]
    if sorts:
        frame = frame.sort_values([c for c, _ in sorts], ascending=[up for _, up in sorts], kind="stable")
    return frame


def csv(frame: "pd.DataFrame") -> str:
    """A table as a spreadsheet opens it: text that it would take for a formula has a `'` before it.

    A token or a row of text comes from a file, and a cell that begins with `=` is carried out. The table in
    the audit itself is as it was.
    """

    def told(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value

    return frame.map(told).rename(columns=told).to_csv(index=False)


def column_of(frame: "pd.DataFrame", field: str) -> Any:
    """The column that a grid calls by its place."""
    return frame.columns[int(field)] if field.isdecimal() and int(field) < frame.shape[1] else None


def matches(column: "pd.Series[Any]", model: Mapping[str, Any]) -> "pd.Series[bool]":
    """Which values a filter of a grid lets through."""
    if "conditions" in model:
        parts = [matches(column, each) for each in model["conditions"]]
        found = parts[0]
        for part in parts[1:]:
            found = (found & part) if model.get("operator") == "AND" else (found | part)
        return found
    kind, wanted = model.get("type", ""), model.get("filter")
    if kind in ("blank", "notBlank"):
        empty = column.isna()
        return empty if kind == "blank" else ~empty
    if is_number(column):
        return numbers(column, kind, wanted, model.get("filterTo"))
    return texts(column, kind, wanted)


def numbers(column: "pd.Series[Any]", kind: str, low: Any, high: Any) -> "pd.Series[bool]":
    """Which numbers a filter lets through."""
    compare = {
        "equals": column.eq,
        "notEqual": column.ne,
        "lessThan": column.lt,
        "lessThanOrEqual": column.le,
        "greaterThan": column.gt,
        "greaterThanOrEqual": column.ge,
    }
    if kind == "inRange":
        return column.gt(float(low)) & column.lt(float(high))
    return compare[kind](float(low))


def texts(column: "pd.Series[Any]", kind: str, wanted: Any) -> "pd.Series[bool]":
    """Which texts a filter lets through, whatever their case."""
    text, wanted = column.astype(str).str.casefold(), str(wanted).casefold()
    tests = {
        "contains": lambda: text.str.contains(wanted, regex=False),
        "notContains": lambda: ~text.str.contains(wanted, regex=False),
        "equals": lambda: text == wanted,
        "notEqual": lambda: text != wanted,
        "startsWith": lambda: text.str.startswith(wanted),
        "endsWith": lambda: text.str.endswith(wanted),
    }
    return tests[kind]()


def response(frame: "pd.DataFrame", request: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that a grid asks for, as it shows them, and how many there are."""
    try:
        found = selected(frame, request)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("a grid asks for rows in a way that is not understood: %r", error)
        found = frame.head(0)
    start, stop = int(request.get("startRow", 0)), int(request.get("endRow", BLOCK))
    return {"rowData": rows(found.iloc[start:stop]), "rowCount": len(found)}


def rows(frame: "pd.DataFrame") -> Sequence[dict[str, str]]:
    """Rows as a grid shows them: text, by the place of its column."""
    return [
        {str(i): content.format_cell(value).text for i, value in enumerate(row)}
        for row in frame.to_numpy(dtype=object)
    ]
