"""Where weights can go, and how alike two masks are: the pictures of essential sparsity without a curve."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.analyses.sparsity.grid import COMPARED_SPARSITY
from diagnostics.plotting import theme
from diagnostics.plotting.layer_axes import axes, layer_name

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Columns of the map of layers that can be chosen, with their titles and whether 0 is their middle.
SHADES = {"sparsity": ("sparsity", False), "excess": ("beyond scale", True)}


def of(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def draw_layers(layers: pd.DataFrame) -> "go.Figure":
    """How sparse each matrix is at its side's dropping point; buttons choose the side and the shade."""
    import plotly.graph_objects as go

    places, components = axes(layers)
    figure = theme.figure(title=fullest(layers), x="layer", y="component")
    buttons = []
    shades = [(column, *about) for column, about in SHADES.items() if layers[column].notna().any()]
    choices = [(model, *shade) for model in ("tuned", "base") for shade in shades]
    for place, (model, column, name, middle) in enumerate(choices):
        cells = cells_of(of(layers, model=model), column)
        table = cells.pivot(index="component", columns="layer", values="shade").reindex(
            index=components, columns=places
        )
        texts = cells.pivot(index="component", columns="layer", values="label").reindex(
            index=components, columns=places
        )
        most = max(float(np.nanmax(np.abs(table.to_numpy(dtype=float)))), 1e-3)
        # Opaque, so that numbers in the cells are dark or light as they must be; else the page's own scale.
        colors = theme.scale(theme.LIGHT.diverging) if middle else None
        figure.add_trace(
            go.Heatmap(
                z=table, x=places, y=[theme.verbatim(each) for each in components], name=name,
                visible=place == 0, zmin=-most if middle else 0, zmax=most if middle else 1,
                colorscale=colors, colorbar={"title": {"text": name}}, customdata=texts.fillna(""),
                text=table.map(lambda value: "" if pd.isna(value) else f"{value:.2f}"),
                texttemplate="%{text}" if len(places) <= 24 else None, xgap=2, ygap=2,
                hovertemplate="%{customdata}<extra></extra>",
            )
        )  # fmt: skip
        at = of(layers, model=model)["at"].iloc[0]
        buttons.append(
            {
                "label": f"{model} at {at:.2g}: {name}", "method": "restyle",
                "args": ["visible", [other == place for other in range(len(choices))]],
            }
        )  # fmt: skip
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    menu = {"type": "dropdown", "buttons": buttons, "x": 0, "xanchor": "left", "y": 1.04, "yanchor": "bottom"}
    return figure.update_layout(height=190 + 36 * len(components), updatemenus=[menu])


def fullest(layers: pd.DataFrame) -> str:
    """Which matrix of tuned is pruned most, in a sentence."""
    own = of(layers, model="tuned")
    top = own.nlargest(1, "sparsity").iloc[0]
    where = "" if pd.isna(top["layer"]) else f"layer {layer_name(top['layer'])} "
    text = f"At {top['at']:.2g} overall, {where}{top['component']} of tuned is {top['sparsity']:.2f} sparse"
    return theme.verbatim(f"{text}, the most of any matrix")


def cells_of(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Matrices by layer and component; several, such as experts, share a cell by their entries."""
    named = layers.assign(
        layer=layers["layer"].map(layer_name),
        weighted=layers[column] * layers["entries"],
        label=[hover_text(row) for row in layers.to_dict("records")],
    )
    cells = named.groupby(["component", "layer"], sort=False).agg(
        weighted=("weighted", "sum"), entries=("entries", "sum"), count=("label", "size"),
        label=("label", lambda labels: "<br>".join(labels.iloc[:5])),
    ).reset_index()  # fmt: skip
    more = np.where(cells["count"] > 5, "<br>and " + (cells["count"] - 5).astype(str) + " more", "")
    return cells.assign(shade=cells["weighted"] / cells["entries"], label=cells["label"] + more)


def hover_text(row: Mapping[Any, Any]) -> str:
    """What a matrix says when pointed at."""
    text = f"<b>{theme.verbatim(row['matrix'])}</b><br>sparsity {row['sparsity']:.3f}"
    if pd.notna(row["gaussian"]):
        text += f"; {row['gaussian']:.3f} by its scale alone (rms {row['rms']:.3g})"
    return text


def draw_overlap(overlap: pd.DataFrame) -> "go.Figure":
    """How alike the masks of base and tuned are, with what chance gives."""
    import plotly.graph_objects as go

    title = "How alike the masks of base and tuned are"
    if overlap["kappa"].notna().any():
        title += f": beyond chance by {overlap['kappa'].min():.2f} or more, 1 is the same"
    figure = theme.figure(title=title, x="sparsity", y="likeness")
    lines = {
        "kappa": ("kappa", theme.NEW, "circle", "solid"),
        "iou": ("IoU of what is pruned", theme.COLORWAY[4], "square", "solid"),
        "cosine": ("cosine of what is kept", theme.COLORWAY[3], "diamond", "solid"),
    }
    chance = {"kappa": 0.0 * overlap["sparsity"], "iou": overlap["iou_chance"],
              "cosine": overlap["cosine_chance"]}  # fmt: skip
    for column, (name, color, symbol, dash) in lines.items():
        figure.add_trace(
            go.Scatter(
                x=overlap["sparsity"], y=overlap[column], name=name, mode="lines+markers", legendgroup=name,
                line={"color": color, "width": 3 if column == "kappa" else 1.5, "dash": dash},
                marker={"symbol": symbol, "size": 8},
                hovertemplate=f"{name} at %{{x:.2f}}: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=overlap["sparsity"], y=chance[column], name=f"{name} by chance", mode="lines",
                line={"color": color, "width": 1.2, "dash": "dot"}, showlegend=False,
                hovertemplate=f"{name} by chance at %{{x:.2f}}: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
    bottom = min(0.0, float(np.nanmin(overlap["kappa"])) if overlap["kappa"].notna().any() else 0.0)
    figure.update_yaxes(range=[bottom - 0.03, 1.03])
    return figure.update_layout(height=440)


def draw_change(overlap: pd.DataFrame) -> "go.Figure":
    """What share of the squared change lies in base's smallest weights, against the diagonal of chance."""
    import plotly.graph_objects as go

    row = overlap.iloc[int((overlap["sparsity"] - COMPARED_SPARSITY).abs().argmin())]
    held = f"{row['delta_low']:.2g} of the squared change"
    title = f"Base's smallest {row['sparsity']:.2g} of the weights hold {held}"
    figure = theme.figure(title=title, x="smallest share of base's weights", y="share of the squared change")
    x = [0.0, *overlap["sparsity"], 1.0]
    figure.add_trace(
        go.Scatter(
            x=x, y=x, name="a change blind to magnitude", mode="lines",
            line={"color": theme.NEUTRAL, "dash": "dash", "width": 1.5}, hoverinfo="skip",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=x, y=[0.0, *overlap["delta_low"], 1.0], name="tuned − base", mode="lines+markers",
            line={"color": theme.NEW, "width": 2}, marker={"size": 8},
            hovertemplate="smallest %{x:.2f}: %{y:.3f} of the change<extra></extra>",
        )
    )  # fmt: skip
    return figure.update_layout(height=440, width=640)
