"""The page of one analysis: its question, numbers, figures and tables, all from the registry."""

from collections.abc import Iterable

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
    audit, query, name = view.audit, view.query, view.query.one("analysis")
    if name not in audit.results:
        return absent(view, name)
    section = content.build_section(audit, name)
    controls = choose.row_filters(section.result, query)
    note = "The figures and tables below follow these filters; the numbers above cover the whole audit."
    matrices = drill.matrices(section.result)
    if matrices:
        controls.append(
            choose.one(
                query,
                "matrix",
                "Open one matrix",
                matrices[:OPTIONS],
                placeholder="by name",
                searchable=True,
                limit=50,
            )
        )
        note += " Click a cell of a heat map, or the name of a matrix, to open it."
    return [
        parts.heading(
            section.question or name,
            eyebrow=[parts.code(name), " ", parts.badge(section.verdict)],
            lead=section.summary,
        ),
        html.P([html.Strong("How to read it. "), section.reading], className="reading")
        if section.reading
        else None,
        parts.notes(section.notes),
        parts.section("Numbers", *numbers(section, query.one("metric"))) if section.metrics else None,
        parts.filters("Filters of this page", *controls, note=note) if controls else None,
        parts.section(
            "Figures",
            html.Div(parts.waiting(), id={"role": "pictures", "analysis": name}, className="pictures"),
        ),
        parts.section("Tables", tables(section, query)) if section.result.tables else None,
        parts.section("Masks", masks(section)) if section.result.masks else None,
        method(section),
    ]


def absent(view: View, name: str) -> Content:
    """The message for an analysis without a result."""
    outcome = view.audit.analyses.get(name)
    if outcome is None:
        return [parts.heading("Not found"), parts.state("unknown", "This audit has no such analysis.")]
    failed = outcome.status == "failed"
    return [
        parts.heading(outcome.question or name, eyebrow=parts.code(name)),
        parts.state(
            "trouble" if failed else "empty",
            "This analysis failed" if failed else "This analysis was not run",
            html.P(outcome.reason),
        ),
    ]


def numbers(section: content.Section, linked: str) -> list[Content]:
    """The metrics: the less important ones of many are folded, and the linked one is highlighted."""
    leading, others = content.leading_metrics(section.metrics)
    label = f"Numbers of {section.name}, of the whole audit"
    more = parts.folded(
        f"{len(others)} more numbers",
        metric_table(others, linked, f"More {label[0].lower()}{label[1:]}"),
        opened=linked in [metric.name for metric in others],
    )
    return [metric_table(leading, linked, label), more if others else None]


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
    tabs = [dmc.TabsTab([parts.code(name), f" {len(frame):,}"], value=name) for name, frame in frames.items()]
    panels = [
        dmc.TabsPanel(
            grids.grid(frame, section.name, name)
            if len(frame)
            else parts.state("empty", "This table has no rows."),
            value=name,
            pt="sm",
        )
        for name, frame in frames.items()
    ]
    first = next(iter(frames))
    opened = query.one("table", first)
    return dmc.Tabs(
        [dmc.TabsList(tabs, **{"aria-label": "Tables"}), *panels],
        id=choose.choice("table", default=first),
        value=opened if opened in frames else first,
        keepMounted=False,
        className="tables",
    )


def masks(section: content.Section) -> Content:
    """The files of the masks, and the command that uses them."""
    files = [html.Li(parts.code(mask_file(section.name, mask))) for mask in section.result.masks]
    command = parts.code("tunescope graft BASE TUNED --mask FILE --out DIR")
    return [
        html.Ul(files),
        html.P([command, " writes the base with the masked entries taken from tuned."], className="source"),
    ]


def method(section: content.Section) -> Content:
    """The source of the method, the parameters, and the cost."""
    address = arxiv_url(section.paper)
    paper = (
        html.A(section.paper, href=address, target="_blank", rel="noreferrer") if address else section.paper
    )
    device = f" on {section.outcome.device}" if section.outcome.device else ""
    parameters = content.format_number(section.result.parameters)
    return html.P(
        [
            *(["Method: ", paper, ". "] if section.paper else []),
            f"Parameters: {parameters}. " if parameters else "",
            f"Time: {content.format_number(section.outcome.seconds)} s{device}.",
        ],
        className="source method",
    )


PAGE = Page(
    name="analysis",
    title="Analysis",
    of="audit",
    layout=layout,
    identity=("analysis", "metric"),
    linked=lambda view: False,  # the navigation links each analysis by its name
    callbacks=analysis_callbacks.callbacks,
)
