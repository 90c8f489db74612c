"""The pictures of the path from base to tuned, drawn from the tables alone: a saved result redraws."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.set_styles import COLORS, DASHES, X, marked, named

if TYPE_CHECKING:
    import plotly.graph_objects as go

# pattern of base, tuned, blend -> what the legend calls it
PATTERNS = {
    "TTT": "right in all three",
    "FFT": "right in the blend alone",
    "TFT": "right in base and blend",
    "FTT": "right in tuned and blend",
    "FTF": "right in tuned alone",
    "TFF": "right in base alone",
    "TTF": "wrong in the blend alone",
    "FFF": "wrong in all three",
}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    path = result.tables.get("path")
    if path is None or not len(path):
        return {}
    best = result.metrics.get("best_alpha")
    figures = {
        "loss": draw_metric(path, "loss", best, ensemble=True),
        "accuracy": draw_metric(path, "accuracy", best),
    }
    choices = result.tables.get("choices")
    if choices is not None and len(choices) and choices["kept_nats"].notna().any():
        figures["trade"] = draw_trade(choices)
    figures["sides"] = draw_sides(path)
    patterns = result.tables.get("patterns")
    if patterns is not None and len(patterns):
        figures["patterns"] = draw_patterns(patterns)
    return figures


def curves(path: pd.DataFrame, metric: str) -> "list[tuple[str, str, str, str, pd.DataFrame]]":
    """Each set's curve of a metric, with its name, colour, dash and symbol."""
    part = path[path["metric"] == metric]
    found, seen = [], dict.fromkeys(COLORS, 0)
    for keys, curve in part.groupby(["role", "set"], sort=False):
        role, name = map(str, keys)
        turn = seen.get(role, 0)
        seen[role] = turn + 1
        look = COLORS.get(role, theme.NEUTRAL), DASHES[turn % 5], theme.SYMBOLS[turn % 5]
        found.append((named(role, name), *look, curve.sort_values("alpha")))
    return found


def draw_metric(path: pd.DataFrame, metric: str, best: Any, *, ensemble: bool = False) -> "go.Figure":
    """A metric of every set over α, and the α that is chosen."""
    import plotly.graph_objects as go

    units = " or ".join(dict.fromkeys(path["unit"]))
    title, y = {
        "loss": ("A dip below both ends is a better model, a bump above both a hole", f"nats per {units}"),
        "accuracy": (
            "Accuracy can rise where loss does: an overconfident tuned end",
            f"share of {units}s right",
        ),
    }[metric]
    figure = theme.figure(title=title, x=X, y=y)
    for name, color, dash, symbol, curve in curves(path, metric):
        figure.add_trace(
            go.Scatter(
                x=curve["alpha"], y=curve["value"], name=name, mode="lines+markers",
                line={"color": color, "dash": dash}, marker={"symbol": symbol, "size": 8},
                hovertemplate="alpha %{x:g}: %{y:.4f}",
            )
        )  # fmt: skip
    if ensemble:
        for place, (name, color, _, _, curve) in enumerate(curves(path, "ensemble_loss")):
            figure.add_trace(
                go.Scatter(
                    x=curve["alpha"], y=curve["value"], mode="lines", opacity=0.6, legendgroup="mixture",
                    name="mixture of both ends' answers", showlegend=place == 0,
                    line={"color": color, "dash": "dot", "width": 1.5},
                    hovertemplate=f"mixture, {name}: %{{y:.4f}}",
                )
            )  # fmt: skip
    if best is not None:
        marked(figure, f"best alpha {best:g}", best)
    return figure.update_layout(height=440)


def draw_trade(choices: pd.DataFrame) -> "go.Figure":
    """What each α costs on the task against what it keeps; tuned is the origin."""
    import plotly.graph_objects as go

    won = bool(choices["dominates"].any())
    figure = theme.figure(
        title="An alpha left of or on 0 and above it dominates tuned" if won else
        "No alpha keeps more without a cost on the task",
        x="task loss beyond tuned's, nats", y="keep loss taken off tuned's, nats",
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=choices["task_cost_nats"], y=choices["kept_nats"], mode="lines+markers+text",
            text=[f"{alpha:g}" for alpha in choices["alpha"]], textposition="top center",
            name="alpha on the path", showlegend=False, line={"color": theme.NEUTRAL},
            marker={
                "size": 10,
                "color": [theme.NEW if found else theme.NEUTRAL for found in choices["dominates"]],
                "symbol": ["diamond" if found else "circle" for found in choices["dominates"]],
            },
            error_x={"array": choices["task_cost_error"], "color": theme.NEUTRAL, "thickness": 1, "width": 0},
            error_y={"array": choices["kept_error"], "color": theme.NEUTRAL, "thickness": 1, "width": 0},
            hovertemplate="alpha %{text}: task %{x:+.4f}, kept %{y:+.4f}",
        )
    )  # fmt: skip
    theme.threshold(figure, "as good as tuned on the task", x=0)
    theme.threshold(figure, "", y=0)
    return figure.update_layout(height=440)


def draw_sides(path: pd.DataFrame) -> "go.Figure":
    """FalseFalseTrue and its mirror over α."""
    import plotly.graph_objects as go

    figure = theme.figure(
        title="What only the blend gets right (solid), and what only it gets wrong (open)",
        x=X,
        y="share of " + " or ".join(f"{unit}s" for unit in dict.fromkeys(path["unit"])),
    )
    for metric, mark, said in (("fft", "", "right"), ("ttf", "-open", "wrong")):
        for name, color, _, symbol, curve in curves(path, metric):
            figure.add_trace(
                go.Scatter(
                    x=curve["alpha"], y=curve["value"], mode="lines+markers",
                    name=f"{name}: {said}", marker={"symbol": symbol + mark, "size": 8},
                    line={"color": color, "dash": "dot" if mark else "solid"},
                    hovertemplate="alpha %{x:g}: %{y:.4f}",
                )
            )  # fmt: skip
    return figure.update_layout(height=400)


def draw_patterns(patterns: pd.DataFrame) -> "go.Figure":
    """Who is right where, as shares that add to 1, of the first set of the last role that there is."""
    import plotly.graph_objects as go

    role, name = patterns[["role", "set"]].iloc[-1]
    part = patterns[(patterns["role"] == role) & (patterns["set"] == name)]
    figure = theme.figure(title=f"Who is right as alpha grows: {named(role, name)}", x=X, y="share of units")
    shades = ("#2b7bba", "#9a3be8", "#7fb3da", "#e8a562", "#d9730d", "#174e7c", "#c91d5f", "#7d8590")
    for (pattern, said), color in zip(PATTERNS.items(), shades, strict=True):
        curve = part[part["pattern"] == pattern].sort_values("alpha")
        figure.add_trace(
            go.Scatter(
                x=curve["alpha"], y=curve["share"], name=said, stackgroup="one", mode="lines",
                line={"color": color, "width": 0.5}, fillcolor=color, hovertemplate="%{y:.4f}",
            )
        )  # fmt: skip
    figure.update_yaxes(range=[0, 1])
    return figure.update_layout(height=460, margin={"t": 120})
