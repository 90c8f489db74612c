"""What stands around every page: the head, the links, and the page that the address names."""

from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from dashboard.components import choose, parts
from dashboard.components.drawings import template
from dashboard.pages import Page, View, pages
from dashboard.state.audit_library import Entry
from dashboard.state.query import Query, link
from diagnostics.plotting import theme

# Mantine asks for ten shades of its first colour; the base's blue is the sixth, and readable on white.
BLUES = [
    "#eaf3fa",
    "#d3e5f3",
    "#a9cbe6",
    "#7bb0d8",
    "#559acc",
    theme.BASE,
    "#1f6ba8",
    "#1a5b90",
    "#174e7c",
    "#0f3a5e",
]

# From the dark page's text to below its paper; Mantine draws borders in the fifth, controls on the seventh.
DARKS = [
    theme.DARK.ink, "#c5cad1", theme.DARK.muted, "#7d8590", "#4a525d", theme.DARK.grid, "#262d36",
    theme.DARK.paper, "#10141a", "#0b0e12",
]  # fmt: skip

# Keys of the query that no page is another page for: filters, and what is opened on a page.
INSIDE = {"layer", "component", "group", "matrix", "cell", "table", "step", "measure"}


def layout() -> Any:
    """The empty frame; what it holds follows from the address."""
    waiting = html.Div([dmc.Skeleton(height=120), dmc.Skeleton(height=320, mt="md")], className="waiting")
    return dmc.MantineProvider(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Store(id="place"),
            dcc.Store(id="spot"),
            dcc.Store(id="inside", data=sorted(INSIDE)),
            dcc.Store(id="shown"),
            dcc.Store(id="scheme"),
            dcc.Store(id="title"),
            dcc.Store(id="looks", data={scheme: template(scheme) for scheme in ("light", "dark")}),
            html.A("Skip to the page", href="#page", className="skip"),
            dmc.AppShell(
                [
                    dmc.AppShellHeader(head(), className="head"),
                    dmc.AppShellNavbar(
                        html.Div(id="nav"), className="side", p="md", **{"aria-label": "Pages"}
                    ),
                    dmc.AppShellMain(
                        [
                            html.Div(
                                "The dashboard does not answer. Is it still running?",
                                className="lost",
                                role="status",
                            ),
                            html.Div(id="trouble"),
                            html.Div(waiting, id="page", tabIndex="-1"),
                        ]
                    ),
                ],
                id="shell",
                className="folded",
                header={"height": 56},
                navbar={"width": 236, "breakpoint": "md", "collapsed": {"mobile": True}},
                padding=0,
                transitionDuration=0,
            ),
            dmc.Drawer(
                id="drawer",
                position="right",
                size="min(760px, 94vw)",
                closeButtonProps={"aria-label": "Close"},
                overlayProps={"backgroundOpacity": 0.25},
                transitionProps={"duration": 0},
                className="drawer",
            ),
        ],
        defaultColorScheme="auto",
        theme={
            "primaryColor": "blue",
            "primaryShade": {"light": 6, "dark": 5},
            "colors": {"blue": BLUES, "dark": DARKS},
            "fontFamily": theme.FONT,
            "headings": {"fontFamily": theme.FONT},
            "defaultRadius": "sm",
            "cursorType": "pointer",
        },
    )


def head() -> html.Div:
    """The bar on top."""
    return html.Div(
        [
            dmc.Burger(
                id="burger", opened=False, size="sm", hiddenFrom="md", **{"aria-label": "Show the pages"}
            ),
            parts.going(
                [html.Span(className="mark", **{"aria-hidden": "true"}), "tunescope"], "?", className="brand"
            ),
            html.Div(id="chooser"),
            dmc.ColorSchemeToggle(
                lightIcon=html.Span(className="sun"),
                darkIcon=html.Span(className="moon"),
                variant="subtle",
                color="gray",
                **{"aria-label": "Light or dark"},
            ),
        ],
        className="head-in",
    )


def chooser(view: View) -> Any:
    """The choice of an audit, where there is one."""
    options = [entry.id for entry in view.shelf.entries.values() if entry.kind == "audit"]
    if len(options) < 2 or view.entry is None or view.entry.kind != "audit":
        return None
    return choose.one(
        view.query,
        "audit",
        "",
        options,
        searchable=len(options) > 8,
        clearable=False,
        allowDeselect=False,
        className="audit-choice",
        comboboxProps={"width": "max-content", "position": "bottom-start"},
        **{"aria-label": "Audit"},
    )


def sought(view: View) -> tuple[View, Page]:
    """The view as it is meant, and its page: an address may leave out what goes without saying."""
    known = pages()
    query = view.query
    if not query.one("page"):
        entry = view.shelf.meant(query)
        if entry is not None and not query.one("audit"):
            query = query.with_changes(audit=entry.id)
        if not query.one("audit"):
            page = "audits"
        elif entry is not None and entry.kind == "series":
            page = "series"
        else:
            page = "analysis" if query.one("analysis") else "overview"
        query = query.with_changes(page=page)
    return View(view.shelf, query, view.allowed), known.get(query.one("page"), known["audits"])


def body(view: View, page: Page) -> Any:
    """The content of a page, or what stands in its place."""
    if page.name != view.query.one("page"):
        return nowhere("There is no such page.")
    if page.of == "shelf":
        return page.content(view)
    entry = view.entry
    if entry is None:
        return nowhere("This dashboard has no such audit.")
    if entry.kind == "audit" and entry.audit is None:
        return damaged(entry)
    if entry.kind != page.of:
        return nowhere(f"This page is of one {page.of}, which {entry.id} is not.")
    return page.content(view)


def damaged(entry: Entry) -> Any:
    """What stands in place of an audit that cannot be read."""
    return [
        parts.heading(entry.id, eyebrow="audit"),
        parts.state(
            "damaged",
            "This audit is damaged or only half written",
            html.P(parts.code(entry.damage)),
            html.P(
                "If it is still running, it shows here once it has written its first results. "
                "Otherwise run `tunescope audit` once more with the same --out: what is whole is kept."
            ),
            back(),
        ),
    ]


def nowhere(why: str) -> Any:
    """What stands at an address that leads nowhere."""
    return [parts.heading("Not found"), parts.state("unknown", why, back())]


def back() -> html.P:
    """The way out of a dead end."""
    return html.P(parts.going("All audits", link(page="audits")))


def nav(view: View, page: Page) -> Any:
    """The links to other pages: of this audit or series, and of the whole shelf."""
    entry = view.entry
    shown: list[Any] = []
    if entry is not None and entry.series:
        shown.append(group("Series", [to(f"← {entry.series}", link(page="series", audit=entry.series))]))
    if entry is not None and entry.kind == "audit" and entry.audit is not None:
        audit = entry.audit
        verdicts = {}
        for finding in reversed(audit.findings):
            verdicts[finding.analysis] = finding.severity
        of_audit = [each for each in pages().values() if each.of == "audit" and each.linked(view)]
        own = [
            to(each.title, link(page=each.name, audit=entry.id), active=page.name == each.name)
            for each in of_audit
        ]
        name = view.query.one("analysis")
        each_analysis = [
            to(
                analysis,
                link(page="analysis", audit=entry.id, analysis=analysis),
                active=page.name == "analysis" and analysis == name,
                sign=parts.badge(verdicts.get(analysis, "pass" if judged(view, analysis) else ""), " "),
            )
            for analysis in sorted(
                audit.results, key=lambda n: ("fail", "warn", "").index(verdicts.get(n, ""))
            )
        ]
        shown.append(group("This audit", own[:1]))
        if each_analysis:
            shown.append(group("Analyses", each_analysis))
        if own[1:]:
            shown.append(group("More", own[1:]))
    shelf = [
        to(each.title, link(page=each.name), active=page.name == each.name)
        for each in pages().values()
        if each.of == "shelf" and each.linked(view)
    ]
    shown += [group("Everything", shelf)] if shelf else []
    return shown


def judged(view: View, analysis: str) -> bool:
    """Whether the policy has a threshold for what an analysis measured."""
    from diagnostics.core.policy import judged

    return bool(judged(view.audit.results[analysis], view.audit.policy))


def group(title: str, links: list[Any]) -> html.Div:
    """Links under a common title."""
    return html.Div([html.P(title, className="nav-title"), html.Ul([html.Li(each) for each in links])])


def to(title: str, href: str, *, active: bool = False, sign: Any = None) -> Any:
    """One link."""
    about = {"aria-current": "page"} if active else {}
    return parts.going(
        [sign, title] if sign else title, href, className="nav-link" + " active" * active, **about
    )


def title(view: View, page: Page) -> str:
    """What the browser's tab says."""
    of = view.entry.id if view.entry else ""
    name = view.query.one("analysis") if page.name == "analysis" else page.title
    return " · ".join(filter(None, (name, of, "tunescope")))


def identity(query: Query, page: Page) -> list[list[str]]:
    """What makes it this page: while this stays, the page stands."""
    return [list(query.many(key)) for key in page.identity]
