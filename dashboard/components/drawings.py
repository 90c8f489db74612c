"""Figures of a page: drawn on the server from the tables, thinned, and kept for the next who looks."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from dash import dcc, html

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.report import content
from diagnostics.report.content import EmbeddedFigure

if TYPE_CHECKING:
    import plotly.graph_objects as go

Drawn = tuple[list[EmbeddedFigure], list[str]]

LIMIT = 800  # points of one figure: what a browser redraws while a person waits
LOOKS = {"light": theme.LIGHT, "dark": theme.DARK}
CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}


class Drawings:
    """The last few results that were drawn; each is drawn once, however many ask at the same time."""

    def __init__(self, size: int = 32):
        self.size = size
        self.kept: OrderedDict[Hashable, Drawn] = OrderedDict()
        self.lock = threading.Lock()

    def of(self, key: Hashable, result: Callable[[], Result]) -> Drawn:
        """The pictures under a key, drawn if need be, and what to say if they cannot be drawn."""
        with self.lock:
            if key not in self.kept:
                self.kept[key] = content.embedded_figures(result(), LIMIT)
                while len(self.kept) > self.size:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return self.kept[key]


def template(scheme: str | None) -> dict[str, Any]:
    """The look of figures on a light or a dark page, as JSON keeps it."""
    if scheme not in TEMPLATES:
        made = theme.template(LOOKS[scheme or "light"] if scheme in LOOKS else theme.LIGHT)
        TEMPLATES[scheme] = made.to_plotly_json()
    return TEMPLATES[scheme]


TEMPLATES: dict[str | None, dict[str, Any]] = {}


def axes(picture: EmbeddedFigure, curve: int) -> tuple[str, str]:
    """The titles of the axes that a trace of a picture stands on."""
    spec = json.loads(picture.spec)
    trace = spec["data"][curve] if curve < len(spec["data"]) else {}

    def title(letter: str) -> str:
        axis = spec["layout"].get(letter + "axis" + trace.get(letter + "axis", letter)[1:], {})
        return str(axis.get("title", {}).get("text", ""))

    return title("x"), title("y")


def figure(picture: EmbeddedFigure, scheme: str | None, step: Any = None) -> dict[str, Any]:
    """What plotly.js draws; a step is drawn into a picture over steps."""
    spec = json.loads(picture.spec)
    layout = spec["layout"]
    layout["template"] = template(scheme)
    layout["margin"] = {"t": 36, **layout.get("margin", {})}
    axis = str(layout.get("xaxis", {}).get("title", {}).get("text", ""))
    if step is not None and axis.split(" ")[0].rstrip(",;:") == "step":
        layout["shapes"] = [*layout.get("shapes", []), cursor(step)]
    return {"data": spec["data"], "layout": layout}


def shown(made: "go.Figure", scheme: str | None) -> dict[str, Any]:
    """A figure of our own as plotly.js draws it."""
    spec = json.loads(made.to_json())
    return {"data": spec["data"], "layout": {**spec["layout"], "template": template(scheme)}}


def cursor(place: Any) -> dict[str, Any]:
    """A shape that marks the chosen step."""
    return {
        "type": "line",
        "xref": "x",
        "x0": place,
        "x1": place,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "opacity": 0.25,
        "line": {"color": theme.TUNED, "width": 6},
    }


def panel(
    picture: EmbeddedFigure, scheme: str | None, known: dict[str, str], *, step: Any = None
) -> html.Figure:
    """A figure under its title.

    Args:
        known: completes the id of the graph, `{"role": "graph", "name": …}`.
        step: what is chosen among steps, if anything.
    """
    about = {"name": picture.name, **known}
    config = CONFIG | {"toImageButtonOptions": {"filename": picture.name, "format": "svg"}}
    graph = dcc.Graph(
        id={"role": "graph", **about},
        figure=figure(picture, scheme, step),
        config=config,
        style=size(picture),
        className="plot",
    )
    return html.Figure(
        [
            html.Figcaption(picture.title, id={"role": "caption", **about}),
            graph,
            html.P(thinned(picture), id={"role": "thinned", **about}, className="source"),
        ]
    )


def changes(
    picture: EmbeddedFigure, scheme: str | None, before: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What turns a panel into that of another picture of the same name: properties by the id's role.

    A panel that is replaced is built anew in the browser, which takes several times as long; so does a figure
    that is given a size, even the one that it had `before`.
    """
    resized = {} if before == size(picture) else {"style": size(picture)}
    return {
        "graph": {"figure": figure(picture, scheme), **resized},
        "caption": {"children": picture.title},
        "thinned": {"children": thinned(picture)},
    }


def size(picture: EmbeddedFigure) -> dict[str, Any]:
    """How large a figure is: as wide as the page, unless it says otherwise."""
    return {"height": picture.height, **({"maxWidth": picture.width} if picture.width else {})}


def thinned(picture: EmbeddedFigure) -> str:
    """What is not drawn, if there is anything."""
    if picture.drawn == picture.total:
        return ""
    return f"{picture.drawn:,} of {picture.total:,} points are drawn: crowds are thinned, outliers kept."
