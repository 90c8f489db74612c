"""Pictures of drift: each similarity by layer, task and keep rows in one picture."""

from typing import TYPE_CHECKING

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

# RSA below which the representations of base and tuned are said to part.
ONSET = 0.95
COLORS = {"task": theme.TUNED, "keep": theme.BASE}
# column -> title and axis
CURVES = {
    "rsa": ("Where RSA falls, rows stand to each other in another way", "RSA, 1 is unchanged"),
    "cka": ("Debiased CKA says the same of another similarity of rows", "CKA, 1 is unchanged"),
    "procrustes": ("What no rotation undoes", "Procrustes residual, 0 is unchanged"),
    "displacement": ("How far rows moved, rotations included", "displacement, share of base's norm"),
    "class_shift": ("How far the centres of classes moved", "shift, in spreads within a class"),
}


def draw(result: Result) -> "dict[str, go.Figure]":
    """A curve a set over the layers, for each measure that there is."""
    import plotly.graph_objects as go

    layers = result.tables["layers"]
    figures = {}
    # Layers are whole numbers; of many not every one has a tick.
    whole = {"dtick": 1} if layers["layer"].nunique() <= 32 else {"tickformat": "d"}
    for column, (title, y) in CURVES.items():
        if not layers[column].notna().any():
            continue
        figure = theme.figure(title=title, x="layer; -1: before the first block", y=y)
        seen = dict.fromkeys(COLORS, 0)
        for name, part in layers.groupby("set", sort=False):
            role = str(part["role"].iloc[0])
            symbol = theme.SYMBOLS[seen[role] % len(theme.SYMBOLS)]
            seen[role] += 1
            figure.add_trace(
                go.Scatter(
                    x=part["layer"],
                    y=part[column],
                    mode="lines+markers",
                    name=theme.verbatim(name if name == role else f"{name} ({role})"),
                    line_color=COLORS[role],
                    marker={"symbol": symbol, "size": 8},
                    hovertemplate="layer %{x}: %{y:.4f}",
                )
            )
        if column == "rsa":
            theme.threshold(figure, f"onset {ONSET:g}", y=ONSET)
        figures[column] = figure.update_layout(height=400).update_xaxes(**whole)
    return figures
