"""An audit started from the page, of a pair that the server was started with: its progress, log and end."""

import threading
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update

from dashboard.components import parts
from dashboard.pages import Content, View, page
from dashboard.server.runs import Runs
from dashboard.state.audit_library import AuditLibrary, written
from dashboard.state.query import link

HIDDEN = {"display": "none"}


def callbacks(app: Dash, shelf: AuditLibrary, allowed: dict[str, Any]) -> None:
    """Start, follow, cancel and open, where the server was started with `--allow-run`."""
    runs: Runs | None = allowed.get("run")
    if runs is None:
        return
    runs.join(shelf)
    seen, lock = written(runs.directory), threading.Lock()

    @app.server.before_request
    def join() -> None:
        # A run ends in a process of its own, and maybe in that of another server of the same app.
        nonlocal seen
        with lock:
            now = written(runs.directory)
            if now != seen:
                seen = now
                runs.join(shelf)

    @app.callback(
        Output("run-done", "data"),
        Output("run-told", "children"),
        Input("run-start", "n_clicks"),
        State("run-pair", "value"),
        State("run-only", "value"),
        State("run-limit", "value"),
        prevent_initial_call=True,
        background=True,
        manager=runs.manager(),
        running=[
            (Output("run-start", "disabled"), True, False),
            (Output("run-cancel", "disabled"), False, True),
            (Output("run-going", "style"), {}, HIDDEN),
        ],
        progress=[
            Output("run-bar", "value"),
            Output("run-bar", "aria-label"),
            Output("run-says", "children"),
            Output("run-log", "children"),
        ],
        cancel=[Input("run-cancel", "n_clicks")],
    )
    def start(set_progress: Any, clicks: int | None, pair: Any, only: Any, limit: Any) -> Any:
        def tell(share: float, now: str, log: str) -> None:
            set_progress((100 * share, f"{share:.0%} of the audit", now, log))

        tell(0.0, "starting", "")
        try:
            return runs.run(str(pair), runs.request(pair, only, limit), tell), None
        except (LookupError, ValueError, OSError) as error:
            return None, parts.state("trouble", "The audit was not finished", html.Pre(str(error)))

    @app.callback(
        Output("run-told", "children", allow_duplicate=True),
        Input("run-cancel", "n_clicks"),
        prevent_initial_call=True,
    )
    def cancelled(clicks: int | None) -> Any:
        if not clicks:
            return no_update
        return parts.state("empty", "Cancelled", html.P("Nothing of it is on the shelf."))

    @app.callback(
        Output("url", "search", allow_duplicate=True), Input("run-done", "data"), prevent_initial_call=True
    )
    def opened(known: Any) -> Any:
        entry = runs.entry(shelf, known)
        return link(audit=entry.id) if entry else no_update


@page(
    "run",
    title="Run an audit",
    of="shelf",
    order=90,
    linked=lambda shown: "run" in shown.allowed,
    callbacks=callbacks,
)
def content(shown: View) -> Content:
    """What to run, and how far it is."""
    runs: Runs | None = shown.allowed.get("run")
    if runs is None:
        return [
            parts.heading("Run an audit", eyebrow="tunescope"),
            parts.state(
                "empty",
                "This server runs no audits",
                html.P(parts.code('tunescope dashboard --allow-run --pair "NAME=BASE TUNED"')),
            ),
        ]
    from diagnostics.core.registry import installed

    names = [
        {"value": name, "label": f"{name}: {base} → {tuned}"} for name, (base, tuned) in runs.pairs.items()
    ]
    read = [parts.code(f"--{role} {file}") for role, files in runs.rows.items() for file in files]
    controls = [
        dmc.Select(
            id="run-pair",
            label="Checkpoints",
            data=names,
            value=next(iter(runs.pairs), None),
            allowDeselect=False,
            size="sm",
        ),
        dmc.MultiSelect(
            id="run-only",
            label="Analyses",
            data=installed(),
            placeholder="all that have what they need",
            clearable=True,
            size="sm",
        ),
        dmc.NumberInput(
            id="run-limit",
            label="Rows of each file",
            placeholder="all",
            min=1,
            allowDecimal=False,
            allowNegative=False,
            size="sm",
        ),
    ]
    return [
        parts.heading(
            "Run an audit",
            eyebrow="tunescope",
            lead="Of the checkpoints and rows that this server was started with.",
        ),
        html.Div(controls, className="controls run-controls"),
        html.P(
            ["Rows: ", *[each for code in read for each in (code, " ")]]
            if read
            else "No rows were given: only what reads the weights alone can run.",
            className="source",
        ),
        html.Div(
            [
                dmc.Button("Run", id="run-start", size="sm"),
                dmc.Button("Cancel", id="run-cancel", size="sm", variant="default", disabled=True),
            ],
            className="policy-tools run-tools",
        ),
        html.Div(
            [
                dmc.Progress(id="run-bar", value=0, size="lg", **{"aria-label": "0% of the audit"}),
                html.P(id="run-says", className="source", role="status"),
                html.Pre(id="run-log", tabIndex="0", **{"aria-label": "Log"}),
            ],
            id="run-going",
            style=HIDDEN,
        ),
        html.Div(id="run-told"),
        dcc.Store(id="run-done"),
    ]
