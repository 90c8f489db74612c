"""Pictures of single samples: how far apart they are, which experts carry them, how far they moved."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diagnostics.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Groups that a histogram tells apart.
APART = 5


def panels(figure: "go.Figure", steps: list[float]) -> "go.Figure":
    """One panel for each step, side by side on one axis of samples."""
    titles = [f"step {step:g}" for step in steps]
    return figure.set_subplots(
        rows=1, cols=len(steps), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles
    )


def borders(groups: list[str]) -> tuple[list[float], list[float], list[str]]:
    """Where groups end on an axis of samples in order, the middle of each, and its name."""
    starts = [place for place, name in enumerate(groups) if place == 0 or groups[place - 1] != name]
    ends = [*starts[1:], len(groups)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    return [start - 0.5 for start in starts[1:]], middles, [theme.verbatim(groups[start]) for start in starts]


def grouped(figure: "go.Figure", groups: list[str]) -> None:
    """Name the groups on the axis of samples, with a line between any two."""
    ends, middles, names = borders(groups)
    for end in ends:
        figure.add_hline(y=end, line={"color": theme.NEUTRAL, "width": 1})
    if len(names) > 1:
        figure.update_yaxes(tickvals=middles, ticktext=names)
    figure.update_yaxes(showgrid=False, autorange="reversed")


def draw_matrix(matrix: pd.DataFrame, samples: pd.DataFrame) -> "go.Figure":
    """Distances between samples, ordered by group, at three steps."""
    import plotly.graph_objects as go

    steps = list(dict.fromkeys(matrix["step"]))
    shown = np.union1d(matrix["sample"], matrix["other"])
    place = {sample: at for at, sample in enumerate(shown)}
    group = samples.set_index("sample")["group"]
    names = [str(group[sample]) for sample in shown]
    figure = panels(
        theme.figure(title="How far samples' pathways differ; blocks are groups", x="sample", y=""), steps
    )
    rows = [f"{names[at]}, {samples.set_index('sample')['row'][sample]}" for at, sample in enumerate(shown)]
    for col, step in enumerate(steps, start=1):
        own = matrix[matrix["step"] == step]
        cells = np.zeros((len(shown), len(shown)))
        one, other = (own[column].map(place).to_numpy() for column in ("sample", "other"))
        cells[one, other] = cells[other, one] = own["distance"]
        figure.add_trace(
            go.Heatmap(
                z=cells, coloraxis="coloraxis",
                customdata=np.array([[theme.verbatim(each)] * len(rows) for each in rows]),
                hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
            ),
            row=1, col=col,
        )  # fmt: skip
    grouped(figure, names)
    for end in borders(names)[0]:
        figure.add_vline(x=end, line={"color": theme.NEUTRAL, "width": 1})
    figure.update_xaxes(showgrid=False, showticklabels=False, title="sample")
    bar = {"title": {"text": "edits / longer pathway"}}
    return figure.update_layout(height=420, coloraxis={"cmin": 0, "cmax": 1, "colorbar": bar})


def hues(count: int) -> list[str]:
    """Colours for so many experts, neighbours far apart in hue and in turn light and dark."""
    return [f"hsl({(place * 137.5) % 360:.0f}, 60%, {(42, 66)[place % 2]}%)" for place in range(count)]


def draw_routes(routes: pd.DataFrame, samples: pd.DataFrame) -> "go.Figure":
    """The expert that gets most of each sample in each layer, at three steps."""
    import plotly.graph_objects as go

    steps, layers = (list(dict.fromkeys(routes[column])) for column in ("step", "layer"))
    shown = list(dict.fromkeys(routes["sample"]))
    group = samples.set_index("sample")["group"]
    experts = int(routes["expert"].max()) + 1
    colors = hues(experts)
    scale = [(edge / experts, colors[place]) for place in range(experts) for edge in (place, place + 1)]
    figure = panels(
        theme.figure(title="Which expert gets most of each sample, layer by layer", x="layer", y=""), steps
    )
    for col, step in enumerate(steps, start=1):
        own = routes[routes["step"] == step]
        wide = {
            column: own.pivot(index="sample", columns="layer", values=column).loc[shown, layers].to_numpy()
            for column in ("expert", "share", "kept")
        }
        figure.add_trace(
            go.Heatmap(
                z=wide["expert"], x=[f"{layer:g}" for layer in layers], coloraxis="coloraxis",
                customdata=np.stack([wide["share"], wide["kept"]], axis=2),
                hovertemplate="sample %{y}, layer %{x}: expert %{z} has %{customdata[0]:.2f} of it; "
                "%{customdata[1]} experts are kept<extra></extra>",
            ),
            row=1, col=col,
        )  # fmt: skip
    grouped(figure, [str(group[sample]) for sample in shown])
    figure.update_xaxes(type="category", showgrid=False, title="layer")
    few = {"tickvals": list(range(experts))} if experts <= 16 else {}
    axis = {"cmin": -0.5, "cmax": experts - 0.5, "colorscale": scale, "colorbar": {"title": "expert", **few}}
    return figure.update_layout(height=460, coloraxis=axis)


def draw_drift(samples: pd.DataFrame, steps: pd.DataFrame) -> "go.Figure":
    """How far each sample's pathway moved from the first checkpoint to the last."""
    import plotly.graph_objects as go

    first, last = (f"{steps['step'].iloc[place]:g}" for place in (0, -1))
    figure = theme.figure(
        title=f"How far pathways moved from step {first} to step {last}; 0 is not at all",
        x="edits / longer pathway, of one sample at the two checkpoints", y="samples",
    )  # fmt: skip
    names = list(dict.fromkeys(samples["group"]))
    parts = [(name, samples[samples["group"] == name]) for name in names]
    if not 1 < len(names) <= APART:
        parts = [("samples", samples)]
    bins = {"start": 0, "end": 1.0 + 1e-9, "size": 0.05}
    for place, (name, own) in enumerate(parts):
        figure.add_trace(
            go.Histogram(
                x=own["drift"], name=theme.verbatim(name), xbins=bins,
                marker={"color": theme.COLORWAY[place], "line": {"color": "white", "width": 1}},
                hovertemplate=f"{theme.verbatim(name)}: %{{y}} samples in %{{x}}<extra></extra>",
            )
        )  # fmt: skip
    theme.threshold(figure, f"mean {samples['drift'].mean():.2f}", x=float(samples["drift"].mean()))
    figure.update_xaxes(range=[0, 1.02])
    return figure.update_layout(
        height=380, barmode="stack", showlegend=len(parts) > 1, legend_traceorder="normal"
    )
