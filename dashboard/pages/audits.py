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
        return [
            parts.heading("No audits yet", eyebrow="tunescope"),
            parts.state(
                "empty",
                "This dashboard was started without an audit",
                html.P(
                    [
                        parts.code("tunescope audit BASE TUNED --out DIR"),
                        " writes an audit; ",
                        parts.code("tunescope dashboard DIR"),
                        " shows it.",
                    ]
                ),
            ),
        ]
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
    if audit is not None:
        return parts.audit_card(entry.id, audit, html.P(time(audit.created), className="source"))
    inside = [parts.badge("fail", "damaged"), html.Strong(entry.id), html.P(entry.damage, className="source")]
    return parts.going(inside, link(audit=entry.id), className="card damaged")


def time(created: str) -> str:
    """A time to the minute."""
    return created[:16].replace("T", " ") + " UTC" if created.endswith("Z") else created


def series_card(view: View, entry: Entry) -> html.A:
    """One series."""
    count = content.plural(len(view.library.parts(entry.id)), "audit")
    return parts.going(
        [html.Strong(entry.id), html.P(f"series, {count}", className="source")],
        link(audit=entry.id),
        className="card series",
    )


PAGE = Page(name="audits", title="All audits", of="library", layout=layout)
