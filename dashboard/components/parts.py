"""Small components that pages are built from. Every string is shown as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import html

from dashboard.state.query import link
from diagnostics.report import content
from diagnostics.store.audit_store import Audit

Content = Any  # a Dash component, a string, or a list of them

VERDICTS = ("pass", "warn", "fail")


def icon(verdict: str) -> html.Span:
    """The sign of a verdict, for use next to its word."""
    kind = verdict if verdict in VERDICTS else "skipped"
    return html.Span(className=f"icon {kind}", **{"aria-hidden": "true"})


def badge(verdict: str, word: str = "") -> html.Span:
    """A verdict as a sign and a word, never by colour alone."""
    kind, text = (verdict, verdict) if verdict in VERDICTS else ("skipped", "not judged")
    return html.Span([icon(verdict), word or text], className=f"badge {kind}")


def source(text: Content) -> Content:
    """A remark in small letters; nothing without text."""
    return html.P(text, className="source") if text else None


def code(text: object) -> html.Code:
    """A name as it appears in a file or a command."""
    return html.Code(str(text))


def going(children: Content, href: str, **props: Any) -> html.A:
    """A link within the app, `?…`; `assets/tunescope.js` follows it without reloading the page."""
    return html.A(children, href=href, **props)


def heading(question: str, *, eyebrow: Content = None, lead: Content = None) -> html.Header:
    """The head of a page."""
    above = html.P(eyebrow, className="eyebrow") if eyebrow else None
    below = html.P(lead, className="lead") if lead else None
    return html.Header([above, html.H1(question, id="heading", tabIndex="-1"), below], className="page-head")


def flat(children: Iterable[Content]) -> list[Content]:
    """Nested lists as one list: Dash does not accept a list within a list."""
    return [item for child in children for item in (flat(child) if isinstance(child, list) else [child])]


def section(title: str, *children: Content, name: str = "") -> html.Section:
    """A titled part of a page."""
    return html.Section([html.H2(title), *flat(children)], id=name or title.lower().replace(" ", "-"))


def filters(label: str, *controls: Content, note: Content = None, className: str = "") -> html.Div:
    """The bar of controls that stays on top while a page scrolls."""
    bar = html.Div(list(controls), className=f"controls {className}".strip())
    return html.Div([bar, source(note)], className="filters", role="group", **{"aria-label": label})


def notes(texts: Iterable[str]) -> Content:
    """What a reader must know about the numbers, if there is anything."""
    items = [html.Li(text) for text in texts]
    return html.Div([html.P("Notes"), html.Ul(items)], className="notes") if items else None


def state(kind: str, title: str, *children: Content) -> html.Div:
    """A message in place of missing content; kinds: `empty`, `damaged`, `unknown`, `trouble`."""
    role = "alert" if kind in ("damaged", "trouble") else "status"
    return html.Div([html.P(title), *flat(children)], className=f"state {kind}", role=role)


def troubles(title: str, texts: Iterable[str]) -> list[Content]:
    """A message that lists errors; nothing without errors."""
    reasons = [html.P(text) for text in texts]
    return [state("trouble", title, *reasons)] if reasons else []


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Content]], *, label: str, numeric: Iterable[int] = ()
) -> Content:
    """A short table. The first cell of a row is its head; `numeric` lists columns, counted from 0."""
    right = set(numeric)

    def look(i: int) -> dict[str, str]:
        return {"className": "n"} if i in right else {}

    def line(cells: Sequence[Content]) -> html.Tr:
        others = [html.Td(cell, **look(i)) for i, cell in enumerate(cells[1:], 1)]
        return html.Tr([html.Th(cells[0], scope="row", **look(0)), *others])

    head = html.Tr([html.Th(text, scope="col", **look(i)) for i, text in enumerate(heads)])
    body = html.Table([html.Thead(head), html.Tbody([line(row) for row in rows])], className="plain")
    return html.Div(body, className="scroll", tabIndex="0", role="region", **{"aria-label": label})


def pairs(items: Mapping[str, Any]) -> html.Dl:
    """Names and values."""

    def shown(value: Any) -> Content:
        return value if hasattr(value, "to_plotly_json") else content.format_number(value)

    return html.Dl([html.Div([html.Dt(key), html.Dd(shown(value))]) for key, value in items.items()])


def short(fingerprint: str | None) -> Content:
    """The first digits of a hash, and a button that copies all of it."""
    if not fingerprint:
        return content.NOTHING
    look = {"size": "compact-xs", "variant": "default", "children": "copy", "copiedChildren": "copied"}
    button = dmc.CopyButton(value=fingerprint, **look)
    return html.Span([code(fingerprint[:12] + "…"), button], className="hash")


def folded(title: Content, *children: Content, opened: bool = False) -> html.Details:
    """Details that open on request."""
    return html.Details([html.Summary(title), *flat(children)], open=opened)


def audit_card(audit_id: str, audit: Audit, *details: Content) -> html.A:
    """A link to one audit: verdict, checkpoints, findings."""
    adapter = audit.tuned.get("adapter") or {}
    rank = f", rank {adapter['r']}" if adapter.get("r") is not None else ""
    kind = f"{audit.tuned['kind']}{rank}" if audit.tuned.get("kind") else ""
    count = content.plural(len(audit.findings), "finding") if audit.findings else "no findings"
    checkpoints = {
        "tuned": html.Span([code(audit.tuned.get("ref", "")), f" ({kind})" if kind else ""]),
        "base": code(audit.base.get("ref", "")),
    }
    summary = source(f"{count}. Analyses: {', '.join(audit.results) or 'none'}.")
    lines = [badge(audit.verdict), html.Strong(audit_id), pairs(checkpoints), summary, *details]
    return going(lines, link(audit=audit_id), className=f"card {audit.verdict}")


def waiting() -> list[Content]:
    """A placeholder for a figure that is being drawn."""
    return [dmc.Skeleton(height=18, width="40%", mt="lg"), dmc.Skeleton(height=360, mt="sm")]


def failure(error: Exception) -> Content:
    """The message of a page when a callback raised an error."""
    hint = html.P("Reload the page. If it happens again, see the terminal of the dashboard for details.")
    reason = html.P([code(f"{type(error).__name__}: {error}")])
    return state("trouble", "This could not be shown", reason, hint)
