"""Tables of a page: the browser holds the visible rows, the server sorts and filters all rows."""

import functools
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import dcc, html

from diagnostics.report import content

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

BLOCK = 100  # rows per request of the browser
SEEN = 12  # rows of a long table that are visible without scrolling
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates cells that begin with these
ROW, HEAD = 32, 36  # pixels
COMPARE = {  # filters of numbers, as methods of a series
    "equals": "eq", "notEqual": "ne", "lessThan": "lt", "lessThanOrEqual": "le", "greaterThan": "gt",
    "greaterThanOrEqual": "ge",
}  # fmt: skip


def grid(frame: "pd.DataFrame", analysis: str, table: str, spot: str = "") -> html.Div:
    """A table with a row count and a button that saves it as CSV.

    Args:
        spot: the address of the matrix that the rows belong to; empty for the whole table.
    """
    key: Mapping[str, str] = {"analysis": analysis, "table": table, "spot": spot}
    look = {"variant": "default", "size": "compact-sm", "aria-label": f"Save table {table} as CSV"}
    tools = [
        html.Span(id={"role": "count", **key}, className="source", role="status"),
        dmc.Button("Save as CSV", id={"role": "export", **key}, **look),
        dcc.Download(id={"role": "saved", **key}),
    ]
    rows = dag.AgGrid(
        id={"role": "grid", **key},
        columnDefs=[column_definition(i, frame[name]) for i, name in enumerate(frame.columns)],
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
            "localeText": {"noRowsToShow": "No rows match.", "ariaLabel": f"Table {table} of {analysis}"},
        },
        style={"height": HEAD + ROW * max(2, min(len(frame), SEEN)) + 18, "width": "100%"},
        className="grid",
    )
    return html.Div([html.Div(tools, className="grid-tools"), rows])


def column_definition(i: int, column: "pd.Series[Any]") -> dict[str, Any]:
    """One column for AG Grid, called by its position: a name from a file may hold any character."""
    name, numeric = str(column.name), is_number(column)
    longest = 8 if numeric else max([4, *(len(str(value)) for value in column.head(50))])
    return {
        "field": str(i),
        "headerName": name,
        "filter": "agNumberColumnFilter" if numeric else "agTextColumnFilter",
        "type": "rightAligned" if numeric else None,
        "width": int(min(420, max(90, 8 * longest + 24, 8 * len(name) + 56))),
        **({"cellClass": "opens"} if name == "matrix" else {}),
    }


def is_number(column: "pd.Series[Any]") -> bool:
    """Whether a column is sorted and filtered as numbers."""
    import pandas as pd

    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def selected(frame: "pd.DataFrame", request: Mapping[str, Any] | None) -> "pd.DataFrame":
    """The rows that pass a grid's column filters, in its sort order.

    Args:
        request: AG Grid's `IGetRowsParams`: filterModel and sortModel.
    """
    request = request or {}
    for field, model in (request.get("filterModel") or {}).items():
        name = column_name(frame, field)
        if name is not None:
            frame = frame[matches(frame[name], model)]
    for order in reversed(request.get("sortModel") or []):  # stable, so that the first order wins
        name = column_name(frame, order.get("colId", ""))
        if name is not None:
            frame = frame.sort_values(name, ascending=order.get("sort") == "asc", kind="stable")
    return frame


def csv(frame: "pd.DataFrame") -> str:
    """A table as CSV for a spreadsheet: text that it would evaluate as a formula gets a leading `'`.

    Tokens and rows of text come from files. The table in the audit itself is unchanged.
    """

    def escaped(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value

    return frame.map(escaped).rename(columns=escaped).to_csv(index=False)


def column_name(frame: "pd.DataFrame", field: str) -> Any:
    """The name of the column at a position; None if there is no such position."""
    return frame.columns[int(field)] if field.isdecimal() and int(field) < frame.shape[1] else None


def matches(column: "pd.Series[Any]", model: Mapping[str, Any]) -> "pd.Series[bool]":
    """Which values pass a filter of AG Grid."""
    if "conditions" in model:
        passes = (matches(column, condition) for condition in model["conditions"])
        return functools.reduce(operator.and_ if model.get("operator") == "AND" else operator.or_, passes)
    kind, wanted = model.get("type", ""), model.get("filter")
    if kind in ("blank", "notBlank"):
        return column.isna() if kind == "blank" else column.notna()
    if not is_number(column):
        text, wanted = column.astype(str).str.casefold(), str(wanted).casefold()
        return {
            "contains": lambda: text.str.contains(wanted, regex=False),
            "notContains": lambda: ~text.str.contains(wanted, regex=False),
            "equals": lambda: text == wanted,
            "notEqual": lambda: text != wanted,
            "startsWith": lambda: text.str.startswith(wanted),
            "endsWith": lambda: text.str.endswith(wanted),
        }[kind]()
    if kind == "inRange":
        return column.gt(float(wanted)) & column.lt(float(model["filterTo"]))  # type: ignore[arg-type]
    return getattr(column, COMPARE[kind])(float(wanted))  # type: ignore[arg-type]


def response(frame: "pd.DataFrame", request: Mapping[str, Any]) -> dict[str, Any]:
    """The block of rows that a grid requests, and the number of all rows that pass its filters."""
    try:
        left = selected(frame, request)
        block = left.iloc[int(request.get("startRow", 0)) : int(request.get("endRow", BLOCK))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("a grid sent a request that cannot be read: %r", error)
        left = block = frame.head(0)
    return {"rowData": rows(block), "rowCount": len(left)}


def rows(frame: "pd.DataFrame") -> Sequence[dict[str, str]]:
    """Rows as a grid shows them: text by the position of its column."""
    return [
        {str(i): content.format_cell(value).text for i, value in enumerate(row)}
        for row in frame.to_numpy(dtype=object)
    ]
