"""All audits with their verdicts, and all series."""

from dash import html

from dashboard.components import parts
from dashboard.pages.page import Content, Page
from dashboard.state.audit_library import Entry
from dashboard.state.query import link
from dashboard.state.view import View
from diagnostics.report import content


def layout(view: View) -> Content:
    """The audits, then the series."""
    library = view.library
    if not library.entries:
        audit, shown = "tunescope audit BASE TUNED --out DIR", "tunescope dashboard DIR"
        hint = html.P([parts.code(audit), " writes an audit; ", parts.code(shown), " shows it."])
        message = parts.state("empty", "This dashboard was started without an audit", hint)
        return [parts.heading("No audits yet", eyebrow="tunescope"), message]
    audits = html.Ul([html.Li(card(entry)) for entry in library.audits], className="library")
    series = html.Ul([html.Li(series_card(view, entry)) for entry in library.series], className="library")
    if not library.audits:
        return [parts.heading("Series", eyebrow="tunescope"), series]
    return [
        parts.heading("Audits", eyebrow="tunescope"),
        audits,
        parts.section("Series", series) if library.series else None,
    ]


def card(entry: Entry) -> html.A:
    """One audit."""
    audit = entry.audit
    if audit is None:
        damaged = [parts.badge("fail", "damaged"), html.Strong(entry.id), parts.source(entry.damage)]
        return parts.going(damaged, link(audit=entry.id), className="card damaged")
    created = audit.created
    time = created[:16].replace("T", " ") + " UTC" if created.endswith("Z") else created  # to the minute
    return parts.audit_card(entry.id, audit, parts.source(time))


def series_card(view: View, entry: Entry) -> html.A:
    """One series."""
    count = content.plural(len(view.library.parts(entry.id)), "audit")
    text = [html.Strong(entry.id), parts.source(f"series, {count}")]
    return parts.going(text, link(audit=entry.id), className="card series")


PAGE = Page("audits", "All audits", "library", layout)
