"""Audits side by side: their findings, all their numbers, and each figure on shared axes."""

import json
from collections import Counter
from collections.abc import Mapping

from dash import Dash, Input, Output, State, html, no_update

from dashboard.components import choose, drawings, parts
from dashboard.components.figure_panels import figure_panels
from dashboard.pages.page import Content, Page
from dashboard.state.audit_library import AuditLibrary, Entry
from dashboard.state.differences import (
    MARKED,
    Measure,
    SharedFinding,
    analyses_of,
    cautions,
    measures,
    shared_findings,
)
from dashboard.state.query import Query, link
from dashboard.state.view import Site, View
from diagnostics.report import content
from diagnostics.report.content import EmbeddedFigure
from diagnostics.store.audit_store import Audit

MOST = 6  # audits in one comparison
SIGNS = {"up": "▲", "down": "▼", "verdict": "◆"}
MEANINGS = {
    "up": "far above the first",
    "down": "far below the first",
    "verdict": "different verdict from the first",
}
ROWS = {"all": "all numbers", "different": "numbers that differ", "judged": "numbers with a threshold"}


def comparable(library: AuditLibrary) -> list[Entry]:
    """Every audit, those of the steps of a series last."""
    audits = [entry for entry in library.entries.values() if entry.kind == "audit"]
    return sorted(audits, key=lambda entry: bool(entry.series))


def requested(view: View) -> list[str]:
    """The ids of the audits that an address compares; by default, all that are not steps of a series."""
    ids = view.query.many("of") or [entry.id for entry in view.library.audits]
    return list(dict.fromkeys(ids))


def compared(view: View) -> dict[str, Audit]:
    """The requested audits that can be read, by id."""
    entries = {audit_id: view.library.find(audit_id) for audit_id in requested(view)}
    audits = {audit_id: entry.audit if entry else None for audit_id, entry in entries.items()}
    return {audit_id: audit for audit_id, audit in audits.items() if audit is not None}


def callbacks(app: Dash, site: Site) -> None:
    """Let tables and figures follow the choice of audits."""

    @app.callback(
        Output("side-by-side", "children"),
        Output("side-by-side", "data-of"),
        Input("url", "search"),
        State("side-by-side", "data-of"),
    )
    def update_text(search: str, before: str | None) -> Content:
        view = site.view(search)
        now = repr((view.query.many("of"), view.query.one("rows")))
        if view.query.one("page") != "compare" or now == before:
            return no_update, no_update
        return comparison(view), now

    @app.callback(
        Output("same-figures", "children"),
        Output("same-figures", "data-of"),
        Input("url", "search"),
        State("same-figures", "data-of"),
        State("scheme", "data"),
    )
    def update_figures(search: str, before: str | None, scheme: str | None) -> Content:
        view = site.view(search)
        now = repr([view.query.many(key) for key in ("of", "figures", "columns")])
        if view.query.one("page") != "compare" or now == before:
            return no_update, no_update
        return pictures(view, scheme), now


def layout(view: View) -> Content:
    """The choice of audits; callbacks fill in the comparison."""
    query = view.query
    entries = comparable(view.library)
    head = parts.heading(
        "Compare audits", eyebrow="tunescope", lead="Every difference is from the first selected audit."
    )
    if len(entries) < 2:
        hint = html.P("A comparison needs at least two audits.")
        return [head, parts.state("empty", "There is only one audit", hint)]
    analyses = analyses_of(entry.audit for entry in entries if entry.audit)
    ids = [entry.id for entry in entries]
    rows = [{"value": key, "label": text} for key, text in ROWS.items()]
    figures = [
        choose.one(
            query,
            "figures",
            "Figures of",
            analyses,
            default=commonest(view.library),
            searchable=len(analyses) > 8,
        ),
        choose.one(query, "columns", "Columns", ["1", "2", "3"], default="2"),
    ]
    return [
        head,
        parts.filters(
            "Audits to compare",
            choose.many(query, "of", "Audits", ids, maxValues=MOST, comboboxProps={"zIndex": 300}),
            choose.one(query, "rows", "Show", rows, default="all"),
        ),
        html.Div(id="side-by-side"),
        parts.section(
            "Figures",
            html.Div(figures, className="controls"),
            html.Div(id="same-figures", className="pictures"),
        )
        if analyses
        else None,
    ]


def commonest(library: AuditLibrary) -> str:
    """The analysis that most audits have."""
    counts = Counter(name for entry in comparable(library) if entry.audit for name in entry.audit.results)
    return next((name for name, _ in counts.most_common(1)), "")


def comparison(view: View) -> Content:
    """Verdicts, findings and numbers of the selected audits."""
    audits = compared(view)
    missing = [audit_id for audit_id in requested(view) if audit_id not in audits]
    notes = [f"{audit_id} is left out: it is damaged or unknown." for audit_id in missing]
    if len(audits) > MOST:
        notes.append(f"The first {MOST} of {len(audits)} audits are shown. Select others above.")
        audits = dict(list(audits.items())[:MOST])
    if len(audits) < 2:
        hint = html.P("A comparison needs at least two audits.")
        return [parts.notes(notes), parts.state("empty", "Select another audit", hint)]
    cards = [parts.audit_card(audit_id, audit) for audit_id, audit in audits.items()]
    return [
        parts.section("Verdicts", html.Div(cards, className="cards narrow")),
        parts.notes([*notes, *cautions(audits)]),
        parts.section("Findings", finding_table(audits)),
        parts.section("Numbers", *number_tables(audits, view.query.one("rows", "all"))),
    ]


def finding_table(audits: Mapping[str, Audit]) -> Content:
    """The findings of all audits, those of a single audit first."""
    findings = shared_findings(audits)
    if not findings:
        return parts.state("empty", "None of these audits has a finding.")
    names = list(audits)
    rows = [
        [
            owners(finding, names),
            [
                html.Span([finding.analysis, ": ", parts.code(finding.metric)]),
                html.Span(finding.worst.message, className="source"),
            ],
            *finding_cells(finding, names),
        ]
        for finding in findings
    ]
    return parts.table(("found in", "finding", *names), rows, label="Findings of each audit")


def owners(shared: SharedFinding, names: list[str]) -> Content:
    """Which of the audits have a finding."""
    having = [name for name, finding in zip(names, shared.findings, strict=True) if finding is not None]
    if len(having) == len(names):
        return "all"
    text = f"only {having[0]}" if len(having) == 1 else f"{len(having)} of {len(names)}"
    return html.Strong(text, className="apart")


def finding_cells(shared: SharedFinding, names: list[str]) -> list[Content]:
    """The finding in each audit, or why an audit does not have it."""
    cells: list[Content] = []
    for name, finding, reason in zip(names, shared.findings, shared.reasons, strict=True):
        if finding is None:
            cells.append(html.Span(reason, className="empty"))
            continue
        address = link(page="analysis", audit=name, analysis=shared.analysis, metric=shared.metric)
        value = parts.going(content.format_number(finding.value), address)
        cells.append(html.Span([parts.badge(finding.severity), " ", value], className="found"))
    return cells


def number_tables(audits: Mapping[str, Audit], rows: str) -> list[Content]:
    """The numbers of all audits, one table for each analysis."""
    by_analysis: dict[str, list[list[Content]]] = {}
    for (name, metric), values in measures(audits).items():
        wanted = {
            "different": any(value.differs for value in values),
            "judged": any(value.verdict for value in values),
        }
        if wanted.get(rows, True):
            cells = [number_cell(value) for value in values]
            by_analysis.setdefault(name, []).append([parts.code(metric), *cells])
    if not by_analysis:
        hint = html.P(f"Select “{ROWS['all']}” to see the others.")
        return [parts.state("empty", "No numbers to show", hint)]
    legend = html.P(
        [
            f"Small figures give the difference from {next(iter(audits))}. ",
            *[html.Span([mark(kind), f" {meaning}; "]) for kind, meaning in MEANINGS.items()],
            f"far means more than {MARKED:.0%} of the larger number.",
        ],
        className="source",
    )
    shown: list[Content] = [legend]
    for name, body in by_analysis.items():
        label = f"Numbers of {name} in each audit"
        shown.append(html.H3(parts.code(name), className="of-analysis"))
        shown.append(parts.table(("metric", *audits), body, label=label, numeric=range(1, len(audits) + 1)))
    return shown


def mark(kind: str) -> html.Span:
    """The sign of a difference."""
    return html.Span(SIGNS[kind], className=f"mark-{kind}", role="img", **{"aria-label": MEANINGS[kind]})


def number_cell(value: Measure) -> Content:
    """One number with its difference from the first audit's."""
    verdict = [parts.badge(value.verdict, " "), html.Span(value.verdict, className="unseen")]
    change = [mark(value.marked) if value.marked else None, " ", value.change]
    return html.Div(
        [
            html.Span(verdict) if value.verdict in ("warn", "fail") else None,
            html.Span(value.text),
            html.Span(change, className="change") if value.change or value.marked else None,
        ],
        className="value" + " differs" * bool(value.marked),
    )


def pictures(view: View, scheme: str | None) -> Content:
    """Each figure of an analysis, for all audits that have it, on shared axes."""
    audits = dict(list(compared(view).items())[:MOST])
    if len(audits) < 2:
        return None
    name = view.query.one("figures", commonest(view.library))
    drawn = {
        audit_id: view.site.drawn(view.library.find(audit_id), name)
        for audit_id, audit in audits.items()
        if name in audit.results
    }
    shown: list[Content] = []
    missing = [audit_id for audit_id in audits if audit_id not in drawn]
    if missing:
        shown.append(html.P(f"No result of {name} in {', '.join(missing)}.", className="source"))
    errors = [f"{audit_id}: {text}" for audit_id, (_, texts) in drawn.items() for text in texts]
    shown += parts.troubles("Some figures are missing", errors)
    by_figure: dict[str, dict[str, EmbeddedFigure]] = {}
    for audit_id, (figures, _) in drawn.items():
        for picture in figures:
            by_figure.setdefault(picture.name, {})[audit_id] = picture
    shown += [
        panels(name, figure, by_audit, column_count(view.query), scheme)
        for figure, by_audit in by_figure.items()
    ]
    if not by_figure and not errors:
        shown.append(parts.state("empty", "This analysis has no figures."))
    return shown


def column_count(query: Query) -> int:
    """How many panels share a row."""
    asked = query.one("columns", "2")
    return int(asked) if asked in ("1", "2", "3") else 2


def panels(
    analysis: str, figure: str, pictures: Mapping[str, EmbeddedFigure], columns: int, scheme: str | None
) -> html.Figure:
    """The same figure of several audits: on shared axes where that is possible, else one by one."""
    titles = {audit_id: picture.title for audit_id, picture in pictures.items()}
    caption: Content = next(iter(titles.values()))
    if len(set(titles.values())) > 1:
        caption = html.Ul(
            [html.Li([html.Strong(audit_id), f": {title}"]) for audit_id, title in titles.items()]
        )
    joint = figure_panels(
        {audit_id: json.loads(picture.spec) for audit_id, picture in pictures.items()},
        {audit_id: picture.height for audit_id, picture in pictures.items()},
        columns,
    )
    key = {"role": "joint", "analysis": analysis, "name": figure}
    name = f"{analysis}.{figure}"
    if joint is not None:
        joint["layout"]["template"] = drawings.template(scheme)
        plot: Content = drawings.graph({**key, "of": ""}, joint, {"height": joint["layout"]["height"]}, name)
        note = "" if len(pictures) > 1 else "Only one of these audits has this figure."
    else:
        apart = [
            html.Div(
                [
                    html.Strong(audit_id),
                    drawings.graph(
                        {**key, "of": audit_id},
                        drawings.figure(picture, scheme),
                        {"height": picture.height},
                        name,
                    ),
                ]
            )
            for audit_id, picture in pictures.items()
        ]
        plot = html.Div(apart, className="cards narrow")
        note = "This figure cannot be drawn on shared axes; each audit has its own."
    return html.Figure([html.Figcaption(caption), plot, html.P(note, className="source") if note else None])


PAGE = Page(
    name="compare",
    title="Compare",
    of="library",
    layout=layout,
    linked=lambda view: len(comparable(view.library)) > 1,
    callbacks=callbacks,
)
