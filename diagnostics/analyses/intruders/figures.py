"""Figures of intruder dimensions, drawn from the tables alone, so that a saved result redraws."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, drawn, heat, line, points
from diagnostics.plotting.layer_axes import axes, layer_map, location

MEASURED = "measured"
# Cells without a count: the strength of their grey, and the sign that tells them apart without colour.
UNCOUNTED = {"frozen": (0.15, "="), "not applicable": (0.4, "×")}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The figures; one without data is left out."""
    matrices, vectors = result.tables["matrices"], result.tables["vectors"]
    measured = matrices.loc[matrices["status"] == MEASURED, "matrix"]
    vectors = vectors[vectors["matrix"].isin(measured) & (vectors["rank"] <= result.parameters["k"])]
    vectors = vectors.assign(intruder=vectors["intruder"].astype(bool))
    if not result.metrics.get("descendant", 1):
        title = "Tuned does not descend from this base"
        return {"cosines": draw_cosines(vectors, matrices, result, title)}
    return drawn(
        replace(result, tables={**result.tables, "vectors": vectors}), where=draw_where, cosines=draw_cosines,
        sweep=draw_sweep, spectra=draw_spectra, similarity=draw_similarity,
    )  # fmt: skip


def ranked(matrices: pd.DataFrame) -> pd.DataFrame:
    """The matrix with the most intruders first; among equals the one with the lowest cosine."""
    return matrices.sort_values(["intruders", "min_cosine_low"], ascending=[False, True], kind="stable")


def worst(matrices: pd.DataFrame, *tables: pd.DataFrame) -> tuple[str, list[pd.DataFrame]]:
    """The worst of the matrices that the first table keeps, and the rows of each table about it."""
    kept = matrices[matrices["matrix"].isin(tables[0]["matrix"])]
    name = str(ranked(kept)["matrix"].iloc[0])
    return name, [table[table["matrix"] == name] for table in tables]


def draw_where(matrices: pd.DataFrame, result: Result) -> "go.Figure":
    """Intruders by layer and component; matrices without a count have their own grey and sign."""
    counted = matrices[matrices["status"] == MEASURED]
    total, flagged = int(counted["intruders"].sum()), int((counted["intruders"] > 0).sum())
    title = f"{total:,} intruder{'s' * (total != 1)} in {flagged} of {len(counted)} matrices"
    if total:
        top = ranked(counted).iloc[0]
        alone = (counted["intruders"] == top["intruders"]).sum() == 1
        title += f"; most in {location(top)}" if alone else f"; at most {top['intruders']:.0f} in one"
    figure, order = theme.figure(title, "layer", "component"), axes(matrices)
    # Experts share a cell: those without a count do not hide the others'.
    matrices = matrices.assign(uncounted=matrices["status"] != MEASURED)
    least = matrices.groupby(["layer", "component"], dropna=False)["uncounted"].transform("min")
    matrices = matrices[matrices["uncounted"] == least]
    for status, (strength, sign) in UNCOUNTED.items():
        part = matrices[matrices["status"] == status].assign(intruders=0)
        grey = theme.faint(theme.NEUTRAL, strength)
        if len(part):
            layer_map(
                figure, part, "intruders", label=hover_text, text=sign, order=order,
                name=f"{sign} {status}", showlegend=True, colorscale=[(0, grey), (1, grey)], showscale=False,
            )  # fmt: skip
    part, name = matrices[matrices["status"] == MEASURED], "intruders"
    layer_map(figure, part, name, label=hover_text, text="{:.0f}", order=order, name=name, bar=name)
    figure.data[-1].update(zmax=max(result.parameters["k"], figure.data[-1].zmax))
    return figure.update_xaxes(categoryorder="array", categoryarray=order[0])


def hover_text(row: Mapping[Any, Any]) -> str:
    """The hover text of a matrix."""
    text = f"<b>{theme.verbatim(row['matrix'])}</b><br>"
    if row["status"] != MEASURED:
        return text + row["status"]
    text += f"{row['intruders']:.0f} of {row['examined']} directions are intruders"
    if pd.notna(row["min_cosine_low"]):
        text += f"<br>lowest cosine from {row['min_cosine_low']:.3f}; random floor {row['floor']:.3f}"
    return text


def draw_cosines(
    vectors: pd.DataFrame, matrices: pd.DataFrame, result: Result, title: str = ""
) -> "go.Figure":
    """Cosine of each leading tuned vector with its nearest base vector: a mark nearest epsilon, a whisker."""
    bounded = vectors.dropna(subset=["cosine_low", "cosine_high"]).reset_index(drop=True)
    new = f"{bounded['intruder'].sum():,} of {len(bounded):,} leading tuned directions"
    title = title or f"{new} come near no base direction"
    title += "; whiskers: certified intervals" * bool((bounded["cosine_low"] < bounded["cosine_high"]).any())
    figure = theme.figure(title, "rank of the tuned singular value", "|cosine| with nearest base vector", 460)
    # Matrices lie next to one another within a rank, in file order: each lines up across ranks.
    order = pd.factorize(bounded["matrix"])[0]
    bounded["at"] = bounded["rank"] + 0.7 * ((order + 0.5) / (order.max(initial=0) + 1) - 0.5)
    bounded["mark"] = bounded["cosine_high"].where(bounded["intruder"], bounded["cosine_low"])
    symbols = dict(zip(dict.fromkeys(bounded["tier"]), theme.SYMBOLS, strict=False))
    hover = "<b>{matrix}</b><br>rank {rank}, singular value {singular_value:.4g}"
    hover += "<br>cosine from {cosine_low:.4f} to {cosine_high:.4f}"
    for (intruder, tier), part in bounded.groupby(["intruder", "tier"], sort=False):
        name, color = ("intruder", theme.NEW) if intruder else ("near the base", theme.BASE)
        style = Style(f"{name} ({tier})", color, symbols.get(tier, "star"), size=7)
        points(figure, part, "at", "mark", style, hover, interval=("cosine_low", "cosine_high"), opacity=0.75)
    epsilon = result.parameters["epsilon"]
    theme.threshold(figure, f"epsilon {epsilon:g}: intruders lie below", y=epsilon)
    floors = matrices.loc[matrices["status"] == MEASURED, "floor"]
    name = f"random floor {floors.min():.2f}" + (f" to {floors.max():.2f}" if floors.nunique() > 1 else "")
    theme.shade(figure, theme.NEUTRAL, y=(0, floors.max()), strength=0.18, name=name, showlegend=True)
    if len(bounded) and bounded["rank"].max() <= 20:
        figure.update_xaxes(dtick=1, showgrid=False)
    return figure.update_yaxes(range=[0, 1.03])


def draw_sweep(sweep: pd.DataFrame, result: Result) -> "go.Figure":
    """Count against epsilon for up to five k, with a ribbon where certified intervals leave it open."""
    k, epsilon = result.parameters["k"], result.parameters["epsilon"]
    others = sorted(set(sweep["k"]) - {k})
    chosen = {others[round(i * (len(others) - 1) / 3)] for i in range(4)} if others else set()
    title, hover, interval = "Intruders counted at other thresholds", "epsilon {x:.2f}: {y}", None
    if (sweep["intruders_high"] > sweep["intruders_low"]).any():
        title += "; a band where the certified intervals leave it open"
        hover, interval = hover + " to {intruders_high}", ("intruders_low", "intruders_high")
    figure = theme.figure(title, "epsilon: |cosine| below which a direction is new", "intruders")
    colors = iter(color for color in theme.COLORWAY if color != theme.NEW)
    for value in sorted({*chosen, *({k} & set(sweep["k"]))}):
        color, dash, width = (theme.NEW, "solid", 3.0) if value == k else (next(colors), "dot", 1.5)
        part = sweep[sweep["k"] == value].sort_values("epsilon")
        style = Style(f"k = {value}", color, dash=dash, width=width)
        line(figure, part, "epsilon", "intruders_low", style, hover, interval=interval, mode="lines")
    return theme.threshold(figure, f"epsilon {epsilon:g}", x=epsilon).update_yaxes(rangemode="tozero")


def draw_spectra(spectra: pd.DataFrame, matrices: pd.DataFrame, vectors: pd.DataFrame) -> "go.Figure":
    """Base and tuned singular values of the worst matrix, its intruders marked."""
    matrix, (spectra, intruders) = worst(matrices, spectra, vectors[vectors["intruder"]])
    subject = "the intruder" if len(intruders) == 1 else f"the {len(intruders)} intruders"
    title = f"Where {subject} of {matrix} stand{'s' * (len(intruders) == 1)} among its singular values"
    figure = theme.figure(title, "rank", "singular value (log scale)")
    for name, color, dash in (("base", theme.BASE, "dash"), ("tuned", theme.TUNED, "solid")):
        line(figure, spectra, "rank", name, Style(name, color, dash=dash), "{y:.4g}", mode="lines")
    hover = "{y:.4g}, cosine from {cosine_low:.3f} to {cosine_high:.3f}"
    points(
        figure, intruders, "rank", "singular_value", Style("intruder", theme.NEW, "diamond", size=10), hover
    )
    sizes = spectra[["base", "tuned"]].to_numpy()
    ticks = decades(float(np.nanmin(sizes[sizes > 0])), float(np.nanmax(sizes)))
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_xaxes(range=[spectra["rank"].min() - 0.5, spectra["rank"].max() + 0.5])
    return figure.update_layout(hovermode="x unified")


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten of a range; of a long one the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    return [float(f"{step}e{power}") for power in powers for step in steps]


def draw_similarity(cosines: pd.DataFrame, matrices: pd.DataFrame, vectors: pd.DataFrame) -> "go.Figure":
    """|U1ᵀ U0| of the worst matrix: an intruder is a blank column, and later ones shift off the diagonal."""
    matrix, (cosines, intruders) = worst(matrices, cosines, vectors[vectors["intruder"]])
    title = f"Intruders (▼) of {matrix} match no base direction"
    figure = theme.figure(title, "rank of the tuned vector", "rank of the base vector")
    cells = cosines.assign(size=cosines["cosine"].abs()).sort_values(["base_rank", "tuned_rank"])
    # From the page itself to the colour of base, on a light page and on a dark one.
    colors = theme.scale((theme.faint(theme.BASE, 0.0), theme.BASE))
    look: dict[str, Any] = {"bar": "|cosine|", "colorscale": colors, "zmax": 1, "xgap": 0, "ygap": 0}
    hover = "tuned {x}, base {y}: |cosine| {z:.3f}"
    heat(figure, cells, "tuned_rank", "base_rank", "size", hover, **look)
    for rank in sorted(set(intruders["rank"]) & set(cells["tuned_rank"])):
        mark = {"yref": "paper", "y": 1, "yanchor": "bottom", "font": {"color": theme.NEW, "size": 14}}
        figure.add_annotation(x=rank, text="▼", **mark)
    return figure.update_xaxes(type="linear").update_yaxes(type="linear").update_layout(width=640, height=560)
