"""The pictures of correlations over several models."""

from typing import TYPE_CHECKING

from diagnostics import theme
from diagnostics.across import Across

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Panels of the scatter: more would not be read.
MOST = 9


def draw(made: Across) -> "dict[str, go.Figure]":
    """Both pictures; without a correlation only the scatter."""
    figures = {"scatter": scatter(made)}
    if made.table["raw"].notna().any():
        figures["correlations"] = intervals(made)
    return figures


def scatter(made: Across) -> "go.Figure":
    """Sharpness against the outcome, a panel a predictor, coloured by displacement."""
    from plotly.subplots import make_subplots

    order = made.table["partial"].abs().sort_values(ascending=False, na_position="last").index
    chosen = made.table.loc[order, "predictor"].tolist()[:MOST]
    wide = min(3, len(chosen))
    high = -(-len(chosen) // wide)
    figure = make_subplots(
        rows=high, cols=wide, subplot_titles=[theme.verbatim(name) for name in chosen],
        horizontal_spacing=0.07, vertical_spacing=0.14 / high + 0.06,
    )  # fmt: skip
    models = made.models
    for place, name in enumerate(chosen):
        figure.add_scatter(
            x=models[f"sharpness:{name}"], y=models["outcome"], mode="markers", showlegend=False,
            row=place // wide + 1, col=place % wide + 1, customdata=models[["model", "displacement"]],
            marker={"color": models["displacement"], "coloraxis": "coloraxis", "size": 9,
                "line": {"width": 1, "color": theme.NEUTRAL}},
            hovertemplate="%{customdata[0]}<br>sharpness %{x:.3g}<br>outcome %{y:.4g}<br>"
            "displacement %{customdata[1]:.3g}<extra></extra>",
        )  # fmt: skip
    more = f"; the {MOST} of {len(made.table)} with the largest partial one" if len(made.table) > MOST else ""
    return figure.update_layout(
        template=theme.template(), height=120 + 260 * high,
        title=f"{made.outcome} against sharpness at tuned (x, nats), {len(models)} models{more}",
        coloraxis={"colorbar": {"title": "moved"}, "colorscale": theme.scale(theme.LIGHT.sequential)},
    )  # fmt: skip


def intervals(made: Across) -> "go.Figure":
    """Raw and partial correlation of every predictor with 95 % intervals."""
    figure = theme.figure(
        title=f"Rank correlation of sharpness with {made.outcome}",
        x="Spearman correlation", y="",
    )  # fmt: skip
    table = made.table.iloc[::-1]
    for kind, color, symbol in (("raw", theme.NEUTRAL, "circle"), ("partial", theme.NEW, "diamond")):
        figure.add_scatter(
            x=table[kind], y=table["predictor"], mode="markers",
            name="raw" if kind == "raw" else "given displacement",
            marker={"color": color, "symbol": symbol, "size": 10},
            error_x={
                "type": "data", "symmetric": False, "array": table[f"{kind}_high"] - table[kind],
                "arrayminus": table[kind] - table[f"{kind}_low"], "thickness": 1,
            },
            customdata=table[[f"{kind}_p", f"{kind}_holm"]],
            hovertemplate="%{y}: %{x:+.2f}, p %{customdata[0]:.3g}, after Holm %{customdata[1]:.3g}",
        )  # fmt: skip
    theme.threshold(figure, "", x=0)
    return figure.update_layout(height=180 + 30 * len(table)).update_xaxes(range=[-1.05, 1.05])


def page(made: Across) -> str:
    """Both pictures and the notes as one page that opens offline."""
    import html

    from plotly.io import to_html

    figures = "".join(
        to_html(figure, full_html=False, include_plotlyjs=place == 0, config={"displaylogo": False})
        for place, figure in enumerate(draw(made).values())
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in made.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tunescope correlate</title>'
        f"<style>body{{font-family:{theme.FONT};margin:2rem auto;max-width:1200px;padding:0 1rem}}</style>"
        f"</head><body><h1>{html.escape(made.outcome)} over {len(made.models)} models</h1>"
        f"{notes}{figures}</body></html>"
    )
