"""The few charts that every figure is made of: lines with ribbons, points, bars, heat maps, panels, menus.

Each draws columns of a tidy frame into a figure and gives the figure back. A hover text is a format string:
`"layer {x}: {y:.4f}, {rows} rows"`. `{x}`, `{y}` and `{z}` are what is drawn, any other field is a column.
Text from a frame is escaped, because plotly reads labels as markup.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.plotting import theme
from probes.checkpoints.steps import step_label

Interval = tuple[str, str]  # the columns of its lower and upper end
Panel = tuple[int | None, int | None]  # row and column, counted from 1

ALONE: Panel = (None, None)  # the panel of a figure that has no others
LABELLED = 24  # columns of a heat map up to which its cells carry text


@dataclass(frozen=True)
class Style:
    """The look of a curve and its name in the legend."""

    name: str
    color: str
    symbol: str = "circle"
    dash: str = "solid"
    width: float | int = 2
    size: float | int = 8

    @property
    def stroke(self) -> dict[str, Any]:
        """The line as plotly takes it."""
        return {"color": self.color, "dash": self.dash, "width": self.width}


def drawn(result: Any, **functions: "Callable[..., go.Figure | None]") -> "dict[str, go.Figure]":
    """Figures by name, each drawn from the tables that its function's parameters name.

    A parameter `result` gets the result itself. A figure is left out where a table without a default is
    missing or empty, or where its function returns None.
    """
    tables = {name: table for name, table in result.tables.items() if len(table)} | {"result": result}
    figures: dict[str, go.Figure] = {}
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        if all(p.name in tables or p.default is not p.empty for p in parameters):
            figure = function(**{p.name: tables[p.name] for p in parameters if p.name in tables})
            figures |= {} if figure is None else {name: figure}
    return figures


def line(
    figure: "go.Figure", table: pd.DataFrame, x: str, y: str, style: Style, hover: str = "", *,
    interval: Interval | None = None, panel: Panel = ALONE, **look: Any,
) -> "go.Figure":  # fmt: skip
    """A line with marks, and a ribbon where it has an interval."""
    if interval:
        low, high = (table[column].to_numpy(float) for column in interval)
        ends, x_values = np.concatenate([high, low[::-1]]), table[x].to_numpy(float)
        ribbon = {
            "type": "scatter", "mode": "lines", "x": np.concatenate([x_values, x_values[::-1]]), "y": ends,
            "fill": "toself", "fillcolor": theme.faint(style.color, 0.15), "hoverinfo": "skip",
            "line": {"width": 0, "color": style.color}, "showlegend": False, "legendgroup": style.name,
        }  # fmt: skip
        figure.add_trace(ribbon, *panel)
        look = {"legendgroup": style.name, **look}  # the legend hides both
    look = {"mode": "lines+markers", "line": style.stroke, **look}
    return points(figure, table, x, y, style, hover, panel=panel, **look)


def points(
    figure: "go.Figure", table: pd.DataFrame, x: str, y: str, style: Style, hover: str = "", *,
    interval: Interval | None = None, x_interval: Interval | None = None, panel: Panel = ALONE, **look: Any,
) -> "go.Figure":  # fmt: skip
    """Marks, with error bars where they have intervals."""
    marks = {
        "marker": {"color": style.color, "symbol": style.symbol, "size": style.size},
        "error_x": whiskers(table, x, x_interval, style.color),
        "error_y": whiskers(table, y, interval, style.color),
    }
    return trace(figure, "scatter", table, x, y, style, hover, panel, {"mode": "markers", **marks, **look})


def bars(
    figure: "go.Figure", table: pd.DataFrame, x: str, y: str, style: Style, hover: str = "", *,
    interval: Interval | None = None, panel: Panel = ALONE, **look: Any,
) -> "go.Figure":  # fmt: skip
    """Bars with intervals, upright unless `orientation` is `h`."""
    value, error = (x, "error_x") if look.get("orientation") == "h" else (y, "error_y")
    ends = whiskers(table, value, interval, theme.NEUTRAL, width=4)
    look = {"marker": {"color": style.color}, error: ends, **look}
    return trace(figure, "bar", table, x, y, style, hover, panel, look)


def trace(
    figure: "go.Figure", kind: str, table: pd.DataFrame, x: str, y: str, style: Style, hover: str,
    panel: Panel, look: dict[str, Any],
) -> "go.Figure":  # fmt: skip
    """Two columns as a trace of plotly."""
    data = {"name": theme.verbatim(style.name), "x": values(table[x]), "y": values(table[y])}
    data |= pointed(hover, lambda field: values(table[field]))
    return figure.add_trace({"type": kind, **data, **look}, *panel)


def heat(
    figure: "go.Figure", table: pd.DataFrame, x: str, y: str, value: str, hover: str, *, bar: str = "",
    text: str = "", columns: Iterable[Any] | None = None, rows: Iterable[Any] | None = None,
    diverging: bool = False, markup: bool = False, panel: Panel = ALONE, **look: Any,
) -> "go.Figure":  # fmt: skip
    """A heat map with a cell for each row of the table; the first row of cells is on top.

    Args:
        bar: the title of the colour bar.
        text: the column written into the cells, where there are few enough columns to read it.
        columns, rows: values of `x` and `y` in order; by default as the table has them.
        diverging: whether 0 is the middle of the colours; else they start from 0.
        markup: whether the columns of the hover text are in plotly's markup already.
    """
    x_values = list(table[x].unique() if columns is None else columns)
    y_values = list(table[y].unique() if rows is None else rows)

    def grid(column: str) -> np.ndarray:
        cells = table.assign(cell=table[column] if markup else values(table[column]))
        cells = cells.pivot(index=y, columns=x, values="cell")
        return cells.reindex(index=y_values, columns=x_values).to_numpy()

    z = grid(value).astype(float)
    most = max(float(np.nanmax(np.abs(z), initial=0.0)), 1e-12)
    cells: dict[str, Any] = {
        "type": "heatmap", "z": z, "x": names(x_values), "y": names(y_values),
        "zmin": -most if diverging else 0, "zmax": most, "colorbar": {"title": {"text": bar}},
        **pointed(f"{hover}<extra></extra>", grid),
    }  # fmt: skip
    if diverging:
        # Opaque, so that the numbers in its cells are dark or light as they must be.
        cells["colorscale"] = theme.scale(theme.LIGHT.diverging)
    if max(z.shape) <= 2 * LABELLED:
        cells |= {"xgap": 2, "ygap": 2}
    if text and len(x_values) <= LABELLED:
        labels = grid(text).astype(object)
        cells |= {"text": np.where(pd.isna(labels), "", labels), "texttemplate": "%{text}"}
    figure.add_trace({**cells, **look}, *panel)
    axis = {"type": "category", "showgrid": False, "row": panel[0], "col": panel[1]}
    figure.update_xaxes(**axis).update_yaxes(autorange="reversed", **axis)
    return figure.update_layout(height=max(280, 170 + 30 * len(y_values)))


def panels(
    title: str, x: str, y: str, *, height: int = 420, rows: int = 1, columns: int = 1,
    names: Sequence[str] = (), **spacing: Any,
) -> "go.Figure":  # fmt: skip
    """A figure of panels, with axis titles at the bottom and on the left."""
    titles = [theme.verbatim(name) for name in names]
    figure = theme.figure(title, "", "", height).set_subplots(rows, columns, subplot_titles=titles, **spacing)
    figure.update_annotations(font_size=13)
    return figure.update_xaxes(title=x, row=rows).update_yaxes(title=y, col=1)


def menu(figures: "Mapping[str, go.Figure]") -> "go.Figure":
    """The first of several figures, with a menu of the others; a single one stays as it is."""
    (first, *others), counts = figures.values(), [len(figure.data) for figure in figures.values()]
    if not others:
        return first
    layouts = []
    for figure in figures.values():
        ranges = {f"{axis}.range": figure.layout[axis].range for axis in ("xaxis", "yaxis")}
        marks = {key: figure.layout.to_plotly_json().get(key, []) for key in ("shapes", "annotations")}
        layouts.append({**marks, **ranges, "title.text": figure.layout.title.text})
    buttons = []
    for chosen, (label, layout) in enumerate(zip(figures, layouts, strict=True)):
        seen = [i == chosen for i, count in enumerate(counts) for _ in range(count)]
        button: dict[str, Any] = {"method": "update", "args": [{"visible": seen}, layout]}
        if all(other == layout for other in layouts):
            button = {"method": "restyle", "args": ["visible", seen]}
        buttons.append({"label": theme.verbatim(label), **button})
    first.update_traces(visible=True)
    first.add_traces([trace.update(visible=False) for figure in others for trace in figure.data])
    # Above the legend.
    corner = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "pad": {"b": 26}}
    return first.update_layout(updatemenus=[{"type": "dropdown", "buttons": buttons, **corner}], margin_t=120)


def whiskers(
    table: pd.DataFrame, value: str, interval: Interval | None, color: str, width: int = 0
) -> dict[str, Any] | None:  # fmt: skip
    """Error bars from a value to the ends of its interval."""
    if not interval:
        return None
    ends = {"array": table[interval[1]] - table[value], "arrayminus": table[value] - table[interval[0]]}
    return {"symmetric": False, **ends, "color": color, "thickness": 1.5, "width": width}


def pointed(hover: str, column: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """A hover text in plotly's notation, with the columns that it needs."""
    template, fields = "", []
    for text, field, spec, _ in Formatter().parse(hover):
        template += text
        if field not in ("x", "y", "z", None):
            fields += [] if field in fields else [field]
            field = f"customdata[{fields.index(field)}]"
        template += "" if field is None else "%{" + field + (f":{spec}" if spec else "") + "}"
    data = [column(field) for field in fields]
    if len(data) == 1:
        return {"hovertemplate": template.replace("customdata[0]", "customdata"), "customdata": data[0]}
    return {"hovertemplate": template or None, **({"customdata": np.stack(data, axis=-1)} if data else {})}


def values(column: "pd.Series[Any]") -> np.ndarray:
    """A column as a trace holds it: numbers as they are, text escaped."""
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(float, na_value=np.nan) if column.hasnans else column.to_numpy()
    return column.map(lambda text: "" if pd.isna(text) else theme.verbatim(text)).to_numpy(object)


def names(categories: Iterable[Any]) -> list[str]:
    """The categories of an axis: text escaped, steps in all their digits, shares without needless ones."""
    return [
        f"{name:g}" if isinstance(name, float) and not name.is_integer() else theme.verbatim(step_label(name))
        for name in categories
    ]
