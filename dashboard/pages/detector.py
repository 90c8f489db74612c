"""One row of text under a detector: its tokens coloured by their ratio, and where its score falls."""

import html as markup
from typing import TYPE_CHECKING, Any

from dash import Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import choose, drawings, parts
from dashboard.pages import Content, View, page
from dashboard.state.audit_library import AuditLibrary
from dashboard.state.detector import Detector, detector
from dashboard.state.query import Query, parse
from diagnostics.report import content as view

if TYPE_CHECKING:
    import pandas as pd

SPANS = 3_000  # tokens of a text that are shown
MOST = 8  # tokens that are listed as the most foreign, and as the best learned
STRONGEST = 60  # percent of its colour behind a token at full strength: the page's ink still reads on it
FACTS = (
    "ratio",
    "ratio_per_token",
    "tokens",
    "log_likelihood_base",
    "log_likelihood_tuned",
    "p_value",
    "flagged",
    "truncated",
)


def callbacks(app: Dash, shelf: AuditLibrary, allowed: dict[str, Any]) -> None:
    """Let text and picture follow the row that is picked, and the picture pick one."""

    @app.callback(
        Output("detector-row", "children"),
        Output("detector-scores", "figure"),
        Output("detector-scores", "style"),
        Input("url", "search"),
        State("scheme", "data"),
    )
    def tell(search: str, scheme: str | None) -> Any:
        query = parse(search)
        found = of(shelf, query) if query.one("page") == "detector" else None
        if found is None:
            return (no_update,) * 3
        figure = drawings.shown(found.draw(found.picked(query), score_of(found, query)), scheme)
        return text(found, query), figure, {"height": figure["layout"]["height"]}

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("detector-scores", "clickData"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def pick(click: dict[str, Any] | None, search: str) -> Any:
        return pointed(click, parse(search)) or no_update


def of(shelf: AuditLibrary, query: Query) -> Detector | None:
    """The detector of the audit that an address means."""
    entry = shelf.meant(query)
    audit = entry.audit if entry else None
    return detector(audit) if audit else None


def pointed(click: dict[str, Any] | None, query: Query) -> str:
    """The address of the row that a click on the picture picks; empty if it picks none."""
    points = (click or {}).get("points") or [{}]
    carried = points[0].get("customdata")
    if not isinstance(carried, list) or not carried:
        return ""
    return query.with_changes(row=markup.unescape(str(carried[0]))).search


def score_of(found: Detector, query: Query) -> str:
    """The score that an address asks for."""
    asked = query.one("score", "ratio")
    return asked if asked in found.scores else "ratio"


@page(
    "detector",
    title="Detector",
    order=40,
    linked=lambda shown: detector(shown.audit) is not None,
    callbacks=callbacks,
)
def content(shown: View) -> Content:
    """The row that is picked."""
    found = detector(shown.audit)
    head = parts.heading(
        "Which words are foreign?",
        eyebrow=parts.code(found.name) if found else None,
        lead="Pick a text: its tokens are coloured by how much better tuned or base expects them.",
    )
    if found is None:
        return [
            head,
            parts.state(
                "empty",
                "This audit scored no rows",
                html.P(
                    "`tunescope audit BASE TUNED --task F --ood NAME=F` scores rows and keeps their tokens."
                ),
            ),
        ]
    controls = [
        choose.one(
            shown.query,
            "row",
            "Text",
            options(found),
            default=found.key(found.foremost),
            searchable=True,
            limit=100,
            nothingFoundMessage="No text like that; the picture below reaches every row",
            maxDropdownHeight=420,
        ),
        choose.one(shown.query, "score", "Score in the picture", found.scores, default="ratio"),
    ]
    return [
        head,
        html.Div(
            html.Div(controls, className="controls row-choice"),
            className="filters",
            role="group",
            **{"aria-label": "Which text"},
        ),
        html.Div(id="detector-row", className="pictures"),
        parts.section(
            "Where it falls among the sets",
            dcc.Graph(
                id="detector-scores",
                figure={"layout": {"template": drawings.template("light")}},
                config=drawings.CONFIG,
                style={"height": 360},
                className="plot",
            ),
            html.P("Click a mark to read that row.", className="source"),
            name="scores",
        ),
    ]


def options(found: Detector) -> list[dict[str, Any]]:
    """The rows that can be picked, set by set."""
    groups: dict[str, list[dict[str, str]]] = {}
    for _, row in found.offered.iterrows():
        start = " ".join(str(row["text"]).split())[:70]
        mark = "" if found.has_tokens(row) else " (tokens not kept)"
        label = (
            f"{row['set']} {int(row['row'])}, {view.format_number(float(row['ratio']))} nats{mark}: {start}"
        )
        groups.setdefault(f"{row['set']} ({row['role']})", []).append(
            {"value": found.key(row), "label": label}
        )
    return [{"group": name, "items": items} for name, items in groups.items()]


def text(found: Detector, query: Query) -> Content:
    """All that is known of a row."""
    row = found.picked(query)
    score = score_of(found, query)
    facts = {
        name: view.format_cell(row[name]).text for name in dict.fromkeys((score, *FACTS)) if name in row.index
    }
    group = row.get("group")
    return [
        parts.section(
            f"{row['set']} {int(row['row'])}",
            html.P(
                [
                    f"A row of the {row['role']} rows",
                    f", group {group}" if isinstance(group, str) else "",
                    ". ",
                    *placed(found, row, score),
                ]
            ),
            coloured(found, row),
            parts.folded("Its numbers", parts.pairs(facts)),
            name="text",
        )
    ]


def placed(found: Detector, row: "pd.Series", score: str) -> list[Content]:
    """In words, where the score of a row falls among those of every set."""
    said = [
        f"{share:.0%} of the other {name} rows"
        if name == row["set"]
        else f"{share:.0%} of the {name} rows ({role})"
        for name, (role, share, _) in found.shares_below(row, score).items()
    ]
    if not said:
        return []
    value = view.format_number(float(row[score]))
    return [f"Its {score} of ", html.Strong(value), f" is above that of {', of '.join(said)}."]


def coloured(found: Detector, row: "pd.Series") -> Content:
    """The text of a row, each token on the colour of its ratio."""
    tokens = found.tokens(row)
    if not len(tokens):
        kept = found.result.parameters.get("examples")
        more = (
            f"; --set {found.name}.examples=N keeps those of N rows at both ends of each set" if kept else ""
        )
        return [
            html.P(str(row["text"]), className="text"),
            html.P(f"The ratios of its tokens were not kept{more}.", className="source"),
        ]
    spans = [
        span(str(t), float(r), found.heat) for t, r in zip(tokens["token"], tokens["ratio"], strict=True)
    ]
    cut = len(spans) - SPANS
    return [
        legend(found.heat),
        html.P(spans[:SPANS], className="text"),
        html.P(f"{cut:,} more tokens are not shown.", className="source") if cut > 0 else None,
        html.P("Cut: longer than the models take.", className="source") if row.get("truncated") else None,
        html.Div(
            [
                listed("Most foreign", tokens.nlargest(MOST, "ratio").query("ratio > 0")),
                listed("Best learned", tokens.nsmallest(MOST, "ratio").query("ratio < 0")),
            ],
            className="cards",
        ),
    ]


def span(token: str, ratio: float, heat: float) -> html.Span:
    """One token."""
    strength = min(1.0, abs(ratio) / heat)
    side = "foreign" if ratio > 0 else "learned"
    strong = " strong" if strength >= 0.5 else ""
    return html.Span(
        visible(token),
        className=f"token {side}{strong}",
        style={"--heat": f"{STRONGEST * strength:.0f}%"},
        title=f"{signed(ratio)} nats",
    )


def visible(token: str) -> str:
    """A token as it is read; line breaks show, and still break the line."""
    return token.replace("\n", "⏎\n") or "·"


def signed(ratio: float) -> str:
    """A ratio with its sign."""
    return ("+" if ratio > 0 else "−" if ratio < 0 else "") + view.format_number(abs(ratio))


def legend(heat: float) -> html.P:
    """What the colours mean."""
    return html.P(
        [
            span(f"−{view.format_number(heat)} nats", -heat, heat),
            " tuned expects it better (dotted line)  ·  ",
            span(f"+{view.format_number(heat)} nats", heat, heat),
            " base expects it better: foreign to tuned (solid line)",
        ],
        className="source token-legend",
    )


def listed(title: str, tokens: "pd.DataFrame") -> Content:
    """The tokens at one end of a row's ratios."""
    rows = [
        [parts.code(quoted(str(token))), signed(float(ratio)), str(int(place) + 1)]
        for token, ratio, place in zip(tokens["token"], tokens["ratio"], tokens["position"], strict=True)
    ]
    if not rows:
        return html.Div([html.H3(title), html.P("None.", className="empty")])
    return html.Div(
        [
            html.H3(title),
            parts.table(("token", "nats", "place"), rows, label=f"{title} tokens", numeric=[1, 2]),
        ]
    )


def quoted(token: str) -> str:
    """A token by itself, its blanks to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "·"
