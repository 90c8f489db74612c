"""The pictures of likelihood-ratio OOD, drawn from the tables alone, so that a saved result redraws."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from diagnostics.core.analysis import Result
from diagnostics.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

ROLES = {"task": theme.TUNED, "ood": theme.NEW, "keep": theme.BASE, "guard": theme.NEUTRAL}
# The scores that a ROC is drawn of; more would hide one another.
CURVES = ("ratio", "ratio_per_token", "tuned_likelihood", "base_likelihood", "length")
POINTS = 2000  # of a set in a scatter plot
# The texts whose tokens are shown: how many, and of each how many lines of how many letters.
TEXTS, LINES, WIDTH = 24, 3, 76
ENDS = 3  # of them, of each set, the most foreign, and as many of the least
MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures; one whose table is missing or empty is left out."""
    tables = {name: table for name, table in result.tables.items() if len(table)}
    if not {"detection", "rows", "sets"} <= set(tables):
        return {}
    rows = tables["rows"].dropna(subset=["ratio"])
    whole = tables["detection"][tables["detection"]["group"].isna()]
    ratio = whole[(whole["ood"] == "all") & (whole["score"] == "ratio")].iloc[0]
    figures = {
        "densities": draw_densities(rows, float(ratio["threshold_95_id_kept"]), float(ratio["auroc"])),
        "scores": draw_scores(whole),
        "roc": draw_roc(rows),
        "losses": draw_losses(rows),
        "length": draw_length(rows),
        "gains": draw_gains(tables["sets"]),
    }
    if "tokens" in tables:
        figures["tokens"] = draw_tokens(tables["tokens"])
    return figures


def looks(rows: pd.DataFrame) -> "dict[str, dict[str, str]]":
    """A colour for the role of every set, and a symbol that tells those of one role apart."""
    made, seen = {}, dict.fromkeys(ROLES, 0)
    for name, part in rows.groupby("set", sort=False):
        role = str(part["role"].iloc[0])
        made[str(name)] = {"color": ROLES[role], "symbol": theme.SYMBOLS[seen[role] % len(theme.SYMBOLS)]}
        seen[role] += 1
    return made


def few(part: pd.DataFrame) -> pd.DataFrame:
    """Rows of a set for a scatter plot, evenly taken."""
    return part.iloc[:: max(1, -(-len(part) // POINTS))]


def draw_densities(rows: pd.DataFrame, threshold: float, auroc: float) -> "go.Figure":
    """How the ratio is spread in each set, as shares of its rows; lines, since filled areas would mix."""
    import plotly.graph_objects as go

    title = f"OOD rows score above task rows with chance {auroc:.3f}"
    figure = theme.figure(title=title, x="log p_base − log p_tuned, nats", y="share of the set's rows")
    low, high = np.quantile(rows["ratio"], [0.005, 0.995])
    # As many bins as the smallest set can fill.
    bins = int(np.clip(2 * rows.groupby("set").size().min() ** 0.5, 10, 40))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    dashes = {
        "circle": "solid",
        "diamond": "dash",
        "square": "dot",
        "triangle-up": "dashdot",
        "cross": "longdash",
    }
    for name, look in looks(rows).items():
        part = rows.loc[rows["set"] == name, "ratio"].clip(edges[0], edges[-1])
        share = np.histogram(part, edges)[0] / len(part)
        figure.add_trace(
            go.Scatter(
                x=(edges[1:] + edges[:-1]) / 2, y=share, name=theme.verbatim(name), mode="lines",
                line={"color": look["color"], "dash": dashes[look["symbol"]], "shape": "hvh", "width": 2},
                hovertemplate="%{x:.3g} nats: %{y:.1%}",
            )
        )  # fmt: skip
    theme.threshold(figure, "95 % of the task rows lie below", x=threshold)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure.update_layout(height=420)


def draw_scores(whole: pd.DataFrame) -> "go.Figure":
    """AUROC of every score on every OOD set, the best of all sets together on top."""
    import plotly.graph_objects as go

    order = whole[whole["ood"] == "all"].sort_values("auroc", kind="stable")["score"].tolist()
    best = order[-1] if order else ""
    figure = theme.figure(
        title=f"Best over all OOD sets: {theme.verbatim(best)}; the length knows nothing of the models",
        x="AUROC with 95 % interval", y="",
    )  # fmt: skip
    names = list(dict.fromkeys(whole["ood"]))
    if len(names) == 2:  # one set, and the same again as all
        names = names[1:]
    for place, name in enumerate(names):
        part = whole[whole["ood"] == name].set_index("score").reindex(order)
        shift = 0.6 * ((place + 0.5) / len(names) - 0.5)
        color = theme.NEUTRAL if name == "all" else theme.COLORWAY[(place + 2) % len(theme.COLORWAY)]
        figure.add_trace(
            go.Scatter(
                x=part["auroc"],
                y=[i + shift for i in range(len(order))], name=theme.verbatim(name), mode="markers",
                marker={"color": color, "symbol": theme.SYMBOLS[place % len(theme.SYMBOLS)], "size": 8},
                error_x={
                    "symmetric": False, "array": part["high"] - part["auroc"],
                    "arrayminus": part["auroc"] - part["low"], "thickness": 1, "width": 0, "color": color,
                },
                customdata=np.column_stack([order, part["fpr95"]]),
                hovertemplate="%{customdata[0]}: AUROC %{x:.3f}, FPR95 %{customdata[1]:.3f}",
            )
        )  # fmt: skip
    figure.update_yaxes(tickvals=list(range(len(order))), ticktext=order, showgrid=False)
    theme.threshold(figure, "chance", x=0.5)
    return figure.update_layout(height=140 + 30 * len(order))


def draw_roc(rows: pd.DataFrame) -> "go.Figure":
    """OOD caught against task rows flagged, all OOD sets together."""
    import plotly.graph_objects as go

    title = "What it costs to catch OOD rows, by score"
    figure = theme.figure(title=title, x="task rows flagged", y="OOD rows caught")
    inside, outside = rows[rows["role"] == "task"], rows[rows["role"] == "ood"]
    dashes = ("solid", "dash", "dot", "dashdot", "longdash")
    for score, color, dash in zip(CURVES, theme.COLORWAY, dashes, strict=True):
        flagged, caught = roc(inside[score].to_numpy(), outside[score].to_numpy())
        line = {"color": color, "dash": dash, "width": 3 if score == "ratio" else 1.5}
        figure.add_trace(go.Scatter(x=flagged, y=caught, name=score, mode="lines", line=line))
    theme.threshold(figure, "95 % caught", y=0.95)
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(range=[-0.01, 1.01], tickformat=".0%")
    return figure.update_layout(width=620, height=560)


def roc(inside: np.ndarray, outside: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Shares of both that reach each threshold, from the highest down, at a few hundred thresholds."""
    levels = np.unique(np.concatenate([inside, outside]))[::-1]
    if len(levels) > points:
        levels = levels[np.linspace(0, len(levels) - 1, points).round().astype(int)]
    shares = [
        np.concatenate([[0], 1 - np.searchsorted(np.sort(part), levels, side="left") / len(part), [1]])
        for part in (inside, outside)
    ]
    return shares[0], shares[1]


def draw_losses(rows: pd.DataFrame) -> "go.Figure":
    """Loss of tuned against that of base, row by row: under the diagonal tuning won."""
    learned = (rows["ratio"] < 0).groupby([rows["role"]]).mean()
    parts = [f"{learned[role]:.0%} of the {role} rows" for role in ("task", "ood", "keep") if role in learned]
    title = f"Tuned reads better than base {', '.join(parts)}"
    figure = scatter(rows, "base_loss", "tuned_loss", title, "loss of base, nats per token", "loss of tuned")
    ends = [
        min(rows["base_loss"].min(), rows["tuned_loss"].min()),
        max(rows["base_loss"].max(), rows["tuned_loss"].max()),
    ]
    line = {"color": theme.NEUTRAL, "dash": "dash"}
    figure.add_shape(type="line", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1], line=line)
    figure.add_annotation(
        x=ends[1], y=ends[1], text="no change", showarrow=False, xanchor="right", yanchor="bottom"
    )
    return figure


def draw_length(rows: pd.DataFrame) -> "go.Figure":
    """The ratio against the length: what stays apart among rows of one length is not length."""
    title = "The ratio against the length: only what is apart at one length is not length"
    figure = scatter(rows, "tokens", "ratio", title, "length", "log p_base − log p_tuned, nats")
    theme.threshold(figure, "no change", y=0)
    if (rows["tokens"] > 0).all() and rows["tokens"].max() > 20 * rows["tokens"].median():
        figure.update_xaxes(type="log")
    return figure


def scatter(rows: pd.DataFrame, x: str, y: str, title: str, x_title: str, y_title: str) -> "go.Figure":
    """One mark a row; pointing at it shows its text."""
    import plotly.graph_objects as go

    figure = theme.figure(title=title, x=x_title, y=y_title)
    for name, look in looks(rows).items():
        part = few(rows[rows["set"] == name])
        labels = part["text"].str.slice(0, 80).map(theme.verbatim)
        figure.add_trace(
            go.Scatter(
                x=part[x], y=part[y], mode="markers", name=theme.verbatim(name),
                marker={**look, "size": 6, "opacity": 0.6},
                customdata=np.column_stack([labels, part["row"], part["ratio"]]),
                hovertemplate="row %{customdata[1]}: %{customdata[2]:.3g} nats<br>%{customdata[0]}",
            )
        )  # fmt: skip
    return figure.update_layout(height=480)


def draw_gains(sets: pd.DataFrame) -> "go.Figure":
    """Nats per token that tuning won or lost on each set."""
    import plotly.graph_objects as go

    whole = sets[sets["group"].isna()].sort_values("gain", kind="stable")
    figure = theme.figure(
        title="What tuning won on each set; left of 0 it lost", x="nats per token, with 95 % interval", y=""
    )
    figure.add_trace(
        go.Bar(
            x=whole["gain"], y=[theme.verbatim(name) for name in whole["set"]], orientation="h",
            marker_color=[ROLES[role] for role in whole["role"]],
            error_x={
                "symmetric": False, "array": whole["gain_high"] - whole["gain"],
                "arrayminus": whole["gain"] - whole["gain_low"], "color": theme.NEUTRAL,
            },
            customdata=whole[["loss_base", "loss_tuned", "rows", "role"]],
            hovertemplate="%{customdata[3]}, %{customdata[2]} rows: loss %{customdata[0]:.3f} in base, "
            "%{customdata[1]:.3f} in tuned<extra></extra>",
        )
    )  # fmt: skip
    return figure.update_layout(height=150 + 40 * len(whole))


def draw_tokens(tokens: pd.DataFrame) -> "go.Figure":
    """The texts themselves, each token on the colour of its ratio: which words tuned finds foreign."""
    import plotly.graph_objects as go

    texts = telling(tokens)
    lines, first, names = 0, [], []
    x, y, letters = [], [], []
    grid = np.full((TEXTS * LINES, WIDTH), np.nan)
    said = np.full(grid.shape, "", dtype=object)
    for (name, row), part in texts:
        first.append(lines)
        names.append(f"{theme.verbatim(name)} {row}")
        for cell in laid(part):
            x.append(cell.column)
            y.append(lines + cell.line)
            letters.append(theme.verbatim(cell.letter))
            grid[y[-1], x[-1]] = cell.ratio
            said[y[-1], x[-1]] = theme.verbatim(cell.token)
        lines = y[-1] + 1
    most = float(np.nanmax(np.abs(grid))) or 1.0
    figure = theme.figure(
        title="Which tokens tuned finds foreign (high), in the most and the least foreign rows of each set",
        x="tokens in their order, set apart by a space", y="",
    )  # fmt: skip
    figure.add_trace(
        go.Heatmap(
            z=grid[:lines], customdata=said[:lines], zmin=-most, zmax=most, ygap=4, hoverongaps=False,
            # Faint enough for the page's own ink on it, be the page light or dark.
            colorscale=[
                (0, theme.faint(theme.TUNED, 0.7)), (0.5, theme.faint(theme.NEUTRAL, 0.08)),
                (1, theme.faint(theme.NEW, 0.7)),
            ],
            colorbar={"title": {"text": "nats"}}, hovertemplate="%{customdata}: %{z:.3g} nats<extra></extra>",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=x, y=y, text=letters, mode="text", textfont={"family": "monospace", "size": 12},
            hoverinfo="skip", showlegend=False,
        )
    )  # fmt: skip
    figure.update_yaxes(range=[lines - 0.5, -0.5], showgrid=False, tickvals=first, ticktext=names)
    figure.update_xaxes(range=[-0.5, WIDTH - 0.5], showgrid=False, showticklabels=False, ticks="")
    return figure.update_layout(height=120 + 20 * lines)


def telling(tokens: pd.DataFrame) -> list[tuple[tuple[str, int], pd.DataFrame]]:
    """The rows at both ends of every set, with their tokens, as the table has them in order."""
    chosen = []
    for name, part in tokens.groupby("set", sort=False):
        rows = list(dict.fromkeys(part["row"]))
        ends = dict.fromkeys([*rows[:ENDS], *rows[-ENDS:]])
        chosen += [((str(name), int(row)), part[part["row"] == row]) for row in ends]
    return chosen[:TEXTS]


class TokenCell(NamedTuple):
    """One letter of a token, and where it stands in its text."""

    line: int
    column: int
    letter: str
    token: str
    ratio: float


def laid(part: pd.DataFrame) -> list[TokenCell]:
    """The letters of a row's tokens in lines, a token never parted from itself and one space between two.

    Tokenizers differ in where they keep the space between words; what is no more than that shows as a mark.
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
