"""The content of a report: the verdict in words, numbers with their meaning, figures, heads of tables.

All of it comes from the audit and the registry; no analysis is known by name. It is plain text, to be escaped
by the page that shows it.
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

ROWS = 200  # rows of a table in a page; the parquet file holds all
HEAD = 8  # of these, rows that are not folded
SENTENCE = 40  # characters from which a cell of a table wraps
LEADING = 12  # metrics of an analysis that are not folded
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of an analysis with its meaning and threshold; `verdict` is empty without a threshold."""

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
    """The first rows of a table; `sorted_by` names the columns that it is sorted by, largest first."""

    name: str
    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    total: int
    sorted_by: list[str]
    file: str


@dataclass(frozen=True, kw_only=True)
class EmbeddedFigure:
    """A figure for plotly.js, without its title, which the page shows itself so that it wraps."""

    name: str
    title: str
    spec: str  # JSON of data and layout
    height: int  # in pixels, as the width
    width: int | None  # None: as wide as the page
    drawn: int  # scatter points in it
    total: int  # before thinning


@dataclass(frozen=True, kw_only=True)
class Section:
    """The part of a report on one analysis with a result."""

    name: str
    outcome: Outcome
    result: Result
    question: str
    reading: str
    paper: str
    summary: str
    verdict: str
    preflight: bool
    metrics: list[Metric]
    notes: list[str]


def leading_metrics(metrics: list[Metric]) -> tuple[list[Metric], list[Metric]]:
    """The first metrics and those with a threshold, and the others; a few more are not worth a fold.

    Where there are many thresholds, those that are passed fold too.
    """
    if len(metrics) <= LEADING + 4:
        return metrics, []
    many = sum(bool(metric.threshold) for metric in metrics) > LEADING
    shown = [metric for metric in metrics if metric.threshold and not (many and metric.verdict == "pass")]
    first = [metric for i, metric in enumerate(metrics) if i < LEADING or metric in shown]
    return first, [metric for metric in metrics if metric not in first]


def build_sections(audit: Audit) -> list[Section]:
    """A section for each analysis with a result: those that check the files, then the most severe first."""
    sections = [build_section(audit, name) for name in audit.results]
    by_verdict = sorted(sections, key=lambda section: ("fail", "warn", "pass", "").index(section.verdict))
    return sorted(by_verdict, key=lambda section: not section.preflight)


def build_section(audit: Audit, name: str) -> Section:
    """The section of one analysis; when that is not installed, without figures and meanings."""
    outcome = audit.analyses[name]
    result = audit.results[name]
    record, notes = registry_record(name)
    try:
        summary = record.summary(result) if record else ""
    except Exception as error:  # a table of another version; its numbers are still shown
        log.warning("%s: cannot be summed up: %r", name, error)
        summary = ""
    rows = metric_rows(audit, name, record)
    verdicts = {metric.verdict for metric in rows}
    return Section(
        name=name, outcome=outcome, result=result, reading=record.reading if record else "", summary=summary,
        question=record.question if record else outcome.question, metrics=rows,
        preflight=record.preflight if record else False,
        paper=record.paper if record else outcome.paper, notes=[*result.notes, *notes],
        verdict=next((verdict for verdict in ("fail", "warn", "pass") if verdict in verdicts), ""),
    )  # fmt: skip


def registry_record(name: str) -> tuple[Analysis | None, list[str]]:
    """The registry's record of an analysis, or None and why."""
    try:
        return find(name), []
    except LookupError as error:
        return None, [f"Shown without figures and without the meaning of its numbers: {error}."]


def metric_rows(audit: Audit, name: str, record: Analysis | None) -> list[Metric]:
    """Each metric of an analysis in its own order, then those of the policy that have no value."""
    result = audit.results[name]
    rules = judged(result, audit.policy)
    lacking = audit.not_measured.get(name, {})
    rows = []
    for metric in dict.fromkeys([*result.metrics, *lacking]):
        judgement = {}
        if metric in lacking:
            judgement = {"threshold": f"no value: {lacking[metric]}"}
        elif metric in rules:
            rule = rules[metric]
            factor = scale(result, rule)
            beyond = rule.beyond(result.metrics[metric], factor)
            judgement = {"verdict": beyond[0] if beyond else "pass", "source": rule.source}
            judgement["threshold"] = threshold_text(rule, factor)
        value = format_number(result.metrics.get(metric))
        meaning = record.metrics.get(metric, "") if record else ""
        rows.append(Metric(name=metric, value=value, meaning=meaning, **judgement))
    return rows


def threshold_text(rule: Rule, factor: float) -> str:
    """The thresholds of a rule in words."""
    steps = {"warn": rule.warn, "fail": rule.fail}
    limits = {word: format_number(limit * factor) for word, limit in steps.items() if limit is not None}
    return ", ".join(f"{word} {rule.side} {limit}" for word, limit in limits.items())


def threshold_side(audit: Audit, finding: Finding) -> str:
    """On which side of its threshold the value of a finding lies."""
    return audit.policy.rules[finding.analysis][finding.metric].side


def count_findings(audit: Audit) -> str:
    """The findings counted: `1 warning, 0 failures (2 numbers judged)`."""
    failures = sum(finding.severity == "fail" for finding in audit.findings)
    warnings = len(audit.findings) - failures
    text = "nothing was judged: the policy has no threshold for what was measured"
    if audit.judged:
        counts = f"{plural(warnings, 'warning')}, {plural(failures, 'failure')}"
        text = f"{counts} ({plural(audit.judged, 'number')} judged)"
    return f"no result from {', '.join(audit.failed)}; {text}" if audit.failed else text


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return text[:1].upper() + text[1:] + "."


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_number(value: Any) -> str:
    """A value for a reader: four digits, separated thousands, a dash for what was not measured."""
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
        return ", ".join(f"{key} {format_number(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(format_number, value))
    return str(value)


def table_head(name: str, kind: str, frame: "pd.DataFrame", metrics: Iterable[str]) -> Table:
    """The first rows of the table `kind` of an analysis.

    A long one is sorted by the columns with the names of `metrics`, then by its flags, the largest first.
    """
    import pandas as pd

    numeric = [pd.api.types.is_numeric_dtype(frame[column]) for column in frame.columns]
    flags = [column for column in frame.columns if pd.api.types.is_bool_dtype(frame[column])]
    keys = [metric for metric in metrics if metric in frame.columns] + flags if len(frame) > HEAD else []
    ordered = frame.sort_values(keys, ascending=False, kind="stable") if keys else frame
    rows = [[format_cell(value) for value in row] for row in ordered.head(ROWS).to_numpy(dtype=object)]
    return Table(
        name=kind, columns=list(map(str, frame.columns)), numeric=numeric, rows=rows, total=len(frame),
        sorted_by=keys, file=table_file(name, kind),
    )  # fmt: skip


def format_cell(value: Any) -> Cell:
    """One value of a table."""
    import pandas as pd

    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool | int | float):
        return Cell(text=format_number(value), order=None if math.isnan(value) else float(value))
    missing = pd.api.types.is_scalar(value) and pd.isna(value)
    return Cell(text=format_number(None if missing else value))


def table_heads(result: Result) -> list[Table]:
    """The first rows of each table of a result."""
    return [table_head(result.analysis, kind, frame, result.metrics) for kind, frame in result.tables.items()]


def embedded_figures(result: Result, limit: int = thinning.LIMIT) -> tuple[list[EmbeddedFigure], list[str]]:
    """The figures of a result, thinned to `limit` points each, and a note if they cannot be drawn."""
    record, _ = registry_record(result.analysis)
    if record is None:
        return [], []
    try:
        return [embed_figure(name, figure, limit) for name, figure in record.draw(result).items()], []
    except Exception as error:  # a plug-in may draw it; the report is still worth its numbers
        log.warning("%s: its figures cannot be drawn", result.analysis, exc_info=True)
        return [], [f"Its figures could not be drawn ({type(error).__name__}: {error})."]


def embed_figure(name: str, figure: "go.Figure", limit: int = thinning.LIMIT) -> EmbeddedFigure:
    """One figure, thinned so that it can be embedded."""
    from plotly.io.json import to_json_plotly

    traces, drawn, total = thinning.thin_traces(figure, limit)
    # plotly has its own markup for titles.
    title = Markup((figure.layout.title.text or name).replace("<br>", " ")).striptags()
    # The page has its own templates, light and dark; the width becomes a maximum, for narrow pages.
    left_out = {"title", "width", "template"}
    layout = {key: value for key, value in figure.layout.to_plotly_json().items() if key not in left_out}
    spec = to_json_plotly({"data": [thinning.pack_arrays(trace) for trace in traces], "layout": layout})
    size: dict[str, Any] = {"height": int(figure.layout.height or 420), "width": figure.layout.width}
    return EmbeddedFigure(name=name, title=title, spec=spec, drawn=drawn, total=total, **size)
