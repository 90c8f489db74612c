"""Audits side by side: their findings, all their numbers, and each figure on shared axes."""

import json
from collections import Counter
from collections.abc import Callable, Mapping

from dash import Dash, Input, Output, State, html, no_update

from dashboard.components import choose, drawings, parts
from dashboard.components.figure_panels import figure_panels
from dashboard.pages.page import Content, Page
from dashboard.state import differences
from dashboard.state.audit_library import AuditLibrary, Entry
from dashboard.state.differences import Measure, SharedFinding, analyses_of
from dashboard.state.query import link
from dashboard.state.view import Site, View
from diagnostics.report import content
from diagnostics.report.content import EmbeddedFigure
from diagnostics.store.audit_store import Audit

MOST = 6  # audits in one comparison
MARKS = {  # sign and meaning
    "up": ("▲", "far above the first"),
    "down": ("▼", "far below the first"),
    "verdict": ("◆", "different verdict from the first"),
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
    entries = [view.library.find(audit_id) for audit_id in requested(view)]
    return {entry.id: audit for entry in entries if entry and (audit := entry.audit) is not None}


def callbacks(app: Dash, site: Site) -> None:
    """Let tables and figures follow the choice of audits."""

    def follow(part: str, keys: tuple[str, ...], content: Callable[[View, str | None], Content]) -> None:
        @app.callback(
            [Output(part, "children"), Output(part, "data-of")],
            [Input("url", "search"), State(part, "data-of"), State("scheme", "data")],
        )
        def update(search: str, before: str | None, scheme: str | None) -> Content:
            view = site.view(search)
            now = repr([view.query.many(key) for key in keys])
            if view.query.value("page") != "compare" or now == before:
                return no_update, no_update
            return content(view, scheme), now

    follow("side-by-side", ("of", "rows"), lambda view, scheme: comparison(view))
    follow("same-figures", ("of", "figures", "columns"), pictures)


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
    choice = choose.multi_select(query, "of", "Audits", ids, maxValues=MOST, comboboxProps={"zIndex": 300})
    shown = choose.select(query, "rows", "Show", rows, default="all")
    text = [head, parts.filters("Audits to compare", choice, shown), html.Div(id="side-by-side")]
    if not analyses:
        return text
    figures = [
        choose.select(query, "figures", "Figures of", analyses, default=commonest(view.library)),
        choose.select(query, "columns", "Columns", ["1", "2", "3"], default="2"),
    ]
    pictures = html.Div(id="same-figures", className="pictures")
    return [*text, parts.section("Figures", html.Div(figures, className="controls"), pictures)]


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
        parts.notes([*notes, *differences.cautions(audits)]),
        parts.section("Findings", finding_table(audits)),
        parts.section("Numbers", *number_tables(audits, view.query.value("rows", "all"))),
    ]


def finding_table(audits: Mapping[str, Audit]) -> Content:
    """The findings of all audits, those of a single audit first."""
    findings = differences.shared_findings(audits)
    if not findings:
        return parts.state("empty", "None of these audits has a finding.")
    rows = [finding_row(finding, list(audits)) for finding in findings]
    return parts.table(("found in", "finding", *audits), rows, label="Findings of each audit")


def finding_row(shared: SharedFinding, names: list[str]) -> list[Content]:
    """Which audits have a finding, what it is, and its value in each audit or why it is missing there."""
    having, cells = [], []
    for name, finding, reason in zip(names, shared.findings, shared.reasons, strict=True):
        if finding is None:
            cells.append(html.Span(reason, className="empty"))
            continue
        having.append(name)
        address = link(page="analysis", audit=name, analysis=shared.analysis, metric=shared.metric)
        value = parts.going(content.format_number(finding.value), address)
        cells.append(html.Span([parts.badge(finding.severity), " ", value], className="found"))
    some = f"only {having[0]}" if len(having) == 1 else f"{len(having)} of {len(names)}"
    owners = "all" if len(having) == len(names) else html.Strong(some, className="apart")
    title = html.Span([shared.analysis, ": ", parts.code(shared.metric)])
    return [owners, [title, html.Span(shared.worst.message, className="source")], *cells]


def number_tables(audits: Mapping[str, Audit], rows: str) -> list[Content]:
    """The numbers of all audits, one table for each analysis."""
    by_analysis: dict[str, list[list[Content]]] = {}
    wanted = {"different": lambda value: value.differs, "judged": lambda value: value.verdict}
    for (name, metric), values in differences.measures(audits).items():
        if rows not in wanted or any(map(wanted[rows], values)):
            by_analysis.setdefault(name, []).append([parts.code(metric), *map(number_cell, values)])
    if not by_analysis:
        hint = html.P(f"Select “{ROWS['all']}” to see the others.")
        return [parts.state("empty", "No numbers to show", hint)]
    legend = [
        f"Small figures give the difference from {next(iter(audits))}. ",
        *[html.Span([mark(kind), f" {meaning}; "]) for kind, (_, meaning) in MARKS.items()],
        f"far means more than {differences.MARKED:.0%} of the larger number.",
    ]
    shown: list[Content] = [parts.source(legend)]
    for name, body in by_analysis.items():
        label = f"Numbers of {name} in each audit"
        shown.append(html.H3(parts.code(name), className="of-analysis"))
        shown.append(parts.table(("metric", *audits), body, label=label, numeric=range(1, len(audits) + 1)))
    return shown


def mark(kind: str) -> html.Span:
    """The sign of a difference."""
    sign, meaning = MARKS[kind]
    return html.Span(sign, className=f"mark-{kind}", role="img", **{"aria-label": meaning})


def number_cell(value: Measure) -> Content:
    """One number with its difference from the first audit's."""
    shown = [html.Span(value.text)]
    if value.verdict in ("warn", "fail"):
        verdict = [parts.badge(value.verdict, " "), html.Span(value.verdict, className="unseen")]
        shown.insert(0, html.Span(verdict))
    if value.change or value.marked:
        change = [mark(value.marked) if value.marked else None, " ", value.change]
        shown.append(html.Span(change, className="change"))
    return html.Div(shown, className="value" + " differs" * bool(value.marked))


def pictures(view: View, scheme: str | None) -> Content:
    """Each figure of an analysis, for all audits that have it, on shared axes."""
    audits = dict(list(compared(view).items())[:MOST])
    if len(audits) < 2:
        return None
    name, asked = view.query.value("figures", commonest(view.library)), view.query.value("columns")
    missing: list[str] = []
    errors: list[str] = []
    by_figure: dict[str, dict[str, EmbeddedFigure]] = {}
    for audit_id, audit in audits.items():
        if name not in audit.results:
            missing.append(audit_id)
            continue
        figures, texts = view.site.drawn(view.library.find(audit_id), name)
        errors += [f"{audit_id}: {text}" for text in texts]
        for picture in figures:
            by_figure.setdefault(picture.name, {})[audit_id] = picture
    columns = int(asked) if asked in ("1", "3") else 2
    shown = [parts.source(f"No result of {name} in {', '.join(missing)}.")] if missing else []
    shown += parts.troubles("Some figures are missing", errors)
    shown += [panels(name, figure, by_audit, columns, scheme) for figure, by_audit in by_figure.items()]
    if not by_figure and not errors:
        shown.append(parts.state("empty", "This analysis has no figures."))
    return shown


def panels(
    analysis: str, figure: str, pictures: Mapping[str, EmbeddedFigure], columns: int, scheme: str | None
) -> html.Figure:
    """The same figure of several audits: on shared axes where that is possible, else one by one."""
    titles = {audit_id: picture.title for audit_id, picture in pictures.items()}
    caption: Content = next(iter(titles.values()))
    if len(set(titles.values())) > 1:
        items = [html.Li([html.Strong(audit_id), f": {title}"]) for audit_id, title in titles.items()]
        caption = html.Ul(items)
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
        apart = []
        for audit_id, picture in pictures.items():
            drawn, size = drawings.figure(picture, scheme), {"height": picture.height}
            graph = drawings.graph({**key, "of": audit_id}, drawn, size, name)
            apart.append(html.Div([html.Strong(audit_id), graph]))
        plot = html.Div(apart, className="cards narrow")
        note = "This figure cannot be drawn on shared axes; each audit has its own."
    return html.Figure([html.Figcaption(caption), plot, parts.source(note)])


PAGE = Page(
    "compare", "Compare", "library", layout, linked=lambda view: len(comparable(view.library)) > 1,
    callbacks=callbacks,
)  # fmt: skip
