"""The measures of a series over its steps, one panel above the other, with a cursor through all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dashboard.state.steps import SIDES, Step, positions
from diagnostics.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

LOOKS = {
    "against_first": {"color": theme.COLORWAY[0], "dash": "solid", "symbol": theme.SYMBOLS[0]},
    "against_previous": {"color": theme.COLORWAY[2], "dash": "dot", "symbol": theme.SYMBOLS[1]},
}
PANEL = 130  # pixels of one measure
EDGES = 124  # pixels above and below all panels


def cursor(position: Any) -> dict[str, Any]:
    """A shape that marks the selected step."""
    return {
        "type": "line", "layer": "below", "opacity": 0.25, "line": {"color": theme.TUNED, "width": 6},
        "xref": "x", "x0": position, "x1": position, "yref": "paper", "y0": 0, "y1": 1,
    }  # fmt: skip


def padded_range(values: Sequence[float]) -> tuple[float, float]:
    """An axis range with room for a label beyond the outermost value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = 0.2 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def series_figure(
    steps: Sequence[Step], names: Sequence[str], selected: int, thresholds: Mapping[str, Mapping[str, float]]
) -> "go.Figure":
    """The measures over the steps. All panels share one x axis, so hovering shows the step in each."""
    import plotly.graph_objects as go

    x = positions(steps)
    count = max(1, len(names))
    gap = 0.32 / count
    height = (1 - gap * (count - 1)) / count
    figure = go.Figure(layout={"template": theme.template()})
    for i, name in enumerate(names):
        axis = "" if i == 0 else str(i + 1)
        top = 1 - i * (height + gap)
        limits = thresholds.get(name, {})
        values = {side: [step.metrics[side].get(name) for step in steps] for side in LOOKS}
        for side, look in LOOKS.items():
            if all(value is None for value in values[side]):
                continue
            figure.add_scatter(
                x=x, y=values[side], yaxis="y" + axis, mode="lines+markers", name=SIDES[side],
                legendgroup=side, showlegend=i == 0, line={"color": look["color"], "dash": look["dash"]},
                marker={"symbol": look["symbol"], "size": 8},
                hovertemplate=f"{theme.verbatim(name)}: %{{y:.4g}}<extra>{SIDES[side]}</extra>",
            )  # fmt: skip
        measured = [value for side in values.values() for value in side if value is not None]
        figure.layout["yaxis" + axis] = {
            "domain": [max(0.0, top - height), top],
            "nticks": 4,
            "anchor": "x",
            # Left to itself, plotly cuts off the label of a threshold at the edge.
            "range": padded_range([*limits.values(), *measured]),
        }
        figure.add_annotation(
            text=f"<b>{theme.verbatim(name)}</b>", font={"size": 13}, showarrow=False,
            x=0, xref="paper", xanchor="left", y=top, yref="paper", yanchor="bottom",
        )  # fmt: skip
        for severity, limit in limits.items():
            figure.add_shape(
                type="line", xref="paper", x0=0, x1=1, yref="y" + axis, y0=limit, y1=limit,
                line={"color": theme.NEUTRAL, "width": 1, "dash": "dash"},
                label={"text": severity, "textposition": "end", "font": {"color": theme.NEUTRAL, "size": 11}},
            )  # fmt: skip
    figure.add_shape(cursor(x[selected]))
    figure.update_xaxes(
        title="step" if isinstance(x[0], float) else "checkpoint", showspikes=True,
        anchor=f"y{count}" if count > 1 else "y", spikemode="across", spikethickness=1,
        spikecolor=theme.NEUTRAL, spikedash="solid", spikesnap="cursor",
    )  # fmt: skip
    return figure.update_layout(
        height=EDGES + PANEL * len(names),
        hovermode="x unified",
        hoversubplots="axis",
        margin={"t": 72, "b": 52},
        legend={"y": 1 + 26 / (PANEL * count)},
    )
