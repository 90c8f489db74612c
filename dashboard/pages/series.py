"""A series of checkpoints: its measures over steps, one step chosen for all figures, the run as a whole."""

from functools import partial
from typing import Any

from dash import ALL, Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import choose, drawings, parts
from dashboard.pages import Content, View, page
from dashboard.pages.analysis_callbacks import DRAWN
from dashboard.state import steps
from dashboard.state.audit_library import AuditLibrary, Entry
from dashboard.state.query import Query, link, parse
from dashboard.state.steps import SIDES, Step
from diagnostics.core.analysis import Result
from diagnostics.report import content as view


def chosen(query: Query, made: list[Step]) -> int:
    """The place of the chosen step: the last unless an address says otherwise."""
    labels = [each.label for each in made]
    wanted = query.one("step")
    return labels.index(wanted) if wanted in labels else len(made) - 1


def over(shelf: AuditLibrary, entry: Entry, query: Query, scheme: str | None) -> Content:
    """What follows the chosen step and measures: the strip, the measures, the step, the run."""
    made = steps.steps(entry)
    at = chosen(query, made)
    known = steps.measures(made)
    names = [name for name in query.many("measure") if name in known] or steps.telling(shelf, made)
    figure = steps.draw(made, names, at, steps.limits(shelf, made))
    return [
        strip(entry, query, made, at),
        html.Figure(
            [
                html.Figcaption("Measures over the checkpoints; a click chooses the step"),
                dcc.Graph(
                    id={"role": "measures", "series": entry.id},
                    figure=drawings.shown(figure, scheme),
                    config=drawings.CONFIG,
                    style={"height": figure.layout.height},
                ),
            ]
        ),
        parts.section(f"At {step_name(made[at])}", *of_step(shelf, query, made[at], scheme), name="step"),
        whole(shelf, entry, steps.places(made)[at], scheme),
    ]


def step_name(step: Step) -> str:
    """How a step is called in a sentence."""
    return f"step {step.label}" if step.label.isdecimal() else step.label


def strip(entry: Entry, query: Query, made: list[Step], at: int) -> html.Nav:
    """The steps as links, each with its verdict."""
    links = [
        html.Li(
            parts.going(
                [parts.icon(each.verdict), each.label, html.Span(f", {each.verdict}", className="unseen")],
                query.with_changes(page="series", audit=entry.id, step=each.label).search,
                className=f"step {each.verdict}" + " active" * (i == at),
                **({"aria-current": "step"} if i == at else {}),
            )
        )
        for i, each in enumerate(made)
    ]
    return html.Nav(html.Ol(links), className="strip", **{"aria-label": "Steps"})


def of_step(shelf: AuditLibrary, query: Query, step: Step, scheme: str | None) -> list[Any]:
    """The numbers of one step, and the figures of one of its analyses."""
    audits = [
        html.Li(
            [
                parts.badge(step.verdicts[side]),
                " ",
                parts.going(f"The audit {SIDES[side]}", link(audit=known)),
            ]
        )
        for side, known in step.entries.items()
    ]
    names = list(dict.fromkeys(name for found in step.metrics.values() for name in found))
    rows = [
        [parts.code(name), *(view.format_number(step.metrics[side].get(name)) for side in SIDES)]
        for name in names
    ]
    table = parts.table(("measure", *SIDES.values()), rows, label="Numbers of this step", numeric=[1, 2])
    shown: list[Any] = [html.P(parts.code(step.ref)), html.Ul(audits, className="audits")]
    shown.append(parts.folded(view.plural(len(rows), "number"), table))
    entry = shelf.find(step.entries.get("against_first", ""))
    audit = entry.audit if entry else None
    if entry is None or audit is None or not audit.results:
        return shown
    name = query.one("analysis")
    name = name if name in audit.results else next(iter(audit.results))
    made, troubles = DRAWN.of((entry.id, entry.version, name, None), partial(same, audit.results[name]))
    shown.append(html.H3(f"Figures of {name}, against the first"))
    shown += [drawings.panel(each, scheme, {"analysis": name, "spot": "step"}) for each in made]
    shown += [parts.state("trouble", "No figures", html.P(text)) for text in troubles]
    return shown


def same(result: Result) -> Result:
    """All of a result."""
    return result


def whole(shelf: AuditLibrary, entry: Entry, place: Any, scheme: str | None) -> Content:
    """The analyses that look at the whole run, the chosen step drawn into what has steps for an axis."""
    run = shelf.find(f"{entry.id}/run")
    audit = run.audit if run else None
    if run is None or audit is None or not audit.results:
        return None
    shown: list[Any] = []
    for name, result in audit.results.items():
        made, troubles = DRAWN.of((run.id, run.version, name, None), partial(same, result))
        to = link(page="analysis", audit=run.id, analysis=name)
        shown.append(html.H3([parts.going(name, to), ": ", audit.analyses[name].question]))
        known = {"analysis": name, "spot": "run"}
        shown += [drawings.panel(each, scheme, known, step=place) for each in made]
        shown += [parts.state("trouble", "No figures", html.P(text)) for text in troubles]
    return parts.section("The run as a whole", *shown, name="run")


def controls(shelf: AuditLibrary, query: Query, made: list[Step]) -> html.Div:
    """Which measures are shown, and which analysis' figures of the step."""
    analyses = list(dict.fromkeys(name.partition(".")[0] for name in steps.measures(made)))
    several = (
        [choose.one(query, "analysis", "Figures of", analyses, analyses[0])] if len(analyses) > 1 else []
    )
    return html.Div(
        html.Div(
            [
                choose.many(
                    query, "measure", "Measures", steps.measures(made), placeholder="the most telling"
                ),
                *several,
            ],
            className="controls",
        ),
        className="filters",
        role="group",
        **{"aria-label": "What is shown"},
    )


def callbacks(app: Dash, shelf: AuditLibrary, allowed: dict[str, Any]) -> None:
    """All follows the address; a click on the measures chooses a step."""

    @app.callback(
        Output("series", "children"),
        Input("url", "search"),
        State("series", "data-of"),
        State("scheme", "data"),
    )
    def redraw(search: str, known: str, scheme: str | None) -> Any:
        entry = shelf.find(known)
        query = parse(search)
        # The address of a dashboard that holds nothing else may leave the series out.
        if entry is None or query.one("audit", known) != known:
            return no_update
        return over(shelf, entry, query, scheme)

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input({"role": "measures", "series": ALL}, "clickData"),
        State("series", "data-of"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def choose_step(clicks: list[Any], known: str, search: str) -> Any:
        entry = shelf.find(known)
        points = next((click["points"] for click in clicks if click and click.get("points")), None)
        if entry is None or not points:
            return no_update
        made = steps.steps(entry)
        x = points[0].get("x")
        place = next((i for i, each in enumerate(steps.places(made)) if each == x), None)
        return (
            no_update
            if place is None
            else parse(search).with_changes(audit=known, step=made[place].label).search
        )


@page("series", title="Series", of="series", order=0, callbacks=callbacks)
def content(shown: View) -> Content:
    """The measures over the steps."""
    entry = shown.entry
    assert entry is not None
    try:
        made = steps.steps(entry)
    except ValueError as error:
        return [
            parts.heading(entry.id, eyebrow="series"),
            parts.state(
                "damaged", "This series is damaged or only half written", html.P(parts.code(str(error)))
            ),
        ]
    if not made:
        return only_whole(shown, entry)
    return [
        parts.heading(
            entry.id, eyebrow="series", lead=f"{view.plural(len(made), 'checkpoint')} after the first"
        ),
        controls(shown.shelf, shown.query, made),
        html.Div(parts.waiting(), id="series", className="pictures", **{"data-of": entry.id}),
    ]


def only_whole(shown: View, entry: Entry) -> Content:
    """A series in which only the run as a whole was looked at."""
    run = shown.shelf.find(f"{entry.id}/run")
    audit = run.audit if run else None
    if run is None or audit is None:
        return [parts.heading(entry.id, eyebrow="series"), parts.state("empty", "No checkpoint was audited.")]
    links = [
        html.Li([parts.going(name, link(page="analysis", audit=run.id, analysis=name)), ": ", made.question])
        for name, made in audit.analyses.items()
        if made.result is not None
    ]
    return [parts.heading(entry.id, eyebrow="series", lead="looked at as a whole"), html.Ul(links)]
