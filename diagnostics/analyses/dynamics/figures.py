"""Figures of a run's dynamics, drawn from the tables alone, so that a saved result redraws."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, drawn, heat, line, panels
from diagnostics.plotting.layer_axes import layer_name
from diagnostics.plotting.set_styles import COLORS

# Panels of the strip: the axis, and the columns with their names.
PANELS: dict[str, dict[str, str]] = {
    "collapsed<br>softmax": {"collapsed_train": "train labels", "collapsed_task": "held-out labels"},
    "logit scale": {"logit_scale_train": "train labels", "logit_scale_task": "held-out labels"},
    "−∇L along W,<br>cosine": {"nlm_unembedding": "unembedding", "nlm_cosine": "all matrices"},
    "units switched<br>a token": {"local_complexity": "local complexity"},
    "kernel CKA<br>to the first": {"kernel_cka": "plain", "kernel_cka_debiased": "debiased"},
    "kernel–label<br>alignment": {"kernel_alignment": "last kernel with labels"},
    "linearity gap": {"linearity_gap": "towards each step"},
    "movement": {"movement": "of all weights"},
}
# Colour, symbol, and the symbol as text: of held-out labels, and of the first and second of other curves.
HELD_OUT = (theme.TUNED, "diamond", "◆")
LOOKS = ((theme.NEUTRAL, "circle", "●"), HELD_OUT)
# table, column, title and colour bar; by the figure's name
MAPS = {
    "complexity": ("layers", "share", "Units of each layer that switch near the rows", "share of units"),
    "nlm": ("tensors", "nlm_cosine", "Cosine of the descent direction with the weights", "mean cosine"),
    "movement": ("tensors", "movement", "Distance of each layer from the first checkpoint", "share of norm"),
}
SCORES = {
    "train": Style("train rows", COLORS["train"]),
    "task": Style("held-out rows", COLORS["task"], "diamond"),
}


def draw(result: Result) -> dict[str, go.Figure]:
    """The figures; one without data is left out."""
    figures = drawn(result, strip=draw_strip, scores=draw_scores)
    for name, (table, column, title, bar) in MAPS.items() if figures else ():
        if measured(result.tables.get(table, pd.DataFrame()), column):
            figures[name] = draw_map(result.tables[table], column, title, bar)
    return figures


def measured(table: pd.DataFrame, column: str) -> bool:
    """Whether a column exists and has values."""
    return column in table and bool(table[column].notna().any())


def draw_strip(steps: pd.DataFrame) -> go.Figure:
    """Every measure over the same axis of steps, one above the other."""
    strip = {
        axis: {column: name for column, name in columns.items() if measured(steps, column)}
        for axis, columns in PANELS.items()
    }
    strip = {axis: columns for axis, columns in strip.items() if columns}
    count = max(1, len(strip))
    figure = panels("Each measure over the run", "step", "", height=140 + 130 * count, rows=count,
                    shared_xaxes=True, vertical_spacing=0.04)  # fmt: skip
    for row, (axis, columns) in enumerate(strip.items(), start=1):
        legend = []
        for i, (column, name) in enumerate(columns.items()):
            color, symbol, sign = HELD_OUT if column.endswith("_task") else LOOKS[i]
            style = Style(f"{axis.replace('<br>', ' ')}: {name}", color, symbol, size=7)
            line(figure, steps, "step", column, style, "step {x}: {y:.4g}", panel=(row, 1), showlegend=False)
            legend.append(f'<span style="color:{color}">{sign}</span> {name}')
        # A legend for each panel: one for all would have to name the panels.
        figure.add_annotation(
            text="&nbsp;&nbsp; ".join(legend), xref="x domain", yref="y domain", x=0, y=1, xanchor="left",
            yanchor="bottom", font={"size": 11}, row=row, col=1,
        )  # fmt: skip
        figure.update_yaxes(
            title={"text": axis, "font": {"size": 11}}, exponentformat="e", nticks=5,
            range=[-0.05, 1.05] if "collapsed" in axis else None, row=row, col=1,
        )  # fmt: skip
    return figure.update_layout(title_y=0.985)


def draw_scores(steps: pd.DataFrame) -> go.Figure:
    """Loss and accuracy of train and held-out rows over the steps."""
    figure = panels("Train and held-out rows: when each was learnt", "step", "", height=480, rows=2,
                    shared_xaxes=True, vertical_spacing=0.06)  # fmt: skip
    for row, (measure, axis) in enumerate((("loss", "loss, nats"), ("metric", "share right")), start=1):
        for role, style in SCORES.items():
            if measured(steps, f"{measure}_{role}"):
                line(
                    figure, steps, "step", f"{measure}_{role}", style, "step {x}: {y:.4f}", panel=(row, 1),
                    showlegend=row == 1,
                )  # fmt: skip
        figure.update_yaxes(title=axis, row=row, col=1)
    return figure


def draw_map(table: pd.DataFrame, column: str, title: str, bar: str) -> go.Figure:
    """Layers over steps; several tensors of one layer are averaged."""
    part = table[table[column].notna()]
    # Tensors outside the blocks have rows by name: the unembedding is looked at first.
    layers = part["layer"].map(layer_name)
    named = part.assign(layer=layers.where(layers != "none", part.get("component", part["layer"])))
    cells = named.groupby(["layer", "step"])[[column]].mean().reset_index()
    look: dict[str, Any] = {"diverging": True, "zmin": -1, "zmax": 1} if column == "nlm_cosine" else {}
    look |= {"columns": sorted(cells["step"].unique()), "bar": bar}
    look["rows"] = sorted(cells["layer"].unique(), key=lambda name: (not name.isdigit(), name.zfill(9)))
    hover = f"layer {{y}}, step {{x}}: {{z:.4g}} ({bar})"
    return heat(theme.figure(title, "step", "layer"), cells, "step", "layer", column, hover, **look)
