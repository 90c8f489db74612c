"""The command `tunescope`: each command parses its options, calls one function, and prints."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from diagnostics.cli import options as opt
from diagnostics.cli.group import Commands, Interrupted
from probes.errors import InputError

main = typer.Typer(
    cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="What fine-tuning did to a transformer, and whether the result is fit to ship.",
    subcommand_metavar="COMMAND …",
    epilog="Exit codes: 0 the policy passes, 1 it fails, 2 wrong input or usage, 3 an analysis crashed.",
)  # fmt: skip


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
    """Options in front of a command."""


@main.command("audit")
@opt.with_run_options
def run_audit(
    base: opt.Base, tuned: opt.Tuned, adapter: opt.Adapter = None, out: opt.Out = Path("audit"),
    as_json: opt.Json = False, quiet: opt.Quiet = False, verbose: opt.Verbose = False, **options: Any,
) -> None:  # fmt: skip
    """Compare TUNED with BASE: run the analyses, judge the numbers, write a report."""
    run_and_print(out, as_json, quiet, verbose, base=base, tuned=tuned, adapter=adapter, **options)


@main.command("check")
def run_check(
    base: opt.Base, tuned: opt.Tuned, adapter: opt.Adapter = None,
    policy: opt.PolicyFile = None, fresh: opt.Fresh = False, replace: opt.Replace = False,
    out: opt.Out = Path("check"),
    as_json: opt.Json = False, quiet: opt.Quiet = False, verbose: opt.Verbose = False,
) -> None:  # fmt: skip
    """Check in seconds, without data, that TUNED is what it seems: tuned, merged, complete, finite."""
    from diagnostics.core.registry import installed_analyses

    names = [name for name, record in installed_analyses().items() if record.preflight]
    run_and_print(
        out, as_json, quiet, verbose, notes=True, base=base, tuned=tuned, adapter=adapter, only=names,
        policy=policy, fresh=fresh, replace=replace,
    )  # fmt: skip


def run_and_print(
    out: Path, as_json: bool, quiet: bool, verbose: bool, *, notes: bool = False, **options: Any
) -> NoReturn:  # fmt: skip
    """Audit a pair, print the outcome, and end with its exit code."""
    from diagnostics.audit.run import audit
    from diagnostics.cli import terminal

    with interruptible(out), terminal.progress_bars(show=not quiet) as progress:
        finished = audit(out=out, progress=progress, **options)
    if as_json:
        typer.echo((out / "audit.json").read_text(encoding="utf-8"), nl=False)
    elif not quiet:
        terminal.print_audit(finished, verbose=verbose, notes=notes)
    end(finished.exit_code, finished)


@main.command("series")
@opt.with_run_options
def run_series(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT CKPT…",
            help="In order, the base first. A run's directory or a pattern stands for several.",
        ),
    ],
    steps: Annotated[
        str,
        typer.Option(metavar="N,N,…", help="Step of each checkpoint; by default read from the names."),
    ] = "",
    out: opt.Out = Path("series"),
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    **options: Any,
) -> None:
    """Audit a training run: each checkpoint against the first and the previous one, and the run itself."""
    from diagnostics.audit.series import series
    from diagnostics.cli import terminal

    labels = [step.strip() for step in steps.split(",")] if steps else ()
    logging.getLogger("probes.checkpoints.series").addHandler(logging.NullHandler())  # printed at the end
    with interruptible(out), terminal.progress_bars(show=not quiet) as progress:
        finished = series(checkpoints, out=out, labels=labels, progress=progress, **options)
    if as_json:
        typer.echo((out / "series.json").read_text(encoding="utf-8"), nl=False)
    elif not quiet:
        terminal.print_series(finished, out, verbose=verbose)
    end(finished.exit_code, *finished.audits)


@main.command("mitigate")
def run_mitigate(
    base: opt.Base,
    tuned: opt.Tuned,
    out: opt.NewOut,
    scale: Annotated[float, typer.Option(help="0 removes an intruder, 1 leaves it.")] = 0.7,
    mode: Annotated[
        Literal["top", "all", "update", "neighbour"],
        typer.Option(
            help="top: highest-ranked intruder of each matrix, as in the paper. all: every intruder. "
            "update, neighbour: controls, which scale the whole delta or a base-like direction."
        ),
    ] = "top",
    k: Annotated[int, typer.Option("--k", help="Leading singular vectors examined in each matrix.")] = 10,
    epsilon: Annotated[float, typer.Option(help="Cosine under which a vector counts as new.")] = 0.5,
    full: Annotated[bool, typer.Option("--full", help="Write full weights, even for an adapter.")] = False,
    device: opt.Device = "auto",
    engine: opt.Engine = "local",
    cache: opt.Cache = None,
    cache_gb: opt.CacheGB = 20,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write TUNED with its intruder dimensions scaled down."""
    from diagnostics.cli import terminal
    from diagnostics.edits.mitigate import mitigate
    from diagnostics.execution import engines, environment

    resolved = environment.device(device)
    with (
        engines.engine(engine, resolved),
        terminal.progress_bars(show=not quiet, name="mitigate") as progress,
    ):
        written = mitigate(
            base, tuned, out, scale=scale, mode=mode, k=k, epsilon=epsilon, full=full or None,
            device=resolved, cache=opt.open_cache(cache, cache_gb), progress=progress,
        )  # fmt: skip
    print_edit(written, as_json, quiet)


@main.command("graft")
def run_graft(
    base: opt.Base,
    tuned: opt.Tuned,
    mask: Annotated[
        Path,
        typer.Option("--mask", metavar="F", help="Mask from an audit: AUDIT/masks/….safetensors."),
    ],
    out: opt.NewOut,
    without: Annotated[
        bool, typer.Option("--without", help="Write the complement: TUNED with the masked entries of BASE.")
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write BASE with the masked entries of TUNED."""
    from diagnostics.cli import terminal
    from diagnostics.edits.graft import graft

    with terminal.progress_bars(show=not quiet, name="graft") as progress:
        written = graft(base, tuned, mask, out, without=without, progress=progress)
    print_edit(written, as_json, quiet)


@main.command("interpolate")
def run_interpolate(
    base: opt.Base, tuned: opt.Tuned,
    alpha: Annotated[float, typer.Option("--alpha", metavar="A", help="0 is BASE, 1 is TUNED.")],
    out: opt.NewOut, as_json: opt.Json = False, quiet: opt.Quiet = False,
) -> None:  # fmt: skip
    """Write BASE + alpha (TUNED - BASE)."""
    from diagnostics.cli import terminal
    from diagnostics.edits.interpolate import interpolate

    with terminal.progress_bars(show=not quiet, name="interpolate") as progress:
        written = interpolate(base, tuned, alpha, out, progress=progress)
    print_edit(written, as_json, quiet)


def print_edit(checkpoint: Any, as_json: bool, quiet: bool) -> None:
    """Print what an edit wrote."""
    from diagnostics.cli import terminal
    from diagnostics.store.files import to_json

    if as_json:
        typer.echo(to_json(checkpoint.describe()), nl=False)
    elif not quiet:
        terminal.print_edit(checkpoint.summary(), checkpoint.notes, checkpoint.out)


@main.command("demo")
def run_demo(
    out: opt.Out = Path("demo-audit"),
    fresh: opt.Fresh = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Audit the bundled example models and explain the result."""
    from diagnostics.audit.demo import demo
    from diagnostics.cli import terminal

    with interruptible(out), terminal.progress_bars(show=not quiet) as progress:
        audits = demo(out, fresh=fresh, progress=progress)
    if not quiet:
        terminal.print_demo(audits, verbose=verbose)
    # Exit code 1 is left out: that a model fails the policy is what the demonstration shows.
    codes = [audit.exit_code for audit in audits.values() if audit.exit_code != 1]
    end(max(codes, default=0), *audits.values())


@main.command("detect")
def run_detect(
    rows: Annotated[str, typer.Argument(metavar="ROWS", help="File of rows to score.")],
    base: Annotated[str | None, typer.Option(metavar="REF", help="Directory, file or hub id.")] = None,
    tuned: Annotated[str | None, typer.Option(metavar="REF", help="The same, or an adapter.")] = None,
    task: Annotated[
        str | None, typer.Option(metavar="F", help="Held-out rows of the tuned task, for calibration.")
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(metavar="F", help="A saved detector, in place of --base, --tuned and --task."),
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="F", help="Save the detector for --detector.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of task rows that may be flagged (0.05 unless given).")
    ] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Score by the mean over tokens.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Add the ratio of each token.")] = False,
    windows: Annotated[
        bool, typer.Option("--windows", help="Read long rows in windows instead of cutting them.")
    ] = False,
    chat_template: opt.Chat = False,
    trust_remote_code: opt.Trust = False,
    device: opt.Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="D", help="dtype of the models; by default as stored.")
    ] = None,
) -> None:
    """Score the rows of a file: how out-of-distribution are they for TUNED? Prints JSON lines."""
    from diagnostics.execution import environment

    if detector is None and (base is None or tuned is None or task is None):
        raise InputError("detect needs --base, --tuned and --task, or a saved --detector")
    if detector is not None and (base or tuned or task or per_token or windows or chat_template):
        raise InputError(
            "a saved --detector has its own --base, --tuned, --task, --per-token, --windows and "
            "--chat-template; leave them out"
        )
    from diagnostics.analyses.ood.detector import LikelihoodRatioDetector
    from probes.checkpoints.lineage import adapter_notes
    from probes.text.rows import read_task

    scored_rows = read_task(rows)  # before a model is loaded, so that a bad file is reported at once
    parameters = {
        "device": environment.device(device),
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        **({"alpha": alpha} if alpha is not None else {}),
    }
    if detector is not None:
        fitted = LikelihoodRatioDetector.load(detector, **parameters)
    else:
        fitted = LikelihoodRatioDetector.fit(
            (base, tuned), task, per_token=per_token, windows=windows, chat_template=chat_template,
            **parameters,
        )  # fmt: skip
    for note in adapter_notes(fitted.pair.base, fitted.pair.tuned):
        typer.echo(f"note: {note}", err=True)
    if save is not None:
        fitted.save(save)
    for record in fitted.records(scored_rows, tokens=tokens):
        typer.echo(json.dumps(record, ensure_ascii=False))


@main.command("correlate")
def run_correlate(
    audits: Annotated[
        list[str], typer.Argument(metavar="AUDIT AUDIT…", help="Audits of models tuned from one base.")
    ],
    metric: Annotated[Literal["loss", "accuracy"], typer.Option(help="Metric on the OOD rows.")] = "loss",
    where: Annotated[
        Literal["tuned", "half", "best"],
        typer.Option("--at", help="Where it is read: at tuned, half-way from base, or at the best alpha."),
    ] = "half",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write tables and figures there.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Correlate sharpness with quality on OOD rows, over several audits with one base."""
    from diagnostics.audit.correlate import correlate
    from diagnostics.cli import terminal
    from diagnostics.store.files import to_json

    correlations = correlate(audits, metric=metric, where=where)
    if out is not None:
        correlations.write(out)
    if as_json:
        typer.echo(to_json(correlations.record()), nl=False)
    else:
        terminal.print_correlations(correlations, out)


WRITTEN = "File to write. Default: AUDIT/report.html; md and json are printed."


@main.command("report")
def run_report(
    audit: Annotated[Path, typer.Argument(metavar="AUDIT", help="Directory of an audit.")],
    form: Annotated[
        Literal["html", "md", "json"], typer.Option("--format", help="Format of the report.")
    ] = "html",
    out: Annotated[Path | None, typer.Option("--out", metavar="F", help=WRITTEN)] = None,
) -> None:
    """Write the report of a saved audit again, as HTML, Markdown or JSON."""
    from diagnostics.report import render
    from diagnostics.store.audit_store import load
    from diagnostics.store.files import replacing

    saved = load(audit)
    if form == "html":
        assert saved.path is not None
        out = out or saved.path / "report.html"
        render.write_html(saved, out)
    else:
        text = render.to_markdown(saved) if form == "md" else render.to_json(saved)
        if out is None:
            typer.echo(text, nl=False)
            return
        with replacing(out) as part:
            part.write_text(text, encoding="utf-8")
    typer.echo(out)


@main.command("analyses")
def list_analyses(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME…]", help="Show everything about these.", show_default=False),
    ] = None,
    as_json: opt.Json = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show everything about all.", rich_help_panel=opt.OUTPUT)
    ] = False,
) -> None:
    """List the installed analyses; with a NAME, its cost, metrics and parameters."""
    from diagnostics.cli import terminal
    from diagnostics.core.registry import broken_analyses, find, installed, installed_analyses
    from diagnostics.store.files import to_json

    records = {name: find(name) for name in names} if names else installed_analyses()
    if as_json:
        typer.echo(to_json({name: record.describe() for name, record in records.items()}), nl=False)
    elif names or verbose:
        terminal.print_analyses(records)
    else:
        terminal.list_analyses(records)
    for reason in broken_analyses(set(names or installed()) - set(records)).values():
        terminal.print_error(reason)


def end(exit_code: int, *audits: Any) -> NoReturn:
    """Print the failures of audits on standard error, and end with the exit code."""
    from diagnostics.cli import terminal

    for audit in audits:
        terminal.print_failures(audit)
    raise typer.Exit(exit_code)


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """On Ctrl-C, say how many finished analyses are kept in `out`."""
    try:
        yield
    except KeyboardInterrupt as error:
        from diagnostics.store.audit_store import load

        count = 0
        for file in (out / "audit.json", *out.glob("*/audit.json")):
            with suppress(InputError):
                count += len(load(file, damaged="drop").results)
        kept = f"{count} finished {'analysis is' if count == 1 else 'analyses are'} kept in {out}"
        raise Interrupted(
            f"interrupted; {kept}; run the same command again to continue"
            if count
            else "interrupted; nothing was finished"
        ) from error
