"""Figures of likelihood-ratio OOD, drawn from the tables alone, so that a saved result redraws."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, bars, drawn, line, points
from diagnostics.plotting.set_styles import COLORS, DASHES, set_curves

RATIO = "log p_base − log p_tuned, nats"
# The scores with a ROC curve; more would hide one another.
CURVES = ("ratio", "ratio_per_token", "tuned_likelihood", "base_likelihood", "length")
POINTS = 2000  # of a set in a scatter plot
# The texts whose tokens are shown: how many, and of each how many lines of how many letters.
TEXTS, LINES, WIDTH = 24, 3, 76
ENDS = 3  # rows of each set with the highest ratio, and as many with the lowest
MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The figures; without rows there are none."""
    if not all(len(result.tables.get(name, ())) for name in ("detection", "rows", "sets")):
        return {}
    rows, detection = result.tables["rows"], result.tables["detection"]
    shown = {"rows": rows.dropna(subset=["ratio"]), "detection": detection[detection["group"].isna()]}
    return drawn(
        replace(result, tables={**result.tables, **shown}), densities=draw_densities, scores=draw_scores,
        roc=draw_roc, losses=draw_losses, length=draw_length, gains=draw_gains, tokens=draw_tokens,
    )  # fmt: skip


def draw_densities(rows: pd.DataFrame, detection: pd.DataFrame) -> "go.Figure":
    """How the ratio is spread in each set, as shares of its rows; lines, since filled areas would mix."""
    ratio = detection[(detection["ood"] == "all") & (detection["score"] == "ratio")].iloc[0]
    title = f"The ratio of an OOD row is above that of a task row with probability {ratio['auroc']:.3f}"
    figure = theme.figure(title, RATIO, "share of the set's rows")
    low, high = np.quantile(rows["ratio"], [0.005, 0.995])
    # As many bins as the smallest set can fill.
    bins = int(np.clip(2 * rows.groupby("set").size().min() ** 0.5, 10, 40))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for style, part in set_curves(rows, "row"):
        counts, _ = np.histogram(part["ratio"].clip(edges[0], edges[-1]), edges)
        shares = pd.DataFrame({"ratio": (edges[1:] + edges[:-1]) / 2, "share": counts / len(part)})
        line(figure, shares, "ratio", "share", style, "{x:.3g} nats: {y:.1%}", mode="lines", line_shape="hvh")
    theme.threshold(figure, "95 % of the task rows lie below", x=float(ratio["threshold_95_id_kept"]))
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")


def draw_scores(detection: pd.DataFrame) -> "go.Figure":
    """AUROC of every score on every OOD set, the best of all sets together on top."""
    order = detection[detection["ood"] == "all"].sort_values("auroc", kind="stable")["score"].tolist()
    title = f"Best over all OOD sets: {order[-1] if order else ''}; length knows nothing of the models"
    figure = theme.figure(title, "AUROC with 95 % interval", "", 140 + 30 * len(order))
    sets = list(dict.fromkeys(detection["ood"]))
    if len(sets) == 2:  # one set, and the same again as all
        sets = sets[1:]
    for i, name in enumerate(sets):
        part = detection[detection["ood"] == name].set_index("score").reindex(order).reset_index()
        part["at"] = np.arange(len(order)) + 0.6 * ((i + 0.5) / len(sets) - 0.5)
        color = theme.NEUTRAL if name == "all" else theme.COLORWAY[(i + 2) % len(theme.COLORWAY)]
        style = Style(name, color, theme.SYMBOLS[i % len(theme.SYMBOLS)])
        hover = "{score}: AUROC {x:.3f} ({low:.3f} to {high:.3f}), FPR95 {fpr95:.3f}"
        points(figure, part, "auroc", "at", style, hover, x_interval=("low", "high"))
    figure.update_yaxes(tickvals=list(range(len(order))), ticktext=order, showgrid=False)
    return theme.threshold(figure, "chance", x=0.5)


def draw_roc(rows: pd.DataFrame) -> "go.Figure":
    """OOD rows caught against task rows flagged, all OOD sets together."""
    from sklearn.metrics import roc_curve

    title = "OOD rows caught and task rows flagged, by score"
    figure = theme.figure(title, "task rows flagged", "OOD rows caught", 560)
    judged = rows[rows["role"].isin(["task", "ood"])]
    for score, color, dash in zip(CURVES, theme.COLORWAY, DASHES, strict=True):
        flagged, caught, _ = roc_curve(judged["role"] == "ood", judged[score])
        shares = pd.DataFrame({"flagged": flagged, "caught": caught})
        style = Style(score, color, dash=dash, width=3 if score == "ratio" else 1.5)
        line(figure, shares, "flagged", "caught", style, "{y:.1%} caught, {x:.1%} flagged", mode="lines")
    axis = {"range": [-0.01, 1.01], "tickformat": ".0%"}
    theme.threshold(figure, "95 % caught", y=0.95).update_xaxes(**axis).update_yaxes(**axis)
    return figure.update_layout(width=620, margin_t=110)


def draw_losses(rows: pd.DataFrame) -> "go.Figure":
    """Loss of tuned against that of base, row by row: under the diagonal tuning helped."""
    won = (rows["ratio"] < 0).groupby([rows["role"]]).mean()
    shares = [f"{won[role]:.0%} of the {role} rows" for role in ("task", "ood", "keep") if role in won]
    title = f"Tuned has the lower loss on {', '.join(shares)}"
    figure = theme.figure(title, "loss of base, nats per token", "loss of tuned, nats per token", 480)
    losses = rows[["base_loss", "tuned_loss"]].to_numpy()
    low, high = float(losses.min()), float(losses.max())
    diagonal = {"color": theme.NEUTRAL, "dash": "dash"}
    figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=diagonal)
    figure.add_annotation(x=high, y=high, text="no change", xanchor="right", yanchor="bottom")
    return row_points(figure, rows, "base_loss", "tuned_loss")


def draw_length(rows: pd.DataFrame) -> "go.Figure":
    """The ratio against the length: what separates rows of one length is not length."""
    title = "Ratio against length: a gap at one length is not due to length"
    figure = theme.figure(title, "length, tokens", RATIO, 480)
    if (rows["tokens"] > 0).all() and rows["tokens"].max() > 20 * rows["tokens"].median():
        figure.update_xaxes(type="log")
    return theme.threshold(row_points(figure, rows, "tokens", "ratio"), "no change", y=0)


def row_points(figure: "go.Figure", rows: pd.DataFrame, x: str, y: str) -> "go.Figure":
    """One mark a row; its hover text has the start of the row's text."""
    for style, part in set_curves(rows.assign(start=rows["text"].str.slice(0, 80)), "row"):
        shown = part.iloc[:: max(1, -(-len(part) // POINTS))]
        hover = "row {row}: {ratio:.3g} nats<br>{start}"
        points(figure, shown, x, y, style, hover, marker_size=6, opacity=0.6)
    return figure


def draw_gains(sets: pd.DataFrame) -> "go.Figure":
    """Nats per token that tuning won or lost on each set."""
    sets = sets[sets["group"].isna()].sort_values("gain", kind="stable")
    title = "What tuning gained on each set; left of 0 it lost"
    figure = theme.figure(title, "nats per token, with 95 % interval", "", 150 + 40 * len(sets))
    hover = "{role}, {rows:,} rows: {x:+.3f} nats ({gain_low:+.3f} to {gain_high:+.3f})"
    hover += "<br>loss {loss_base:.3f} in base, {loss_tuned:.3f} in tuned<extra></extra>"
    look: dict[str, Any] = {"orientation": "h", "marker": {"color": sets["role"].map(COLORS)}}
    return bars(figure, sets, "gain", "set", Style("", ""), hover, interval=("gain_low", "gain_high"), **look)


def draw_tokens(tokens: pd.DataFrame) -> "go.Figure":
    """The texts themselves, each token on the colour of its ratio: which words are foreign to tuned."""
    height, starts, names = 0, list[int](), list[str]()
    letters: list[TokenCell] = []
    for name, part in tokens.groupby("set", sort=False):
        rows = list(dict.fromkeys(part["row"]))
        for row in list(dict.fromkeys([*rows[:ENDS], *rows[-ENDS:]]))[: TEXTS - len(starts)]:
            starts.append(height)
            names.append(f"{theme.verbatim(name)} {row}")
            letters += [cell._replace(line=height + cell.line) for cell in laid(part[part["row"] == row])]
            height = letters[-1].line + 1
    ratios, texts = np.full((height, WIDTH), np.nan), np.full((height, WIDTH), "", dtype=object)
    for cell in letters:
        ratios[cell.line, cell.column], texts[cell.line, cell.column] = cell.ratio, theme.verbatim(cell.token)
    most = float(np.nanmax(np.abs(ratios))) or 1.0
    title = "Tokens foreign to tuned (high), in the rows of each set with the highest and lowest ratio"
    figure = theme.figure(title, "tokens in their order, separated by a space", "", 120 + 20 * height)
    # Faint enough for the page's own ink on it, on a light page and on a dark one.
    colors = (theme.faint(theme.TUNED, 0.7), theme.faint(theme.NEUTRAL, 0.08), theme.faint(theme.NEW, 0.7))
    figure.add_heatmap(
        z=ratios, customdata=texts, zmin=-most, zmax=most, ygap=4, colorscale=theme.scale(colors),
        colorbar_title_text="nats", hovertemplate="%{customdata}: %{z:.3g} nats<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[cell.column for cell in letters], y=[cell.line for cell in letters], mode="text", hoverinfo="skip",
        text=[theme.verbatim(cell.letter) for cell in letters], showlegend=False,
        textfont={"family": "monospace", "size": 12},
    )  # fmt: skip
    figure.update_yaxes(range=[height - 0.5, -0.5], showgrid=False, tickvals=starts, ticktext=names)
    return figure.update_xaxes(range=[-0.5, WIDTH - 0.5], showgrid=False, showticklabels=False, ticks="")


class TokenCell(NamedTuple):
    """One letter of a token, and its place in the text."""

    line: int
    column: int
    letter: str
    token: str
    ratio: float


def laid(part: pd.DataFrame) -> list[TokenCell]:
    """The letters of a row's tokens in lines: a token is never broken, and one space separates two.

    Tokenizers keep the space between words in different places; a token of nothing else shows as a mark.
    """
    cells, line, column = [], 0, 0
    for token, ratio in zip(part["token"], part["ratio"], strict=True):
        letters = "".join(MARKS.get(letter, letter) for letter in token.strip(" ") or token or "·")[:WIDTH]
        if column + len(letters) > WIDTH:
            line, column = line + 1, 0
        if line == LINES:
            break
        cells += [TokenCell(line, column + i, letter, token, ratio) for i, letter in enumerate(letters)]
        column += len(letters) + 1
    return cells
