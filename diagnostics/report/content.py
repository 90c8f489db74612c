"""What a reader is shown of an audit: its verdict in words, numbers with their meaning, figures, table heads.

All of it comes from the audit and the registry; no analysis is known by name. It is plain text: who puts it
on a page escapes it.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from diagnostics.core.analysis import Analysis, Result
from diagnostics.core.policy import Finding, Rule, judged, scale
from diagnostics.core.registry import find
from diagnostics.report import thinning
from diagnostics.store.audit_store import Audit, Outcome, table_file

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

ROWS = 200  # of a table that a page holds; the parquet file holds all
LEADING = 12  # numbers of an analysis that are shown before the reader asks for more
HEAD = 8  # of these seen before the reader asks for more
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of an analysis, what it says and what it is judged by; `verdict` is empty if by nothing."""

    name: str
    value: str
    meaning: str
    verdict: str = ""
    threshold: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A formatted value; `order` is the number to sort by, None for text."""

    text: str
    order: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """The first rows of a table; `sorted_by` names columns, largest first; none: as the analysis left it."""

    name: str
    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    total: int
    sorted_by: list[str]
    file: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure for plotly.js, without its title, which stands beside it and wraps.

    Attributes:
        spec: JSON of data and layout.
        height, width: in pixels; width None: as wide as the page.
        drawn, total: scatter points in it, and in the table.
    """

    name: str
    title: str
    spec: str
    height: int
    width: int | None
    drawn: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Section:
    """All that is shown of one analysis that has a result."""

    name: str
    outcome: Outcome
    result: Result
    question: str
    reading: str
    paper: str
    summary: str
    verdict: str
    metrics: list[Metric]
    notes: list[str]


def parted(metrics: list[Metric]) -> tuple[list[Metric], list[Metric]]:
    """The numbers that a reader wants first, and the others: a few more are not worth a fold."""
    if len(metrics) <= LEADING + 4:
        return metrics, []
    first = [metric for place, metric in enumerate(metrics) if place < LEADING or metric.threshold]
    return first, [metric for metric in metrics if metric not in first]


def sections(audit: Audit) -> list[Section]:
    """What is shown of each analysis that has a result, the gravest first."""
    made = [section(audit, name) for name in audit.results]
    return sorted(made, key=lambda section: ("fail", "warn", "pass", "").index(section.verdict))


def section(audit: Audit, name: str) -> Section:
    """What is shown of one analysis; where it is not installed, the audit still reads, if with less."""
    outcome = audit.analyses[name]
    result = audit.results[name]
    record, notes = registered(name)
    try:
        summary = record.summary(result) if record else ""
    except Exception as error:  # a table of another version: the numbers are still worth showing
        log.warning("%s: cannot be summed up: %r", name, error)
        summary = ""
    shown = metrics(audit, name, record)
    verdicts = {metric.verdict for metric in shown}
    return Section(
        name=name,
        outcome=outcome,
        result=result,
        question=record.question if record else outcome.question,
        reading=record.reading if record else "",
        paper=record.paper if record else outcome.paper,
        summary=summary,
        verdict=next((verdict for verdict in ("fail", "warn", "pass") if verdict in verdicts), ""),
        metrics=shown,
        notes=[*result.notes, *notes],
    )


def registered(name: str) -> tuple[Analysis | None, list[str]]:
    """The registry's record of an analysis, or None and why."""
    try:
        return find(name), []
    except LookupError as error:
        return None, [f"Shown without its figures and without what its numbers mean: {error}."]


def metrics(audit: Audit, name: str, record: Analysis | None) -> list[Metric]:
    """Each number of an analysis in its own order, then those that the policy asks for in vain."""
    result = audit.results[name]
    rules = judged(result, audit.policy)
    lacking = audit.not_measured.get(name, {})
    shown = []
    for metric in dict.fromkeys([*result.metrics, *lacking]):
        judgement = {}
        if metric in lacking:
            judgement = {"threshold": f"not judged: {lacking[metric]}"}
        elif metric in rules:
            rule = rules[metric]
            factor = scale(result, rule)
            beyond = rule.beyond(result.metrics[metric], factor)
            judgement = {
                "verdict": beyond[0] if beyond else "pass",
                "threshold": thresholds(rule, factor),
                "source": rule.source,
            }
        shown.append(
            Metric(
                name=metric,
                value=number(result.metrics.get(metric)),
                meaning=record.metrics.get(metric, "") if record else "",
                **judgement,
            )
        )
    return shown


def thresholds(rule: Rule, factor: float) -> str:
    """The thresholds of a rule in words."""
    side = "below" if rule.below else "above"
    steps = (("warn", rule.warn), ("fail", rule.fail))
    return ", ".join(f"{word} {side} {number(limit * factor)}" for word, limit in steps if limit is not None)


def side(audit: Audit, finding: Finding) -> str:
    """On which side of its threshold a finding lies."""
    return "below" if audit.policy.rules[finding.analysis][finding.metric].below else "above"


def headline(audit: Audit, shown: Iterable[Section]) -> str:
    """The verdict in a sentence or two."""
    numbers = sum(bool(metric.verdict) for section in shown for metric in section.metrics)
    fails = sum(finding.severity == "fail" for finding in audit.findings)
    warns = len(audit.findings) - fails
    of = f"of {counted(numbers, 'judged number')}"
    said = []
    if audit.failed:
        said.append(
            f"Not finished: {', '.join(audit.failed)} gave no result; nothing says that it would pass."
        )
    if fails:
        more = f"; {warns} more would only warn" if warns else ""
        said.append(f"{fails} {of} {'is' if fails == 1 else 'are'} beyond the limit{more}.")
    elif warns:
        said.append(
            f"{warns} {of} {'asks' if warns == 1 else 'ask'} for a second look; none is beyond the limit."
        )
    elif numbers:
        said.append(f"{counted(numbers, 'number')} judged, none beyond a threshold.")
    else:
        said.append("Nothing was judged: the policy has no threshold for what was measured.")
    return " ".join(said)


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def number(value: Any) -> str:
    """A value as a reader wants it: four digits, thousands apart, a dash for what was not measured."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isnan(value):
            return NOTHING
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(number, value))
    return str(value)


def table(name: str, kind: str, frame: "pd.DataFrame", metrics: Iterable[str]) -> Table:
    """The head of a table that is too long to be shown whole, the rows that matter on top.

    Args:
        name: the analysis.
        kind: the table's name.
        metrics: of the analysis: a long table with a column of that name is sorted by it, then by its flags.
    """
    import pandas as pd

    numeric = [pd.api.types.is_numeric_dtype(frame[column]) for column in frame.columns]
    flags = [column for column in frame.columns if pd.api.types.is_bool_dtype(frame[column])]
    keys = [metric for metric in metrics if metric in frame.columns] + flags if len(frame) > HEAD else []
    ordered = frame.sort_values(keys, ascending=False, kind="stable") if keys else frame
    return Table(
        name=kind,
        columns=[str(column) for column in frame.columns],
        numeric=numeric,
        rows=[[cell(value) for value in row] for row in ordered.head(ROWS).to_numpy(dtype=object)],
        total=len(frame),
        sorted_by=keys,
        file=table_file(name, kind),
    )


def cell(value: Any) -> Cell:
    """One value of a table."""
    import pandas as pd

    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool | int | float):
        return Cell(text=number(value), order=None if math.isnan(value) else float(value))
    missing = pd.api.types.is_scalar(value) and pd.isna(value)
    return Cell(text=number(None if missing else value))


def tables(result: Result) -> list[Table]:
    """The heads of a result's tables."""
    return [table(result.analysis, kind, frame, result.metrics) for kind, frame in result.tables.items()]


def pictures(result: Result, limit: int = thinning.LIMIT) -> tuple[list[Picture], list[str]]:
    """The figures of a result, each of at most `limit` scatter points, and a note if they cannot be drawn."""
    record, _ = registered(result.analysis)
    if record is None:
        return [], []
    try:
        return [picture(name, figure, limit) for name, figure in record.draw(result).items()], []
    except Exception as error:  # drawing may be any package's code; the numbers are worth a report without it
        log.warning("%s: its figures cannot be drawn", result.analysis, exc_info=True)
        return [], [f"Its figures could not be drawn ({type(error).__name__}: {error})."]


def picture(name: str, figure: "go.Figure", limit: int = thinning.LIMIT) -> Picture:
    """One figure, light enough to be embedded."""
    from plotly.io.json import to_json_plotly

    traces, drawn, total = thinning.traces(figure, limit)
    # plotly's titles are markup of its own kind
    title = Markup((figure.layout.title.text or name).replace("<br>", " ")).striptags()
    # The page brings its own template, light and dark; a width becomes a limit, for narrow pages.
    apart = {"title", "width", "template"}
    layout = {key: value for key, value in figure.layout.to_plotly_json().items() if key not in apart}
    return Picture(
        name=name,
        title=title,
        spec=to_json_plotly({"data": [thinning.packed(trace) for trace in traces], "layout": layout}),
        height=int(figure.layout.height or 420),
        width=figure.layout.width,
        drawn=drawn,
        total=total,
    )
