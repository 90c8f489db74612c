"""Figures of single samples: distances between them, the experts that carry them, how far they moved."""

from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.plotting import theme
from diagnostics.plotting.charts import heat, names, panels

DISTANCE = "edits / longer pathway"
# Most groups that a histogram tells apart.
APART = 5


def borders(groups: list[str]) -> tuple[list[float], list[float], list[str]]:
    """Where groups end on an axis of samples in order, the middle of each, and its name."""
    sizes = [(name, len(list(members))) for name, members in groupby(groups)]
    ends = np.cumsum([size for _, size in sizes])
    middles = [float(end) - (size + 1) / 2 for end, (_, size) in zip(ends, sizes, strict=True)]
    return (ends[:-1] - 0.5).tolist(), middles, [theme.verbatim(name) for name, _ in sizes]


def step_panels(title: str, x: str, steps: list[float], groups: list[str]) -> go.Figure:
    """A panel for each step, on one axis of samples that names the groups, with a line between any two."""
    look: dict[str, Any] = {"shared_yaxes": True, "horizontal_spacing": 0.04}
    labels = [f"step {name}" for name in names(steps)]
    figure = panels(title, x, "", columns=len(steps), names=labels, **look)
    ends, middles, groups = borders(groups)
    for end in ends:  # in each panel, also while it is empty
        figure.add_hline(y=end, line={"color": theme.NEUTRAL, "width": 1}, exclude_empty_subplots=False)
    ticks = {"tickvals": middles, "ticktext": groups} if len(groups) > 1 else {}
    return figure.update_yaxes(showgrid=False, autorange="reversed", **ticks)


def draw_matrix(matrix: pd.DataFrame, samples: pd.DataFrame) -> go.Figure:
    """Distances between samples, ordered by group, at three steps."""
    shown = samples.set_index("sample").loc[np.union1d(matrix["sample"], matrix["other"])]
    groups, title = shown["group"].astype(str).tolist(), "How far samples' pathways differ; blocks are groups"
    figure = step_panels(title, "sample", list(dict.fromkeys(matrix["step"])), groups)
    labels = [theme.verbatim(f"{group}, {row}") for group, row in zip(groups, shown["row"], strict=True)]
    for col, (_, part) in enumerate(matrix.groupby("step", sort=False), start=1):
        half = part.pivot(index="sample", columns="other", values="distance")
        half = half.reindex(index=shown.index, columns=shown.index).fillna(0.0)
        figure.add_heatmap(
            z=np.maximum(half, half.T), text=[[label] * len(labels) for label in labels], row=1, col=col,
            coloraxis="coloraxis", hovertemplate="%{text}: %{z:.3f}<extra></extra>",
        )  # fmt: skip
    for end in borders(groups)[0]:
        figure.add_vline(x=end, line={"color": theme.NEUTRAL, "width": 1})
    figure.update_xaxes(showgrid=False, showticklabels=False)
    return figure.update_layout(coloraxis={"cmin": 0, "cmax": 1, "colorbar": {"title": {"text": DISTANCE}}})


def hues(count: int) -> list[str]:
    """Colours of experts, neighbours far apart in hue and in turn light and dark."""
    return [f"hsl({(i * 137.5) % 360:.0f}, 60%, {(42, 66)[i % 2]}%)" for i in range(count)]


def draw_routes(routes: pd.DataFrame, samples: pd.DataFrame) -> go.Figure:
    """The expert that gets most of each sample in each layer, at three steps."""
    steps, shown = (list(dict.fromkeys(routes[column])) for column in ("step", "sample"))
    groups = samples.set_index("sample")["group"].loc[shown].astype(str).tolist()
    figure = step_panels("Which expert gets most of each sample, layer by layer", "layer", steps, groups)
    for col, step in enumerate(steps, start=1):
        part = routes[routes["step"] == step]
        hover = "sample {sample}, layer {x}: expert {z} has {share:.2f} of it; {kept} experts are kept"
        look: dict[str, Any] = {"rows": shown, "panel": (1, col), "coloraxis": "coloraxis"}
        heat(figure, part, "layer", "sample", "expert", hover, **look)
    # Samples by their place, as the names of groups are.
    figure.update_traces(y=None).update_yaxes(type="linear")
    count = int(routes["expert"].max()) + 1
    scale = [(edge / count, color) for i, color in enumerate(hues(count)) for edge in (i, i + 1)]
    bar = {"title": {"text": "expert"}, **({"tickvals": list(range(count))} if count <= 16 else {})}
    axis = {"cmin": -0.5, "cmax": count - 0.5, "colorscale": scale, "colorbar": bar}
    return figure.update_layout(coloraxis=axis, height=460)


def draw_drift(samples: pd.DataFrame, steps: pd.DataFrame) -> go.Figure:
    """How far each sample's pathway moved from the first checkpoint to the last."""
    first, *_, last = names(steps["step"])
    title = f"How far pathways moved from step {first} to step {last}; 0 is not at all"
    figure = theme.figure(title, f"{DISTANCE}, of one sample at the two checkpoints", "samples")
    parts: dict[Any, pd.DataFrame] = dict(list(samples.groupby("group", sort=False)))
    parts = parts if 1 < len(parts) <= APART else {"samples": samples}
    for (name, part), color in zip(parts.items(), theme.COLORWAY, strict=False):
        bins, edge = {"start": 0, "end": 1.0 + 1e-9, "size": 0.05}, {"color": "white", "width": 1}
        figure.add_histogram(x=part["drift"], name=theme.verbatim(name), xbins=bins, marker_color=color,
                             marker_line=edge, hovertemplate="%{y} samples in %{x}")  # fmt: skip
    mean = float(samples["drift"].mean())
    theme.threshold(figure, f"mean {mean:.2f}", x=mean).update_xaxes(range=[0, 1.02])
    return figure.update_layout(barmode="stack", showlegend=len(parts) > 1, legend_traceorder="normal")
