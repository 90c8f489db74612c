"""Small things that pages are made of; every string is shown as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import html

from diagnostics.report import content

Content = Any

WORDS = {"pass": "pass", "warn": "warn", "fail": "fail"}


def icon(verdict: str) -> html.Span:
    """The sign of a verdict; the word stands beside it."""
    return html.Span(className=f"icon {WORDS.get(verdict, 'skipped')}", **{"aria-hidden": "true"})


def badge(verdict: str, word: str = "") -> html.Span:
    """A verdict as its sign and a word, never by colour alone."""
    return html.Span(
        [icon(verdict), word or WORDS.get(verdict, "not judged")],
        className=f"badge {WORDS.get(verdict, 'skipped')}",
    )


def code(text: object) -> html.Code:
    """A name as it stands in a file or a command."""
    return html.Code(str(text))


def going(children: Content, href: str, **about: Any) -> html.A:
    """A link within the app, to a `?…`: `assets/tunescope.js` follows it without loading the page anew."""
    return html.A(children, href=href, **about)


def heading(question: str, *, eyebrow: Content = None, lead: Content = None) -> html.Header:
    """The head of a page."""
    return html.Header(
        [
            html.P(eyebrow, className="eyebrow") if eyebrow else None,
            html.H1(question, id="heading", tabIndex="-1"),
            html.P(lead, className="lead") if lead else None,
        ],
        className="page-head",
    )


def flat(children: Iterable[Content]) -> list[Content]:
    """Children of children in one list: Dash takes no list within a list."""
    return [each for child in children for each in (flat(child) if isinstance(child, list) else [child])]


def section(title: str, *children: Content, name: str = "") -> html.Section:
    """A part of a page under a title of its own."""
    return html.Section([html.H2(title), *flat(children)], id=name or title.lower().replace(" ", "-"))


def notes(texts: Iterable[str]) -> Content:
    """What a reader must bear in mind, if there is anything."""
    listed = [html.Li(text) for text in texts]
    return html.Div([html.P("Bear in mind"), html.Ul(listed)], className="notes") if listed else None


def state(kind: str, title: str, *children: Content) -> html.Div:
    """What stands where there is nothing to show: `empty`, `damaged`, `unknown`, or `trouble`."""
    return html.Div(
        [
            html.Span(className=f"state-sign {kind}", **{"aria-hidden": "true"}),
            html.P(title),
            *flat(children),
        ],
        className=f"state {kind}",
        role="alert" if kind in ("damaged", "trouble") else "status",
    )


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Content]], *, label: str, numeric: Iterable[int] = ()
) -> Content:
    """A short table; the first cell of a row is its head; `numeric` counts columns from 0."""
    right = set(numeric)

    def look(i: int) -> dict[str, str]:
        return {"className": "n"} if i in right else {}

    body = [
        html.Tr(
            [
                (html.Th(c, scope="row", **look(i)) if i == 0 else html.Td(c, **look(i)))
                for i, c in enumerate(row)
            ]
        )
        for row in rows
    ]
    head = html.Tr([html.Th(text, scope="col", **look(i)) for i, text in enumerate(heads)])
    return html.Div(
        html.Table([html.Thead(head), html.Tbody(body)], className="plain"),
        className="scroll",
        tabIndex="0",
        role="region",
        **{"aria-label": label},
    )


def pairs(items: Mapping[str, Any]) -> html.Dl:
    """Names and values."""
    return html.Dl(
        [
            html.Div(
                [
                    html.Dt(key),
                    html.Dd(value if hasattr(value, "to_plotly_json") else content.format_number(value)),
                ]
            )
            for key, value in items.items()
        ]
    )


def short(fingerprint: str | None) -> Content:
    """The start of a hash; the whole of it can be copied."""
    if not fingerprint:
        return content.NOTHING
    return html.Span(
        [
            code(fingerprint[:12] + "…"),
            dmc.CopyButton(
                value=fingerprint,
                size="compact-xs",
                variant="default",
                children="copy",
                copiedChildren="copied",
            ),
        ],
        className="hash",
    )


def folded(title: Content, *children: Content, opened: bool = False) -> html.Details:
    """Something that is unfolded by those who want it."""
    return html.Details([html.Summary(title), *flat(children)], open=opened)


def waiting() -> list[Content]:
    """The outline of a figure that is being drawn."""
    return [dmc.Skeleton(height=18, width="40%", mt="lg"), dmc.Skeleton(height=360, mt="sm")]


def failure(error: Exception) -> Content:
    """What a page says when the server could not answer."""
    return state(
        "trouble",
        "This could not be shown",
        html.P([code(f"{type(error).__name__}: {error}")]),
        html.P("Load the page anew; if it happens again, the terminal of the dashboard says more."),
    )
