"""Who may look: everyone on this machine, and beyond it whoever brings the token."""

import hmac
import ipaddress
from typing import Any

COOKIE = "tunescope-token"
# Addresses that a page open in this machine's browser may call us by; any other is a name that someone else
# has pointed here.
LOCAL = {"localhost", "127.0.0.1", "[::1]"}


def loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def protect(server: Any, *, token: str | None, prefix: str) -> None:
    """Ask every visitor of a Flask server for the token, if there is one."""
    from flask import Response, redirect, request

    @server.before_request
    def ask() -> Any:
        if token is None or same(request.cookies.get(COOKIE, ""), token):
            return None
        if same(request.args.get("token", ""), token):
            # The token leaves the address, which people copy and browsers keep.
            rest = {key: request.args.getlist(key) for key in request.args if key != "token"}
            from urllib.parse import urlencode

            query = urlencode(rest, doseq=True)
            answer = redirect(request.path + ("?" + query if query else ""))
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict", path=prefix)
            return answer
        text = (
            "This dashboard asks for a token: open the address that `tunescope dashboard` printed, "
            "with its ?token=… at the end."
        )
        return Response(text, status=401, mimetype="text/plain")

    @server.after_request
    def harden(answer: Any) -> Any:
        answer.headers.setdefault("X-Content-Type-Options", "nosniff")
        answer.headers.setdefault("Referrer-Policy", "same-origin")
        return answer


def only_called(server: Any, names: set[str]) -> None:
    """Refuse requests that call this server by another name: a website could point its own name here."""
    from flask import Response, request

    @server.before_request
    def check() -> Any:
        host = request.host.rpartition(":")[0] if not request.host.endswith("]") else request.host
        if (host or request.host) in names:
            return None
        return Response(f"this server is not called {request.host}", status=421, mimetype="text/plain")


def same(given: str, wanted: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell how far they agree."""
    return hmac.compare_digest(given.encode(), wanted.encode())
