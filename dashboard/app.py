"""The Dash app: the frame, the pages, and the callbacks that follow the address."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dash
from dash import ClientsideFunction, Input, Output, State, no_update, set_props

from dashboard import frame
from dashboard.components import choose, parts
from dashboard.components.style import INDEX
from dashboard.pages import PAGES
from dashboard.server import guard
from dashboard.state.audit_library import AuditLibrary
from dashboard.state.view import Site
from diagnostics.store.audit_store import Audit
from probes.errors import InputError

log = logging.getLogger(__name__)


class Dashboard(dash.Dash):
    """A Dash app that offers its debugger to this machine only."""

    def run(self, host: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `dash.Dash.run`.

        Raises:
            InputError: `debug` on an address that others can reach: the debugger runs any code it is sent.
        """
        if kwargs.get("debug") and not guard.loopback(host or "127.0.0.1"):
            raise InputError(f"debug=True on host {host}: others could run code here; leave debug off")
        kwargs.setdefault("debug", False)
        return super().run(host or "127.0.0.1", *args, **kwargs)


def show_error(error: Exception) -> Any:
    """Show the error of a callback on the page, and log it."""
    log.error("a callback of the dashboard failed", exc_info=error)
    set_props("trouble", {"children": parts.failure(error)})
    return None


def create_app(
    audits: "Sequence[str | Path | Audit] | Mapping[str, str | Path | Audit] | AuditLibrary" = (),
    *,
    prefix: str = "/",
    token: str | None = None,
    allowed: Mapping[str, Any] | None = None,
) -> Dashboard:
    """The dashboard of saved audits: run it, pass it to a WSGI server, or show it in a notebook.

    >>> from dashboard import create_app
    >>> app = create_app()  # or create_app(["audit-1", "audit-2"])
    >>> app.server.test_client().get("/").status_code
    200

    Args:
        audits: directories of audits or series, audits in memory, or either by the name to show.
        prefix: the path that it is served under, where a proxy forwards only a part of a site.
        token: what visitors must send once, as `?token=…`; None lets everyone in.
        allowed: what visitors may do beyond reading audits, by name; see each page.

    Raises:
        InputError: a path without an audit.
    """
    library = audits if isinstance(audits, AuditLibrary) else AuditLibrary(audits)
    site = Site(library, dict(allowed or {}))
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
        # The callbacks of a page name components that exist only while it is shown.
        suppress_callback_exceptions=True,
        enable_mcp=False,
        meta_tags=[{"name": "color-scheme", "content": "light dark"}],
        background_callback_manager=site.allowed.get("background"),
        on_error=show_error,
    )
    app.layout = frame.layout()
    guard.protect(app, token=token, prefix=path)

    app.clientside_callback(
        ClientsideFunction("tunescope", "placed"),
        [Output("place", "data"), Output("spot", "data")],
        Input("url", "search"),
        [State(store, "data") for store in ("inside", "place", "spot")],
    )

    @app.callback(
        [Output(part, "children") for part in ("page", "nav", "chooser")],
        [Output("shown", "data"), Output("title", "data")],
        Input("place", "data"),
        [State("url", "search"), State("shown", "data")],
    )
    def turn(_: str | None, search: str | None, shown: Any) -> Any:
        """The page that the address names, unless it is already shown."""
        view, page = frame.resolve(site.view(search))
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
        [Output("shell", "navbar"), Output("burger", "opened"), Output("shell", "className")],
        [Input("burger", "opened"), Input("shown", "data")],
        State("shell", "navbar"),
    )
    choose.callbacks(app)
    for page in PAGES.values():
        if page.callbacks:
            page.callbacks(app, site)
    return app
