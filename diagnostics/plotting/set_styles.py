"""What pictures over α share: axis, colours of roles, names of sets, and lines at an α."""

from typing import TYPE_CHECKING

from diagnostics.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

X = "alpha; 0 is base, 1 is tuned"
# role -> colour; sets of one role differ by symbol and dash
COLORS = {"task": theme.TUNED, "keep": theme.BASE, "ood": theme.NEW, "guard": theme.COLORWAY[3]}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def named(role: str, name: str) -> str:
    """What a legend calls a set."""
    return theme.verbatim(name if name == role else f"{name} ({role})")


def marked(figure: "go.Figure", label: str, alpha: float) -> None:
    """Draw a labelled line at an α, the label towards the middle."""
    theme.threshold(figure, label, x=alpha)
    if alpha > 0.5:
        figure.layout.annotations[-1].update(xanchor="right")
