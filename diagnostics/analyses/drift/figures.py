"""Figures of drift: each similarity of base and tuned by layer, a line a set."""

import plotly.graph_objects as go

from diagnostics.analyses.drift.similarity import ONSET
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.set_styles import set_lines

# column -> title and axis
CURVES = {
    "rsa": ("Similarity of the distances between rows (RSA), by layer", "RSA, 1 is unchanged"),
    "cka": ("Similarity of the rows' kernels (debiased CKA), by layer", "CKA, 1 is unchanged"),
    "procrustes": ("Change that no rotation undoes, by layer", "Procrustes residual, 0 is unchanged"),
    "displacement": ("How far rows moved, rotations included", "displacement, share of base's norm"),
    "class_shift": ("How far the centres of classes moved", "shift, in spreads within a class"),
}


def draw(result: Result) -> "dict[str, go.Figure]":
    """A line for each set over the layers, for each measure that was taken."""
    layers = result.tables["layers"]
    # Layers are whole numbers; with many of them, some have no tick.
    ticks = {"dtick": 1} if layers["layer"].nunique() <= 32 else {"tickformat": "d"}
    figures = {}
    for column, (title, y) in CURVES.items():
        if layers[column].notna().any():
            figure = theme.figure(title, "layer; −1 is before the first block", y).update_xaxes(**ticks)
            figures[column] = set_lines(figure, layers, "layer", column, "layer {x}: {y:.4f}")
    if "rsa" in figures:
        theme.threshold(figures["rsa"], f"onset {ONSET:g}", y=ONSET)
    return figures
