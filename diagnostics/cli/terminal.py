"""What the command line prints: results on standard output, progress and trouble on standard error."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from diagnostics.audit.correlate import Correlations
    from diagnostics.audit.series import Series
    from diagnostics.core.analysis import Analysis
    from diagnostics.core.policy import Finding
    from diagnostics.store.audit_store import Audit, Outcome

COLOURS = {"pass": "green", "ok": "green", "warn": "yellow", "fail": "red", "failed": "red", "skipped": "dim"}
SAYING = {
    "pass": "nothing measured is beyond its threshold",
    "warn": "worth a look before it ships",
    "fail": "not fit to ship by this policy",
}


def plain(text: str) -> str:
    """One line without control characters: names and messages may come from files."""
    return "".join(each if each.isprintable() else "�" for each in " ".join(text.split()))


def trouble(text: str) -> None:
    """One line on standard error."""
    typer.echo(f"tunescope: {plain(text)}", err=True)


def say(*lines: "Text | Table | str") -> None:
    """Lines on standard output, wrapped by the terminal if there is one."""
    console = Console(highlight=False)
    for line in lines:
        console.print(line, soft_wrap=not isinstance(line, Table), markup=False)


def coloured(word: str, width: int = 0) -> Text:
    """A verdict or a status in its colour."""
    return Text(word.ljust(width), style=COLOURS.get(word.strip().lower(), ""))


@contextmanager
def bars(*, show: bool) -> "Iterator[Callable[[str, int, int, str], None] | None]":
    """A progress callback for an audit: a bar for each analysis, on standard error; None when not shown."""
    if not show:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[name]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", style="dim", markup=False),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    tasks = {}

    def update(name: str, done: int, total: int, what: str) -> None:
        progress.start()  # not before: an error alone must stay one line
        if name not in tasks:
            tasks[name] = progress.add_task("", name=plain(name))
        progress.update(tasks[name], completed=done, total=total, description=plain(what))

    try:
        yield update
    finally:
        if tasks:
            progress.stop()


def closing(audit: "Audit") -> None:
    """What a person reads when an audit has ended: the verdict first, then why, then where to look."""
    say(headline(audit), *findings(audit), "", *outcomes(audit.analyses), "", *remarks(audit))
    if audit.path is not None:
        say(f"report   {audit.path / 'report.html'}", f"results  {audit.path / 'audit.json'}")


def outcomes(analyses: "Mapping[str, Outcome]") -> list[Text]:
    """What became of each analysis; those of one reason share a line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, made in analyses.items():
        told = one_line(made) if made.status == "ok" else plain(made.reason or "")
        lines.setdefault((made.status, told), []).append(name)
    return [
        Text.assemble("  ", coloured(status, 8), f"{', '.join(names)}: {told}")
        for (status, told), names in sorted(lines.items(), key=lambda line: line[0][0] != "ok")
    ]


def headline(audit: "Audit") -> Text:
    """The verdict in one line."""
    saying = SAYING[audit.verdict]
    if not audit.judged:
        saying = "nothing was judged, for no rule of the policy applies to what was measured"
    if audit.failed:
        saying = f"{', '.join(audit.failed)} did not finish, so nothing says that this checkpoint is fit"
    tuned, base = plain(str(audit.tuned["ref"])), plain(str(audit.base["ref"]))
    style = f"bold {COLOURS[audit.verdict]}"
    return Text.assemble((audit.verdict.upper(), style), f"  {tuned} against {base}: {saying}")


def findings(audit: "Audit") -> list[Text]:
    """Each finding with its value, threshold and source."""
    lines = []
    for each in audit.findings:
        lines += [
            Text(),
            Text.assemble("  ", coloured(each.severity), f"  {each.analysis}: {comparison(each)}"),
        ]
        lines += [Text(f"        {plain(each.message)}")]
        lines += [Text(f"        threshold: {plain(each.source)}", style="dim")]
    return lines


def comparison(found: "Finding") -> str:
    """A value beside its threshold."""
    sign = "below" if found.value < found.threshold else "above"
    return f"{found.metric} is {found.value:.4g}, {sign} {found.threshold:.4g}"


def one_line(made: "Outcome") -> str:
    """What an analysis found, in a line."""
    assert made.result is not None
    origin = "from an earlier run" if made.reused else f"{made.seconds:.1f} s"
    return f"{plain(made.result.summary())} ({origin})"


def remarks(audit: "Audit") -> list[Text]:
    """What must be known beside the results: notes, rules without a value, tensors without a partner."""
    lines = [f"{name}: {note}" for name, result in audit.results.items() for note in result.notes]
    lines += audit.notes
    for name, reasons in audit.not_measured.items():
        lines += [f"{name}: {metric} is not judged, {reason}" for metric, reason in reasons.items()]
    if audit.unmatched:
        first = audit.unmatched[0]
        more = f" and {len(audit.unmatched) - 1} more" if len(audit.unmatched) > 1 else ""
        lines.append(f"not compared: {first['tensor']} ({first['reason']}){more}; all are in audit.json")
    return [Text(f"  note: {plain(line)}", style="dim") for line in lines] + ([Text("")] if lines else [])


def failures(audit: "Audit") -> None:
    """A line on standard error for each analysis that has no result although it should."""
    for name, made in audit.failed.items():
        trouble(f"{name}: {made.reason}")


def explanation(audits: "Mapping[str, Audit]") -> None:
    """Several models tuned from one base: what each is found to be, and how to read it."""
    from diagnostics.core.registry import find

    width = max(map(len, audits), default=0)
    say(f"{len(audits)} models tuned from one small base, each against it:", "")
    for name, made in audits.items():
        say(Text.assemble("  ", name.ljust(width), "  ", coloured(made.verdict.upper(), 4)))
        for analysis, result in made.results.items():
            say(f"  {' ' * width}  {analysis}: {plain(result.summary())}")
    for analysis in dict.fromkeys(name for made in audits.values() for name in made.results):
        record = find(analysis)
        say("", Text.assemble((analysis, "bold"), f": {record.question}"), f"  {record.reading}")
        say(f"  Source: {record.paper}")
    told: dict[tuple[str, str, str, str], list[str]] = {}
    for name, made in audits.items():
        for each in made.findings:
            told.setdefault((each.severity, each.metric, each.message, each.source), []).append(
                f"{name} {each.value:.4g}"
            )
    for (severity, metric, message, source), names in told.items():
        say("", Text.assemble("  ", coloured(severity), f"  {metric}: {', '.join(names)}"))
        say(f"        {plain(message)}", Text(f"        threshold: {plain(source)}", style="dim"))
    say("", *(f"report   {made.path / 'report.html'}" for made in audits.values() if made.path is not None))
    say("", "The same for yours:  tunescope audit BASE TUNED")


def registry(records: "Mapping[str, Analysis]") -> None:
    """The analyses that are installed."""
    from diagnostics.core.inputs import OPTIONS

    for name, record in records.items():
        needs, uses = (
            ", ".join(OPTIONS.get(i, i) for i in inputs) for inputs in (record.inputs, record.optional)
        )
        say(Text.assemble((name, "bold"), f"  {record.question}"))
        say(f"  needs  {needs}", *([f"  uses   {uses}"] if uses else []))
        say(f"  cost   {record.cost}", f"  paper  {record.paper}")
        defaults = record.describe()["parameters"]
        say(*(f"  --set  {name}.{parameter}={setting(value)}" for parameter, value in defaults.items()), "")


def setting(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, list):
        return ",".join(map(setting, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def comparisons(made: "Series", out: Path) -> None:
    """A series as a table: a row a checkpoint, the first metric of each analysis against both others.

    Below it what is found of the run as a whole.
    """
    if made.rows:
        table = Table("checkpoint", "verdict")
        for name in made.measures:
            for other in ("first", "previous"):
                table.add_column(f"{name}\nagainst {other}", justify="right")
        for row in made.rows:
            numbers = [number(audit, name) for name in made.measures for audit in (row.first, row.previous)]
            table.add_row(plain(row.label), coloured(row.verdict), *numbers)
        say(table)
    if made.run is not None:
        over = {
            name: outcome
            for name, outcome in made.run.analyses.items()
            if name not in {each for row in made.rows for each in row.first.results}
        }
        say("", Text.assemble(coloured(made.run.verdict.upper()), "  the run as a whole"))
        say(*findings(made.run), "", *outcomes(over), "", *remarks(made.run))
    say("", f"results  {out / 'series.json'}, a report in each directory beside it")


def correlations(made: "Correlations") -> None:
    """Correlations over several models: raw, and given how far each moved."""
    table = Table("sharpness of", "raw", "p (Holm)", "given displacement", "p (Holm)")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in made.table.to_dict("records"):
        cells = []
        for kind in ("raw", "partial"):
            value, low, high = (row[f"{kind}{end}"] for end in ("", "_low", "_high"))
            known = not math.isnan(value)
            cells += [f"{value:+.2f} ({low:+.2f} to {high:+.2f})" if known else "–"]
            cells += [f"{row[f'{kind}_holm']:.3g}" if known else "–"]
        table.add_row(plain(str(row["predictor"])), *cells)
    say(f"Rank correlation of sharpness at tuned with {made.outcome}, {len(made.models)} models", table)
    say(*made.notes)


def number(audit: "Audit", measure: str) -> str:
    """A metric of an audit, `analysis.metric`."""
    name, _, metric = measure.partition(".")
    result = audit.results.get(name)
    return "–" if result is None or metric not in result.metrics else f"{result.metrics[metric]:.4g}"
