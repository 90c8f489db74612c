"""Look at audits in a browser: one explored, several compared, a series followed."""

import secrets
import socket
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.errors import InputError

if TYPE_CHECKING:
    from dashboard.server.runs import Runs


def dashboard(
    audits: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AUDIT…]",
            help="Directories of audits or of series, or that hold some; without any, those here.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="H", help="Address to bind to; one that others reach asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="P", min=0, max=65535, help="0 takes any that is free.")
    ] = 8050,
    prefix: Annotated[str, typer.Option(metavar="PATH", help="Path that a proxy serves it under.")] = "/",
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    allow_run: Annotated[
        bool, typer.Option("--allow-run", help="Let visitors run audits of the pairs given here.")
    ] = False,
    pair: Annotated[
        list[str] | None, typer.Option(metavar='"NAME=BASE TUNED"', help="What visitors may run an audit of.")
    ] = None,
    runs: Annotated[
        Path, typer.Option(metavar="DIR", help="Where these audits are written; made if need be.")
    ] = Path("audits"),
    task: Annotated[list[str] | None, typer.Option(metavar="F", help="Rows for them, as of `audit`.")] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="F", help="The same.")] = None,
    guard: Annotated[list[str] | None, typer.Option(metavar="F", help="The same.")] = None,
    ood: Annotated[list[str] | None, typer.Option(metavar="NAME=F", help="The same.")] = None,
    train: Annotated[list[str] | None, typer.Option(metavar="F", help="The same.")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="F", help="A TOML file of thresholds for them.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="D", help="Where they run.")] = "auto",
) -> None:
    """Look at audits in a browser."""
    from dashboard.server.guard import loopback

    rows = {"task": task, "keep": keep, "guard": guard, "ood": ood, "train": train}
    given = {role: files for role, files in rows.items() if files}
    allowed: dict[str, Any] = {}
    if allow_run:
        allowed["run"] = runnable(pair or [], runs, given, policy, device)
    elif pair or given or policy:
        raise InputError("--pair, rows and --policy are for audits that visitors run: add --allow-run")
    free(host, port)
    token = None if loopback(host) else secrets.token_urlsafe(24)
    serve(
        audits or [],
        host=host,
        port=port,
        prefix=prefix,
        token=token,
        open_browser=open_browser,
        allowed=allowed,
    )


def runnable(
    pair: list[str], directory: Path, rows: dict[str, list[str]], policy: str | None, device: str
) -> "Runs":
    """What visitors may run, checked as far as a start in a second allows.

    Raises:
        InputError: no pair, one that cannot be read, or a policy that makes no sense.
    """
    from dashboard.server.runs import Runs, pairs

    if not pair:
        raise InputError('--allow-run: of what? add --pair "NAME=BASE TUNED", as often as there are pairs')
    if policy and not Path(policy).is_file():
        raise InputError(f"--policy {policy}: there is no such file")
    return Runs(directory, pairs(pair), rows, policy, device)


def free(host: str, port: int) -> None:
    """Make sure of the address before anything is loaded.

    Raises:
        InputError: it cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot serve on {host} port {port}: {error.strerror}; name another with --host or --port"
        ) from error


def serve(
    audits: list[str],
    *,
    host: str,
    port: int,
    prefix: str,
    token: str | None,
    open_browser: bool,
    allowed: dict[str, Any],
) -> None:
    """Serve the dashboard until it is interrupted."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    from dashboard.app import create_app
    from dashboard.server.guard import LOCAL, only_called
    from dashboard.server.warm import afterwards, meanwhile
    from dashboard.state.audit_library import AuditLibrary, nearby

    class Quiet(WSGIRequestHandler):
        """Keeps requests out of the terminal; errors are shown."""

        def log_request(self, *_: object) -> None:
            """Say nothing."""

    shelf = AuditLibrary(audits or list(nearby(Path.cwd())))
    if not shelf.entries and not allowed:
        raise InputError(
            "no audit here; name one, or write one with `tunescope audit BASE TUNED --out DIR` "
            "(`tunescope demo` writes three)"
        )
    app = create_app(shelf, prefix=prefix, token=token, allowed=allowed)
    if token is None and prefix.strip("/") == "":
        only_called(app.server, LOCAL | {host})
    afterwards(app.server, shelf)
    meanwhile(shelf)
    server = make_server(host, port, app.server, threaded=True, request_handler=Quiet)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{server.server_port}{app.config.requests_pathname_prefix}"
    if token:
        typer.echo(
            f"{host} can be reached by others, and audits tell of models and texts that may be private: "
            "a token is asked for.",
            err=True,
        )
        address += f"?token={token}"
    typer.echo(
        f"{len(shelf.entries)} on the shelf: {', '.join(list(shelf.entries)[:6]) or 'none yet'}", err=True
    )
    if "run" in allowed:
        typer.echo(f"visitors may run audits of {', '.join(allowed['run'].pairs)}", err=True)
    typer.echo(address)
    if open_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
