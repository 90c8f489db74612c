"""Pictures of a run's dynamics, drawn from the tables alone: a saved result redraws."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.layer_axes import layer_name
from diagnostics.plotting.set_styles import COLORS
from probes.checkpoints.steps import step_label

if TYPE_CHECKING:
    import plotly.graph_objects as go

ROLES = {"train": theme.NEUTRAL, "task": COLORS["task"]}
# A panel of the strip: its axis, and the columns drawn in it with their names.
PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("collapsed<br>softmax", {"collapsed_train": "train labels", "collapsed_task": "held-out labels"}),
    ("logit scale", {"logit_scale_train": "train labels", "logit_scale_task": "held-out labels"}),
    ("−∇L along W,<br>cosine", {"nlm_unembedding": "unembedding", "nlm_cosine": "all matrices"}),
    ("units switched<br>a token", {"local_complexity": "local complexity"}),
    ("kernel CKA<br>to the first", {"kernel_cka": "plain", "kernel_cka_debiased": "debiased"}),
    ("kernel–label<br>alignment", {"kernel_alignment": "last kernel with labels"}),
    ("linearity gap", {"linearity_gap": "towards each step"}),
    ("movement", {"movement": "of all weights"}),
)
# Colour, symbol, and the symbol as it is written.
LOOKS = ((theme.NEUTRAL, "circle", "●"), (theme.TUNED, "diamond", "◆"))


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or says nothing is left out."""
    steps = result.tables.get("steps")
    if steps is None or not len(steps):
        return {}
    figures = {"strip": draw_strip(steps), "scores": draw_scores(steps)}
    layers, tensors = result.tables.get("layers"), result.tables.get("tensors")
    if layers is not None and len(layers):
        figures["complexity"] = draw_map(
            layers, "share", "Which layers' units still switch near what is read", "share of units"
        )
    if tensors is not None and len(tensors):
        if tensors["nlm_cosine"].notna().any():
            figures["nlm"] = draw_map(
                tensors, "nlm_cosine", "Where the gradient runs along the weights themselves", "mean cosine",
                diverging=True,
            )  # fmt: skip
        if tensors["movement"].notna().any():
            figures["movement"] = draw_map(
                tensors, "movement", "How far each layer moved from the first checkpoint",
                "mean share of its length",
            )  # fmt: skip
    return figures


def draw_strip(steps: pd.DataFrame) -> "go.Figure":
    """Every measure over the same axis of steps, one above the other."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = [
        (axis, {column: name for column, name in columns.items() if known(steps, column)})
        for axis, columns in PANELS
    ]
    panels = [(axis, columns) for axis, columns in panels if columns]
    figure = make_subplots(rows=max(1, len(panels)), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    for row, (axis, columns) in enumerate(panels, start=1):
        for (column, name), (color, symbol, _) in zip(columns.items(), looks(columns), strict=True):
            said = f"{axis.replace('<br>', ' ')}: {name}"
            figure.add_trace(
                go.Scatter(
                    x=steps["step"], y=steps[column], mode="lines+markers", name=said, showlegend=False,
                    line={"color": color}, marker={"symbol": symbol, "size": 7},
                    hovertemplate=f"step %{{x}}: %{{y:.4g}}<extra>{said}</extra>",
                ),
                row=row, col=1,
            )  # fmt: skip
        place = "" if row == 1 else str(row)
        # A legend of its own above each panel: one for all would have to name the panels.
        figure.add_annotation(
            text="&nbsp;&nbsp; ".join(
                f'<span style="color:{color}">{mark}</span> {name}'
                for name, (color, _, mark) in zip(columns.values(), looks(columns), strict=True)
            ),
            xref=f"x{place} domain", yref=f"y{place} domain", x=0, y=1, xanchor="left", yanchor="bottom",
            font={"size": 11},
        )  # fmt: skip
        shares = "collapsed" in axis
        figure.update_yaxes(
            title={"text": axis, "font": {"size": 11}}, exponentformat="e", nticks=5,
            range=[-0.05, 1.05] if shares else None, row=row, col=1,
        )  # fmt: skip
    figure.update_xaxes(title="step", row=max(1, len(panels)), col=1)
    title = "Numbers, features and pieces over the run"
    return figure.update_layout(
        template=theme.template(),
        title={"text": title, "y": 0.985},
        height=140 + 130 * max(1, len(panels)),
    )


def looks(columns: Iterable[str]) -> list[tuple[str, str, str]]:
    """The looks of a panel's curves: what is held out looks alike in all."""
    return [LOOKS[1] if column.endswith("_task") else LOOKS[at] for at, column in enumerate(columns)]


def known(steps: pd.DataFrame, column: str) -> bool:
    """Whether a column is there and says anything."""
    return column in steps and bool(steps[column].notna().any())


def draw_scores(steps: pd.DataFrame) -> "go.Figure":
    """Loss of train and held-out rows, and the share of them that is right, over the steps."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (measure, axis) in enumerate((("loss", "loss, nats"), ("metric", "share right")), start=1):
        for role, color in ROLES.items():
            if known(steps, f"{measure}_{role}"):
                figure.add_trace(
                    go.Scatter(
                        x=steps["step"], y=steps[f"{measure}_{role}"], mode="lines+markers",
                        name="train rows" if role == "train" else "held-out rows", showlegend=row == 1,
                        line_color=color,
                        marker={"symbol": "circle" if role == "train" else "diamond", "size": 8},
                        hovertemplate=f"{role}, step %{{x}}: %{{y:.4f}}",
                    ),
                    row=row, col=1,
                )  # fmt: skip
        figure.update_yaxes(title=axis, row=row, col=1)
    figure.update_xaxes(title="step", row=2, col=1)
    title = "When the train rows were learnt, and when the held-out rows"
    return figure.update_layout(template=theme.template(), title={"text": title, "y": 0.97}, height=480)


def draw_map(
    table: pd.DataFrame, column: str, title: str, what: str, *, diverging: bool = False
) -> "go.Figure":
    """Layers over steps; of a layer's several tensors the mean."""
    import plotly.graph_objects as go

    part = table[table[column].notna()]
    # What stands outside the blocks is shown by itself: the unembedding is looked at first.
    outside = part["component"] if "component" in part else part["layer"]
    named = part.assign(
        layer=[
            name if layer_name(layer) == "none" else layer_name(layer)
            for layer, name in zip(part["layer"], outside, strict=True)
        ]
    )
    grid = named.pivot_table(index="layer", columns="step", values=column, aggfunc="mean")
    grid = grid.loc[sorted(grid.index, key=lambda name: (not name.isdigit(), name.zfill(9)))]
    figure = theme.figure(title=title, x="step", y="layer")
    scale: dict[str, Any] = {"zmin": 0, "zmax": max(float(grid.max().max()), 1e-12)}
    if diverging:
        scale = {"zmin": -1, "zmax": 1, "colorscale": theme.scale(theme.LIGHT.diverging)}
    figure.add_trace(
        go.Heatmap(
            z=grid.to_numpy(), x=[step_label(step) for step in grid.columns], y=list(grid.index),
            colorbar={"title": {"text": what}},
            hovertemplate=f"layer %{{y}}, step %{{x}}: %{{z:.4g}} {what}<extra></extra>", **scale,
        )
    )  # fmt: skip
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return figure.update_layout(height=max(280, 120 + 26 * len(grid)))
