"""Colours and the plotly template of every figure, the report and the dashboard.

The hues keep apart under protanopia, deuteranopia and tritanopia and stand at 3:1 or more against the light
and the dark page, so one figure serves both: only what is in the template changes with the page.
"""

import functools
import html
import math
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

Ends = tuple[float | int, float | int]

BASE = "#2b7bba"
TUNED = "#d9730d"
NEW = "#9a3be8"  # what tuning brought: intruders, grafted regions
NEUTRAL = "#7d8590"  # thresholds, floors, what was not measured
COLORWAY = (BASE, TUNED, NEW, "#c91d5f", "#497229")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")  # with COLORWAY: never colour alone

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'


@dataclass(frozen=True, kw_only=True, eq=False)
class PageColours:
    """The colours of a page: one for light, one for dark.

    Attributes:
        verdicts: a colour for text and icons by verdict, readable (4.5:1) on `paper` and `panel`.
    """

    paper: str
    panel: str
    ink: str
    muted: str
    grid: str
    sequential: tuple[str, ...]  # from little to much, lightness monotone; starts at the page's own tone
    diverging: tuple[str, ...]  # from the base's side over the page's tone to the tuned side
    verdicts: dict[str, str]


LIGHT = PageColours(
    paper="#ffffff", panel="#f5f6f8", ink="#1c2128", muted="#57606a", grid="#e3e6ea",
    sequential=("#f3f1f8", "#d8c6f4", "#b48aec", "#8c48d8", "#5c1ca0", "#2f0a59"),
    diverging=("#174e7c", BASE, "#a9cbe6", "#f3f3f3", "#f4c79a", TUNED, "#8a4300"),
    verdicts={"pass": "#077070", "warn": "#8a5a00", "fail": "#c0253a", "skipped": "#57606a"},
)  # fmt: skip
DARK = PageColours(
    paper="#14181d", panel="#1c2128", ink="#e6e9ed", muted="#a0a8b3", grid="#333a44",
    sequential=("#20262e", "#43306b", "#6f42b8", "#9c62f0", "#c6a4fb", "#f1e8ff"),
    diverging=("#b5dbf7", "#4f9fdb", "#28506f", "#2a2f36", "#7a4718", "#f09238", "#ffd9ae"),
    verdicts={"pass": "#3fc1c1", "warn": "#e3a93c", "fail": "#ff7b72", "skipped": "#a0a8b3"},
)  # fmt: skip


def verbatim(text: object) -> str:
    """Text as plotly should show it: its labels read `<b>`, `<a href>` and entities as markup."""
    return html.escape(str(text), quote=False)


@functools.cache
def template(page: PageColours = LIGHT) -> "go.layout.Template":
    """The look of a figure on a page; figures copy it."""
    lines = {"gridcolor": page.grid, "linecolor": page.grid, "tickcolor": page.grid}
    axis = {**lines, "zeroline": False, "ticks": "outside", "title": {"standoff": 10}}
    hover = {"align": "left", "namelength": -1, "bgcolor": page.panel, "bordercolor": page.grid}
    hover |= {"font": {"color": page.ink, "family": FONT}}
    bar = {"thickness": 12, "outlinewidth": 0, "tickcolor": page.grid, "title": {"side": "right"}}
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": page.ink},
            "title": {"font": {"size": 16}, "x": 0, "xref": "paper", "xanchor": "left", "yanchor": "top"},
            "paper_bgcolor": page.paper,
            "plot_bgcolor": page.paper,
            "colorway": list(COLORWAY),
            "colorscale": {"sequential": scale(page.sequential), "diverging": scale(page.diverging)},
            "coloraxis": {"colorscale": scale(page.sequential), "colorbar": bar},
            # Each axis in one direction only: with both, labels that turn when they lack room never settle.
            "xaxis": {**axis, "automargin": "height"},
            "yaxis": {**axis, "automargin": "width"},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "tracegroupgap": 0},
            "hoverlabel": hover,
            "margin": {"l": 64, "r": 24, "t": 84, "b": 56},
            "annotationdefaults": {"font": {"size": 12, "color": page.muted}, "showarrow": False},
        },
        data={"heatmap": [{"colorscale": scale(page.sequential), "colorbar": bar, "hoverongaps": False}]},
    )


def scale(colors: tuple[str, ...]) -> list[tuple[float, str]]:
    """Evenly spaced stops of a colour scale, from 0 to 1."""
    return [(i / (len(colors) - 1), color) for i, color in enumerate(colors)]


def faint(color: str, alpha: float) -> str:
    """A colour that lets the page through: alpha 0 is the page, 1 the colour."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"


def figure(title: str, x: str, y: str, height: int = 420) -> "go.Figure":
    """An empty figure in the house style; its titles are shown as they are, markup and all."""
    layout = {"template": template(), "title": {"text": verbatim(title), "y": 0.97}, "height": height}
    return go.Figure(layout=layout).update_xaxes(title=verbatim(x)).update_yaxes(title=verbatim(y))


def threshold(
    figure: "go.Figure", label: str = "", *, x: float | int | None = None, y: float | int | None = None,
    left: bool = False, color: str = NEUTRAL, dash: str = "dash", **panel: Any,
) -> "go.Figure":  # fmt: skip
    """Draw a labelled line across the figure at one x, one y, or both.

    Args:
        left: whether the label is to the left of a vertical line, or at the left end of a horizontal one.
        panel: `row` and `col` of a figure with panels.
    """
    look = {"line": {"color": color, "dash": dash, "width": 1.5}, **panel}
    if label:
        look |= {"annotation_text": label, "annotation_position": f"top {'left' if left else 'right'}"}
    for draw, letter, value in ((figure.add_vline, "x", x), (figure.add_hline, "y", y)):
        if value is not None:
            draw(**{letter: value}, **look)
            if label and figure.layout[f"{letter}axis"].type == "log":
                # plotly leaves the label of such a line where a linear axis would have it.
                figure.layout.annotations[-1][letter] = math.log10(value)
    return figure


def shade(
    figure: "go.Figure", color: str, *, x: Ends | None = None, y: Ends | None = None, strength: float = 0.12,
    **look: Any,
) -> "go.Figure":  # fmt: skip
    """Shade a range of x or of y, behind what is drawn."""
    look |= {"fillcolor": faint(color, strength), "line_width": 0, "layer": "below"}
    if x is not None:
        figure.add_vrect(x0=x[0], x1=x[1], **look)
    if y is not None:
        figure.add_hrect(y0=y[0], y1=y[1], **look)
    return figure
