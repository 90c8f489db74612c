"""The callbacks of the analysis page: figures and tables follow the filters, a click opens one matrix."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dash
from dash import ALL, MATCH, ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import drawings, grids, parts
from dashboard.pages.page import Content
from dashboard.state import drill
from dashboard.state.figure_cache import Drawn
from dashboard.state.filters import filters_of
from dashboard.state.query import link, parse
from dashboard.state.view import Site, View
from diagnostics.core.analysis import Result
from diagnostics.report import content
from diagnostics.report.content import EmbeddedFigure

if TYPE_CHECKING:
    import pandas as pd

TABLE = {"analysis": MATCH, "table": MATCH, "spot": MATCH}


def drawn(view: View, analysis: str) -> Drawn:
    """The figures of an analysis under the filters of the address."""
    return view.site.drawn(view.entry, analysis, filters_of(view.query))


def pictures(
    figures: list[EmbeddedFigure], errors: list[str], view: View, scheme: str | None
) -> list[Content]:
    """The figures of the page, or why there are none."""
    about = {"analysis": view.query.value("analysis"), "spot": ""}
    shown: list[Content] = [drawings.panel(picture, scheme, about) for picture in figures]
    if (errors or not figures) and filters_of(view.query):
        reason = html.P("The filters remove rows that the figures need. Widen them.")
        return [*shown, parts.state("empty", "Too few rows to draw", reason)]
    if not figures and not errors:
        return [parts.state("empty", "This analysis has no figures.")]
    return [*shown, *parts.troubles("Figures could not be drawn", errors)]


def table_rows(view: View, about: Mapping[str, str]) -> "pd.DataFrame | None":
    """The rows that a grid shows, before its column filters."""
    result = view.result(about["analysis"])
    frame = result.tables.get(about["table"]) if result else None
    if frame is None:
        return None
    if not about["spot"]:
        return filters_of(view.query).rows(frame)
    opened = drill.opened(view.audit, parse(about["spot"]))
    return opened.rows(frame) if opened else None


def row_count(view: View, about: Mapping[str, str], left: int) -> str:
    """How many rows of a table pass the filters; empty when all do, and for the rows of one matrix."""
    result = view.result(about["analysis"])
    total = len(result.tables[about["table"]]) if result else left
    return f"{left:,} of {content.plural(total, 'row')}" if left < total and not about["spot"] else ""


def drawer(view: View, scheme: str | None) -> tuple[str, Content]:
    """The title and the content of the drawer that an address opens."""
    opened = drill.opened(view.audit, view.query)
    if opened is None:
        return "Not found", parts.state("unknown", "No table of this audit contains it.")
    cell = {"layer": opened.layer, "component": opened.component}
    first, results = view.query.value("analysis"), view.audit.results
    sections = [
        drawer_section(name, result, opened, scheme, drawing=name == first)
        for name in sorted(results, key=lambda name: name != first)
        if (result := opened.of(results[name])).tables
    ]
    return opened.title, [parts.pairs({key: value for key, value in cell.items() if value}), *sections]


def drawer_section(
    name: str, result: Result, opened: drill.OpenedMatrices, scheme: str | None, *, drawing: bool
) -> html.Section:
    """The results of one analysis for the opened matrices: figures, and tables or single rows."""
    spot = link(cell=f"{opened.layer}/{opened.component}")
    if len(opened.matrices) == 1:
        spot = link(matrix=opened.matrices[0])
    figures = content.embedded_figures(result)[0] if drawing else []
    shown: list[Content] = [
        drawings.panel(picture, scheme, {"analysis": name, "spot": spot})
        for picture in figures
        # A heat map of one cell repeats the row below it.
        if set(drawings.axis_titles(picture, 0)) != drill.CELL
    ]
    for table, frame in result.tables.items():
        shown.append(html.H3([parts.code(table), " ", content.plural(len(frame), "row")]))
        if len(frame) == 1:
            cells = {str(key): content.format_cell(value).text for key, value in frame.iloc[0].items()}
            shown.append(parts.pairs(cells))
        else:
            shown.append(grids.grid(frame, name, table, spot))
    return html.Section([html.H2(name), *shown], className="drilled")


def callbacks(app: Dash, site: Site) -> None:
    """Connect figures, tables and the drawer with the address."""

    box = {"role": "pictures", "analysis": MATCH}
    plots = {"role": "graph", "analysis": MATCH, "spot": "", "name": ALL}
    search_state = State("url", "search")

    @app.callback(
        [Output(box, "children"), Output(box, "data-of")],
        Input("url", "search"),
        [State(box, "id"), State(box, "data-of"), State(plots, "id"), State(plots, "style")],
        State("scheme", "data"),
    )
    def redraw(search: str, about: Any, before: Any, graphs: Any, sizes: Any, scheme: str | None) -> Any:
        view, name = site.view(search), about["analysis"]
        now = repr((view.query.value("audit"), filters_of(view.query)))
        if view.query.value("analysis") != name or now == before:
            return no_update, no_update
        figures, errors = drawn(view, name)
        if errors or not figures or [picture.name for picture in figures] != [g["name"] for g in graphs]:
            return pictures(figures, errors, view, scheme), now
        for picture, size in zip(figures, sizes, strict=True):
            for role, props in drawings.changes(picture, scheme, size).items():
                dash.set_props({"role": role, "name": picture.name, "analysis": name, "spot": ""}, props)
        return no_update, now

    @app.callback(
        [
            Output({"role": "grid", **TABLE}, "getRowsResponse"),
            Output({"role": "count", **TABLE}, "children"),
        ],
        Input({"role": "grid", **TABLE}, "getRowsRequest"),
        [State({"role": "grid", **TABLE}, "id"), search_state],
        prevent_initial_call=True,
    )
    def fill(request: dict[str, Any] | None, about: dict[str, str], search: str) -> Any:
        view = site.view(search)
        frame = table_rows(view, about) if request else None
        if frame is None or request is None:
            return no_update, no_update
        answer = grids.response(frame, request)
        return answer, row_count(view, about, answer["rowCount"])

    @app.callback(
        Output({"role": "saved", **TABLE}, "data"),
        Input({"role": "export", **TABLE}, "n_clicks"),
        [State({"role": "export", **TABLE}, "id"), State({"role": "grid", **TABLE}, "getRowsRequest")],
        search_state,
        prevent_initial_call=True,
    )
    def export(clicks: int | None, about: dict[str, str], request: dict[str, Any] | None, search: str) -> Any:
        frame = table_rows(site.view(search), about) if clicks else None
        if frame is None:
            return no_update
        name = f"{about['analysis']}.{about['table']}.csv"
        return dcc.send_string(grids.csv(grids.selected(frame, request)), name)

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input({"role": "graph", "analysis": ALL, "spot": "", "name": ALL}, "clickData"),
        Input({"role": "grid", "analysis": ALL, "table": ALL, "spot": ""}, "cellClicked"),
        search_state,
        prevent_initial_call=True,
    )
    def open_clicked(points: list[Any], cells: list[Any], search: str) -> Any:
        about, view = dash.ctx.triggered_id, site.view(search)
        click = dash.ctx.triggered[0]["value"] if dash.ctx.triggered else None
        if not about or not click:
            return no_update
        opens = row_clicked if about["role"] == "grid" else figure_clicked
        changes = opens(view, about, click)
        return (
            view.query.with_changes(**{"matrix": None, "cell": None} | changes).search
            if changes
            else no_update
        )

    @app.callback(
        [Output("drawer", name) for name in ("opened", "title", "children")],
        Input("spot", "data"),
        [State("drawer", "opened"), State("scheme", "data")],
        prevent_initial_call=True,
    )
    def unfold(search: str | None, is_open: bool, scheme: str | None) -> Any:
        view = site.view(search)
        if not view.query.value("analysis") or view.readable_audit is None:
            return (False, no_update, no_update) if is_open else (no_update,) * 3
        return True, *drawer(view, scheme)

    app.clientside_callback(
        ClientsideFunction("tunescope", "closed"), Input("drawer", "opened"), prevent_initial_call=True
    )
    app.clientside_callback(
        ClientsideFunction("tunescope", "refill"),
        Input("url", "search"),
        State({"role": "grid", "analysis": ALL, "table": ALL, "spot": ""}, "id"),
        prevent_initial_call=True,
    )


def row_clicked(view: View, about: Mapping[str, str], click: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the query that open the clicked name of a matrix; empty for any other cell."""
    result = view.result(about["analysis"])
    frame = result.tables.get(about["table"]) if result else None
    if frame is None or grids.column_name(frame, str(click.get("colId", ""))) != "matrix":
        return {}
    return {"matrix": str(click.get("value"))}


def figure_clicked(view: View, about: Mapping[str, str], click: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the query that open the clicked matrix or cell of a figure; empty if there is none."""
    result, points = view.result(about["analysis"]), click.get("points")
    picture = {picture.name: picture for picture in drawn(view, about["analysis"])[0]}.get(about["name"])
    if result is None or picture is None or not points:
        return {}
    axes = drawings.axis_titles(picture, int(points[0].get("curveNumber", 0)))
    return drill.pointed(points[0], axes, set(drill.matrices(result)))
