"""The pictures of intruder dimensions, drawn from the tables alone, so that a saved result redraws."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.layer_axes import axes, layer_name

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURED = "measured"
# Cells that hold no count: how strong their grey is, and the sign that tells them apart without colour.
UNCOUNTED = {"frozen": (0.15, "="), "not applicable": (0.4, "×")}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    tables = {name: table for name, table in result.tables.items() if len(table)}
    k, epsilon = result.parameters["k"], result.parameters["epsilon"]
    matrices = result.tables["matrices"]
    measured = matrices[matrices["status"] == MEASURED]
    vectors = result.tables["vectors"]
    vectors = vectors[vectors["matrix"].isin(measured["matrix"]) & (vectors["rank"] <= k)]
    if not result.metrics.get("descendant", 1):
        return {
            "cosines": draw_cosines(vectors, measured, epsilon, title="Tuned does not descend from this base")
        }
    figures = {}
    if len(matrices):
        figures["where"] = draw_where(matrices, k)
    if len(vectors):
        figures["cosines"] = draw_cosines(vectors, measured, epsilon)
    if "sweep" in tables:
        figures["sweep"] = draw_sweep(tables["sweep"], k, epsilon)
    if "spectra" in tables:
        name = worst(matrices, tables["spectra"])
        figures["spectra"] = draw_spectra(of(tables["spectra"], name), of(vectors, name), name)
    if "cosines" in tables:
        name = worst(matrices, tables["cosines"])
        figures["similarity"] = draw_similarity(of(tables["cosines"], name), of(vectors, name), name)
    return figures


def of(table: pd.DataFrame, matrix: str) -> pd.DataFrame:
    """The rows of one matrix."""
    return table[table["matrix"] == matrix]


def ranked(matrices: pd.DataFrame) -> pd.DataFrame:
    """The matrix with the most intruders first; among equals the one with the lowest cosine."""
    return matrices.sort_values(["intruders", "min_cosine_low"], ascending=[False, True], kind="stable")


def worst(matrices: pd.DataFrame, kept: pd.DataFrame) -> str:
    """Of the matrices that a table keeps, the worst."""
    return str(ranked(matrices[matrices["matrix"].isin(kept["matrix"])])["matrix"].iloc[0])


def draw_where(matrices: pd.DataFrame, k: int) -> "go.Figure":
    """Intruders by layer and component; matrices that hold no count have their own grey and sign."""
    counted = matrices[matrices["status"] == MEASURED]
    found, flagged = int(counted["intruders"].sum()), int((counted["intruders"] > 0).sum())
    title = f"{found:,} intruder{'s' * (found != 1)} in {flagged} of {len(counted)} matrices"
    if found:
        top = ranked(counted).iloc[0]
        layer = "" if pd.isna(top["layer"]) else f"layer {top['layer']:.0f} "
        alone = (counted["intruders"] == top["intruders"]).sum() == 1
        title += (
            f"; most in {layer}{top['component']}" if alone else f"; at most {top['intruders']:.0f} in one"
        )
    figure = theme.figure(title=theme.verbatim(title), x="layer", y="component")

    cells = matrices.assign(
        layer=matrices["layer"].map(layer_name),
        label=[label(row) for row in matrices.to_dict("records")],
    )[["component", "layer", "status", "intruders", "label"]]
    if cells.duplicated(["component", "layer"]).any():
        cells = shared(cells)
    layers, components = axes(matrices)
    for status, (strength, sign) in UNCOUNTED.items():
        if (cells["status"] == status).any():
            grey = theme.faint(theme.NEUTRAL, strength)
            part = cells[cells["status"] == status].assign(sign=sign, intruders=0)
            trace = heatmap(part, layers, components, name=f"{sign} {status}", showlegend=True)
            figure.add_trace(trace.update(colorscale=[(0, grey), (1, grey)], showscale=False))
    part = cells[cells["status"] == MEASURED]
    part = part.assign(sign=[f"{count:.0f}" for count in part["intruders"]])
    most = max([k, *part["intruders"]])
    trace = heatmap(part, layers, components, name="intruders", zmin=0, zmax=most)
    figure.add_trace(trace.update(colorbar_title_text="intruders"))
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=layers, showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure.update_layout(height=170 + 34 * len(components))


def shared(cells: pd.DataFrame) -> pd.DataFrame:
    """One row for each cell of the map of layers and components.

    Several experts share a cell: their counts add up, and those without a count do not hide the others'.
    """
    return (
        cells.groupby(["component", "layer", "status"], sort=False)
        .agg(intruders=("intruders", "sum"), label=("label", joined))
        .reset_index()
        .sort_values("status", key=lambda status: status != MEASURED, kind="stable")
        .drop_duplicates(["component", "layer"])
    )


def heatmap(cells: pd.DataFrame, layers: list[str], components: list[str], **look: Any) -> "go.Heatmap":
    """Some cells of the map of layers and components; the others stay empty."""
    import plotly.graph_objects as go

    table = cells.set_index(["component", "layer"])

    def grid(column: str, empty: Any) -> np.ndarray:
        wide = table[column].unstack(fill_value=empty)
        return wide.reindex(index=components, columns=layers, fill_value=empty).to_numpy()

    signs = len(layers) <= 48  # in more columns they cannot be read
    return go.Heatmap(
        z=grid("intruders", math.nan),
        x=layers,
        y=[theme.verbatim(component) for component in components],
        text=grid("sign", ""),
        texttemplate="%{text}" if signs else None,
        customdata=grid("label", ""),
        hovertemplate="%{customdata}<extra></extra>",
        xgap=2,
        ygap=2,
        **look,
    )


def label(row: Mapping[Any, Any]) -> str:
    """What a matrix says when pointed at."""
    text = f"<b>{theme.verbatim(row['matrix'])}</b>"
    if row["status"] != MEASURED:
        return f"{text}<br>{row['status']}"
    text += f"<br>{row['intruders']:.0f} of {row['examined']} directions are intruders"
    if pd.notna(row["min_cosine_low"]):
        text += f"<br>lowest cosine from {row['min_cosine_low']:.3f}; random floor {row['floor']:.3f}"
    return text


def joined(labels: pd.Series) -> str:
    """The first few of several labels."""
    more = f"<br>and {len(labels) - 5} more" if len(labels) > 5 else ""
    return "<br>".join(labels.iloc[:5]) + more


def draw_cosines(
    vectors: pd.DataFrame, measured: pd.DataFrame, epsilon: float, title: str = ""
) -> "go.Figure":
    """Cosine of each leading tuned vector with its nearest base vector.

    What is known of a cosine is an interval: the mark is its end nearest epsilon, the line the rest.
    """
    import plotly.graph_objects as go

    seen = vectors.dropna(subset=["cosine_low", "cosine_high"]).reset_index(drop=True)
    intruder = seen["intruder"].astype(bool)
    title = (
        title or f"{intruder.sum():,} of {len(seen):,} leading tuned directions come near no base direction"
    )
    if (seen["cosine_low"] < seen["cosine_high"]).any():
        title += "; lines: what a certified interval leaves open"
    x, y = "rank of the tuned singular value", "|cosine| with nearest base vector"
    figure = theme.figure(title=title, x=x, y=y)
    # Matrices lie side by side within a rank, in file order: the same matrix lines up across ranks.
    place = seen["matrix"].map({name: i for i, name in enumerate(dict.fromkeys(seen["matrix"]))})
    seen["x"] = seen["rank"] + 0.7 * ((place + 0.5) / (place.max() + 1) - 0.5)
    seen["mark"] = seen["cosine_high"].where(intruder, seen["cosine_low"])
    seen["name"] = seen["matrix"].map(theme.verbatim)
    tiers = dict(zip(dict.fromkeys(seen["tier"]), theme.SYMBOLS, strict=False))
    for (new, tier), part in seen.groupby([intruder, "tier"], sort=False):
        color = theme.NEW if new else theme.BASE
        figure.add_trace(
            go.Scatter(
                x=part["x"],
                y=part["mark"],
                mode="markers",
                name=f"{'intruder' if new else 'near the base'} ({theme.verbatim(tier)})",
                marker={"color": color, "symbol": tiers.get(tier, "star"), "size": 7, "opacity": 0.75},
                error_y={
                    "symmetric": False,
                    "array": part["cosine_high"] - part["mark"],
                    "arrayminus": part["mark"] - part["cosine_low"],
                    "color": theme.faint(color, 0.3),
                    "thickness": 1,
                    "width": 0,
                },
                customdata=part[["name", "rank", "cosine_low", "cosine_high", "singular_value"]],
                hovertemplate="<b>%{customdata[0]}</b><br>rank %{customdata[1]}, "
                "singular value %{customdata[4]:.4g}<br>"
                "cosine from %{customdata[2]:.4f} to %{customdata[3]:.4f}<extra></extra>",
            )
        )
    theme.threshold(figure, f"epsilon {epsilon:g}: intruders lie below", y=epsilon)
    floors = measured["floor"]
    name = f"random floor {floors.min():.2f}" + (f" to {floors.max():.2f}" if floors.nunique() > 1 else "")
    look = {"fillcolor": theme.faint(theme.NEUTRAL, 0.18), "line_width": 0, "layer": "below"}
    figure.add_hrect(y0=0, y1=floors.max(), name=name, showlegend=True, **look)
    figure.update_yaxes(range=[0, 1.03])
    if len(seen) and seen["rank"].max() <= 20:
        figure.update_xaxes(dtick=1, showgrid=False)
    return figure.update_layout(height=460)


def draw_sweep(sweep: pd.DataFrame, k: int, epsilon: float) -> "go.Figure":
    """Count against epsilon for up to five k; where the intervals leave it open, a band from low to high."""
    import plotly.graph_objects as go

    others = sorted(set(sweep["k"]) - {k})
    chosen = {others[round(i * (len(others) - 1) / 3)] for i in range(4)} if others else set()
    undecided = bool((sweep["intruders_high"] > sweep["intruders_low"]).any())
    title = "How many intruders other thresholds would count"
    title += "; a band where the certified intervals do not tell" if undecided else ""
    figure = theme.figure(title=title, x="epsilon: |cosine| under which a direction is new", y="intruders")
    colors = iter(color for color in theme.COLORWAY if color != theme.NEW)
    for value in sorted({*chosen, *({k} & set(sweep["k"]))}):
        part = sweep[sweep["k"] == value].sort_values("epsilon")
        color = theme.NEW if value == k else next(colors)
        if undecided:
            high = {"width": 0, "color": color}
            trace = go.Scatter(x=part["epsilon"], y=part["intruders_high"], mode="lines", line=high)
            figure.add_trace(trace.update(hoverinfo="skip", showlegend=False, legendgroup=f"{value}"))
        figure.add_trace(
            go.Scatter(
                x=part["epsilon"],
                y=part["intruders_low"],
                mode="lines",
                name=f"k = {value}",
                legendgroup=f"{value}",
                line={
                    "color": color,
                    "width": 3 if value == k else 1.5,
                    "dash": None if value == k else "dot",
                },
                fill="tonexty" if undecided else None,
                fillcolor=theme.faint(color, 0.25 if value == k else 0.12),
                customdata=part["intruders_high"],
                hovertemplate="epsilon %{x:.2f}: %{y}" + (" to %{customdata}" if undecided else ""),
            )
        )
    theme.threshold(figure, f"epsilon {epsilon:g}", x=epsilon)
    figure.update_yaxes(rangemode="tozero")
    return figure.update_layout(height=420)


def draw_spectra(spectra: pd.DataFrame, vectors: pd.DataFrame, matrix: str) -> "go.Figure":
    """Base and tuned singular values of one matrix, its intruders marked."""
    import plotly.graph_objects as go

    intruders = vectors[vectors["intruder"].astype(bool)]
    subject = "the intruder" if len(intruders) == 1 else f"the {len(intruders)} intruders"
    title = f"Where {subject} of {matrix} stand{'s' * (len(intruders) == 1)} among its singular values"
    figure = theme.figure(title=theme.verbatim(title), x="rank", y="singular value (log scale)")
    for name, color, dash in (("base", theme.BASE, "dash"), ("tuned", theme.TUNED, "solid")):
        line = {"color": color, "width": 2, "dash": dash}
        figure.add_trace(go.Scatter(x=spectra["rank"], y=spectra[name], name=name, mode="lines", line=line))
    figure.add_trace(
        go.Scatter(
            x=intruders["rank"],
            y=intruders["singular_value"],
            name="intruder",
            mode="markers",
            marker={"color": theme.NEW, "symbol": "diamond", "size": 10},
            customdata=intruders[["cosine_low", "cosine_high"]],
            hovertemplate="%{y:.4g}, cosine from %{customdata[0]:.3f} to %{customdata[1]:.3f}",
        )
    )
    sizes = spectra[["base", "tuned"]].to_numpy()
    ticks = decades(float(np.nanmin(sizes[sizes > 0])), float(np.nanmax(sizes)))
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_xaxes(range=[spectra["rank"].min() - 0.5, spectra["rank"].max() + 0.5])
    return figure.update_layout(height=420, hovermode="x unified")


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten of a range; of a long one the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    return [float(f"{step}e{power}") for power in powers for step in steps]


def draw_similarity(cosines: pd.DataFrame, vectors: pd.DataFrame, matrix: str) -> "go.Figure":
    """|U1ᵀ U0| of one matrix: an intruder is a blank column, and what follows it shifts off the diagonal."""
    import plotly.graph_objects as go

    grid = cosines.pivot(index="base_rank", columns="tuned_rank", values="cosine").abs()
    title = theme.verbatim(f"Intruders (▼) of {matrix} are columns that match no base direction")
    figure = theme.figure(title=title, x="rank of the tuned vector", y="rank of the base vector")
    figure.add_trace(
        go.Heatmap(
            z=grid,
            x=grid.columns,
            y=grid.index,
            zmin=0,
            zmax=1,
            colorscale=theme.fading(theme.BASE),
            colorbar={"title": {"text": "|cosine|"}},
            hovertemplate="tuned %{x}, base %{y}: |cosine| %{z:.3f}<extra></extra>",
        )
    )
    for rank in sorted(set(vectors.loc[vectors["intruder"].astype(bool), "rank"]) & set(grid.columns)):
        mark = {"yref": "paper", "y": 1, "yanchor": "bottom", "font": {"color": theme.NEW, "size": 14}}
        figure.add_annotation(x=rank, text="▼", **mark)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure.update_layout(width=640, height=560)
