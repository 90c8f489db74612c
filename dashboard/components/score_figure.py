"""Where the score of one row of text falls among the scores of every set."""

from typing import TYPE_CHECKING

import numpy as np

from dashboard.state.detector import Detector
from diagnostics.plotting import theme

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

POINTS = 2_000  # rows in the figure
COLORS = {"task": theme.TUNED, "ood": theme.NEW, "keep": theme.BASE, "guard": theme.NEUTRAL}
SELECTED = theme.COLORWAY[3]


def sample(rows: "pd.DataFrame", score: str) -> dict[str, "pd.DataFrame"]:
    """The rows to draw by set: evenly spaced in the order of their scores, both ends included."""
    sets = list(rows[rows[score].notna()].groupby("set", sort=False))
    room = max(2, POINTS // max(1, len(sets)))
    samples = {}
    for name, part in sets:
        order = part.sort_values(score, kind="stable")
        kept = np.unique(np.linspace(0, len(order) - 1, min(room, len(order))).round().astype(int))
        samples[str(name)] = order.iloc[kept]
    return samples


def score_figure(detector: Detector, row: "pd.Series", score: str) -> "go.Figure":
    """A strip of marks for each set, the selected row, and the thresholds."""
    unit = ", nats" if score == "ratio" else ""
    figure = theme.figure(title="", x=f"{score}{unit} (higher is more foreign)", y="")
    samples = sample(detector.rows, score)
    labels = []
    for position, (name, part) in enumerate(samples.items()):
        role = str(part["role"].iloc[0])
        labels.append(f"{theme.verbatim(name)} ({role})")
        # A fixed pattern off the middle keeps marks of similar scores apart.
        jitter = 0.62 * ((np.arange(len(part)) * 0.618034) % 1 - 0.5)
        figure.add_scatter(
            x=part[score], y=position + jitter, mode="markers", name=f"{role} rows", showlegend=False,
            marker={"color": COLORS.get(role, theme.NEUTRAL), "size": 6, "opacity": 0.55},
            customdata=[
                [theme.verbatim(detector.key(drawn)), theme.verbatim(str(drawn["text"])[:80])]
                for _, drawn in part.iterrows()
            ],
            hovertemplate="%{customdata[0]}: %{x:.4g}<br>%{customdata[1]}<extra></extra>",
        )  # fmt: skip
    names = list(samples)
    position = names.index(str(row["set"])) if str(row["set"]) in names else 0
    mark = {"symbol": "diamond-open", "size": 16, "color": SELECTED, "line": {"color": SELECTED, "width": 3}}
    figure.add_scatter(
        x=[row[score]], y=[position], mode="markers", name="selected row", showlegend=False, hoverinfo="skip",
        marker=mark,
    )  # fmt: skip
    figure.add_vline(x=row[score], line={"color": SELECTED, "width": 1.5})
    for text, value in detector.thresholds(score).items():
        figure.add_vline(x=value, line={"color": theme.NEUTRAL, "dash": "dash", "width": 1.5})
        top = text.endswith("below")
        figure.add_annotation(
            x=value, xref="x", y=1 if top else 0, yref="paper", text=text, xanchor="left",
            yanchor="top" if top else "bottom",
        )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=labels, showgrid=False, range=[len(names) - 0.4, -0.6]
    )
    return figure.update_layout(height=110 + 86 * len(names), title=None, margin={"t": 16}, clickmode="event")
