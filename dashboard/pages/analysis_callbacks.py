"""What moves on the page of an analysis: figures and tables that follow the filters, one matrix opened."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dash import (
    ALL,
    MATCH,
    ClientsideFunction,
    Dash,
    Input,
    Output,
    State,
    ctx,
    dcc,
    html,
    no_update,
    set_props,
)

from dashboard.components import drawings, parts
from dashboard.components.drawings import Drawn
from dashboard.components.grids import column_of, csv, response, selected
from dashboard.pages.analysis import grid
from dashboard.state import drill, filters
from dashboard.state.audit_library import AuditLibrary
from dashboard.state.query import Query, parse
from diagnostics.core.analysis import Result
from diagnostics.report import content
from diagnostics.store.audit_store import Audit

if TYPE_CHECKING:
    import pandas as pd

DRAWN = drawings.Drawings()
GRID = {"analysis": MATCH, "table": MATCH, "spot": MATCH}


def result_of(shelf: AuditLibrary, query: Query, analysis: str) -> Result | None:
    """The result of an analysis of the audit that an address names."""
    entry = shelf.meant(query)
    audit = entry.audit if entry else None
    return audit.results.get(analysis) if audit else None


def drawn(shelf: AuditLibrary, query: Query, analysis: str) -> Drawn:
    """The pictures of an analysis, of the rows that the filters leave."""
    result = result_of(shelf, query, analysis)
    entry = shelf.meant(query)
    if result is None or entry is None:
        return [], ["This result is no longer there; load the page anew."]
    kept = filters.filters(query)
    return DRAWN.of((entry.id, entry.version, analysis, kept), partial(kept.only, result))


def pictures(shelf: AuditLibrary, query: Query, analysis: str, scheme: str | None) -> Any:
    """The figures of a page, or what stands in their place."""
    made, troubles = drawn(shelf, query, analysis)
    shown = [drawings.panel(picture, scheme, {"analysis": analysis, "spot": ""}) for picture in made]
    if (troubles or not made) and filters.filters(query):
        shown.append(
            parts.state(
                "empty",
                "Too little is left to draw",
                html.P("The filters leave rows out that the figures need; widen them."),
            )
        )
    elif troubles:
        shown.append(parts.state("trouble", "No figures", *map(html.P, troubles)))
    elif not made:
        shown.append(parts.state("empty", "There is nothing to draw here."))
    return shown


def frame_of(shelf: AuditLibrary, query: Query, known: Mapping[str, str]) -> "pd.DataFrame | None":
    """The rows of a table that a grid stands for, before its own filters."""
    result = result_of(shelf, query, known["analysis"])
    frame = result.tables.get(known["table"]) if result else None
    if frame is None:
        return None
    if not known["spot"]:
        return filters.only(filters.filters(query), frame)
    entry = shelf.meant(query)
    spot = drill.spot(entry.audit, parse(known["spot"])) if entry and entry.audit else None
    return spot.rows(frame) if spot else None


def counted(shelf: AuditLibrary, query: Query, known: Mapping[str, str], left: int) -> str:
    """How many rows of a table are left by filters; of a table on a matrix, none but its own are meant."""
    result = result_of(shelf, query, known["analysis"])
    total = len(result.tables[known["table"]]) if result else left
    return f"{left:,} of {content.plural(total, 'row')}" if left < total and not known["spot"] else ""


def opened(audit: Audit, query: Query, scheme: str | None) -> tuple[str, Any]:
    """The title and the content of the drawer that an address opens."""
    spot = drill.spot(audit, query)
    if spot is None:
        return "Not found", parts.state("unknown", "No table of this audit knows of it.")
    first = query.one("analysis")
    order = [first, *(name for name in audit.results if name != first)]
    shown: list[Any] = [
        parts.pairs(
            {key: value for key, value in (("layer", spot.layer), ("component", spot.component)) if value}
        )
    ]
    for name in order:
        if name not in audit.results:
            continue
        part = spot.of(audit.results[name])
        if part.tables:
            shown.append(about(name, part, spot, scheme if name == first else None, drawing=name == first))
    return spot.title, shown


def about(
    name: str, part: Result, spot: drill.OpenedMatrices, scheme: str | None, *, drawing: bool
) -> html.Section:
    """What one analysis knows of a matrix: its figures, a single row in full, longer tables as grids."""
    key = (
        Query()
        .with_changes(
            **(
                {"matrix": spot.matrices[0]}
                if len(spot.matrices) == 1
                else {"cell": f"{spot.layer}/{spot.component}"}
            )
        )
        .search
    )
    made = content.embedded_figures(part)[0] if drawing else []
    # A map of one cell says nothing that its row does not.
    made = [picture for picture in made if set(drawings.axes(picture, 0)) != drill.CELL]
    shown: list[Any] = [drawings.panel(picture, scheme, {"analysis": name, "spot": key}) for picture in made]
    for kind, frame in part.tables.items():
        shown.append(html.H3([parts.code(kind), " ", content.plural(len(frame), "row")]))
        if len(frame) == 1:
            row = frame.iloc[0]
            shown.append(parts.pairs({str(c): content.format_cell(row[c]).text for c in frame.columns}))
        else:
            shown.append(grid(name, kind, frame, key))
    return html.Section([html.H2(name), *shown], className="drilled")


def callbacks(app: Dash, shelf: AuditLibrary, allowed: dict[str, Any]) -> None:
    """Tie them to the address."""

    @app.callback(
        Output({"role": "pictures", "analysis": MATCH}, "children"),
        Output({"role": "pictures", "analysis": MATCH}, "data-of"),
        Input("url", "search"),
        State({"role": "pictures", "analysis": MATCH}, "id"),
        State({"role": "pictures", "analysis": MATCH}, "data-of"),
        State({"role": "graph", "analysis": MATCH, "spot": "", "name": ALL}, "id"),
        State({"role": "graph", "analysis": MATCH, "spot": "", "name": ALL}, "style"),
        State("scheme", "data"),
    )
    def redraw(
        search: str,
        known: dict[str, str],
        before: str | None,
        graphs: list[dict[str, str]],
        sizes: list[dict[str, Any]],
        scheme: str | None,
    ) -> Any:
        query, name = parse(search), known["analysis"]
        now = repr((query.one("audit"), filters.filters(query)))
        if query.one("analysis") != name or now == before:
            return no_update, no_update
        made, troubles = drawn(shelf, query, name)
        if troubles or not made or [each.name for each in made] != [graph["name"] for graph in graphs]:
            return pictures(shelf, query, name, scheme), now
        for picture, size in zip(made, sizes, strict=True):
            for role, props in drawings.changes(picture, scheme, size).items():
                set_props({"role": role, "name": picture.name, "analysis": name, "spot": ""}, props)
        return no_update, now

    @app.callback(
        Output({"role": "grid", **GRID}, "getRowsResponse"),
        Output({"role": "count", **GRID}, "children"),
        Input({"role": "grid", **GRID}, "getRowsRequest"),
        State({"role": "grid", **GRID}, "id"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def fill(request: dict[str, Any] | None, known: dict[str, str], search: str) -> Any:
        query = parse(search)
        frame = frame_of(shelf, query, known) if request else None
        if frame is None or request is None:
            return no_update, no_update
        answer = response(frame, request)
        return answer, counted(shelf, query, known, answer["rowCount"])

    @app.callback(
        Output({"role": "saved", **GRID}, "data"),
        Input({"role": "export", **GRID}, "n_clicks"),
        State({"role": "export", **GRID}, "id"),
        State({"role": "grid", **GRID}, "getRowsRequest"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def export(clicks: int | None, known: dict[str, str], request: dict[str, Any] | None, search: str) -> Any:
        frame = frame_of(shelf, parse(search), known) if clicks else None
        if frame is None:
            return no_update
        name = f"{known['analysis']}.{known['table']}.csv"
        return dcc.send_string(csv(selected(frame, request)), name)

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input({"role": "graph", "analysis": ALL, "spot": "", "name": ALL}, "clickData"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def open_clicked(clicks: list[Any], search: str) -> Any:
        known, query = ctx.triggered_id, parse(search)
        click = ctx.triggered[0]["value"] if ctx.triggered else None
        if not known or not click or not click.get("points"):
            return no_update
        return clicked(shelf, query, known, click["points"][0]) or no_update

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input({"role": "grid", "analysis": ALL, "table": ALL, "spot": ""}, "cellClicked"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def open_row(clicks: list[Any], search: str) -> Any:
        known, query = ctx.triggered_id, parse(search)
        click = ctx.triggered[0]["value"] if ctx.triggered else None
        return no_update if not known or not click else row_clicked(shelf, query, known, click) or no_update

    @app.callback(
        Output("drawer", "opened"),
        Output("drawer", "title"),
        Output("drawer", "children"),
        Input("spot", "data"),
        State("drawer", "opened"),
        State("scheme", "data"),
        prevent_initial_call=True,
    )
    def unfold(search: str | None, is_open: bool, scheme: str | None) -> Any:
        query = parse(search)
        entry = shelf.meant(query) if query.one("analysis") else None
        if entry is None or entry.audit is None:
            return (False, no_update, no_update) if is_open else (no_update,) * 3
        return True, *opened(entry.audit, query, scheme)

    app.clientside_callback(
        ClientsideFunction("tunescope", "closed"), Input("drawer", "opened"), prevent_initial_call=True
    )
    app.clientside_callback(
        ClientsideFunction("tunescope", "refill"),
        Input("url", "search"),
        State({"role": "grid", "analysis": ALL, "table": ALL, "spot": ""}, "id"),
        prevent_initial_call=True,
    )


def row_clicked(shelf: AuditLibrary, query: Query, known: Mapping[str, str], click: Mapping[str, Any]) -> str:
    """The address that a click on the name of a matrix leads to; empty for other cells."""
    result = result_of(shelf, query, known["analysis"])
    frame = result.tables.get(known["table"]) if result else None
    column = None if frame is None else column_of(frame, str(click.get("colId", "")))
    return query.with_changes(matrix=str(click.get("value")), cell=None).search if column == "matrix" else ""


def clicked(shelf: AuditLibrary, query: Query, known: Mapping[str, str], point: Mapping[str, Any]) -> str:
    """The address that a click on a figure leads to; empty if it leads nowhere."""
    result = result_of(shelf, query, known["analysis"])
    made = {picture.name: picture for picture in drawn(shelf, query, known["analysis"])[0]}
    if result is None or known["name"] not in made:
        return ""
    changes = drill.pointed(
        point,
        drawings.axes(made[known["name"]], int(point.get("curveNumber", 0))),
        set(drill.matrices(result)),
    )
    if not changes:
        return ""
    return query.with_changes(**{"matrix": None, "cell": None} | changes).search
