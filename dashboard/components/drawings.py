"""Figures of a page, in the colours of a light or a dark page."""

import json
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from dash import dcc, html

from dashboard.components.series_figure import cursor
from diagnostics.plotting import theme
from diagnostics.report.content import EmbeddedFigure

if TYPE_CHECKING:
    import plotly.graph_objects as go

CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}

_template = cache(lambda dark: theme.template(theme.DARK if dark else theme.LIGHT).to_plotly_json())


def template(scheme: object) -> dict[str, Any]:
    """The template of figures as JSON, for a page in a browser's colour scheme; light unless it is dark."""
    return _template(scheme == "dark")


def axis_titles(picture: EmbeddedFigure, curve: int) -> tuple[str, str]:
    """The titles of the x and y axes of one trace of a picture."""
    spec = json.loads(picture.spec)
    trace = spec["data"][curve] if curve < len(spec["data"]) else {}

    def title(letter: str) -> str:
        axis = spec["layout"].get(letter + "axis" + trace.get(letter + "axis", letter)[1:], {})
        return str(axis.get("title", {}).get("text", ""))

    return title("x"), title("y")


def figure(picture: EmbeddedFigure, scheme: str | None, step: Any = None) -> dict[str, Any]:
    """A picture for plotly.js; a step is marked where the x axis counts steps."""
    spec = json.loads(picture.spec)
    layout = spec["layout"]
    layout["template"] = template(scheme)
    layout["margin"] = {"t": 36, **layout.get("margin", {})}
    axis = str(layout.get("xaxis", {}).get("title", {}).get("text", ""))
    if step is not None and axis.split(" ")[0].rstrip(",;:") == "step":
        layout["shapes"] = [*layout.get("shapes", []), cursor(step)]
    return {"data": spec["data"], "layout": layout}


def own_figure(drawn: "go.Figure", scheme: str | None) -> dict[str, Any]:
    """A figure of the dashboard itself for plotly.js."""
    spec = json.loads(drawn.to_json())
    return {"data": spec["data"], "layout": {**spec["layout"], "template": template(scheme)}}


def graph(id: Any, figure: Any, style: Mapping[str, Any], name: str = "") -> dcc.Graph:
    """A plot; `name` is the name of the file that its camera button saves."""
    saved = {"toImageButtonOptions": {"filename": name, "format": "svg"}} if name else {}
    return dcc.Graph(id=id, figure=figure, config=CONFIG | saved, style=dict(style), className="plot")


def panel(
    picture: EmbeddedFigure, scheme: str | None, about: Mapping[str, str], *, step: Any = None
) -> html.Figure:
    """A figure under its title.

    Args:
        about: completes the id of the graph, `{"role": "graph", "name": …}`.
        step: the selected step of a series, if any.
    """
    key = {"name": picture.name, **about}
    caption = html.Figcaption(picture.title, id={"role": "caption", **key})
    plot = graph({"role": "graph", **key}, figure(picture, scheme, step), size(picture), picture.name)
    return html.Figure(
        [caption, plot, html.P(thinned(picture), id={"role": "thinned", **key}, className="source")]
    )


def changes(
    picture: EmbeddedFigure, scheme: str | None, before: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The properties that turn a panel into that of another picture of the same name, by role of the id.

    Replacing the panel takes a browser several times as long, and so does setting a size, even an equal one.
    """
    resized = {} if before == size(picture) else {"style": size(picture)}
    return {
        "graph": {"figure": figure(picture, scheme), **resized},
        "caption": {"children": picture.title},
        "thinned": {"children": thinned(picture)},
    }


def size(picture: EmbeddedFigure) -> dict[str, Any]:
    """The style of a figure: as wide as the page unless the picture has a width."""
    return {"height": picture.height, **({"maxWidth": picture.width} if picture.width else {})}


def thinned(picture: EmbeddedFigure) -> str:
    """How many points are left out, if any."""
    if picture.drawn == picture.total:
        return ""
    return f"{picture.drawn:,} of {picture.total:,} points shown: dense regions are thinned, outliers kept."
