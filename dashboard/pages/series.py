"""A series of checkpoints: its measures over steps, one selected step, and the run as a whole."""

from typing import Any

from dash import ALL, Dash, Input, Output, State, html, no_update

from dashboard.components import choose, drawings, parts
from dashboard.components.series_figure import series_figure
from dashboard.pages.overview import analyses
from dashboard.pages.page import Content, Page
from dashboard.state.audit_library import Entry
from dashboard.state.query import Query, link, parse
from dashboard.state.steps import SIDES, Step, leading, limits, measures, positions, read_steps
from dashboard.state.view import Site, View
from diagnostics.report import content
from probes.errors import InputError


def callbacks(app: Dash, site: Site) -> None:
    """Let the page follow the address; a click on the measures selects a step."""

    address, name = State("url", "search"), State("series", "data-of")

    @app.callback(Output("series", "children"), Input("url", "search"), name, State("scheme", "data"))
    def redraw(search: str, series: str, scheme: str | None) -> Content:
        view = site.view(search)
        entry = view.library.find(series)
        # The address of a dashboard that has only this series may leave out its name.
        if entry is None or view.query.value("audit", series) != series:
            return no_update
        return series_content(view, entry, scheme)

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input({"role": "measures", "series": ALL}, "clickData"),
        [name, address],
        prevent_initial_call=True,
    )
    def select_step(clicks: list[Any], series: str, search: str) -> Content:
        entry = site.library.find(series)
        points = next((click["points"] for click in clicks if click and click.get("points")), None)
        if entry is None or not points:
            return no_update
        steps = read_steps(entry)
        labels = {position: step.label for step, position in zip(steps, positions(steps), strict=True)}
        label = labels.get(points[0].get("x"))
        return parse(search).with_changes(audit=series, step=label).search if label is not None else no_update


def layout(view: View) -> Content:
    """The choice of measures; a callback fills in the figures."""
    entry = view.entry
    assert entry is not None
    try:
        steps = read_steps(entry)
    except InputError as error:
        damage = html.P(parts.code(str(error)))
        message = parts.state("damaged", "This series is damaged or incomplete", damage)
        return [parts.heading(entry.id, eyebrow="series"), message]
    if not steps:
        run = view.library.find(f"{entry.id}/run")
        if run is None or run.audit is None:
            empty = parts.state("empty", "No checkpoint of this series was audited.")
            return [parts.heading(entry.id, eyebrow="series"), empty]
        lead = "This series has analyses of the whole run, and no audits of single checkpoints."
        return [parts.heading(entry.id, eyebrow="series", lead=lead), analyses(run.audit, run.id)]
    names = measures(steps)
    per_analysis = list(dict.fromkeys(name.partition(".")[0] for name in names))
    controls = [choose.multi_select(view.query, "measure", "Measures", names, placeholder="the main ones")]
    if len(per_analysis) > 1:
        controls.append(choose.select(view.query, "analysis", "Figures of", per_analysis, per_analysis[0]))
    count = content.plural(len(steps), "checkpoint")
    return [
        parts.heading(entry.id, eyebrow="series", lead=f"{count} after the first"),
        parts.filters("Measures and figures", *controls),
        html.Div(parts.waiting(), id="series", className="pictures", **{"data-of": entry.id}),
    ]


def series_content(view: View, entry: Entry, scheme: str | None) -> Content:
    """The steps as links, the measures, the selected step, and the run."""
    steps = read_steps(entry)
    labels = [step.label for step in steps]
    asked = view.query.value("step")
    at = labels.index(asked) if asked in labels else len(steps) - 1
    thresholds = limits(view.library, steps)
    available = measures(steps)
    names = [name for name in view.query.many("measure") if name in available] or leading(steps, thresholds)
    figure = series_figure(steps, names, at, thresholds)
    size = {"height": figure.layout.height}
    drawn = drawings.own_figure(figure, scheme)
    plot = drawings.graph({"role": "measures", "series": entry.id}, drawn, size, "measures")
    caption = "Measures over the checkpoints. Click a point to select its step."
    return [
        step_links(entry, view.query, steps, at),
        html.Figure([html.Figcaption(caption), plot]),
        parts.section(steps[at].title, *step_details(view, steps[at], scheme), name="step"),
        run_figures(view, entry, positions(steps)[at], scheme),
    ]


def step_links(entry: Entry, query: Query, steps: list[Step], at: int) -> html.Nav:
    """The steps as links, each with its verdict."""
    links = []
    for i, step in enumerate(steps):
        text = [parts.icon(step.verdict), step.label, html.Span(f", {step.verdict}", className="unseen")]
        address = query.with_changes(page="series", audit=entry.id, step=step.label).search
        current = {"aria-current": "step"} if i == at else {}
        look = f"step {step.verdict}" + " active" * (i == at)
        links.append(html.Li(parts.going(text, address, className=look, **current)))
    return html.Nav(html.Ol(links), className="strip", **{"aria-label": "Steps"})


def step_details(view: View, step: Step, scheme: str | None) -> list[Content]:
    """The audits and numbers of one step, and the figures of one analysis."""
    audits = []
    for side, audit_id in step.entries.items():
        address = parts.going(f"Audit {SIDES[side]}", link(audit=audit_id))
        audits.append(html.Li([parts.badge(step.verdicts[side]), " ", address]))
    rows = [
        [parts.code(name), *(content.format_number(step.metrics[side].get(name)) for side in SIDES)]
        for name in measures([step])
    ]
    table = parts.table(("measure", *SIDES.values()), rows, label="Numbers of this step", numeric=[1, 2])
    shown: list[Content] = [
        html.P(parts.code(step.ref)),
        html.Ul(audits, className="audits"),
        parts.folded(content.plural(len(rows), "number"), table),
    ]
    entry = view.library.find(step.entries.get("against_first", ""))
    audit = entry.audit if entry else None
    if audit is None or not audit.results:
        return shown
    name = view.query.value("analysis")
    name = name if name in audit.results else next(iter(audit.results))
    return [
        *shown,
        html.H3(f"Figures of {name}, against the first"),
        *panels(view.site, entry, name, {"analysis": name, "spot": "step"}, scheme),
    ]


def run_figures(view: View, entry: Entry, position: Any, scheme: str | None) -> Content:
    """The analyses of the whole run, with the selected step marked where the x axis counts steps."""
    run = view.library.find(f"{entry.id}/run")
    audit = run.audit if run else None
    if run is None or audit is None or not audit.results:
        return None
    shown: list[Content] = []
    for name in audit.results:
        to = link(page="analysis", audit=run.id, analysis=name)
        shown.append(html.H3([parts.going(name, to), ": ", audit.analyses[name].question]))
        shown += panels(view.site, run, name, {"analysis": name, "spot": "run"}, scheme, step=position)
    return parts.section("The whole run", *shown, name="run")


def panels(
    site: Site, entry: Entry | None, name: str, about: dict[str, str], scheme: str | None, step: Any = None
) -> list[Content]:
    """All figures of one analysis, or why they are missing."""
    figures, errors = site.drawn(entry, name)
    return [
        *(drawings.panel(picture, scheme, about, step=step) for picture in figures),
        *parts.troubles("Figures could not be drawn", errors),
    ]


PAGE = Page("series", "Series", "series", layout, callbacks=callbacks)
