"""A result as a few lines of text and as HTML, for consoles and notebooks."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diagnostics.core.analysis import Analysis, Result

METRICS, NOTES, WIDTH = 12, 3, 200


def text(result: "Result", record: "Analysis | None") -> str:
    """At most a dozen lines: name, summary, first metrics, shapes of the tables, first notes."""
    question, summary = _header(result, record)
    lines = [f"Result of {result.analysis or 'no analysis'}", question, summary]
    rest = len(result.metrics) - METRICS
    metrics = [f"{name} {number(value)}" for name, value in list(result.metrics.items())[:METRICS]]
    lines.append("metrics: " + ", ".join(metrics) + (f", and {rest} more" if rest > 0 else ""))
    lines.append("tables: " + ", ".join(f"{name} {shape}" for name, shape in shapes(result).items()))
    lines += [f"note: {note}" for note in notes(result)]
    return "\n  ".join(line for line in lines if line)


def html(result: "Result", record: "Analysis | None") -> str:
    """The same, with metrics and tables as HTML tables; every string is escaped."""
    question, summary = _header(result, record)
    meanings = record.metrics if record else {}
    rest = len(result.metrics) - METRICS
    first = list(result.metrics.items())[:METRICS]
    rows = [(name, number(value), meanings.get(name, "")) for name, value in first]
    if rest > 0:
        rows.append((f"and {rest} more", "", ""))
    parts = [f"<strong>{escape(result.analysis or 'Result')}</strong>"]
    parts += [f"<p>{escape(line)}</p>" for line in (question, summary) if line]
    parts.append(_table(("metric", "value", "meaning"), rows))
    parts.append(_table(("table", "shape"), list(shapes(result).items())))
    parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(result)) + "</ul>")
    return "<div>" + "".join(parts) + "</div>"


def number(value: float | int) -> str:
    """A metric in at most six digits; counts in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def shapes(result: "Result") -> dict[str, str]:
    """Rows by columns of each table."""
    return {name: f"{len(table):,} x {table.shape[1]}" for name, table in result.tables.items()}


def notes(result: "Result") -> list[str]:
    """The first notes, shortened, and how many more there are."""
    shown = [note if len(note) <= WIDTH else f"{note[: WIDTH - 1]}…" for note in result.notes[:NOTES]]
    rest = len(result.notes) - NOTES
    return [*shown, *([f"and {rest} more notes"] if rest > 0 else [])]


def _header(result: "Result", record: "Analysis | None") -> tuple[str, str]:
    """Question and summary, where there are any."""
    if record is None:
        return "", ""
    try:
        return record.question, record.summary(result)
    except (KeyError, IndexError, ValueError):  # a filtered result may lack what the summary names
        return record.question, ""


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
