"""What the command line prints: results on standard output, progress and errors on standard error.

After an audit that is one screen: verdict, findings, a line for each analysis, where the report is. On a
terminal lines are wrapped or cut to its width; in a pipe each stays whole.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from diagnostics.audit.correlate import Correlations
    from diagnostics.audit.series import AuditSeries
    from diagnostics.core.analysis import Analysis
    from diagnostics.core.policy import Finding
    from diagnostics.store.audit_store import Audit

COLOURS = {"pass": "green", "ok": "green", "warn": "yellow", "fail": "red", "failed": "red", "skipped": "dim"}


def printable(text: str) -> str:
    """The text on one line without control characters: names and messages may come from files."""
    return "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))


def print_error(text: str) -> None:
    """One line on standard error."""
    typer.echo(f"tunescope: {printable(text)}", err=True)


def print_lines(*lines: "Text | Table | str") -> None:
    """Lines on standard output."""
    console = Console(highlight=False)
    for line in lines:
        console.print(line, soft_wrap=not isinstance(line, Table), markup=False)


def styled(word: str, width: int = 0) -> Text:
    """A verdict or a status in its colour."""
    return Text(word.ljust(width), style=COLOURS.get(word.strip().lower(), ""))


def entry(head: "str | Text", body: str, *, style: str = "", cut: bool = False) -> Text:
    """A head and its text, which on a terminal is cut to the line, or wrapped behind the head."""
    head, body = Text.assemble(head), printable(body)
    console = Console()
    if console.is_terminal:
        room = max(20, console.width - len(head))
        if cut:
            body = body if len(body) <= room else body[: room - 1].rstrip() + "…"
        else:
            body = ("\n" + " " * len(head)).join(textwrap.wrap(body, room, break_on_hyphens=False))
    return Text.assemble(head, (body, style))


@contextmanager
def progress_bars(*, show: bool, name: str = "") -> Iterator[Any]:
    """A progress callback that draws a bar for each name on standard error; None unless shown.

    Args:
        name: of the only bar; the callback then takes no name.
    """
    if not show:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[name]}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.description}", style="dim", markup=False),
    )  # fmt: skip
    console = Console(stderr=True)
    # Finished bars vanish from a terminal, which then shows the results alone.
    progress = Progress(*columns, console=console, transient=console.is_terminal)
    tasks = {}

    def update(name: str, done: int, total: int, what: str) -> None:
        progress.start()  # only now: an error without progress must stay one line
        if name not in tasks:
            tasks[name] = progress.add_task("", name=printable(name))
        progress.update(tasks[name], completed=done, total=total, description=printable(what))

    try:
        yield partial(update, name) if name else update
    finally:
        if tasks:
            progress.stop()


# --- one audit ---


def print_audit(audit: "Audit", *, verbose: bool = False, notes: bool = False) -> None:
    """The verdict, the findings, a line for each analysis, and where the report is.

    Args:
        notes: print those of the analyses too, as `verbose` does.
    """
    print_lines(verdict_line(audit), *finding_lines(audit), "")
    print_lines(*outcome_lines(audit, verbose=verbose), *note_lines(audit, verbose=verbose or notes))
    if audit.path is not None:
        print_lines("", f"report   {audit.path / 'report.html'}", f"results  {audit.path / 'audit.json'}")


def verdict_line(audit: "Audit") -> Text:
    """The verdict in one line."""
    from diagnostics.report.content import count_findings

    tuned, base = printable(str(audit.tuned["ref"])), printable(str(audit.base["ref"]))
    verdict = (audit.verdict.upper(), f"bold {COLOURS[audit.verdict]}")
    return Text.assemble(verdict, f"  {tuned} against {base}: {count_findings(audit)}")


def finding_lines(audit: "Audit") -> list[Text]:
    """Each finding: its value and threshold, what it means, and where the threshold comes from."""
    lines = []
    for finding in audit.findings:
        severity = Text.assemble("  ", styled(finding.severity), "  ")
        lines += [Text(), entry(severity, f"{finding.analysis}: {comparison(finding)}")]
        if finding.message != comparison(finding):
            lines.append(entry("        ", finding.message))
        lines.append(entry("        source: ", finding.source, style="dim"))
    return lines


def comparison(finding: "Finding") -> str:
    """A value and its threshold."""
    side = "below" if finding.value < finding.threshold else "above"
    return f"{finding.metric} is {finding.value:.4g}, {side} {finding.threshold:.4g}"


def outcome_lines(audit: "Audit", *, verbose: bool, without: "Mapping[str, Any] | None" = None) -> list[Text]:
    """A line for each analysis with a result; then those without, a line for each reason.

    Args:
        verbose: also list the analyses that were not asked for, and do not cut the summaries.
        without: analyses to leave out.
    """
    analyses = {name: outcome for name, outcome in audit.analyses.items() if name not in (without or {})}
    done = {name: outcome for name, outcome in analyses.items() if outcome.result is not None}
    width = max(map(len, done), default=0)
    lines = []
    for name, outcome in done.items():
        assert outcome.result is not None
        seconds = "reused" if outcome.reused else f"{outcome.seconds:.1f} s"
        head = Text.assemble("  ", styled("ok", 7), f"  {name:<{width}}  {seconds:>7}  ")
        lines.append(entry(head, outcome.result.summary(), cut=not verbose))
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, outcome in sorted(analyses.items(), key=lambda item: item[1].status):  # failed, then skipped
        if outcome.result is None and (verbose or outcome.status == "failed" or asked_for(audit, name)):
            reasons.setdefault((outcome.status, outcome.reason or ""), []).append(name)
    for (status, reason), names in reasons.items():
        head = Text.assemble("  ", styled(status, 7), "  ")
        lines.append(entry(head, f"{', '.join(names)}: {reason}"))
    return lines


def asked_for(audit: "Audit", name: str) -> bool:
    """Whether the options of an audit let an analysis run."""
    only, skip = (audit.options.get(option) or () for option in ("only", "skip"))
    return name not in skip and (not only or name in only)


def note_lines(audit: "Audit", *, verbose: bool) -> list[Text]:
    """The notes on the audit as a whole, and the number of the others; with `verbose` all of them.

    The others are the notes of analyses, the metrics without a value, and the tensors without a counterpart.
    """
    others = [f"{name}: {note}" for name, result in audit.results.items() for note in result.notes]
    for name, reasons in audit.not_measured.items():
        others += [f"{name}: {metric} is not judged: {reason}" for metric, reason in reasons.items()]
    if audit.unmatched:
        first = audit.unmatched[0]
        more = f", and {len(audit.unmatched) - 1} more" if len(audit.unmatched) > 1 else ""
        others.append(f"not compared: {first['tensor']} ({first['reason']}){more}; audit.json lists all")
    lines = [entry("  note: ", note, style="dim") for note in (*audit.notes, *(others if verbose else ()))]
    if others and not verbose:
        text = "1 note is" if len(others) == 1 else f"{len(others)} notes are"
        text += f" in the report; --verbose prints {'it' if len(others) == 1 else 'them'}"
        lines.append(entry("  ", text, style="dim"))
    return [Text(), *lines] if lines else []


def print_failures(audit: "Audit") -> None:
    """A line on standard error for each analysis that failed."""
    for name, outcome in audit.failed.items():
        print_error(f"{name}: {outcome.reason}")


# --- several audits ---


def print_demo(audits: "Mapping[str, Audit]", *, verbose: bool = False) -> None:
    """Several models tuned from one base: the verdict on each, and how to read it."""
    from diagnostics.core.registry import find

    width = max(map(len, audits), default=0)
    print_lines(f"{len(audits)} models tuned from one small base, each compared with it:", "")
    for name, audit in audits.items():
        verdict = Text.assemble("  ", name.ljust(width), "  ", styled(audit.verdict.upper(), 4), "  ")
        for analysis, result in audit.results.items():
            print_lines(entry(verdict, f"{analysis}: {result.summary()}", cut=not verbose))
            verdict = Text(" " * len(verdict))
    for analysis in dict.fromkeys(name for audit in audits.values() for name in audit.results):
        record = find(analysis)
        print_lines("", Text.assemble((analysis, "bold"), f": {record.question}"))
        print_lines(entry("  ", record.reading), entry("  ", f"Source: {record.paper}", style="dim"))
    models: dict[tuple[str, str, str, str], list[str]] = {}
    for name, audit in audits.items():
        for finding in audit.findings:
            key = (finding.severity, finding.metric, finding.message, finding.source)
            models.setdefault(key, []).append(f"{name} {finding.value:.4g}")
    for (severity, metric, message, source), values in models.items():
        head = Text.assemble("  ", styled(severity), "  ")
        print_lines("", entry(head, f"{metric}: {', '.join(values)}"), entry("        ", message))
        print_lines(entry("        source: ", source, style="dim"))
    reports = [audit.path / "report.html" for audit in audits.values() if audit.path is not None]
    print_lines("", *(f"report   {report}" for report in reports))
    print_lines("", "For your own models:  tunescope audit BASE TUNED")


def print_series(finished: "AuditSeries", out: Path, *, verbose: bool = False) -> None:
    """A row for each checkpoint with the first metric of each analysis; then the run as a whole."""
    if finished.rows:
        table = Table("checkpoint", "verdict")
        for name in finished.measures:
            for other in ("first", "previous"):
                table.add_column(f"{name}\nagainst {other}", justify="right")
        for row in finished.rows:
            numbers = [
                metric_text(audit, name) for name in finished.measures for audit in (row.first, row.previous)
            ]
            table.add_row(printable(row.label), styled(row.verdict), *numbers)
        print_lines(table)
    base_notes = [note for audit in finished.audits for note in audit.notes if "was trained on" in note]
    print_lines(*(entry("note: ", note, style="dim") for note in dict.fromkeys(base_notes)))
    print_lines(*(entry("left out: ", reason) for reason in finished.left_out.values()))
    run = finished.run
    if run is not None:
        in_table = {name: None for row in finished.rows for name in row.first.results}
        print_lines("", Text.assemble(styled(run.verdict.upper()), "  the run as a whole"))
        print_lines(*finding_lines(run), "", *outcome_lines(run, verbose=verbose, without=in_table))
        print_lines(*note_lines(run, verbose=verbose))
    reports = sorted({audit.path.name for audit in finished.audits if audit.path is not None})
    print_lines("", *(f"report   {out / name / 'report.html'}" for name in reports[-1:]))
    if len(reports) > 1:
        print_lines(f"         and {len(reports) - 1} more in {out}, one for each comparison")
    print_lines(f"results  {out / 'series.json'}")


def print_correlations(correlations: "Correlations", out: Path | None) -> None:
    """Correlations over several models: raw, and partial given how far each model moved."""
    table = Table("sharpness of", "raw", "p (Holm)", "given displacement", "p (Holm)")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in correlations.table.to_dict("records"):
        cells = []
        for kind in ("raw", "partial"):
            value, low, high = (row[f"{kind}{end}"] for end in ("", "_low", "_high"))
            measured = not math.isnan(value)
            cells += [f"{value:+.2f} ({low:+.2f} to {high:+.2f})" if measured else "–"]
            cells += [f"{row[f'{kind}_holm']:.3g}" if measured else "–"]
        table.add_row(printable(str(row["predictor"])), *cells)
    models = len(correlations.models)
    print_lines(f"Rank correlation of sharpness at tuned with {correlations.outcome}, {models} models", table)
    print_lines(*(entry("note: ", note) for note in correlations.notes))
    if out is not None:
        print_lines("", f"report   {out / 'correlations.html'}")


def metric_text(audit: "Audit", measure: str) -> str:
    """A metric of an audit, named `analysis.metric`."""
    name, _, metric = measure.partition(".")
    result = audit.results.get(name)
    return "–" if result is None or metric not in result.metrics else f"{result.metrics[metric]:.4g}"


# --- what else is printed ---


def print_edit(summary: str, notes: "tuple[str, ...]", out: Path) -> None:
    """What an edit of a checkpoint wrote."""
    print_lines(entry("", summary), *(entry("note: ", note, style="dim") for note in notes))
    print_lines(f"written  {out}")


def list_analyses(records: "Mapping[str, Analysis]") -> None:
    """The installed analyses: the question of each and what it needs."""
    width = max(map(len, records), default=0)
    for name, record in records.items():
        print_lines(entry(Text.assemble((name.ljust(width), "bold"), "  "), record.question))
        print_lines(entry(" " * (width + 2), f"needs {option_names(record.inputs)}", style="dim"))
    print_lines("", "Cost, metrics and parameters:  tunescope analyses NAME")


def print_analyses(records: "Mapping[str, Analysis]") -> None:
    """Everything that the registry knows about analyses."""
    for name, record in records.items():
        print_lines(Text.assemble((name, "bold"), f"  {record.question}"))
        print_lines(entry("  needs   ", option_names(record.inputs)))
        if record.optional:
            print_lines(entry("  uses    ", option_names(record.optional)))
        print_lines(entry("  cost    ", record.cost), entry("  paper   ", record.paper))
        print_lines(entry("  read    ", record.reading))
        for metric, meaning in record.metrics.items():
            print_lines(entry(f"  metric  {metric}: ", meaning))
        defaults = record.describe()["parameters"]
        print_lines(*(f"  --set   {name}.{key}={setting_text(value)}" for key, value in defaults.items()), "")


def option_names(inputs: "tuple[str, ...]") -> str:
    """The options that supply the inputs of an analysis."""
    from diagnostics.core.inputs import OPTIONS

    return ", ".join(OPTIONS.get(name, name) for name in inputs)


def setting_text(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, list):
        return ",".join(map(setting_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
