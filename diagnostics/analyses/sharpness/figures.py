"""Figures of layers on the path, drawn from the tables alone, so that a saved result redraws."""

import pandas as pd
import plotly.graph_objects as go

from diagnostics.analyses.sharpness.layer_sharpness import WHOLE
from diagnostics.analyses.sharpness.stragglers import LEAST
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, bars, drawn, heat, line, points
from diagnostics.plotting.set_styles import ALPHA, DASHES, set_curves, set_lines

BARRIERS = {
    "barrier_tuned": Style("barrier, others at tuned", theme.TUNED, size=11),
    "barrier_base": Style("barrier, others at base", theme.BASE, "diamond", size=11),
    "control_rise": Style("random move of half its size", theme.NEUTRAL, "x", size=11),
    "repair_base": Style("repaired by pinning to base", theme.BASE, "triangle-up-open", size=11),
    "repair_tuned": Style("repaired by pinning to tuned", theme.TUNED, "triangle-down-open", size=11),
}


def draw(result: Result) -> dict[str, go.Figure]:
    """The figures; one without data is left out."""
    return drawn(
        result, path=draw_path, single=draw_single, barriers=draw_barriers, by_layer=draw_by_layer,
        by_radius=draw_by_radius, remedies=draw_remedies,
    )  # fmt: skip


def draw_path(path: pd.DataFrame, result: Result) -> go.Figure:
    """The loss of every set over alpha of the whole model."""
    part = path[path["metric"] == "loss"]
    title = "Loss of the whole model from base to tuned: a dip is a better blend, a bump a barrier"
    figure = theme.figure(title, ALPHA, f"loss, nats per {' or '.join(dict.fromkeys(part['unit']))}")
    set_lines(figure, part, "alpha", "value", "alpha {x:g}: {y:.4f}")
    best, worst = (result.metrics.get(f"{name}_alpha") for name in ("best", "worst"))
    marks = {"best and worst": best} if best == worst else {"best": best, "worst": worst}
    for name, alpha in marks.items():
        if alpha is not None:
            theme.threshold(figure, f"{name} {alpha:g}", x=alpha, left=alpha > 0.5)
    return figure


def draw_single(layer_paths: pd.DataFrame, layers: pd.DataFrame) -> go.Figure:
    """Layer by alpha: what tuned loses when one layer alone goes back towards base."""
    part = layer_paths[layer_paths["anchor"] == "tuned"].sort_values(["layer", "alpha"])
    names = part["layer"].map(layers.set_index("layer")["name"]).fillna(part["layer"].astype(str))
    part = part.assign(name=names, rise=part["loss"] - float(part.loc[part["alpha"] == 1.0, "loss"].iloc[0]))
    title = "One layer at a time: loss above tuned's, all others at tuned"
    figure = theme.figure(title, f"{ALPHA}, of this layer alone", "layer")
    hover = "{y} at alpha {x}: {z:+.4f} nats"
    return heat(figure, part, "alpha", "name", "rise", hover, diverging=True, bar="nats")


def draw_barriers(layers: pd.DataFrame) -> go.Figure:
    """Barriers of single layers from both anchors, with random moves and repairs."""
    flagged = ", ".join(layers.loc[layers["straggler"], "name"])
    title = "Barrier of each layer alone, and what pinning it repairs; "
    title += f"stragglers: {flagged}" if flagged else "no straggler"
    figure, hover = theme.figure(title, "layer", "loss, nats", 440), "{x}: {y:+.4f} nats"
    for column, style in BARRIERS.items():
        half = layers.get(f"{column}_half")
        error = None if half is None else {"array": half, "color": theme.faint(style.color, 0.6), "width": 0}
        points(figure, layers, "name", column, style, hover, error_y=error, marker_line_width=2)
    theme.threshold(figure, f"{LEAST:g} nats: least barrier of a straggler", y=LEAST)
    return figure.update_layout(margin_t=110).update_xaxes(type="category")


def draw_by_layer(sharpness: pd.DataFrame, layers: pd.DataFrame, result: Result) -> go.Figure:
    """Layer by alpha: the worst rise within one radius."""
    rho = float(result.parameters["rho"])
    part = sharpness[(sharpness["rho"] == rho) & (sharpness["name"] != WHOLE)].sort_values("alpha")
    rows = [name for name in layers["name"] if name in set(part["name"])]
    title = f"Sharpness of each layer on the task rows, radius {rho:g}: a description, not a fault"
    figure, hover = theme.figure(title, ALPHA, "layer"), "{y} at alpha {x}: {z:.3g} nats"
    return heat(figure, part, "alpha", "name", "worst", hover, rows=rows, bar="nats")


def draw_by_radius(sharpness: pd.DataFrame, layers: pd.DataFrame, result: Result) -> go.Figure:
    """The worst rise over the radius on log axes, at tuned."""
    part = sharpness[(sharpness["alpha"] == 1.0) & (sharpness["worst"] > 0)]
    title = "Sharpness at tuned over the radius: slope 2 is curvature, slope 1 no minimum"
    x = f"radius rho, {result.parameters['norm']}"
    figure = theme.figure(title, x, "worst rise of the task loss, nats", 480)
    flagged = set(layers.loc[layers["straggler"], "name"])
    for i, (name, curve) in enumerate(part.groupby("name", sort=False)):
        color, dash = (theme.NEUTRAL, "dot") if name == WHOLE else (theme.COLORWAY[i % 5], DASHES[i // 5 % 5])
        label, width = (f"{name} (straggler)", 4) if name in flagged else (str(name), 2)
        style = Style(label, color, theme.SYMBOLS[i % 5], dash, width)
        line(figure, curve.sort_values("rho"), "radius", "worst", style, "radius {x:g}: {y:.3g} nats")
    return figure.update_xaxes(type="log").update_yaxes(type="log").update_layout(margin_t=110)


def draw_remedies(remedies: pd.DataFrame, layers: pd.DataFrame, result: Result) -> go.Figure:
    """What each remedy changes at the worst alpha, on every set, against no remedy."""
    worst = float(result.metrics["worst_alpha"])
    at_worst = remedies[remedies["alpha"] == worst]
    at_worst = at_worst.assign(label=(at_worst["remedy"] + " " + at_worst["setting"]).str.strip())
    title = f"Change of loss by each remedy at alpha {worst:g}; below 0 the loss falls"
    figure = theme.figure(title, "remedy", "loss above that without a remedy, nats")
    hover = "{x}: {y:+.4f} nats<br>loss {loss:.4f}"
    hover += ", accuracy {accuracy:.3f}" if at_worst["accuracy"].notna().any() else ""
    for style, part in set_curves(at_worst, "alpha"):
        untreated, turn = part["remedy"] == "none", theme.SYMBOLS.index(style.symbol) % 3
        change = part.assign(change=part["loss"] - float(part.loc[untreated, "loss"].iloc[0]))[~untreated]
        pattern = {"shape": ("", "/", "x")[turn]}
        marker = {"color": style.color, "opacity": 1 - 0.25 * turn, "pattern": pattern}
        bars(figure, change, "label", "change", style, hover, marker=marker)
    return theme.threshold(figure, y=0).update_layout(barmode="group").update_xaxes(type="category")
