"""The Dash app: the frame, the pages, and what ties them to the address."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dash
from dash import ClientsideFunction, Input, Output, State, no_update, set_props

from dashboard.components import choose, frame, parts
from dashboard.components.style import INDEX
from dashboard.pages import View, analysis_callbacks, pages
from dashboard.server import guard
from dashboard.state.audit_library import AuditLibrary
from dashboard.state.query import parse
from diagnostics.store.audit_store import Audit
from probes.errors import InputError

log = logging.getLogger(__name__)


class Dashboard(dash.Dash):
    """A Dash app that refuses to offer its debugger to others than this machine."""

    def run(self, host: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `dash.Dash.run`.

        Raises:
            InputError: `debug` on an address that others reach: the debugger runs whatever it is sent.
        """
        if kwargs.get("debug") and not guard.loopback(host or "127.0.0.1"):
            raise InputError(f"debug=True on host {host}: others could run code here; leave debug off")
        kwargs.setdefault("debug", False)
        return super().run(host or "127.0.0.1", *args, **kwargs)


def broken(error: Exception) -> Any:
    """Say on the page that an answer failed, and in the log how."""
    log.error("the dashboard cannot answer", exc_info=error)
    set_props("trouble", {"children": parts.failure(error)})
    return None


def create_app(
    audits: "Sequence[str | Path | Audit] | Mapping[str, str | Path | Audit] | AuditLibrary" = (),
    *,
    prefix: str = "/",
    token: str | None = None,
    allowed: Mapping[str, Any] | None = None,
) -> Dashboard:
    """The dashboard over saved audits: run it, hand it to a WSGI server, or show it in a notebook.

    Args:
        audits: directories of audits or of series, audits in memory, or these by the names to show.
        prefix: the path under which it is served, where a proxy hands on only a part of a site.
        token: what a visitor must bring, as `?token=…`; None lets everyone in.
        allowed: what it may do beyond looking at audits, by name; each page says what it asks for.

    Raises:
        InputError: a path without an audit.
    """
    shelf = audits if isinstance(audits, AuditLibrary) else AuditLibrary(audits)
    may = dict(allowed or {})
    path = "/" + prefix.strip("/") + "/" if prefix.strip("/") else "/"
    app = Dashboard(
        "tunescope",
        assets_folder=str(Path(__file__).with_name("assets")),
        url_base_pathname=path,
        use_pages=False,
        pages_folder="",
        title="tunescope",
        update_title="",
        index_string=INDEX,
        # Pages come and go, and with them what their callbacks name.
        suppress_callback_exceptions=True,
        enable_mcp=False,
        meta_tags=[{"name": "color-scheme", "content": "light dark"}],
        background_callback_manager=may.get("background"),
        on_error=broken,
    )
    app.layout = frame.layout()
    guard.protect(app.server, token=token, prefix=path)

    app.clientside_callback(
        ClientsideFunction("tunescope", "placed"),
        Output("place", "data"),
        Output("spot", "data"),
        Input("url", "search"),
        State("inside", "data"),
        State("place", "data"),
        State("spot", "data"),
    )

    @app.callback(
        Output("page", "children"),
        Output("nav", "children"),
        Output("chooser", "children"),
        Output("shown", "data"),
        Output("title", "data"),
        Input("place", "data"),
        State("url", "search"),
        State("shown", "data"),
    )
    def turn(_: str | None, search: str | None, shown: Any) -> Any:
        """The page that the address names, unless it is the one that stands there."""
        view, page = frame.sought(View(shelf, parse(search), may))
        now = frame.identity(view.query, page)
        if now == shown:
            return (no_update,) * 5
        content = (frame.body(view, page), frame.nav(view, page), frame.chooser(view))
        return (*content, now, frame.title(view, page))

    app.clientside_callback(
        ClientsideFunction("tunescope", "turned"), Input("title", "data"), State("looks", "data")
    )
    app.clientside_callback(
        ClientsideFunction("tunescope", "burger"),
        Output("shell", "navbar"),
        Output("burger", "opened"),
        Output("shell", "className"),
        Input("burger", "opened"),
        Input("shown", "data"),
        State("shell", "navbar"),
    )
    choose.callbacks(app)
    analysis_callbacks.callbacks(app, shelf, may)
    for each in pages().values():
        if each.callbacks:
            each.callbacks(app, shelf, may)
    return app
