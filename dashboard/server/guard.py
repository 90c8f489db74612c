"""Who may use the dashboard, and which requests and scripts are refused."""

import hmac
import ipaddress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from dashboard.server.callback_request import problem

if TYPE_CHECKING:
    import dash

COOKIE = "tunescope-token"
# The names of this machine. Under any other name, someone has pointed their own name at it.
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
UPDATE = "_dash-update-component"
READING = {"GET", "HEAD", "OPTIONS"}


def loopback(host: str) -> bool:
    """Whether an address to bind to is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def protect(app: "dash.Dash", *, token: str | None, prefix: str) -> None:
    """Refuse visitors without the token, requests of other sites, and malformed callbacks; limit scripts."""
    from flask import redirect, request

    server = app.server

    @server.before_request
    def ask_for_token() -> Any:
        if token is None or same(request.cookies.get(COOKIE, ""), token):
            return None
        if same(request.args.get("token", ""), token):
            # Remove the token from the address, which people copy and browsers keep.
            rest = [(key, value) for key, value in request.args.items(multi=True) if key != "token"]
            answer = redirect(request.path + ("?" + urlencode(rest) if rest else ""))
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict", path=prefix)
            return answer
        address = "the address that `tunescope dashboard` printed, with its ?token=… at the end"
        return refused(401, f"This dashboard asks for a token: open {address}.")

    @server.before_request
    def refuse_other_sites() -> Any:
        if request.method in READING or same_origin():
            return None
        return refused(403, "This dashboard answers only its own pages.")

    @server.before_request
    def refuse_malformed() -> Any:
        if request.path != app.get_relative_path(f"/{UPDATE}") or request.method != "POST":
            return None
        try:
            reason = problem(request.get_json(silent=True), app.callback_map)
        except RecursionError:
            reason = "the JSON is nested too deeply"
        return refused(400, f"Malformed callback: {reason}.") if reason else None

    @server.after_request
    def add_headers(answer: Any) -> Any:
        answer.headers.setdefault("X-Content-Type-Options", "nosniff")
        answer.headers.setdefault("Referrer-Policy", "same-origin")
        if answer.mimetype == "text/html":
            answer.headers.setdefault("Content-Security-Policy", content_security_policy(app))
        return answer


def content_security_policy(app: "dash.Dash") -> str:
    """What the pages of an app may load and run.

    No `'unsafe-eval'`: AG Grid needs it only with `dangerously_allow_code`, plotly.js only for WebGL traces,
    and the dashboard has neither. No `frame-ancestors`: a notebook shows it in a frame on another origin.
    """
    directives = {
        "default-src": ["'self'"],
        # The hashes: Dash's inline script, which starts its renderer, and inline clientside callbacks.
        "script-src": ["'self'", *dict.fromkeys(app.csp_hashes())],
        # Mantine, AG Grid and plotly.js write `<style>` elements and `style` attributes at run time; the page
        # itself has the theme's colours in one.
        "style-src": ["'self'", "'unsafe-inline'"],
        # data: the icons in CSS; blob: the image that plotly.js saves.
        "img-src": ["'self'", "data:", "blob:"],
        # AG Grid has its icons in a font inside its style sheet.
        "font-src": ["'self'", "data:"],
        "object-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'self'"],
    }
    return "; ".join(" ".join([name, *sources]) for name, sources in directives.items())


def only_called(server: Any, names: set[str]) -> None:
    """Refuse requests under other host names: a website could point its own name at this server."""
    from flask import request

    @server.before_request
    def check() -> Any:
        host = request.host.rpartition(":")[0] if not request.host.endswith("]") else request.host
        if (host or request.host) in names:
            return None
        return refused(421, f"this server is not called {request.host}")


def same_origin() -> bool:
    """Whether a request comes from a page of this server, or from no page at all."""
    from flask import request

    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    # Browsers leave it out over plain http to another machine.
    origin = request.headers.get("Origin")
    # A website cannot set X-Forwarded-Host without asking first, which is not answered.
    names = {request.host, request.headers.get("X-Forwarded-Host", request.host)}
    return origin is None or urlsplit(origin).netloc in names


def refused(status: int, reason: str) -> Any:
    """A plain answer that says why."""
    from flask import Response

    return Response(reason, status=status, mimetype="text/plain")


def same(first: str, second: str) -> bool:
    """Whether two secrets are equal, in a time that does not depend on how far they agree."""
    return hmac.compare_digest(first.encode(), second.encode())
