"""The page of one analysis: its question, numbers, figures and tables, drawn by the registry."""

from collections.abc import Iterable, Mapping
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from dashboard.components import choose, grids, parts
from dashboard.pages import Content, View, page
from dashboard.state import drill, filters
from dashboard.state.query import Query
from diagnostics.report import content as view
from diagnostics.report.render import arxiv_url
from diagnostics.store.audit_store import mask_file


@page("analysis", title="Analysis", identity=("analysis", "metric"), linked=lambda view: False)
def content(shown: View) -> Content:
    """Everything about one analysis of one audit."""
    audit, name = shown.audit, shown.query.one("analysis")
    if name not in audit.results:
        return absent(shown, name)
    section = view.build_section(audit, name)
    controls = filters.controls(section.result, shown.query)
    matrices = drill.matrices(section.result)
    if matrices:
        options = matrices[:5_000]  # a search finds any of these
        controls.append(
            choose.one(
                shown.query,
                "matrix",
                "Open one matrix",
                options,
                placeholder="by name",
                searchable=True,
                limit=50,
            )
        )
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
        parts.section("Numbers", *numbers(section, shown.query.one("metric"))) if section.metrics else None,
        bar(controls, opens=bool(matrices)) if controls else None,
        parts.section("Figures", figures(name), name="figures"),
        parts.section("Tables", tables(section, shown.query), name="tables")
        if section.result.tables
        else None,
        parts.section("Masks", masks(section)) if section.result.masks else None,
        made(section),
    ]


def absent(shown: View, name: str) -> Content:
    """What stands in place of an analysis without a result."""
    outcome = shown.audit.analyses.get(name)
    if outcome is None:
        return [parts.heading("Not found"), parts.state("unknown", "This audit has no such analysis.")]
    if outcome.status == "failed":
        return [
            parts.heading(outcome.question or name, eyebrow=parts.code(name)),
            parts.state("trouble", "It gave no result", html.P(outcome.reason)),
        ]
    return [
        parts.heading(outcome.question or name, eyebrow=parts.code(name)),
        parts.state("empty", "It was not run", html.P(outcome.reason)),
    ]


def numbers(section: view.Section, sought: str) -> list[Content]:
    """The metrics, the less important ones of many folded; the one that a link led to stands out."""
    leading, others = view.leading_metrics(section.metrics)
    label = f"Numbers of {section.name}, of the whole audit"
    return [
        listed(leading, sought, label),
        parts.folded(
            f"{len(others)} more numbers",
            listed(others, sought, f"More {label[0].lower()}{label[1:]}"),
            opened=sought in [metric.name for metric in others],
        )
        if others
        else None,
    ]


def listed(metrics: Iterable[view.Metric], sought: str, label: str) -> Content:
    """Metrics in a table."""
    rows = [
        [
            html.Span(parts.code(metric.name), className="sought" if metric.name == sought else ""),
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
    heads = ("metric", "value", "what it says", "judged by")
    return parts.table(heads, rows, label=label, numeric=[1])


def bar(controls: list[Any], *, opens: bool) -> html.Div:
    """The controls that figures and tables follow.

    Args:
        opens: whether something on the page opens a matrix.
    """
    said = "Figures and tables follow these; the numbers above are of the whole audit."
    said += " A click on a cell of a map, or on a matrix by name, opens it." if opens else ""
    return html.Div(
        [html.Div(controls, className="controls"), html.P(said, className="source")],
        className="filters",
        role="group",
        **{"aria-label": "Filters of this page"},
    )


def figures(name: str) -> Content:
    """Where the figures come; until then, their outlines."""
    return html.Div(parts.waiting(), id={"role": "pictures", "analysis": name}, className="pictures")


def tables(section: view.Section, query: Query) -> Content:
    """Each table under its name, one at a time: the others are not drawn until they are asked for."""
    names = list(section.result.tables)
    heads = [
        dmc.TabsTab([parts.code(name), f" {len(section.result.tables[name]):,}"], value=name)
        for name in names
    ]
    panels = [
        dmc.TabsPanel(
            grid(section.name, name, frame)
            if len(frame)
            else parts.state("empty", "This table is empty: there was nothing to list."),
            value=name,
            pt="sm",
        )
        for name, frame in section.result.tables.items()
    ]
    shown = query.one("table", names[0])
    return dmc.Tabs(
        [dmc.TabsList(heads, **{"aria-label": "Tables"}), *panels],
        id=choose.choice("table", default=names[0]),
        value=shown if shown in names else names[0],
        keepMounted=False,
        className="tables",
    )


def grid(analysis: str, kind: str, frame: Any, spot: str = "") -> html.Div:
    """A table with a button that saves it."""
    known: Mapping[str, str] = {"analysis": analysis, "table": kind, "spot": spot}
    button = dmc.Button(
        "Save as CSV",
        id={"role": "export", **known},
        variant="default",
        size="compact-sm",
        **{"aria-label": f"Save table {kind} as CSV"},
    )
    return html.Div(
        [
            html.Div(
                [
                    html.Span(id={"role": "count", **known}, className="source", role="status"),
                    button,
                    dcc.Download(id={"role": "saved", **known}),
                ],
                className="grid-tools",
            ),
            grids.grid(frame, known, f"Table {kind} of {analysis}"),
        ]
    )


def masks(section: view.Section) -> Content:
    """Where the masks lie, and what takes them."""
    listed = [html.Li(parts.code(mask_file(section.name, mask))) for mask in section.result.masks]
    use = "tunescope graft BASE TUNED --mask FILE --out DIR"
    return [
        html.Ul(listed),
        html.P([parts.code(use), " writes base with these entries from tuned."], className="source"),
    ]


def made(section: view.Section) -> Content:
    """Where the method comes from, and what it took."""
    address = arxiv_url(section.paper)
    paper = (
        html.A(section.paper, href=address, target="_blank", rel="noreferrer") if address else section.paper
    )
    took = f"Took {view.format_number(section.outcome.seconds)} s"
    took += f" on {section.outcome.device}." if section.outcome.device else "."
    settings = view.format_number(section.result.parameters)
    return html.P(
        [
            *(["Method: ", paper, ". "] if section.paper else []),
            f"Parameters: {settings}. " if settings else "",
            took,
        ],
        className="source made",
    )
