"""The page of one analysis: its question, numbers, figures and tables, all from the registry."""

from collections.abc import Iterable
from typing import Any

import dash_mantine_components as dmc
from dash import html

from dashboard.components import choose, grids, parts
from dashboard.pages import analysis_callbacks
from dashboard.pages.page import Content, Page
from dashboard.state import drill
from dashboard.state.query import Query
from dashboard.state.view import View
from diagnostics.report import content
from diagnostics.report.render import arxiv_url
from diagnostics.store.audit_store import mask_file

OPTIONS = 5_000  # matrices in the list, which a search narrows


def layout(view: View) -> Content:
    """Everything about one analysis of one audit."""
    audit, query, name = view.audit, view.query, view.query.value("analysis")
    if name not in audit.results:
        return absent(view, name)
    section = content.build_section(audit, name)
    controls = choose.row_filters(section.result, query)
    note = "The figures and tables below follow these filters; the numbers above cover the whole audit."
    if matrices := drill.matrices(section.result)[:OPTIONS]:
        look: dict[str, Any] = {"placeholder": "by name", "searchable": True, "limit": 50}
        controls.append(choose.select(query, "matrix", "Open one matrix", matrices, **look))
        note += " Click a cell of a heat map, or the name of a matrix, to open it."
    eyebrow = [parts.code(name), " ", parts.badge(section.verdict)]
    reading = [html.Strong("How to read it. "), section.reading]
    pictures = html.Div(parts.waiting(), id={"role": "pictures", "analysis": name}, className="pictures")
    return [
        parts.heading(section.question or name, eyebrow=eyebrow, lead=section.summary),
        html.P(reading, className="reading") if section.reading else None,
        parts.notes(section.notes),
        parts.section("Numbers", *numbers(section, query.value("metric"))) if section.metrics else None,
        parts.filters("Filters of this page", *controls, note=note) if controls else None,
        parts.section("Figures", pictures),
        parts.section("Tables", tables(section, query)) if section.result.tables else None,
        parts.section("Masks", masks(section)) if section.result.masks else None,
        method(section),
    ]


def absent(view: View, name: str) -> Content:
    """The message for an analysis without a result."""
    outcome = view.audit.analyses.get(name)
    if outcome is None:
        return [parts.heading("Not found"), parts.state("unknown", "This audit has no such analysis.")]
    failed = ("trouble", "This analysis failed")
    state = failed if outcome.status == "failed" else ("empty", "This analysis was not run")
    head = parts.heading(outcome.question or name, eyebrow=parts.code(name))
    return [head, parts.state(*state, html.P(outcome.reason))]


def numbers(section: content.Section, linked: str) -> list[Content]:
    """The metrics: the less important ones of many are folded, and the linked one is highlighted."""
    leading, others = content.leading_metrics(section.metrics)
    about = f"umbers of {section.name}, of the whole audit"
    more = metric_table(others, linked, f"More n{about}")
    opened = linked in [metric.name for metric in others]
    folded = parts.folded(f"{len(others)} more numbers", more, opened=opened) if others else None
    return [metric_table(leading, linked, f"N{about}"), folded]


def metric_table(metrics: Iterable[content.Metric], linked: str, label: str) -> Content:
    """Metrics with their meaning and their thresholds."""
    rows = [
        [
            html.Span(parts.code(metric.name), className="linked" if metric.name == linked else ""),
            metric.value,
            metric.meaning,
            [
                parts.badge(metric.verdict) if metric.verdict else None,
                html.Span(metric.threshold, className="limits") if metric.threshold else None,
                html.Span(metric.source, className="source") if metric.source else None,
            ],
        ]
        for metric in metrics
    ]
    return parts.table(("metric", "value", "meaning", "threshold"), rows, label=label, numeric=[1])


def tables(section: content.Section, query: Query) -> Content:
    """Each table in a tab; only the open one is drawn."""
    frames = section.result.tables
    tabs, panels = [], []
    for name, frame in frames.items():
        empty = parts.state("empty", "This table has no rows.")
        tabs.append(dmc.TabsTab([parts.code(name), f" {len(frame):,}"], value=name))
        rows = grids.grid(frame, section.name, name) if len(frame) else empty
        panels.append(dmc.TabsPanel(rows, value=name, pt="sm"))
    first = next(iter(frames))
    opened = query.value("table", first)
    tabs_id, value = choose.choice("table", default=first), opened if opened in frames else first
    bar = dmc.TabsList(tabs, **{"aria-label": "Tables"})
    return dmc.Tabs([bar, *panels], id=tabs_id, value=value, keepMounted=False, className="tables")


def masks(section: content.Section) -> Content:
    """The files of the masks, and the command that uses them."""
    files = [html.Li(parts.code(mask_file(section.name, mask))) for mask in section.result.masks]
    command = parts.code("tunescope graft BASE TUNED --mask FILE --out DIR")
    hint = [command, " writes the base with the masked entries taken from tuned."]
    return [html.Ul(files), parts.source(hint)]


def method(section: content.Section) -> Content:
    """The source of the method, the parameters, and the cost."""
    paper: Content = section.paper
    if address := arxiv_url(section.paper):
        paper = html.A(section.paper, href=address, target="_blank", rel="noreferrer")
    device = f" on {section.outcome.device}" if section.outcome.device else ""
    parameters = content.format_number(section.result.parameters)
    text = ["Method: ", paper, ". "] if section.paper else []
    text += [f"Parameters: {parameters}. "] if parameters else []
    text += [f"Time: {content.format_number(section.outcome.seconds)} s{device}."]
    return html.P(text, className="source method")


PAGE = Page(
    "analysis", "Analysis", "audit", layout, identity=("analysis", "metric"),
    linked=lambda view: False,  # the navigation links each analysis by its name
    callbacks=analysis_callbacks.callbacks,
)  # fmt: skip
