"""Figures of `integrity`, drawn from the tables alone."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import drawn
from diagnostics.plotting.layer_axes import axes, layer_map, location

LEAST = 0.1  # end of the colour scale where every factor is 1 but for noise


def draw(result: Result) -> "dict[str, go.Figure]":
    """The merge by layer and component, and the share of changed entries."""
    return drawn(result, factors=draw_factors, changed=draw_changed)


def draw_factors(merge: pd.DataFrame) -> "go.Figure | None":
    """How often the adapter's delta was added to each matrix, as a distance from once."""
    fitted = merge[merge["factor"].notna()]
    if fitted.empty:
        return None
    wrong = int((fitted["verdict"] != "merged").sum())
    title = "Every matrix holds the adapter's delta once"
    if wrong:
        title = f"{wrong} of {len(fitted)} matrices do not hold the adapter's delta just once"
    figure = theme.figure(title, "layer", "component")
    shown = fitted.assign(off=fitted["factor"] - 1, entries=1.0)
    most = max(LEAST, float(shown["off"].abs().max()))
    ticks = {"tickvals": [-most, 0, most], "ticktext": [f"{1 + off:.3g}" for off in (-most, 0, most)]}
    return layer_map(
        figure, shown, "off", label=_label, text=lambda off: f"{1 + off:.3g}",
        order=axes(fitted), weights="entries", diverging=True, zmin=-most, zmax=most,
        bar="", colorbar={"title": {"text": "times added"}, **ticks},
    )  # fmt: skip


def _label(row: dict[Any, Any]) -> str:
    interval = f"{row['low']:.4g} to {row['high']:.4g}"
    return theme.verbatim(f"{location(row)}: {row['factor']:.4g} times ({interval}), {row['verdict']}")


def draw_changed(compared: pd.DataFrame) -> "go.Figure | None":
    """The share of changed entries by layer and component."""
    shown = compared[compared["changed_share"].notna()]
    if shown.empty or not shown["changed"].any():
        return None
    figure = theme.figure("Share of entries that changed by more than rounding", "layer", "component")
    return layer_map(
        figure, shown.astype({"compared": float}), "changed_share", label=_changed_label, text="{:.2g}",
        order=axes(shown), weights="compared", bar="share of entries", zmax=1.0,
    )  # fmt: skip


def _changed_label(row: dict[Any, Any]) -> str:
    counts = f"{row['changed']:,.0f} of {row['compared']:,.0f}"
    return theme.verbatim(f"{location(row)}: {counts} entries changed")
