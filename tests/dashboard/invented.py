"""What audits in these tests hold: invented tables of matrices and rows, pictures of them, and bad names."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

HOSTILE = (
    """<script>document.title="owned"</script>"><img src=x onerror="document.title='owned'"><b>b</b>&lt;|`"""
)


def tables(layers: int = 4, ranks: int = 10, *, suffix: str = "") -> dict[str, pd.DataFrame]:
    """A table of matrices, one of their vectors, and one of rows of text in two groups."""
    components = ("q_proj", "o_proj", "down_proj")
    matrices = [
        {"matrix": f"layers.{layer}.{c}.weight{suffix}", "layer": layer, "component": c, "angle": layer + 0.5}
        for layer in range(layers)
        for c in components
    ]
    vectors = [
        {**m, "rank": rank, "singular_value": 20.0 / rank, "cosine": 1 / (rank + m["layer"])}
        for m in matrices
        for rank in range(1, ranks + 1)
    ]
    rows = [{"row": i, "group": f"g{i % 2}{suffix}", "text": f"text {i}{suffix}"} for i in range(30)]
    return {
        "matrices": pd.DataFrame(matrices),
        "vectors": pd.DataFrame(vectors).drop(columns="angle"),
        "rows": pd.DataFrame(rows),
    }


def draw(result: Any) -> dict[str, go.Figure]:
    """A map of layers and components, and a mark for each vector."""
    from diagnostics.plotting import theme

    matrices, vectors = result.tables["matrices"], result.tables["vectors"]
    grid = matrices.pivot_table(index="component", columns="layer", values="angle", aggfunc="sum")
    where = theme.figure(title=f"Angles of {len(matrices)} matrices", x="layer", y="component")
    names = [theme.verbatim(name) for name in grid.index]
    where.add_trace(go.Heatmap(z=grid.to_numpy(), x=[str(layer) for layer in grid.columns], y=names))
    marks = theme.figure(title=f"{len(vectors)} vectors", x="rank", y="cosine")
    shown = vectors["matrix"].map(theme.verbatim)
    marks.add_trace(
        go.Scatter(
            x=vectors["rank"], y=vectors["cosine"], mode="markers", customdata=np.array(shown)[:, None]
        )
    )
    return {"where": where, "marks": marks}
