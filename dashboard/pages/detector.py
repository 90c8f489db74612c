"""One row of text under a detector: its tokens coloured by their ratio, and its score among all others."""

import html as markup
from typing import TYPE_CHECKING, Any

from dash import Dash, Input, Output, State, html, no_update

from dashboard.components import choose, drawings, parts
from dashboard.components.score_figure import score_figure
from dashboard.pages.page import Content, Page
from dashboard.state.detector import Detector, detector
from dashboard.state.differences import signed
from dashboard.state.query import Query, parse
from dashboard.state.view import Site, View
from diagnostics.report import content

if TYPE_CHECKING:
    import pandas as pd

SPANS = 3_000  # tokens of a text that are shown
LISTED = 8  # tokens in each of the two lists of extremes
STRONGEST = 60  # percent of its colour behind a token at full strength: the text stays readable on it
FACTS = (
    "ratio", "ratio_per_token", "tokens", "log_likelihood_base", "log_likelihood_tuned", "p_value", "flagged",
    "truncated",
)  # fmt: skip


def callbacks(app: Dash, site: Site) -> None:
    """Let text and figure follow the selected row, and let a click on the figure select one."""

    @app.callback(
        Output("detector-row", "children"),
        [Output("detector-scores", "figure"), Output("detector-scores", "style")],
        Input("url", "search"),
        State("scheme", "data"),
    )
    def update(search: str, scheme: str | None) -> Content:
        view = site.view(search)
        audit = view.readable_audit if view.query.value("page") == "detector" else None
        scored = detector(audit) if audit else None
        if scored is None:
            return (no_update,) * 3
        row = scored.selected(view.query)
        score = score_name(scored, view.query)
        figure = score_figure(scored, row, score)
        text, size = row_text(scored, row, score), {"height": figure.layout.height}
        return text, drawings.own_figure(figure, scheme), size

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("detector-scores", "clickData"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def select(click: dict[str, Any] | None, search: str) -> Content:
        return pointed(click, parse(search)) or no_update


def pointed(click: dict[str, Any] | None, query: Query) -> str:
    """The address of the row that a click on the figure selects; empty if it selects none."""
    points = (click or {}).get("points") or [{}]
    carried = points[0].get("customdata")
    if not isinstance(carried, list) or not carried:
        return ""
    return query.with_changes(row=markup.unescape(str(carried[0]))).search


def score_name(scored: Detector, query: Query) -> str:
    """The score that an address selects."""
    name = query.value("score", "ratio")
    return name if name in scored.scores else "ratio"


def layout(view: View) -> Content:
    """The choice of a row; callbacks fill in the text and the figure."""
    scored = detector(view.audit)
    lead = "Select a text. Colours show which checkpoint predicts a token better, and by how much."
    eyebrow = parts.code(scored.analysis) if scored else None
    head = parts.heading("Which words are foreign?", eyebrow=eyebrow, lead=lead)
    if scored is None:
        command = parts.code("tunescope audit BASE TUNED --task F --ood NAME=F")
        hint = html.P([command, " scores rows and records their tokens."])
        return [head, parts.state("empty", "This audit scored no rows", hint)]
    nothing = "No such text in this list; click a mark in the figure to reach any row"
    look = {"limit": 100, "maxDropdownHeight": 420, "nothingFoundMessage": nothing}
    first = scored.key(scored.first_row)
    text = choose.select(view.query, "row", "Text", options(scored), first, searchable=True, **look)
    score = choose.select(view.query, "score", "Score in the figure", scored.scores, default="ratio")
    empty = {"layout": {"template": drawings.template("light")}}
    graph = drawings.graph("detector-scores", empty, {"height": 360})
    hint = parts.source("Click a mark to select its row.")
    return [
        head,
        parts.filters("Text and score", text, score, className="row-choice"),
        html.Div(id="detector-row", className="pictures"),
        parts.section("Score among all rows", graph, hint, name="scores"),
    ]


def options(scored: Detector) -> list[dict[str, Any]]:
    """The rows that can be selected, by set."""
    groups: dict[str, list[dict[str, str]]] = {}
    for _, row in scored.offered.iterrows():
        start = " ".join(str(row["text"]).split())[:70]
        mark = "" if row["has_tokens"] else " (no tokens recorded)"
        nats = content.format_number(float(row["ratio"]))
        label = f"{row['set']} {int(row['row'])}, {nats} nats{mark}: {start}"
        item = {"value": scored.key(row), "label": label}
        groups.setdefault(f"{row['set']} ({row['role']})", []).append(item)
    return [{"group": name, "items": items} for name, items in groups.items()]


def row_text(scored: Detector, row: "pd.Series", score: str) -> Content:
    """Everything recorded about a row."""
    names = [name for name in dict.fromkeys((score, *FACTS)) if name in row.index]
    group = f", group {row['group']}" if isinstance(row.get("group"), str) else ""
    about = html.P([f"Role {row['role']}{group}. ", *standing(scored, row, score)])
    numbers = parts.pairs({name: content.format_cell(row[name]).text for name in names})
    folded = parts.folded("All numbers of this row", numbers)
    title = f"{row['set']} {int(row['row'])}"
    return parts.section(title, about, coloured(scored, row), folded, name="text")


def standing(scored: Detector, row: "pd.Series", score: str) -> list[Content]:
    """A sentence: how the score of a row compares with the rows of every set."""
    shares = [
        f"{share:.0%} of the other {name} rows"
        if name == row["set"]
        else f"{share:.0%} of the {name} rows ({role})"
        for name, (role, share) in scored.shares_below(row, score).items()
    ]
    if not shares:
        return []
    value = html.Strong(content.format_number(float(row[score])))
    return [f"Its {score} of ", value, f" is higher than that of {', '.join(shares)}."]


def coloured(scored: Detector, row: "pd.Series") -> Content:
    """The text of a row, each token on the colour of its ratio."""
    tokens = scored.tokens(row)
    if not len(tokens):
        hint = f"; --set {scored.analysis}.examples=N records them for N rows at both ends of each set"
        more = hint if scored.result.parameters.get("examples") else ""
        reason = parts.source(f"The ratios of its tokens were not recorded{more}.")
        return [html.P(str(row["text"]), className="text"), reason]
    shown = tokens.head(SPANS)
    cut = len(tokens) - len(shown)
    spans = [
        token_span(str(token), float(ratio), scored.full_strength)
        for token, ratio in zip(shown["token"], shown["ratio"], strict=True)
    ]
    extremes = [
        token_list("Most foreign", tokens.nlargest(LISTED, "ratio").query("ratio > 0")),
        token_list("Best learned", tokens.nsmallest(LISTED, "ratio").query("ratio < 0")),
    ]
    truncated = "Truncated: the text is longer than the models' context."
    return [
        legend(scored.full_strength),
        html.P(spans, className="text"),
        parts.source(f"{cut:,} more tokens are not shown.") if cut else None,
        parts.source(truncated) if row.get("truncated") else None,
        html.Div(extremes, className="cards"),
    ]


def token_span(token: str, ratio: float, full_strength: float) -> html.Span:
    """One token on its colour."""
    strength = min(1.0, abs(ratio) / full_strength)
    side = "foreign" if ratio > 0 else "learned"
    return html.Span(
        token.replace("\n", "⏎\n") or "·",  # a line break is visible, and still breaks the line
        className=f"token {side}" + " strong" * (strength >= 0.5),
        style={"--heat": f"{STRONGEST * strength:.0f}%"},
        title=f"{signed(ratio)} nats",
    )


def legend(full_strength: float) -> html.P:
    """The meaning of the colours."""
    limit = content.format_number(full_strength)
    text = [
        token_span(f"−{limit} nats", -full_strength, full_strength),
        " tuned predicts it better (dotted line)  ·  ",
        token_span(f"+{limit} nats", full_strength, full_strength),
        " base predicts it better: foreign to tuned (solid line)",
    ]
    return html.P(text, className="source token-legend")


def token_list(title: str, tokens: "pd.DataFrame") -> Content:
    """The tokens at one end of the ratios of a row."""
    visible = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
    rows = [
        [parts.code(str(token).translate(visible) or "·"), signed(float(ratio)), str(int(position) + 1)]
        for token, ratio, position in zip(tokens["token"], tokens["ratio"], tokens["position"], strict=True)
    ]
    table = parts.table(("token", "nats", "position"), rows, label=f"{title} tokens", numeric=[1, 2])
    return html.Div([html.H3(title), table if rows else html.P("None.", className="empty")])


PAGE = Page(
    "detector", "Detector", "audit", layout, linked=lambda view: detector(view.audit) is not None,
    callbacks=callbacks,
)  # fmt: skip
