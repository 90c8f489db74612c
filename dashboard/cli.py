"""`tunescope dashboard`: explore an audit, compare several, or follow a series in a browser."""

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
            help="Directories of audits or series, or of several; without any, those in this directory.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="H", help="Address to bind to; one that others can reach asks visitors for a token."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="P", min=0, max=65535, help="0 takes any free port.")] = 8050,
    prefix: Annotated[str, typer.Option(metavar="PATH", help="Path under which a proxy serves it.")] = "/",
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    allow_run: Annotated[
        bool, typer.Option("--allow-run", help="Let visitors run audits of the pairs that --pair names.")
    ] = False,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar='"NAME=BASE TUNED"', help="A pair that visitors may audit; repeatable."),
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where these audits are written; created if it does not exist."),
    ] = Path("audits"),
    task: Annotated[
        list[str] | None, typer.Option(metavar="F", help="Rows for these audits, as in `tunescope audit`.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="F", help="As --task.")] = None,
    guard: Annotated[list[str] | None, typer.Option(metavar="F", help="As --task.")] = None,
    ood: Annotated[list[str] | None, typer.Option(metavar="NAME=F", help="As --task.")] = None,
    train: Annotated[list[str] | None, typer.Option(metavar="F", help="As --task.")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="F", help="A TOML file of thresholds for these audits.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="D", help="Device for these audits.")] = "auto",
) -> None:
    """Explore audits in a browser."""
    from dashboard.server.guard import loopback

    rows = {"task": task, "keep": keep, "guard": guard, "ood": ood, "train": train}
    files = {role: paths for role, paths in rows.items() if paths}
    allowed: dict[str, Any] = {}
    if allow_run:
        allowed["run"] = runs_of(pair or [], runs, files, policy, device)
    elif pair or files or policy:
        needing = "--pair, files of rows and --policy"
        raise InputError(f"{needing} are for audits that visitors run: add --allow-run")
    check_port(host, port)
    token = None if loopback(host) else secrets.token_urlsafe(24)
    serve(audits or [], host, port, prefix, token, open_browser, allowed)


def runs_of(
    pair: list[str], directory: Path, rows: dict[str, list[str]], policy: str | None, device: str
) -> "Runs":
    """The audits that visitors may run, checked as far as a fast start allows.

    Raises:
        InputError: no pair, a pair that cannot be parsed, or a policy file that does not exist.
    """
    from dashboard.server.runs import Runs, pairs

    if not pair:
        raise InputError('--allow-run needs a pair: add --pair "NAME=BASE TUNED" for each pair to offer')
    if policy and not Path(policy).is_file():
        raise InputError(f"--policy {policy}: there is no such file")
    return Runs(directory, pairs(pair), rows, policy, device)


def check_port(host: str, port: int) -> None:
    """Check the address before anything is loaded.

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
    audits: list[str], host: str, port: int, prefix: str, token: str | None, open_browser: bool,
    allowed: dict[str, Any],
) -> None:  # fmt: skip
    """Serve the dashboard until it is interrupted."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    from dashboard.app import create_app
    from dashboard.server.guard import LOCAL, only_called
    from dashboard.server.warm import import_after_first_response, read_first
    from dashboard.state.audit_library import AuditLibrary, nearby

    class Quiet(WSGIRequestHandler):
        """Prints errors, but not each request."""

        def log_request(self, *_: object) -> None:
            """Print nothing."""

    library = AuditLibrary(audits or nearby(Path.cwd()))
    if not library.entries and not allowed:
        raise InputError(
            "no audit in this directory; name one, or write one with `tunescope audit BASE TUNED --out DIR` "
            "(`tunescope demo` writes three)"
        )
    app = create_app(library, prefix=prefix, token=token, allowed=allowed)
    if token is None and prefix.strip("/") == "":
        only_called(app.server, LOCAL | {host})
    import_after_first_response(app.server, library)
    read_first(library)
    server = make_server(host, port, app.server, threaded=True, request_handler=Quiet)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{server.server_port}{app.config.requests_pathname_prefix}"
    if token:
        private = "audits describe models and texts that may be private"
        typer.echo(f"Others can reach {host}, and {private}: visitors need the token.", err=True)
        address += f"?token={token}"
    names = ", ".join([*list(library.entries)[:6], *(["…"] if len(library.entries) > 6 else [])])
    typer.echo(f"{len(library.entries)} audits and series: {names or 'none yet'}", err=True)
    if "run" in allowed:
        typer.echo(f"visitors may run audits of {', '.join(allowed['run'].pairs)}", err=True)
    typer.echo(address)
    if open_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
