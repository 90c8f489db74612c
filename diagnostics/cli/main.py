"""The command `tunescope`: parses, calls one function, prints.

Commands of other packages are entry points in the group `tunescope.commands`: a Typer app or a function. They
are imported when they are run; the list of commands shows the first line of their module's docstring.
"""

import ast
import functools
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points, version
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from probes.errors import InputError, UnknownNameError

GROUP = "tunescope.commands"
# `importlib_metadata`, which Dash imports, hands out entry points of a class of its own from then on.
EntryPoint = Any


class Commands(TyperGroup):
    """The commands here and those of entry points; every error is one line, never a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Ours in the order of this file, then the others by name."""
        ours = list(super().list_commands(ctx))
        return ours + sorted({entry.name for entry in entry_points(group=GROUP)} - set(ours))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or for one of another package what stands for it in the list."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        for entry in entry_points(group=GROUP, name=cmd_name):
            return TyperCommand(name=cmd_name, callback=None, help=first_line(entry))
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to run: now that of another package is imported."""
        if args and args[0] not in self.commands:
            for entry in entry_points(group=GROUP, name=args[0]):
                self.add_command(loaded(entry), args[0])
            if args[0] not in self.commands:
                ctx.fail(f"No such command {args[0]!r}; known: {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """The arguments; without any, the help is shown."""
        return super().parse_args(ctx, args or ["--help"])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and end the process with the exit code."""
        code = 0
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("TUNESCOPE_TRACEBACK"):
                raise
            code = explain(error)
        code = code if isinstance(code, int) else 0
        if any(thread.name == "fingerprints" for thread in threading.enumerate()):
            # Stopped early: Python would wait for the hashing of what may be many gigabytes.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        raise SystemExit(code)

    def invoke(self, ctx: Any) -> Any:
        """Run, and let an interrupt through that Typer would swallow."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C; the text says what is kept."""


def explain(error: BaseException) -> int:
    """Say in one line what went wrong; the exit code that it means."""
    from diagnostics.cli.terminal import trouble

    if isinstance(error, Interrupted | KeyboardInterrupt):
        trouble(str(error) or "interrupted")
        return 130
    if hasattr(error, "format_message"):  # usage, by Typer
        command = getattr(getattr(error, "ctx", None), "command_path", "tunescope")
        trouble(f"{error.format_message()} (see {command} --help)")
        return 2
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, InputError | OSError):
        trouble(text)
        return 2
    trouble(f"{type(error).__name__}: {text} (TUNESCOPE_TRACEBACK=1 shows where)")
    return 3


def first_line(entry: Any) -> str:
    """What the module behind an entry point says of itself, read without running it."""
    try:
        spec = importlib.util.find_spec(entry.module)
        text = Path(str(spec.origin)).read_text(encoding="utf-8") if spec else ""
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    except (ImportError, OSError, SyntaxError, ValueError):
        return "(cannot be read)"


def loaded(entry: Any) -> Any:
    """The command behind an entry point.

    Raises:
        UnknownNameError: it cannot be imported.
    """
    try:
        found = entry.load()
    except ImportError as error:
        package = entry.dist.name if entry.dist else entry.value
        raise UnknownNameError(f"the command {entry.name} of {package} cannot be loaded: {error}") from error
    if isinstance(found, typer.Typer):
        return get_command(found)
    if callable(found) and not hasattr(found, "make_context"):
        made = typer.Typer(add_completion=False)
        made.command(entry.name)(found)
        return get_command(made)
    return found


main = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="What fine-tuning did to a transformer, and whether the result is fit to ship.",
    subcommand_metavar="COMMAND …",
    epilog="Exit codes: 0 the policy passes, 1 it fails, 2 wrong input or usage, 3 an analysis crashed.",
)


def show_version(wanted: bool) -> bool:
    """Print the version and end, if wanted."""
    if wanted:
        typer.echo(f"tunescope {version('tunescope')}")
        raise typer.Exit
    return wanted


@main.callback()
def top(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Nothing beside the options that stand before a command."""


Texts = list[str] | None
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write; made if need be.")]
Json = Annotated[bool, typer.Option("--json", help="Print the JSON and nothing else.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print nothing: the exit code and the files say it all.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run left in --out.")]
Chat = Annotated[bool, typer.Option("--chat-template", help="Write rows as a user's message.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a repository brings.")]
Device = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda or cuda:N.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="TUNESCOPE_CACHE",
        help="Keep what is made of a base there, for the next model tuned from it; safe to delete.",
    ),
]
CacheGB = Annotated[
    float, typer.Option("--cache-gb", metavar="N", envvar="TUNESCOPE_CACHE_GB", help="Most that it may hold.")
]
Engine = Annotated[
    str, typer.Option(metavar="E", help="local, local:N, dask://HOST:PORT or ray://HOST:PORT.")
]
Base = Annotated[str, typer.Argument(metavar="BASE", help="Directory, file or hub id (`org/name@revision`).")]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The same, or an adapter.")]


def run_options(
    task: Annotated[Texts, typer.Option(metavar="F", help="Rows of what was trained, held out.")] = None,
    keep: Annotated[Texts, typer.Option(metavar="F", help="Rows of what must survive.")] = None,
    guard: Annotated[Texts, typer.Option(metavar="F", help="Rows of what must never fail.")] = None,
    ood: Annotated[Texts, typer.Option(metavar="NAME=F", help="Rows that it was not made for.")] = None,
    train: Annotated[Texts, typer.Option(metavar="F", help="Rows that it was trained on.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Read the first N rows of a file.")] = None,
    chat_template: Chat = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Let tokenizers differ: nats per byte.")
    ] = False,
    trust_remote_code: Trust = False,
    only: Annotated[Texts, typer.Option(metavar="NAMES", help="Run these analyses alone.")] = None,
    skip: Annotated[Texts, typer.Option(metavar="NAMES", help="Leave these analyses out.")] = None,
    settings: Annotated[
        Texts,
        typer.Option("--set", metavar="ANALYSIS.PARAM=VALUE", help="A parameter in place of its default."),
    ] = None,
    policy: Annotated[str | None, typer.Option(metavar="F", help="A TOML file of thresholds.")] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="D", help="Of the models; else the default of each analysis.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="For what is drawn at random.")] = 0,
    engine: Engine = "local",
    cache: Cache = None,
    cache_gb: CacheGB = 20,
    fresh: Fresh = False,
) -> dict[str, Any]:
    """What every command that audits takes, as `diagnostics.audit.audit` takes it."""
    from diagnostics.cli.settings import parse

    def names(texts: Texts) -> list[str]:
        return [name.strip() for text in texts or () for name in text.split(",") if name.strip()]

    return {
        "task": task or (),
        "keep": keep or (),
        "guard": guard or (),
        "ood": ood or (),
        "train": train or (),
        "limit": limit,
        "chat_template": chat_template,
        "approximate": approximate,
        "trust_remote_code": trust_remote_code,
        "only": names(only),
        "skip": names(skip),
        "settings": parse(settings or ()),
        "policy": policy,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "engine": engine,
        "cache": kept(cache, cache_gb),
        "fresh": fresh,
    }


def kept(cache: Path | None, gigabytes: float) -> Any:
    """The cache of factorisations in a directory, if one is named."""
    if cache is None:
        return None
    from diagnostics.store.factor_cache import FactorCache

    return FactorCache.at(cache, int(gigabytes * 1e9))


def audits(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `run_options` in place of its `**options`."""
    own = [p for p in signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        mine = {p.name: given.pop(p.name) for p in own}
        command(**mine, **run_options(**given))

    arguments = [*own, *signature(run_options).parameters.values()]
    # Positional arguments first, as a signature must; each is passed by name.
    run.__signature__ = Signature([p.replace(kind=p.KEYWORD_ONLY) for p in arguments])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in arguments}
    return run


@main.command("audit")
@audits
def run_audit(
    base: Base,
    tuned: Tuned,
    out: Out = Path("audit"),
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Measure and judge what tuning did to a base."""
    from diagnostics.audit.run import audit
    from diagnostics.cli import terminal

    with interruptible(out), terminal.bars(show=not quiet) as progress:
        made = audit(base, tuned, out=out, progress=progress, **options)
    if as_json:
        typer.echo((out / "audit.json").read_text(encoding="utf-8"), nl=False)
    elif not quiet:
        terminal.closing(made)
    terminal.failures(made)
    raise typer.Exit(made.exit_code)


@main.command("series")
@audits
def run_series(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT CKPT…",
            help="In order, the base first; a run's directory or a pattern is several.",
        ),
    ],
    steps: Annotated[
        str, typer.Option(metavar="N,N,…", help="Of each checkpoint; the names tell otherwise.")
    ] = "",
    out: Out = Path("series"),
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Audit a run: each checkpoint against the first and the previous, and the run as a whole."""
    from diagnostics.audit.series import series
    from diagnostics.cli import terminal

    labels = [step.strip() for step in steps.split(",")] if steps else ()
    with interruptible(out), terminal.bars(show=not quiet) as progress:
        made = series(checkpoints, out=out, labels=labels, progress=progress, **options)
    if as_json:
        typer.echo((out / "series.json").read_text(encoding="utf-8"), nl=False)
    elif not quiet:
        terminal.comparisons(made, out)
    for audit in made.audits:
        terminal.failures(audit)
    raise typer.Exit(made.exit_code)


@main.command("mitigate")
def run_mitigate(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A directory that does not exist yet.")],
    scale: Annotated[float, typer.Option(help="0 removes an intruder, 1 leaves it.")] = 0.7,
    mode: Annotated[
        Literal["top", "all", "update", "neighbour"],
        typer.Option(
            help="The highest-ranked intruder of each matrix (the paper's), all of them, or a control: the "
            "whole update, a neighbouring direction."
        ),
    ] = "top",
    k: Annotated[int, typer.Option("--k", help="Leading directions looked at in each matrix.")] = 10,
    epsilon: Annotated[float, typer.Option(help="Cosine under which a direction counts as new.")] = 0.5,
    full: Annotated[bool, typer.Option("--full", help="Write full weights even of an adapter.")] = False,
    device: Device = "auto",
    engine: Engine = "local",
    cache: Cache = None,
    cache_gb: CacheGB = 20,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a tuned checkpoint with its intruders damped."""
    from diagnostics.cli import terminal
    from diagnostics.edits.mitigate import mitigate
    from diagnostics.execution import engines, environment
    from diagnostics.store.files import to_json

    place = environment.device(device)
    with engines.engine(engine, place), terminal.bars(show=not quiet) as progress:
        shown = functools.partial(progress, "mitigate") if progress else None
        made = mitigate(
            base, tuned, out, scale=scale, mode=mode, k=k, epsilon=epsilon, full=full or None, device=place,
            cache=kept(cache, cache_gb), progress=shown,
        )  # fmt: skip
    if as_json:
        typer.echo(to_json(made.describe()), nl=False)
    elif not quiet:
        terminal.say(made.summary(), *made.notes, f"written  {made.out}")


@main.command("graft")
def run_graft(
    base: Base,
    tuned: Tuned,
    mask: Annotated[
        Path,
        typer.Option("--mask", metavar="F", help="A mask of an audit: AUDIT/masks/….safetensors."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A directory that does not exist yet.")],
    without: Annotated[
        bool, typer.Option("--without", help="The complement: tuned with these entries from base.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a base with the entries of a mask from tuned."""
    from diagnostics.cli import terminal
    from diagnostics.edits.graft import graft
    from diagnostics.store.files import to_json

    with terminal.bars(show=not quiet) as progress:
        shown = functools.partial(progress, "graft") if progress else None
        made = graft(base, tuned, mask, out, without=without, progress=shown)
    if as_json:
        typer.echo(to_json(made.describe()), nl=False)
    elif not quiet:
        terminal.say(made.summary(), *made.notes, f"written  {made.out}")


@main.command("interpolate")
def run_interpolate(
    base: Base,
    tuned: Tuned,
    alpha: Annotated[float, typer.Option("--alpha", metavar="A", help="0 is base, 1 is tuned.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A directory that does not exist yet.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model at some place on the line from base to tuned."""
    from diagnostics.cli import terminal
    from diagnostics.edits.interpolate import interpolate
    from diagnostics.store.files import to_json

    with terminal.bars(show=not quiet) as progress:
        shown = functools.partial(progress, "interpolate") if progress else None
        made = interpolate(base, tuned, alpha, out, progress=shown)
    if as_json:
        typer.echo(to_json(made.describe()), nl=False)
    elif not quiet:
        terminal.say(made.summary(), *made.notes, f"written  {made.out}")


@main.command("demo")
def run_demo(out: Out = Path("demo-audit"), fresh: Fresh = False, quiet: Quiet = False) -> None:
    """Audit the bundled checkpoints and explain what was found."""
    from diagnostics.audit.demo import demo
    from diagnostics.cli import terminal

    with interruptible(out), terminal.bars(show=not quiet) as progress:
        made = demo(out, fresh=fresh, progress=progress)
    if not quiet:
        terminal.explanation(made)
    for audit in made.values():
        terminal.failures(audit)
    # That a model is found unfit is what the demonstration is about.
    raise typer.Exit(max(code for code in (0, *(audit.exit_code for audit in made.values())) if code != 1))


@main.command("detect")
def run_detect(
    rows: Annotated[str, typer.Argument(metavar="ROWS", help="The file to score, row by row.")],
    base: Annotated[str | None, typer.Option(metavar="REF", help="Directory, file or hub id.")] = None,
    tuned: Annotated[str | None, typer.Option(metavar="REF", help="The same, or an adapter.")] = None,
    task: Annotated[
        str | None, typer.Option(metavar="F", help="Rows of what was trained, held out: they calibrate it.")
    ] = None,
    detector: Annotated[
        Path | None, typer.Option(metavar="F", help="One saved before, in place of these three.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="F", help="Keep the detector for --detector.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of in-distribution rows that may be flagged; else 0.05.")
    ] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Score means over tokens.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Give each token's ratio as well.")] = False,
    windows: Annotated[
        bool, typer.Option("--windows", help="Read rows longer than the models take to the end; else cut.")
    ] = False,
    chat_template: Chat = False,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(metavar="D", help="Of the models; else as stored.")] = None,
) -> None:
    """Score rows by how foreign they are to a tuned model."""
    from diagnostics.execution import environment

    if detector is None and (base is None or tuned is None or task is None):
        raise InputError("detect needs --base, --tuned and --task, or a saved --detector")
    if detector is not None and (base or tuned or task or per_token or windows or chat_template):
        raise InputError(
            "a saved --detector has its own --base, --tuned, --task, --per-token, --windows and "
            "--chat-template; leave them out"
        )
    from diagnostics.analyses.ood.detector import LikelihoodRatioDetector
    from probes.text.rows import read_task

    wanted = read_task(rows)  # before a model is loaded: what is wrong with it is said at once
    given = {
        "device": environment.device(device),
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        **({"alpha": alpha} if alpha is not None else {}),
    }
    if detector is not None:
        made = LikelihoodRatioDetector.load(detector, **given)
    else:
        made = LikelihoodRatioDetector.fit(
            (base, tuned), task, per_token=per_token, windows=windows, chat_template=chat_template, **given
        )
    if save is not None:
        made.save(save)
    for record in made.records(wanted, tokens=tokens):
        typer.echo(json.dumps(record, ensure_ascii=False))


@main.command("correlate")
def run_correlate(
    audits: Annotated[
        list[str], typer.Argument(metavar="AUDIT AUDIT…", help="Of several models tuned from one base.")
    ],
    metric: Annotated[Literal["loss", "accuracy"], typer.Option(help="Of the OOD rows.")] = "loss",
    where: Annotated[
        Literal["tuned", "half", "best"], typer.Option("--at", help="The place between base and tuned.")
    ] = "half",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="For tables and pictures.")] = None,
    as_json: Json = False,
) -> None:
    """Ask whether sharpness goes with quality on OOD rows, over tuned models of one base."""
    from diagnostics.audit.correlate import correlate
    from diagnostics.cli import terminal
    from diagnostics.store.files import to_json

    made = correlate(audits, metric=metric, where=where)
    if out is not None:
        made.write(out)
    if as_json:
        typer.echo(to_json(made.record()), nl=False)
        return
    terminal.correlations(made)
    if out is not None:
        terminal.say(f"written  {out / 'correlations.html'}, its tables beside it")


@main.command("report")
def write_report(
    audit: Annotated[Path, typer.Argument(metavar="AUDIT", help="An audit's directory.")],
    form: Annotated[
        Literal["html", "md", "json"], typer.Option("--format", help="Form of the report.")
    ] = "html",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="F", help="Else AUDIT/report.html, or standard output.")
    ] = None,
) -> None:
    """Write the report of a saved audit: html, md or json."""
    from diagnostics.report import render
    from diagnostics.store.audit_store import load
    from diagnostics.store.files import replacing

    made = load(audit)
    if form == "html":
        assert made.path is not None
        out = out or made.path / "report.html"
        render.write_html(made, out)
    else:
        text = render.to_markdown(made) if form == "md" else render.to_json(made)
        if out is None:
            typer.echo(text, nl=False)
            return
        with replacing(out) as part:
            part.write_text(text, encoding="utf-8")
    typer.echo(out)


@main.command("analyses")
def list_analyses(as_json: Json = False) -> None:
    """List the installed analyses: questions, needs, settings."""
    from diagnostics.cli import terminal
    from diagnostics.core.registry import broken_analyses, installed, installed_analyses
    from diagnostics.store.files import to_json

    records = installed_analyses()
    if as_json:
        typer.echo(to_json({name: record.describe() for name, record in records.items()}), nl=False)
    else:
        terminal.registry(records)
    for reason in broken_analyses(set(installed()) - set(records)).values():
        terminal.trouble(reason)


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """Say on Ctrl-C what is kept in `out`."""
    try:
        yield
    except KeyboardInterrupt as error:
        from diagnostics.store.audit_store import load

        done = 0
        for file in (out / "audit.json", *out.glob("*/audit.json")):
            with suppress(ValueError):
                done += len(load(file, damaged="drop").results)
        kept = f"{done} finished analyses are kept in {out}; the same command goes on from there"
        raise Interrupted(f"interrupted; {kept}" if done else "interrupted; nothing was finished") from error
