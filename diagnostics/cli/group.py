"""The command group: commands of other packages, and every error on one line.

Other packages add commands through the entry-point group `tunescope.commands`: a Typer app or a function. A
command is imported when it runs; the list of commands shows the first line of its module's docstring.
"""

import ast
import importlib.util
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from probes.errors import InputError, UnknownNameError

GROUP = "tunescope.commands"
# `importlib_metadata`, which Dash imports, replaces the class of entry points by its own.
EntryPoint = Any


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C; the text says what is kept."""


class Commands(TyperGroup):
    """Our commands and those of entry points."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Our commands in the order of `main.py`, then the others by name."""
        ours = list(super().list_commands(ctx))
        return ours + sorted({entry.name for entry in entry_points(group=GROUP)} - set(ours))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; for one of another package a placeholder, which the list of commands shows."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        for entry in entry_points(group=GROUP, name=cmd_name):
            return TyperCommand(name=cmd_name, callback=None, help=docstring_line(entry))
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to run; one of another package is imported now."""
        if args and args[0] not in self.commands:
            for entry in entry_points(group=GROUP, name=args[0]):
                self.add_command(load_command(entry), args[0])
            if args[0] not in self.commands:
                ctx.fail(f"No such command {args[0]!r}; known: {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """The arguments; `--help` when there are none."""
        return super().parse_args(ctx, args or ["--help"])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and end the process with the exit code."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("TUNESCOPE_TRACEBACK"):
                raise
            code = report_error(error)
        raise SystemExit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run; an interrupt, which Typer would swallow, is passed on."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error


def report_error(error: BaseException) -> int:
    """Print one line on standard error, and return the exit code."""
    from diagnostics.cli.terminal import print_error

    if isinstance(error, Interrupted | KeyboardInterrupt):
        print_error(str(error) or "interrupted")
        return 130
    if hasattr(error, "format_message"):  # wrong usage, found by Typer
        command = getattr(getattr(error, "ctx", None), "command_path", "tunescope")
        print_error(f"{error.format_message()} (see {command} --help)")
        return 2
    if isinstance(error, InputError | OSError):
        print_error(str(error))
        return 2
    print_error(f"{type(error).__name__}: {error} (TUNESCOPE_TRACEBACK=1 shows where)")
    return 3


def docstring_line(entry: EntryPoint) -> str:
    """First line of the docstring of an entry point's module, read without running the module."""
    try:
        spec = importlib.util.find_spec(entry.module)
        text = Path(str(spec.origin)).read_text(encoding="utf-8") if spec else ""
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    except (ImportError, OSError, SyntaxError, ValueError):
        return "(cannot be read)"


def load_command(entry: EntryPoint) -> Any:
    """The command of an entry point."""
    try:
        command = entry.load()
    except ImportError as error:
        package = entry.dist.name if entry.dist else entry.value
        raise UnknownNameError(f"the command {entry.name} of {package} cannot be loaded: {error}") from error
    if callable(command) and not isinstance(command, typer.Typer) and not hasattr(command, "make_context"):
        app = typer.Typer(add_completion=False)
        app.command(entry.name)(command)
        command = app
    return get_command(command) if isinstance(command, typer.Typer) else command
