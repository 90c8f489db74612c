"""Figures of a skill localization, drawn from the tables alone, so that a saved result redraws."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, bars, drawn, heat, line, menu, points
from diagnostics.plotting.layer_axes import axes, layer_map, location

# The controls are drawn first, behind the learned regions.
METHODS = {
    "random": Style("random, as many of each tensor (control)", theme.NEUTRAL, dash="dot", width=1.5, size=6),
    "movement": Style("moved furthest (control)", theme.COLORWAY[4], "triangle-up", "dash"),
    "learned": Style("learned", theme.NEW, "diamond", width=2.5, size=9),
}
MODELS = {
    "base": Style("base", theme.BASE, "circle"),
    "tuned": Style("tuned", theme.TUNED, "diamond"),
    "graft": Style("graft", theme.NEW, "square"),
    "tempered": Style("tuned, one temperature (control)", theme.COLORWAY[3], "triangle-up"),
    "interpolation 0.5": Style("half of the update (control)", theme.NEUTRAL, "cross"),
    "complement": Style("tuned without the region", theme.COLORWAY[4], "star"),
}
ROLES = {"task": "report rows", "keep": "keep", "ood": "OOD"}
REL = "share of tuning's gain kept (Rel)"
# Densities are shown from an eighth of an even spread up.
SPARSEST = 1 / 8


def draw(result: Result) -> "dict[str, go.Figure]":
    """The figures; one without data is left out. Several tasks share a figure with a menu."""
    return drawn(
        result, curve=draw_curve, region=lambda region: by_task(region, draw_region),
        reliability=lambda reliability: by_task(reliability, draw_reliability),
        sets=lambda sets: by_task(sets, draw_sets), overlap=draw_overlap, rel=draw_rel, unions=draw_unions,
    )  # fmt: skip


def by_task(table: pd.DataFrame, draw_task: "Callable[[pd.DataFrame, str], go.Figure]") -> "go.Figure":
    """The figures of the tasks with a menu of them."""
    return menu({str(task): draw_task(part, str(task)) for task, part in table.groupby("task", sort=False)})


def draw_curve(budget: pd.DataFrame, result: Result) -> "go.Figure | None":
    """The curve of each task; none where no region was searched for."""
    kept = float(result.parameters.get("kept", 0.95))
    searched = budget["method"].isin(METHODS).any()
    return by_task(budget, partial(draw_task_curve, kept=kept)) if searched else None


def draw_task_curve(part: pd.DataFrame, task: str, kept: float) -> "go.Figure":
    """Rel against the size of the region, learned and controls, with the skill size."""
    figure = theme.figure(curve_title(part, task, kept), "share of the entries in the region", REL, 460)
    searched = part[part["method"].isin(METHODS)]
    least, most = float(searched["share"].min()), float(searched["share"].max())
    # Room for the blends at the right end.
    reach = [math.log10(least) - 0.15, math.log10(most) + 0.3]
    figure.update_xaxes(type="log", range=reach, dtick=1, exponentformat="power")
    # Several draws of one size are one point.
    sizes = searched.groupby(["method", "share"], as_index=False).agg(
        rel=("rel", "mean"), low=("rel_low", "min"), high=("rel_high", "max"), entries=("entries", "first"),
        metric=("metric", "mean"),
    )  # fmt: skip
    hover = "{entries:,} entries: Rel {y:.2f} ({low:.2f} to {high:.2f}), metric {metric:.3g}"
    for method, style in METHODS.items():
        sized = sizes[sizes["method"] == method]
        if len(sized):
            look: dict[str, Any] = {"mode": "lines+markers", "line": style.stroke}
            points(figure, sized, "share", "rel", style, hover, interval=("low", "high"), **look)
    blends = part[part["method"] == "interpolation"].sort_values("alpha").assign(at=most * 1.35)
    control = Style("base + α of the whole update (control)", theme.BASE, "line-ew-open", size=14)
    points(
        figure, blends, "at", "rel", control, "α {alpha:g}: Rel {y:.2f}", mode="markers+text",
        cliponaxis=False, text=blends["alpha"].map("α {:g}".format), textposition="middle right",
        marker_line_width=3,
    )  # fmt: skip
    theme.threshold(figure, f"{kept:g} of the gain", y=kept, left=True)
    for row in part[part["chosen"]].to_dict("records"):
        label = f"{'skill size' if row['rel_selection'] >= kept else 'reported'}: {row['share']:.2g}"
        theme.threshold(figure, label, x=row["share"], color=theme.NEW, dash="dot")
        figure.layout.annotations[-1].update(y=0.02, yanchor="bottom")  # below the curves
    rel = part.loc[part["method"].isin([*METHODS, "interpolation"]), "rel"]
    low, high = max(min(0.0, float(rel.min())), -1.5), min(max(1.0, float(rel.max())), 2.5) + 0.25
    return figure.update_yaxes(range=[low - 0.12 * (high - low), high]).update_layout(margin_r=72)


def curve_title(part: pd.DataFrame, task: str, kept: float) -> str:
    """What the curve shows, in a sentence."""
    chosen = part[part["chosen"]]
    if not len(chosen) or not chosen["rel_selection"].iloc[0] >= kept:
        return f"{task}: no region tried keeps {kept:g} of what tuning gained"
    row = chosen.iloc[0]
    title = f"{task}: {row['entries']:,} entries keep {row['rel']:.0%} of what tuning gained"
    moved = part[(part["method"] == "movement") & (part["entries"] == row["entries"])]["rel"]
    if row["method"] == "learned" and len(moved):
        title += f"; as many that moved furthest, {moved.iloc[0]:.0%}"
    return title


def draw_region(part: pd.DataFrame, task: str) -> "go.Figure":
    """Where the region lies: density of each layer and component, against an even spread."""
    top = part.nlargest(1, "density").iloc[0]
    title = f"{task}: this region is densest in {location(top)}, {times(top['density'])} times an even spread"
    doublings = np.log2(np.maximum(part["density"], SPARSEST))
    least, most = math.log2(SPARSEST), max(2.0, math.ceil(float(doublings.max())))
    ticks = [tick for tick in range(int(least), int(most) + 1) if most < 4 or tick % 2 == 0]
    labels = [f"{2.0**tick:g}" if tick >= 0 else f"1/{2**-tick}" for tick in ticks]
    figure = theme.figure(title, "layer", "component")
    return layer_map(
        figure, part.assign(doublings=doublings), "doublings", label=region_text, order=axes(part),
        text=lambda doublings: times(2**doublings) if doublings > least else "·", zmin=least, zmax=most,
        bar="times an even spread", colorbar_tickvals=ticks, colorbar_ticktext=labels,
    )  # fmt: skip


def region_text(row: Mapping[Any, Any]) -> str:
    """The hover text of a layer's component."""
    return (
        f"{theme.verbatim(location(row))}<br>{row['entries']:,} of {row['size']:,} entries"
        f"<br>{row['density']:.3g} times an even spread<br>{row['share']:.1%} of the region"
    )


def times(density: float) -> str:
    """A density as a cell shows it."""
    return f"{density:.0f}" if density >= 10 else f"{density:.2g}"


def draw_reliability(part: pd.DataFrame, task: str) -> "go.Figure":
    """Accuracy against stated confidence, of each model."""
    part = part.assign(gap=part["rows"] * (part["accuracy"] - part["confidence"]).abs())
    sums = part.groupby("model")[["gap", "rows"]].sum()
    errors = (sums["gap"] / sums["rows"]).to_dict()
    title = f"{task}: calibration error {errors.get('tuned', math.nan):.2f} of tuned"
    for model, name in (("graft", "the graft"), ("tempered", "tuned with one temperature")):
        title += f", {errors[model]:.2f} of {name}" if model in errors else ""
    figure = theme.figure(title, "stated confidence", "accuracy", 460)
    calibrated = Style("calibrated", theme.NEUTRAL, dash="dash", width=1)
    line(figure, pd.DataFrame({"at": [0, 1]}), "at", "at", calibrated, mode="lines", hoverinfo="skip")
    hover = "{rows:,} rows: confidence {x:.2f}, accuracy {y:.2f}"
    for model in [model for model in MODELS if model in errors]:
        rows = part[part["model"] == model].sort_values("confidence")
        # A bin of a few rows says nothing, and its line would draw the eye.
        rows = rows[rows["rows"] >= max(5, 0.01 * rows["rows"].sum())]
        style = replace(MODELS[model], name=f"{MODELS[model].name}, error {errors[model]:.2f}")
        sizes = 5 + 15 * np.sqrt(rows["rows"] / part["rows"].max())
        line(figure, rows, "confidence", "accuracy", style, hover, marker_size=sizes)
    figure.update_xaxes(range=[max(0.0, float(part["confidence"].min()) - 0.05), 1.02])
    return figure.update_yaxes(range=[-0.03, 1.03]).update_layout(margin_t=120)


def draw_sets(part: pd.DataFrame, task: str) -> "go.Figure":
    """The metric of each model on the task's rows and on every other set."""
    kinds, graft = set(part["kind"]), part[part["model"] == "graft"]
    y = "accuracy, or loss in nats per token"
    if len(kinds) == 1:
        y = "accuracy" if kinds == {"accuracy"} else "loss, nats per token; lower is better"
    verdicts = {"better than tuned": graft["over_tuned_low"] > 0, "worse": graft["over_tuned_high"] < 0}
    sets = {word: ", ".join(graft.loc[rows, "set"]) for word, rows in verdicts.items()}
    words = [f"surely {word} on {names}" for word, names in sets.items() if names]
    title = f"the graft is {' and '.join(words) or 'neither surely better nor worse than tuned'}"
    figure = theme.figure(f"{task}: {title if len(graft) else 'base and tuned on every set'}", "", y)
    labels = part["set"].map(theme.verbatim) + "<br>" + part["role"].map(ROLES)
    hover = "{y:.3g} ({low:.3g} to {high:.3g})<br>better than tuned by {over_tuned:+.3g} "
    hover += "({over_tuned_low:+.3g} to {over_tuned_high:+.3g})"
    for model, style in MODELS.items():
        rows = part[part["model"] == model]
        if len(rows):
            bars(figure, rows, "set", "metric", style, hover, interval=("low", "high"))
            figure.data[-1].x = labels[rows.index]
    return figure.update_xaxes(showgrid=False).update_layout(barmode="group", bargap=0.25, bargroupgap=0.08)


def draw_overlap(overlap: pd.DataFrame) -> "go.Figure":
    """The share of each task's region that another's holds."""
    top = overlap[overlap["task"] != overlap["other"]].nlargest(1, "overlap").iloc[0]
    ratio = top["overlap"] / top["chance"] if top["chance"] else math.inf
    title = f"Regions overlap by at most {top['overlap']:.2f}: {top['task']} holds that much of "
    title += f"{top['other']}, {ratio:.3g} times chance"
    figure = theme.figure(title, "of the region of", "the region of … holds")
    hover = "{y} holds {z:.3f} of {x}<br>by chance {chance:.3f}; Jaccard {jaccard:.3f}"
    cells = overlap.assign(text=overlap["overlap"].map("{:.2f}".format))
    return heat(figure, cells, "other", "task", "overlap", hover, text="text", bar="overlap", zmax=1)


def draw_rel(rel: pd.DataFrame) -> "go.Figure":
    """The share of each task's gain that each region keeps."""
    same_task = rel["region"] == rel["task"]
    own_task, other_tasks = rel.loc[same_task, "rel"], rel.loc[~same_task, "rel"]
    title = f"Regions keep {own_task.min():.2f} or more of their own task's gain, "
    title += f"and {other_tasks.min():.2f} to {other_tasks.max():.2f} of another's"
    figure = theme.figure(title, "task", "region of")
    hover = "the region of {y} keeps {z:.2f} ({low:.2f} to {high:.2f}) of the gain on {x}"
    cells, most = rel.assign(text=rel["rel"].map("{:.2f}".format)), max(1.0, float(rel["rel"].abs().max()))
    look: dict[str, Any] = {"zmin": -most, "zmax": most}
    return heat(figure, cells, "task", "region", "rel", hover, text="text", bar="Rel", diverging=True, **look)


def draw_unions(unions: pd.DataFrame) -> "go.Figure":
    """The share of each task's gain that the regions of several tasks keep together."""
    inside = unions.loc[unions["member"], "rel"]
    title = f"Regions together keep {inside.min():.2f} to {inside.max():.2f} of what their tasks gained"
    figure = theme.figure(title, "union of the regions of; pale: a task that is left out", REL)
    unions = unions.assign(kind=np.where(unions["member"], "a member", "left out"))
    for i, (task, rows) in enumerate(unions.groupby("task", sort=False)):
        color = theme.COLORWAY[i % len(theme.COLORWAY)]
        shades = np.where(rows["member"], color, theme.faint(color, 0.25))
        marker, hover = {"color": shades, "line": {"color": color, "width": 1.5}}, "{kind}: Rel {y:.2f}"
        style = Style(f"on {task}", color)
        bars(figure, rows, "union", "rel", style, hover, interval=("low", "high"), marker=marker)
    figure.update_xaxes(showgrid=False).update_layout(barmode="group", bargap=0.3)
    return theme.threshold(figure, "tuned", y=1.0)
