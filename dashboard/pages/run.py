"""A page that starts an audit of a pair chosen by the server: progress, log and result."""

import logging
import threading
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import parts
from dashboard.pages.page import Content, Page
from dashboard.server.runs import Runs
from dashboard.state.audit_library import file_stamp
from dashboard.state.query import link
from dashboard.state.view import Site, View
from probes.errors import InputError, UnknownNameError

log = logging.getLogger(__name__)

HIDDEN = {"display": "none"}


def callbacks(app: Dash, site: Site) -> None:
    """Start, follow, cancel and open audits, if the server was started with `--allow-run`."""
    runs: Runs | None = site.allowed.get("run")
    if runs is None:
        return
    runs.add_finished(site.library)
    seen, lock = file_stamp(runs.directory), threading.Lock()

    @app.server.before_request
    def add_finished() -> None:
        # An audit ends in another process, perhaps one of another server of the same app.
        nonlocal seen
        with lock:
            now = file_stamp(runs.directory)
            if now != seen:
                seen = now
                runs.add_finished(site.library)

    @app.callback(
        [Output("run-done", "data"), Output("run-message", "children")],
        Input("run-start", "n_clicks"),
        [State(name, "value") for name in ("run-pair", "run-only", "run-limit")],
        prevent_initial_call=True,
        background=True,
        manager=runs.manager(),
        cancel=[Input("run-cancel", "n_clicks")],
        running=[
            (Output("run-start", "disabled"), True, False),
            (Output("run-cancel", "disabled"), False, True),
            (Output("run-going", "style"), {}, HIDDEN),
        ],
        progress=[
            Output("run-bar", "value"),
            Output("run-bar", "aria-label"),
            Output("run-status", "children"),
            Output("run-log", "children"),
        ],
    )
    def start(set_progress: Any, clicks: int | None, pair: Any, only: Any, limit: Any) -> Any:
        def report(share: float, now: str, lines: str) -> None:
            set_progress((100 * share, f"{share:.0%} of the audit", now, lines))

        report(0.0, "starting", "")
        try:
            return runs.run(str(pair), runs.request(pair, only, limit), report), None
        except (InputError, UnknownNameError, OSError) as error:
            log.warning("the audit of %r failed: %s", pair, error)
            return None, parts.state("trouble", "The audit failed", html.Pre(str(error)))

    @app.callback(
        Output("run-message", "children", allow_duplicate=True),
        Input("run-cancel", "n_clicks"),
        prevent_initial_call=True,
    )
    def cancelled(clicks: int | None) -> Content:
        if not clicks:
            return no_update
        return parts.state("empty", "Cancelled", html.P("Nothing was saved."))

    @app.callback(
        Output("url", "search", allow_duplicate=True), Input("run-done", "data"), prevent_initial_call=True
    )
    def open_result(name: Any) -> Content:
        entry = runs.entry(site.library, name)
        return link(audit=entry.id) if entry else no_update


def layout(view: View) -> Content:
    """What to run, and its progress."""
    runs: Runs | None = view.site.allowed.get("run")
    if runs is None:
        command = parts.code('tunescope dashboard --allow-run --pair "NAME=BASE TUNED"')
        hint = parts.state(
            "empty", "This server does not run audits", html.P([command, " starts one that does."])
        )
        return [parts.heading("Run an audit", eyebrow="tunescope"), hint]
    from diagnostics.core.registry import installed

    pairs = [
        {"value": name, "label": f"{name}: {base} → {tuned}"} for name, (base, tuned) in runs.pairs.items()
    ]
    pair: dict[str, Any] = {"data": pairs, "value": next(iter(runs.pairs), None), "allowDeselect": False}
    only = {"data": installed(), "placeholder": "all that these files allow", "clearable": True}
    limit = {"placeholder": "all", "min": 1, "allowDecimal": False, "allowNegative": False}
    controls = [
        dmc.Select(id="run-pair", label="Checkpoints", size="sm", **pair),
        dmc.MultiSelect(id="run-only", label="Analyses", size="sm", **only),
        dmc.NumberInput(id="run-limit", label="Rows per file", size="sm", **limit),
    ]
    files = [parts.code(f"--{role} {file}") for role, paths in runs.rows.items() for file in paths]
    rows = ["Rows: ", *[part for file in files for part in (file, " ")]]
    buttons = [
        dmc.Button("Run", id="run-start", size="sm"),
        dmc.Button("Cancel", id="run-cancel", size="sm", variant="default", disabled=True),
    ]
    progress = [
        dmc.Progress(id="run-bar", value=0, size="lg", **{"aria-label": "0% of the audit"}),
        html.P(id="run-status", className="source", role="status"),
        html.Pre(id="run-log", tabIndex="0", **{"aria-label": "Log"}),
    ]
    lead = "The server was started with these checkpoints and files."
    return [
        parts.heading("Run an audit", eyebrow="tunescope", lead=lead),
        html.Div(controls, className="controls run-controls"),
        parts.source(rows if files else "No files of rows: only analyses of the weights can run."),
        html.Div(buttons, className="policy-tools run-tools"),
        html.Div(progress, id="run-going", style=HIDDEN),
        html.Div(id="run-message"),
        dcc.Store(id="run-done"),
    ]


PAGE = Page(
    "run", "Run an audit", "library", layout, linked=lambda view: "run" in view.site.allowed,
    callbacks=callbacks,
)  # fmt: skip
