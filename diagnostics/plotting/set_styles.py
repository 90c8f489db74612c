"""The styles of row sets: a colour for the role, a symbol and a dash for each set of one role."""

import pandas as pd
import plotly.graph_objects as go

from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, line

ALPHA = "alpha; 0 is base, 1 is tuned"
COLORS = {
    "task": theme.TUNED, "keep": theme.BASE, "ood": theme.NEW, "guard": theme.COLORWAY[3],
    "train": theme.NEUTRAL,
}  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def set_name(role: str, name: str) -> str:
    """A set in a legend."""
    return name if name == role else f"{name} ({role})"


def set_curves(table: pd.DataFrame, order: str) -> list[tuple[Style, pd.DataFrame]]:
    """The style and the rows of each set, sorted by a column."""
    curves: list[tuple[Style, pd.DataFrame]] = []
    counts = dict.fromkeys(COLORS, 0)
    for keys, rows in table.groupby(["role", "set"], sort=False):
        role, name = map(str, keys)
        turn = counts.setdefault(role, 0) % len(DASHES)
        counts[role] += 1
        style = Style(
            set_name(role, name), COLORS.get(role, theme.NEUTRAL), theme.SYMBOLS[turn], DASHES[turn]
        )
        curves.append((style, rows.sort_values(order, kind="stable")))
    return curves


def set_lines(figure: "go.Figure", table: pd.DataFrame, x: str, y: str, hover: str) -> "go.Figure":
    """A line for each set."""
    for style, curve in set_curves(table, x):
        line(figure, curve, x, y, style, hover)
    return figure
