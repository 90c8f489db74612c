"""Audits side by side: what is found in one alone, every number of all, the same figure of each."""

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import choose, drawings, parts
from dashboard.components.figure_panels import figure_panels
from dashboard.pages import Content, View, analysis_callbacks, page
from dashboard.state import filters
from dashboard.state.audit_library import AuditLibrary, Entry
from dashboard.state.differences import MARKED, Measure, Shared, cautions, findings, measures
from dashboard.state.query import Query, link, parse
from diagnostics.report import content as view
from diagnostics.store.audit_store import Audit

MOST = 6  # audits in one view
SIGNS = {"up": "▲", "down": "▼", "verdict": "◆"}
SAYS = {
    "up": "far above the first",
    "down": "far below the first",
    "verdict": "judged otherwise than the first",
}
ROWS = {"all": "every number", "different": "what differs", "judged": "what is judged"}


def comparable(shelf: AuditLibrary) -> list[Entry]:
    """What can be compared: every audit, those of single steps of a series last."""
    own = [entry for entry in shelf.entries.values() if entry.kind == "audit"]
    return sorted(own, key=lambda entry: bool(entry.series))


def compared(shelf: AuditLibrary, query: Query) -> dict[str, Audit]:
    """The audits that an address compares, by id; without a choice, the first that stand for themselves."""
    wanted = query.many("of") or [entry.id for entry in shelf.audits]
    found = [
        entry for known in dict.fromkeys(wanted) if (entry := shelf.find(known)) and entry.kind == "audit"
    ]
    readable = {entry.id: entry.audit for entry in found}
    return {known: audit for known, audit in list(readable.items()) if audit is not None}


def callbacks(app: Dash, shelf: AuditLibrary, allowed: dict[str, Any]) -> None:
    """Let tables and figures follow the choice of audits."""

    @app.callback(
        Output("side-by-side", "children"),
        Output("side-by-side", "data-of"),
        Input("url", "search"),
        State("side-by-side", "data-of"),
    )
    def tell(search: str, before: str | None) -> Any:
        query = parse(search)
        now = repr((query.many("of"), query.one("rows")))
        if query.one("page") != "compare" or now == before:
            return no_update, no_update
        return words(shelf, query), now

    @app.callback(
        Output("same-figures", "children"),
        Output("same-figures", "data-of"),
        Input("url", "search"),
        State("same-figures", "data-of"),
        State("scheme", "data"),
    )
    def draw(search: str, before: str | None, scheme: str | None) -> Any:
        query = parse(search)
        now = repr([query.many(key) for key in ("of", "figures", "columns")])
        if query.one("page") != "compare" or now == before:
            return no_update, no_update
        return pictures(shelf, query, scheme), now


@page(
    "compare",
    title="Compare",
    of="shelf",
    order=20,
    linked=lambda shown: len(comparable(shown.shelf)) > 1,
    callbacks=callbacks,
)
def content(shown: View) -> Content:
    """Which audits, and what of them."""
    options = [entry.id for entry in comparable(shown.shelf)]
    head = parts.heading(
        "Compare audits",
        eyebrow="tunescope",
        lead="Differences are from the first audit chosen.",
    )
    if len(options) < 2:
        return [
            head,
            parts.state("empty", "There is only one audit here", html.P("Two or more can be compared.")),
        ]
    analyses = analyses_of([entry.audit for entry in comparable(shown.shelf) if entry.audit])
    first = foremost(shown.shelf)
    controls = [
        choose.many(
            shown.query,
            "of",
            "Audits",
            options,
            maxValues=MOST,
            placeholder="all",
            comboboxProps={"zIndex": 300},
        ),
        choose.one(
            shown.query,
            "rows",
            "Show",
            [{"value": key, "label": text} for key, text in ROWS.items()],
            default="all",
        ),
    ]
    drawn = [
        choose.one(
            shown.query, "figures", "Figures of", analyses, default=first, searchable=len(analyses) > 8
        ),
        choose.one(shown.query, "columns", "Side by side", ["1", "2", "3"], default="2"),
    ]
    return [
        head,
        html.Div(
            html.Div(controls, className="controls"),
            className="filters",
            role="group",
            **{"aria-label": "What is compared"},
        ),
        html.Div(id="side-by-side"),
        parts.section(
            "Figures",
            html.Div(drawn, className="controls"),
            html.Div(id="same-figures", className="pictures"),
            name="figures",
        )
        if analyses
        else None,
    ]


def analyses_of(audits: list[Audit]) -> list[str]:
    """The names of the analyses that any of some audits has a result of."""
    return list(dict.fromkeys(name for audit in audits for name in audit.results))


def foremost(shelf: AuditLibrary) -> str:
    """The analysis whose figures are shown first: the one that most audits have."""
    counted = Counter(name for entry in comparable(shelf) if entry.audit for name in entry.audit.results)
    return next((name for name, _ in counted.most_common(1)), "")


def words(shelf: AuditLibrary, query: Query) -> Content:
    """All but the figures."""
    audits = compared(shelf, query)
    wanted = query.many("of") or [entry.id for entry in shelf.audits]
    lost = [known for known in dict.fromkeys(wanted) if known not in audits]
    notes = [f"{known} is left out: it is damaged or not on this shelf." for known in lost]
    if len(audits) > MOST:
        notes.append(f"The first {MOST} of {len(audits)} audits are shown; choose others above.")
        audits = dict(list(audits.items())[:MOST])
    if len(audits) < 2:
        return [
            parts.notes(notes),
            parts.state("empty", "Choose two audits or more", html.P("One alone has nothing beside it.")),
        ]
    return [
        parts.section(
            "Verdicts", html.Div([card(k, a) for k, a in audits.items()], className="cards beside")
        ),
        parts.notes([*notes, *cautions(audits)]),
        parts.section("Findings", found(audits), name="findings"),
        parts.section("Numbers", *numbers(audits, query.one("rows", "all")), name="numbers"),
    ]


def card(known: str, audit: Audit) -> Any:
    """One audit in short."""
    adapter = audit.tuned.get("adapter") or {}
    rank = f", rank {adapter['r']}" if adapter.get("r") is not None else ""
    count = view.plural(len(audit.findings), "finding") if audit.findings else "no findings"
    return parts.going(
        [
            parts.badge(audit.verdict),
            html.Strong(known),
            html.P(
                ["tuned ", parts.code(audit.tuned.get("ref", "")), f" ({audit.tuned.get('kind', '')}{rank})"]
            ),
            html.P(["base ", parts.code(audit.base.get("ref", ""))]),
            html.P(f"{count}; {', '.join(audit.results) or 'no result'}", className="source"),
        ],
        link(audit=known),
        className=f"card {audit.verdict}",
    )


def found(audits: Mapping[str, Audit]) -> Content:
    """The findings of all, those that one audit alone has first."""
    listed = findings(audits)
    if not listed:
        return parts.state("empty", "None of these audits has a finding.")
    names = list(audits)
    rows = [[had(each, names), about(each), *cells(each, names)] for each in listed]
    return parts.table(("who has it", "finding", *names), rows, label="Findings of each audit")


def had(each: Shared, names: list[str]) -> Content:
    """Which of the audits have a finding."""
    own = [name for name, finding in zip(names, each.found, strict=True) if finding is not None]
    if len(own) == len(names):
        return "all"
    text = f"only {own[0]}" if len(own) == 1 else f"{len(own)} of {len(names)}"
    return html.Strong(text, className="apart")


def about(each: Shared) -> Content:
    """What a finding says."""
    return [
        html.Span([each.analysis, ": ", parts.code(each.metric)]),
        html.Span(each.any.message, className="source"),
    ]


def cells(each: Shared, names: list[str]) -> list[Content]:
    """The finding in each audit, or why it is not there."""
    made: list[Content] = []
    for name, finding, why in zip(names, each.found, each.why, strict=True):
        if finding is None:
            made.append(html.Span(why, className="empty"))
            continue
        where = link(page="analysis", audit=name, analysis=each.analysis, metric=each.metric)
        made.append(
            [parts.badge(finding.severity), " ", parts.going(view.format_number(finding.value), where)]
        )
    return made


def numbers(audits: Mapping[str, Audit], rows: str) -> list[Content]:
    """Every number of all audits, one table for each analysis."""
    by_analysis: dict[str, list[tuple[str, list[Measure]]]] = {}
    for (name, metric), values in measures(audits).items():
        differs = any(value.differs for value in values)
        judged = any(value.verdict for value in values)
        if {"different": differs, "judged": judged}.get(rows, True):
            by_analysis.setdefault(name, []).append((metric, values))
    if not by_analysis:
        return [parts.state("empty", "No number is left", html.P("Show every number to see them all."))]
    legend = html.P(
        [
            f"Beside each number, how it differs from {next(iter(audits))}. Marked: ",
            *[html.Span([mark(kind), f" {text}; "]) for kind, text in SAYS.items()],
            f"far is more than {MARKED:.0%} of the larger.",
        ],
        className="source",
    )
    made: list[Content] = [legend]
    for name, listed in by_analysis.items():
        body = [[parts.code(metric), *[shown(value) for value in values]] for metric, values in listed]
        columns = range(1, len(audits) + 1)
        made.append(html.H3(parts.code(name), className="of-analysis"))
        made.append(
            parts.table(("metric", *audits), body, label=f"Numbers of {name} in each audit", numeric=columns)
        )
    return made


def mark(kind: str) -> html.Span:
    """The sign of a difference."""
    return html.Span(SIGNS[kind], className=f"mark-{kind}", role="img", **{"aria-label": SAYS[kind]})


def shown(value: Measure) -> Content:
    """One number beside the first audit's."""
    inside = [
        html.Span([parts.badge(value.verdict, " "), html.Span(value.verdict, className="unseen")])
        if value.verdict in ("warn", "fail")
        else None,
        html.Span(value.text),
        html.Span([mark(value.marked) if value.marked else None, " ", value.change], className="change")
        if value.change or value.marked
        else None,
    ]
    return html.Div(inside, className="value" + " differs" * bool(value.marked))


def pictures(shelf: AuditLibrary, query: Query, scheme: str | None) -> Content:
    """Each figure of an analysis, of every audit that has it, on shared axes."""
    audits = dict(list(compared(shelf, query).items())[:MOST])
    if len(audits) < 2:
        return None
    name = query.one("figures", foremost(shelf))
    having = [known for known, audit in audits.items() if name in audit.results]
    drawn = {known: drawn_of(shelf, known, name) for known in having}
    columns = int(query.one("columns", "2")) if query.one("columns", "2") in ("1", "2", "3") else 2
    made: list[Any] = []
    lacking = [known for known in audits if known not in having]
    if lacking:
        made.append(html.P(f"Without a result of {name}: {', '.join(lacking)}.", className="source"))
    troubles = [f"{known}: {text}" for known, (_, texts) in drawn.items() for text in texts]
    if troubles:
        made.append(parts.state("trouble", "Some figures are missing", *map(html.P, troubles)))
    for figure in dict.fromkeys(each.name for pictures, _ in drawn.values() for each in pictures):
        own = {k: each for k, (pictures, _) in drawn.items() for each in pictures if each.name == figure}
        made.append(panels(name, figure, own, columns, scheme))
    if not any(pictures for pictures, _ in drawn.values()) and not troubles:
        made.append(parts.state("empty", "There is nothing to draw here."))
    return made


def drawn_of(shelf: AuditLibrary, known: str, name: str) -> drawings.Drawn:
    """The pictures of one analysis of one audit, of all its rows; shared with that analysis' own page."""
    entry = shelf.find(known)
    assert entry is not None
    audit = entry.audit
    if audit is None or name not in audit.results:
        return [], ["This result is no longer there; load the page anew."]
    kept = filters.Filters()
    return analysis_callbacks.DRAWN.of(
        (entry.id, entry.version, name, kept), partial(kept.only, audit.results[name])
    )


def panels(
    analysis: str, figure: str, own: Mapping[str, view.EmbeddedFigure], columns: int, scheme: str | None
) -> html.Figure:
    """The same figure of several audits."""
    titles = {known: picture.title for known, picture in own.items()}
    caption: Content = next(iter(titles.values()))
    if len(set(titles.values())) > 1:
        caption = html.Ul([html.Li([html.Strong(known), f": {title}"]) for known, title in titles.items()])
    specs = {known: json.loads(picture.spec) for known, picture in own.items()}
    heights = {known: picture.height for known, picture in own.items()}
    joint = figure_panels(specs, heights, columns)
    config = drawings.CONFIG | {"toImageButtonOptions": {"filename": f"{analysis}.{figure}", "format": "svg"}}
    known = {"role": "beside", "analysis": analysis, "name": figure}
    if joint is None:
        shown = [
            html.Div(
                [
                    html.Strong(each),
                    graph({**known, "of": each}, drawings.figure(picture, scheme), picture.height, config),
                ]
            )
            for each, picture in own.items()
        ]
        note = html.P(
            "Each has axes of its own: this figure cannot be put on shared ones.", className="source"
        )
        return html.Figure([html.Figcaption(caption), html.Div(shown, className="cards beside"), note])
    joint["layout"]["template"] = drawings.template(scheme)
    note = None if len(own) > 1 else html.P("Only one of these audits has this figure.", className="source")
    return html.Figure(
        [html.Figcaption(caption), graph({**known, "of": ""}, joint, joint["layout"]["height"], config), note]
    )


def graph(known: Mapping[str, str], figure: Any, height: int, config: Mapping[str, Any]) -> dcc.Graph:
    """What plotly.js draws, at a height in pixels."""
    return dcc.Graph(
        id=dict(known), figure=figure, config=dict(config), style={"height": height}, className="plot"
    )
