"""The pictures of layers on the path, drawn from the tables alone: a saved result redraws."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.analyses.sharpness.layer_sharpness import WHOLE
from diagnostics.analyses.sharpness.stragglers import LEAST
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.set_styles import COLORS, DASHES, X, marked, named

if TYPE_CHECKING:
    import plotly.graph_objects as go


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    tables = result.tables
    figures: dict[str, Any] = {}
    if filled(tables.get("path")):
        figures["path"] = draw_path(tables["path"], result)
    layers = tables.get("layers")
    if not filled(layers) or layers is None:
        return figures
    if filled(tables.get("layer_paths")):
        figures["single"] = draw_single(tables["layer_paths"], layers)
    figures["barriers"] = draw_barriers(layers)
    sharp = tables.get("sharpness")
    if sharp is not None and filled(sharp):
        figures["by_layer"] = draw_by_layer(sharp, layers, float(result.parameters["rho"]))
        figures["by_radius"] = draw_by_radius(sharp, result)
    remedies = tables.get("remedies")
    if remedies is not None and filled(remedies):
        figures["remedies"] = draw_remedies(remedies, result)
    return figures


def filled(table: pd.DataFrame | None) -> bool:
    """Whether there is anything to draw."""
    return table is not None and len(table) > 0


def draw_path(path: pd.DataFrame, result: Result) -> "go.Figure":
    """The loss of every set over α of the whole model."""
    import plotly.graph_objects as go

    part = path[path["metric"] == "loss"]
    best, worst = (result.metrics.get(name) for name in ("best_alpha", "worst_alpha"))
    units = " or ".join(dict.fromkeys(part["unit"]))
    figure = theme.figure(
        title="The whole model from base to tuned: below both ends is a better blend, above both a hole",
        x=X, y=f"loss, nats per {units}",
    )  # fmt: skip
    seen: dict[str, int] = {}
    for keys, curve in part.groupby(["role", "set"], sort=False):
        role, name = map(str, keys)
        turn = seen.setdefault(role, 0)
        seen[role] += 1
        figure.add_trace(
            go.Scatter(
                x=curve["alpha"], y=curve["value"], mode="lines+markers",
                name=named(role, name),
                line={"color": COLORS.get(role, theme.NEUTRAL), "dash": DASHES[turn % 5]},
                marker={"symbol": theme.SYMBOLS[turn % 5], "size": 8},
                hovertemplate="alpha %{x:g}: %{y:.4f}",
            )
        )  # fmt: skip
    if best is not None:
        marked(figure, f"best {best:g}" + (" and worst" if best == worst else ""), best)
    if worst is not None and worst != best:
        marked(figure, f"worst {worst:g}", worst)
    return figure.update_layout(height=430)


def draw_single(paths: pd.DataFrame, layers: pd.DataFrame) -> "go.Figure":
    """Layer by α: what tuned loses when one layer alone goes back towards base."""
    import plotly.graph_objects as go

    part = paths[paths["anchor"] == "tuned"]
    wide = part.pivot_table(index="layer", columns="alpha", values="loss", dropna=False).sort_index()
    names = layers.set_index("layer")["name"].to_dict()
    tuned = float(wide[1.0].iloc[0])
    figure = theme.figure(
        title="One layer at a time: rise over tuned with all others at tuned", x=f"{X}, of this layer alone",
        y="layer",
    )  # fmt: skip
    figure.add_trace(
        go.Heatmap(
            z=wide.to_numpy() - tuned,
            x=[f"{alpha:g}" for alpha in wide.columns],
            y=[names.get(layer, str(layer)) for layer in wide.index],
            colorscale=theme.scale(theme.LIGHT.diverging), zmid=0, colorbar={"title": "nats"},
            hovertemplate="%{y} at %{x}: %{z:+.4f} nats",
        )
    )  # fmt: skip
    return figure.update_layout(height=160 + 24 * len(wide)).update_xaxes(type="category")


def draw_barriers(layers: pd.DataFrame) -> "go.Figure":
    """Barriers of single layers from both anchors, random moves and repairs beside them."""
    import plotly.graph_objects as go

    flagged = layers.loc[layers["straggler"], "name"].tolist()
    who = f"stragglers: {', '.join(flagged)}" if flagged else "no straggler"
    figure = theme.figure(
        title=f"Barrier of each layer alone, and what pinning it repairs; {who}", x="", y="nats"
    )
    for column, name, color, symbol in (
        ("barrier_tuned", "barrier, others at tuned", theme.TUNED, "circle"),
        ("barrier_base", "barrier, others at base", theme.BASE, "diamond"),
        ("control_rise", "random move of half its size", theme.NEUTRAL, "x"),
        ("repair_base", "repaired by pinning to base", theme.BASE, "triangle-up-open"),
        ("repair_tuned", "repaired by pinning to tuned", theme.TUNED, "triangle-down-open"),
    ):
        half = layers.get(f"{column}_half")
        figure.add_trace(
            go.Scatter(
                x=layers["name"], y=layers[column], name=name, mode="markers",
                marker={"color": color, "symbol": symbol, "size": 11, "line": {"width": 2}},
                error_y=None if half is None else {"array": half, "thickness": 1, "width": 0},
                hovertemplate="%{x}: %{y:+.4f}",
            )
        )  # fmt: skip
    theme.threshold(figure, f"{LEAST:g} nats: least barrier of a straggler", y=LEAST)
    return figure.update_layout(height=440, margin={"t": 110}).update_xaxes(type="category")


def draw_by_layer(sharp: pd.DataFrame, layers: pd.DataFrame, rho: float) -> "go.Figure":
    """Layer by α: the worst rise within one radius."""
    import plotly.graph_objects as go

    part = sharp[(sharp["rho"] == rho) & (sharp["name"] != WHOLE)]
    wide = part.pivot_table(index="name", columns="alpha", values="worst", dropna=False)
    wide = wide.reindex([name for name in layers["name"] if name in wide.index])
    figure = theme.figure(
        title=f"Sharpness of each layer on the task rows, radius {rho:g}: a description, not a fault",
        x=X, y="layer",
    )  # fmt: skip
    figure.add_trace(
        go.Heatmap(
            z=wide.to_numpy(), x=[f"{alpha:g}" for alpha in wide.columns], y=list(wide.index),
            colorbar={"title": "nats"}, hovertemplate="%{y} at %{x}: %{z:.3g} nats",
        )
    )  # fmt: skip
    return figure.update_layout(height=160 + 24 * len(wide)).update_xaxes(type="category")


def draw_by_radius(sharp: pd.DataFrame, result: Result) -> "go.Figure":
    """The worst rise over the radius on log axes, at tuned."""
    import plotly.graph_objects as go

    part = sharp[(sharp["alpha"] == 1.0) & (sharp["worst"] > 0)]
    norm = result.parameters["norm"]
    figure = theme.figure(
        title="Sharpness at tuned over the radius: slope 2 is curvature, slope 1 no minimum",
        x=f"radius ρ, {norm}", y="worst rise of the task loss, nats",
    )  # fmt: skip
    names = list(dict.fromkeys(part["name"]))
    layers = result.tables["layers"]
    flagged = set(layers.loc[layers["straggler"], "name"])
    for place, name in enumerate(names):
        curve = part[part["name"] == name].sort_values("rho")
        whole = name == WHOLE
        color = theme.NEUTRAL if whole else theme.COLORWAY[place % len(theme.COLORWAY)]
        figure.add_trace(
            go.Scatter(
                x=curve["radius"], y=curve["worst"], mode="lines+markers",
                name=name + (" (straggler)" if name in flagged else ""),
                line={"color": color, "dash": "dot" if whole else DASHES[place // 5 % 5],
                      "width": 4 if name in flagged else 2},
                marker={"symbol": theme.SYMBOLS[place % len(theme.SYMBOLS)], "size": 8},
                hovertemplate=f"{name}, radius %{{x:g}}: %{{y:.3g}}",
            )
        )  # fmt: skip
    figure.update_xaxes(type="log").update_yaxes(type="log")
    return figure.update_layout(height=480, margin={"t": 110})


def draw_remedies(remedies: pd.DataFrame, result: Result) -> "go.Figure":
    """What each remedy changes at the worst α, on every set, against doing nothing."""
    import plotly.graph_objects as go

    worst = float(result.metrics["worst_alpha"])
    here = remedies[remedies["alpha"] == worst].copy()
    here["label"] = (here["remedy"] + " " + here["setting"]).str.strip()
    figure = theme.figure(
        title=f"What each remedy changes at alpha {worst:g}; below 0 the loss falls",
        x="", y="change of loss against no remedy, nats",
    )  # fmt: skip
    seen: dict[str, int] = {}
    for keys, part in here.groupby(["role", "set"], sort=False):
        role, name = map(str, keys)
        turn = seen.setdefault(role, 0)
        seen[role] += 1
        own = float(part.loc[part["remedy"] == "none", "loss"].iloc[0])
        rest = part[part["remedy"] != "none"]
        figure.add_trace(
            go.Bar(
                x=rest["label"], y=rest["loss"] - own,
                name=named(role, name),
                marker={
                    "color": COLORS.get(role, theme.NEUTRAL), "opacity": 1 - 0.25 * (turn % 3),
                    "pattern": {"shape": ("", "/", "x")[turn % 3]},
                },
                customdata=rest[["loss", "accuracy"]],
                hovertemplate="%{x}: %{y:+.4f} nats; loss %{customdata[0]:.4f}, "
                "accuracy %{customdata[1]:.3f}",
            )
        )  # fmt: skip
    theme.threshold(figure, "", y=0)
    return figure.update_layout(height=430, barmode="group").update_xaxes(type="category")
