"""Everything on the shelf: each audit with its verdict, each series with its steps."""

from typing import Any

from dash import html

from dashboard.components import parts
from dashboard.pages import Content, View, page
from dashboard.state.audit_library import Entry
from dashboard.state.query import link
from diagnostics.report import content as view


@page("audits", title="All audits", of="shelf", order=0)
def content(shown: View) -> Content:
    """The audits, then the series."""
    shelf = shown.shelf
    if not shelf.entries:
        return [
            parts.heading("Nothing to show yet", eyebrow="tunescope"),
            parts.state(
                "empty",
                "No audit was given",
                html.P(
                    [
                        parts.code("tunescope audit BASE TUNED --out DIR"),
                        " writes one; ",
                        parts.code("tunescope dashboard DIR"),
                        " shows it.",
                    ]
                ),
            ),
        ]
    audits = html.Ul([html.Li(card(entry)) for entry in shelf.audits], className="shelf")
    series = html.Ul([html.Li(run(shown, entry)) for entry in shelf.series], className="shelf")
    return [
        parts.heading("Audits" if shelf.audits else "Series", eyebrow="tunescope"),
        audits if shelf.audits else None,
        parts.section("Series", series)
        if shelf.audits and shelf.series
        else series
        if shelf.series
        else None,
    ]


def card(entry: Entry) -> Any:
    """One audit."""
    audit = entry.audit
    if audit is None:
        inside = [
            parts.badge("fail", "damaged"),
            html.Strong(entry.id),
            html.P(entry.damage, className="source"),
        ]
        return parts.going(inside, link(audit=entry.id), className="card damaged")
    count = view.plural(len(audit.findings), "finding") if audit.findings else "no findings"
    return parts.going(
        [
            parts.badge(audit.verdict),
            html.Strong(entry.id),
            html.P(["tuned ", parts.code(audit.tuned.get("ref", ""))]),
            html.P(["base ", parts.code(audit.base.get("ref", ""))]),
            html.P(
                [f"{count}; ran {', '.join(audit.results) or 'nothing'}", html.Br(), when(audit.created)],
                className="source",
            ),
        ],
        link(audit=entry.id),
        className=f"card {audit.verdict}",
    )


def when(created: str) -> str:
    """A time as people write it, to the minute."""
    return created[:16].replace("T", " ") + " UTC" if created.endswith("Z") else created


def run(shown: View, entry: Entry) -> Any:
    """One series."""
    steps = view.plural(len(shown.shelf.parts(entry.id)), "audit")
    return parts.going(
        [html.Strong(entry.id), html.P(f"a series of {steps}", className="source")],
        link(audit=entry.id),
        className="card series",
    )
