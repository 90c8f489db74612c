"""The pictures of a skill localization, drawn from the tables alone, so that a saved result redraws."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.layer_axes import axes, layer_name

if TYPE_CHECKING:
    import plotly.graph_objects as go

# method -> what the legend calls it, its line and its marks; the controls stand behind
CURVES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "random": (
        "random, as many of each tensor (control)",
        {"color": theme.NEUTRAL, "width": 1.5, "dash": "dot"},
        {"symbol": "circle", "size": 6},
    ),
    "movement": (
        "moved furthest (control)",
        {"color": theme.COLORWAY[4], "width": 2, "dash": "dash"},
        {"symbol": "triangle-up", "size": 8},
    ),
    "learned": ("learned", {"color": theme.NEW, "width": 2.5}, {"symbol": "diamond", "size": 9}),
}
# model -> what the legend calls it and its colour
MODELS = {
    "base": ("base", theme.BASE),
    "tuned": ("tuned", theme.TUNED),
    "graft": ("graft", theme.NEW),
    "tempered": ("tuned, one temperature (control)", theme.COLORWAY[3]),
    "interpolation 0.5": ("half of the update (control)", theme.NEUTRAL),
    "complement": ("tuned without the region", theme.COLORWAY[4]),
}
ROLES = {"task": "report rows", "keep": "keep", "ood": "OOD"}
# Densities are shown from an eighth of an even spread up.
SPARSEST = 1 / 8


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    tables = {name: table for name, table in result.tables.items() if len(table)}
    figures: dict[str, go.Figure] = {}
    if "budget" in tables:
        searched = tables["budget"]["method"].isin(CURVES)
        if searched.any():
            kept = float(result.parameters.get("kept", 0.95))
            figures["curve"] = by_task(tables["budget"], lambda part: draw_curve(part, kept))
    for name, drawn in (("region", draw_region), ("reliability", draw_reliability), ("sets", draw_sets)):
        if name in tables:
            figures[name] = by_task(tables[name], drawn)
    if "overlap" in tables:
        figures["overlap"] = draw_overlap(tables["overlap"])
    if "rel" in tables:
        figures["rel"] = draw_rel(tables["rel"])
    if "unions" in tables:
        figures["unions"] = draw_unions(tables["unions"])
    return figures


def by_task(table: pd.DataFrame, drawn: "Callable[[pd.DataFrame], go.Figure]") -> "go.Figure":
    """The picture of the first task, with a menu of the others."""
    made = {str(task): drawn(part) for task, part in table.groupby("task", sort=False)}
    first = next(iter(made.values()))
    if len(made) == 1:
        return first
    import plotly.graph_objects as go

    own = first.to_dict()
    figure = go.Figure(layout=own["layout"])
    counts = [len(each.data) for each in made.values()]
    buttons = []
    for place, (task, each) in enumerate(made.items()):
        for trace in each.data:
            figure.add_trace(trace.update(visible=place == 0))
        shown = [other == place for other, count in enumerate(counts) for _ in range(count)]
        layout = each.to_dict()["layout"]
        kept = {key: layout.get(key, []) for key in ("shapes", "annotations")}
        kept |= {f"{axis}.range": layout[axis].get("range") for axis in ("xaxis", "yaxis")}
        kept |= {"title.text": layout["title"]["text"]}
        buttons.append(
            {"label": theme.verbatim(task), "method": "update", "args": [{"visible": shown}, kept]}
        )
    menu = {
        "buttons": buttons,
        "x": 1,
        "xanchor": "right",
        "y": 1.02,
        "yanchor": "bottom",
        "showactive": True,
    }
    return figure.update_layout(updatemenus=[menu])


def draw_curve(part: pd.DataFrame, kept: float) -> "go.Figure":
    """Rel against the size of the region, learned and controls, with the skill size."""
    import plotly.graph_objects as go

    chosen = part[part["chosen"]]
    figure = theme.figure(
        title=curve_title(part, kept),
        x="share of the entries in the region",
        y="share of tuning's gain kept (Rel)",
    )
    for method, (name, line, marker) in CURVES.items():
        points = part[part["method"] == method]
        if not len(points):
            continue
        # Several draws of one size are one point.
        points = points.groupby("share", as_index=False).agg(
            rel=("rel", "mean"), rel_low=("rel_low", "min"), rel_high=("rel_high", "max"),
            entries=("entries", "first"), metric=("metric", "mean"),
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=points["share"], y=points["rel"], name=name, mode="lines+markers", line=line,
                marker={**marker, "color": line["color"]},
                error_y={
                    "symmetric": False, "array": points["rel_high"] - points["rel"],
                    "arrayminus": points["rel"] - points["rel_low"], "thickness": 1, "width": 0,
                    "color": theme.faint(line["color"], 0.5),
                },
                customdata=points[["entries", "metric", "rel_low", "rel_high"]],
                hovertemplate="%{customdata[0]:,} entries: Rel %{y:.2f} (%{customdata[2]:.2f} to "
                "%{customdata[3]:.2f}), metric %{customdata[1]:.3g}",
            )
        )  # fmt: skip
    shares = part.loc[part["method"].isin(CURVES), "share"]
    figure.update_xaxes(type="log", range=reach_of(shares), dtick=1, exponentformat="power")
    blends = part[part["method"] == "interpolation"].sort_values("alpha")
    figure.add_trace(
        go.Scatter(
            x=[float(shares.max()) * 1.35] * len(blends), y=blends["rel"], mode="markers+text",
            name="base + α of the whole update (control)", text=[f"α {a:g}" for a in blends["alpha"]],
            textposition="middle right", cliponaxis=False,
            marker={"symbol": "line-ew-open", "size": 14, "color": theme.BASE, "line": {"width": 3}},
            hovertemplate="%{text}: Rel %{y:.2f}",
        )
    )  # fmt: skip
    figure.add_hline(
        y=kept, line={"color": theme.NEUTRAL, "dash": "dash", "width": 1.5},
        annotation_text=f"{kept:g} of the gain", annotation_position="top left",
    )  # fmt: skip
    for row in chosen.to_dict("records"):
        figure.add_vline(x=row["share"], line={"color": theme.NEW, "width": 1.5, "dash": "dot"})
        # A line's own label is put where a linear axis would have it.
        figure.add_annotation(
            x=math.log10(row["share"]), y=0.02, yref="paper", xanchor="left", yanchor="bottom",
            text=f"{'skill size' if row['rel_selection'] >= kept else 'reported'}: {row['share']:.2g}",
        )  # fmt: skip
    shown = part[part["method"].isin([*CURVES, "interpolation"])]
    low, high = min(0.0, float(shown["rel"].min())), max(1.0, float(shown["rel"].max()))
    low, high = max(low, -1.5), min(high, 2.5) + 0.25
    figure.update_yaxes(range=[low - 0.12 * (high - low), high])
    return figure.update_layout(height=460, margin_r=72)


def curve_title(part: pd.DataFrame, kept: float) -> str:
    """What the curve shows, in a sentence."""
    task = theme.verbatim(part["task"].iloc[0])
    chosen = part[part["chosen"]]
    if not len(chosen) or not chosen["rel_selection"].iloc[0] >= kept:
        return f"{task}: no region tried keeps {kept:g} of what tuning gained"
    row = chosen.iloc[0]
    title = f"{task}: {row['entries']:,} entries keep {row['rel']:.0%} of what tuning gained"
    moved = part[(part["method"] == "movement") & (part["entries"] == row["entries"])]["rel"]
    if row["method"] == "learned" and len(moved):
        title += f"; as many that moved furthest, {moved.iloc[0]:.0%}"
    return title


def reach_of(shares: "pd.Series[float]") -> list[float]:
    """The range of a logarithmic axis with all of these, and room for what stands at its end."""
    return [math.log10(float(shares.min())) - 0.15, math.log10(float(shares.max())) + 0.3]


def draw_region(part: pd.DataFrame) -> "go.Figure":
    """Where the region lies: density of each layer and component, against an even spread."""
    import plotly.graph_objects as go

    layers, components = axes(part)
    rows = part.assign(layer=part["layer"].map(layer_name))
    top = part.nlargest(1, "density").iloc[0]
    where = "" if pd.isna(top["layer"]) else f"layer {layer_name(top['layer'])} "
    task = theme.verbatim(part["task"].iloc[0])
    title = f"{task}: this region is densest in {where}{theme.verbatim(top['component'])}, "
    title += f"{times(top['density'])} times an even spread"
    figure = theme.figure(title=title, x="layer", y="component")

    def grid(values: Sequence[Any]) -> pd.DataFrame:
        table = rows.assign(value=values).pivot_table(
            index="component", columns="layer", values="value", aggfunc="first"
        )
        return table.reindex(index=components, columns=layers)

    shown = np.log2(np.maximum(rows["density"], SPARSEST))
    labels = [
        f"layer {row['layer']} {theme.verbatim(row['component'])}<br>{row['entries']:,} of {row['size']:,} "
        f"entries <br>{row['density']:.3g} times an even spread<br>{row['share']:.1%} of the region"
        for row in rows.to_dict("records")
    ]
    least, most = math.log2(SPARSEST), max(2.0, math.ceil(float(shown.max())))
    ticks = list(range(int(least), int(most) + 1, 1 if most < 4 else 2))
    if 0 not in ticks:
        ticks = sorted({*(tick for tick in ticks if abs(tick) > 1), 0})
    figure.add_trace(
        go.Heatmap(
            z=grid(list(shown)), x=layers, y=[theme.verbatim(component) for component in components],
            zmin=least, zmax=most, xgap=2, ygap=2, customdata=grid(labels).fillna(""),
            text=grid([times(density) if density else "·" for density in rows["density"]]).fillna(""),
            texttemplate="%{text}" if len(layers) <= 24 else None,
            hovertemplate="%{customdata}<extra></extra>",
            colorbar={
                "title": {"text": "times an even spread"}, "tickvals": ticks,
                "ticktext": [f"{2.0**tick:g}" if tick >= 0 else f"1/{2**-tick}" for tick in ticks],
            },
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure.update_layout(height=190 + 34 * len(components))


def times(density: float) -> str:
    """A density as a cell shows it."""
    return f"{density:.0f}" if density >= 10 else f"{density:.2g}"


def draw_reliability(part: pd.DataFrame) -> "go.Figure":
    """Accuracy against stated confidence, of each model."""
    import plotly.graph_objects as go

    errors = {
        model: float(
            (rows["rows"] * (rows["accuracy"] - rows["confidence"]).abs()).sum() / rows["rows"].sum()
        )
        for model, rows in part.groupby("model")
    }
    task = theme.verbatim(part["task"].iloc[0])
    tuned, graft = errors.get("tuned", math.nan), errors.get("graft", math.nan)
    title = f"{task}: calibration error {tuned:.2f} of tuned"
    if not math.isnan(graft):
        title += f", {graft:.2f} of the graft"
    if "tempered" in errors:
        title += f", {errors['tempered']:.2f} of tuned with one temperature"
    figure = theme.figure(title=title, x="stated confidence", y="accuracy")
    figure.add_trace(
        go.Scatter(
            x=[0, 1], y=[0, 1], mode="lines", name="calibrated", hoverinfo="skip",
            line={"color": theme.NEUTRAL, "width": 1, "dash": "dash"},
        )
    )  # fmt: skip
    order = [model for model in MODELS if model in errors]
    for model, symbol in zip(order, theme.SYMBOLS, strict=False):
        name, color = MODELS[model]
        rows = part[part["model"] == model].sort_values("confidence")
        # A bin of a few rows says nothing, and its line would draw the eye.
        rows = rows[rows["rows"] >= max(5, 0.01 * rows["rows"].sum())]
        figure.add_trace(
            go.Scatter(
                x=rows["confidence"], y=rows["accuracy"], name=f"{name}, error {errors[model]:.2f}",
                mode="lines+markers", line={"color": color, "width": 2},
                marker={
                    "color": color, "symbol": symbol,
                    "size": 5 + 15 * np.sqrt(rows["rows"] / part["rows"].max()),
                },
                customdata=rows["rows"],
                hovertemplate="%{customdata:,} rows: said %{x:.2f}, right %{y:.2f}",
            )
        )  # fmt: skip
    least = float(part["confidence"].min())
    figure.update_xaxes(range=[max(0.0, least - 0.05), 1.02])
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure.update_layout(height=460)


def draw_sets(part: pd.DataFrame) -> "go.Figure":
    """The metric of each model on the task's rows and on every other set."""
    import plotly.graph_objects as go

    kinds = list(dict.fromkeys(part["kind"]))
    unit = "accuracy" if kinds == ["accuracy"] else "loss, nats per token; lower is better"
    if len(kinds) > 1:
        unit = "accuracy, or loss in nats per token"
    task = theme.verbatim(part["task"].iloc[0])
    graft = part[part["model"] == "graft"]
    title = f"{task}: base and tuned on every set"
    if len(graft):
        over = graft[graft["over_tuned_low"] > 0]["set"].map(theme.verbatim).tolist()
        under = graft[graft["over_tuned_high"] < 0]["set"].map(theme.verbatim).tolist()
        said = [f"surely better than tuned on {', '.join(over)}"] if over else []
        said += [f"surely worse on {', '.join(under)}"] if under else []
        title = f"{task}: the graft is {' and '.join(said) or 'neither surely better nor worse than tuned'}"
    figure = theme.figure(title=title, x="", y=unit)
    labels = part["set"].map(theme.verbatim) + "<br>" + part["role"].map(ROLES)
    for model, (name, color) in MODELS.items():
        rows = part.assign(label=labels)[part["model"] == model]
        if not len(rows):
            continue
        figure.add_trace(
            go.Bar(
                x=rows["label"],
                y=rows["metric"], name=name, marker={"color": color},
                error_y={
                    "symmetric": False, "array": rows["high"] - rows["metric"],
                    "arrayminus": rows["metric"] - rows["low"], "thickness": 1.2, "width": 2,
                    "color": theme.NEUTRAL,
                },
                customdata=rows[["over_tuned", "over_tuned_low", "over_tuned_high"]],
                hovertemplate="%{y:.3g}; better than tuned by %{customdata[0]:+.3g} "
                "(%{customdata[1]:+.3g} to %{customdata[2]:+.3g})",
            )
        )  # fmt: skip
    figure.update_xaxes(showgrid=False)
    return figure.update_layout(height=430, barmode="group", bargap=0.25, bargroupgap=0.08)


def draw_overlap(table: pd.DataFrame) -> "go.Figure":
    """The share of each task's region that another's holds."""
    apart = table[table["task"] != table["other"]]
    top = apart.nlargest(1, "overlap").iloc[0]
    times = top["overlap"] / top["chance"] if top["chance"] else math.inf
    title = (
        f"Regions overlap by at most {top['overlap']:.2f}: {theme.verbatim(top['task'])} holds that much of "
    )
    title += f"{theme.verbatim(top['other'])}, {times:.3g} times chance"
    labels = [
        f"{theme.verbatim(row['task'])} holds {row['overlap']:.3f} of {theme.verbatim(row['other'])}<br>"
        f"by chance {row['chance']:.3f}; Jaccard {row['jaccard']:.3f}"
        for row in table.to_dict("records")
    ]
    return matrix(
        table.assign(value=table["overlap"], label=labels, row=table["task"], column=table["other"]),
        title=title, x="of the region of", y="the region of … holds", bar="overlap", low=0.0, high=1.0,
    )  # fmt: skip


def draw_rel(table: pd.DataFrame) -> "go.Figure":
    """What each region keeps of each task's gain."""
    labels = [
        f"the region of {theme.verbatim(row['region'])} keeps {row['rel']:.2f} ({row['low']:.2f} to "
        f"{row['high']:.2f}) of the gain on {theme.verbatim(row['task'])}"
        for row in table.to_dict("records")
    ]
    own = table[table["region"] == table["task"]]["rel"]
    others = table[table["region"] != table["task"]]["rel"]
    title = f"Regions keep {own.min():.2f} or more of their own task's gain, and {others.min():.2f} to "
    title += f"{others.max():.2f} of another's"
    most = max(1.0, float(table["rel"].abs().max()))
    return matrix(
        table.assign(value=table["rel"], label=labels, row=table["region"], column=table["task"]),
        title=title, x="task", y="region of", bar="Rel", low=-most, high=most,
        colors=theme.scale(theme.LIGHT.diverging),
    )  # fmt: skip


def matrix(
    table: pd.DataFrame,
    *,
    title: str,
    x: str,
    y: str,
    bar: str,
    low: float,
    high: float,
    colors: Any = None,
) -> "go.Figure":
    """Tasks against tasks."""
    import plotly.graph_objects as go

    rows, columns = (list(dict.fromkeys(table[axis])) for axis in ("row", "column"))

    def grid(value: str) -> pd.DataFrame:
        return table.pivot(index="row", columns="column", values=value).reindex(index=rows, columns=columns)

    figure = theme.figure(title=title, x=x, y=y)
    figure.add_trace(
        go.Heatmap(
            z=grid("value"), x=[theme.verbatim(name) for name in columns],
            y=[theme.verbatim(name) for name in rows], zmin=low, zmax=high, xgap=2, ygap=2,
            colorscale=colors, customdata=grid("label"), text=grid("value").map("{:.2f}".format),
            texttemplate="%{text}" if len(rows) <= 16 else None,
            hovertemplate="%{customdata}<extra></extra>", colorbar={"title": {"text": bar}},
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure.update_layout(height=220 + 44 * len(rows))


def draw_unions(table: pd.DataFrame) -> "go.Figure":
    """What the regions of several tasks together keep of each task."""
    import plotly.graph_objects as go

    inside = table[table["member"]]["rel"]
    title = f"Regions together keep {inside.min():.2f} to {inside.max():.2f} of what their tasks gained"
    figure = theme.figure(
        title=title,
        x="union of the regions of; pale: a task that is left out",
        y="share of tuning's gain kept (Rel)",
    )
    for place, (task, rows) in enumerate(table.groupby("task", sort=False)):
        color = theme.COLORWAY[place % len(theme.COLORWAY)]
        figure.add_trace(
            go.Bar(
                x=[theme.verbatim(name) for name in rows["union"]], y=rows["rel"],
                name=f"on {theme.verbatim(task)}",
                marker={
                    "color": [color if member else theme.faint(color, 0.25) for member in rows["member"]],
                    "line": {"color": color, "width": 1.5},
                },
                error_y={
                    "symmetric": False, "array": rows["high"] - rows["rel"],
                    "arrayminus": rows["rel"] - rows["low"], "thickness": 1.2, "width": 2,
                    "color": theme.NEUTRAL,
                },
                customdata=np.where(rows["member"], "a member", "left out"),
                hovertemplate="%{customdata}: Rel %{y:.2f}",
            )
        )  # fmt: skip
    theme.threshold(figure, "tuned", y=1.0)
    figure.update_xaxes(showgrid=False)
    return figure.update_layout(height=430, barmode="group", bargap=0.3)
