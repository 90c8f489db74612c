"""The frame of every page: header, navigation, and the page that the address names."""

from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from dashboard.components import choose, parts
from dashboard.components.drawings import template
from dashboard.pages import PAGES, Page
from dashboard.state.query import Query, link
from dashboard.state.view import View
from diagnostics.core.policy import judged
from diagnostics.core.registry import preflight_first
from diagnostics.plotting import theme

# Mantine wants ten shades of its primary colour. The colour of the base is the sixth, and readable on white.
BLUES = [
    "#eaf3fa", "#d3e5f3", "#a9cbe6", "#7bb0d8", "#559acc", theme.BASE, "#1f6ba8", "#1a5b90", "#174e7c",
    "#0f3a5e",
]  # fmt: skip
# From the text of a dark page to below its background. Mantine draws borders in the fifth and controls in the
# seventh.
DARKS = [
    theme.DARK.ink, "#c5cad1", theme.DARK.muted, "#7d8590", "#4a525d", theme.DARK.grid, "#262d36",
    theme.DARK.paper, "#10141a", "#0b0e12",
]  # fmt: skip

# Keys of the query that do not change which page is shown: filters, and what is opened on a page.
INSIDE = {"layer", "component", "group", "matrix", "cell", "table", "step", "measure"}


def layout() -> Any:
    """The empty frame; callbacks fill it from the address."""
    waiting = html.Div([dmc.Skeleton(height=120), dmc.Skeleton(height=320, mt="md")], className="waiting")
    lost = html.Div(
        "The dashboard does not respond. Check that it is still running.", className="lost", role="status"
    )
    content = [lost, html.Div(id="trouble"), html.Div(waiting, id="page", tabIndex="-1")]
    shell = dmc.AppShell(
        [
            dmc.AppShellHeader(head(), className="head"),
            dmc.AppShellNavbar(html.Div(id="nav"), className="side", p="md", **{"aria-label": "Pages"}),
            dmc.AppShellMain(content),
        ],
        id="shell", className="folded", header={"height": 56}, padding=0, transitionDuration=0,
        navbar={"width": 236, "breakpoint": "md", "collapsed": {"mobile": True}},
    )  # fmt: skip
    drawer = dmc.Drawer(
        id="drawer", className="drawer", position="right", size="min(760px, 94vw)",
        closeButtonProps={"aria-label": "Close"}, overlayProps={"backgroundOpacity": 0.25},
        transitionProps={"duration": 0},
    )  # fmt: skip
    return dmc.MantineProvider(
        [
            dcc.Location(id="url", refresh=False),
            *(dcc.Store(id=name) for name in ("place", "spot", "shown", "scheme", "title")),
            dcc.Store(id="inside", data=sorted(INSIDE)),
            dcc.Store(id="looks", data={scheme: template(scheme) for scheme in ("light", "dark")}),
            html.A("Skip to the page", href="#page", className="skip"),
            shell,
            drawer,
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
    """The header."""
    burger = {"id": "burger", "size": "sm", "hiddenFrom": "md", "aria-label": "Show the pages"}
    mark = html.Span(className="mark", **{"aria-hidden": "true"})
    toggle = {"variant": "subtle", "color": "gray", "aria-label": "Switch between light and dark"}
    icons = {"lightIcon": html.Span(className="sun"), "darkIcon": html.Span(className="moon")}
    return html.Div(
        [
            dmc.Burger(opened=False, **burger),
            parts.going([mark, "tunescope"], "?", className="brand"),
            html.Div(id="chooser"),
            dmc.ColorSchemeToggle(**icons, **toggle),
        ],
        className="head-in",
    )


def chooser(view: View) -> Any:
    """The choice of an audit, if the page shows an audit and there are others."""
    options = [entry.id for entry in view.library.entries.values() if entry.kind == "audit"]
    if len(options) < 2 or view.entry is None or view.entry.kind != "audit":
        return None
    look: dict[str, Any] = {"clearable": False, "allowDeselect": False, "className": "audit-choice"}
    below = {"width": "max-content", "position": "bottom-start"}
    return choose.select(
        view.query, "audit", "", options, comboboxProps=below, **look, **{"aria-label": "Audit"}
    )


def resolve(view: View) -> tuple[View, Page]:
    """The page that an address names, and the view with the keys that the address leaves out."""
    query = view.query
    if not query.value("page"):
        entry = view.entry
        if entry is not None and not query.value("audit"):
            query = query.with_changes(audit=entry.id)
        if not query.value("audit"):
            page = "audits"
        elif entry is not None and entry.kind == "series":
            page = "series"
        else:
            page = "analysis" if query.value("analysis") else "overview"
        query = query.with_changes(page=page)
    return View(view.site, query), PAGES.get(query.value("page"), PAGES["audits"])


def body(view: View, page: Page) -> Any:
    """The content of a page, or why there is none."""
    if page.name != view.query.value("page"):
        return not_found("There is no such page.")
    if page.of == "library":
        return page.layout(view)
    entry = view.entry
    if entry is None:
        return not_found("This dashboard has no such audit.")
    if entry.kind == "audit" and entry.audit is None:
        hint = html.P(
            "If it is still running, it appears here after its first results. Otherwise run "
            "`tunescope audit` again with the same --out: it keeps the results that are complete."
        )
        reason = html.P(parts.code(entry.damage))
        message = parts.state("damaged", "This audit is damaged or incomplete", reason, hint, back())
        return [parts.heading(entry.id, eyebrow="audit"), message]
    if entry.kind != page.of:
        kinds = {"audit": "an audit", "series": "a series"}
        return not_found(f"This page shows {kinds[page.of]}, but {entry.id} is {kinds[entry.kind]}.")
    return page.layout(view)


def not_found(why: str) -> Any:
    """The message for an address that names nothing."""
    return [parts.heading("Not found"), parts.state("unknown", why, back())]


def back() -> html.P:
    """A link to all audits."""
    return html.P(parts.going("All audits", link(page="audits")))


def nav(view: View, page: Page) -> Any:
    """Links to the other pages of this audit or series, and to the pages of all audits."""
    entry, audit = view.entry, view.readable_audit

    def pages(of: str, audit_id: str | None = None) -> list[html.A]:
        linked = [other for other in PAGES.values() if other.of == of and other.linked(view)]
        return [to(p.title, link(page=p.name, audit=audit_id), active=p == page) for p in linked]

    groups: list[Any] = []
    if entry is not None and entry.series:
        groups.append(group("Series", [to(f"← {entry.series}", link(page="series", audit=entry.series))]))
    if entry is not None and entry.kind == "audit" and audit is not None:
        first, *more = pages("audit", entry.id)
        verdicts = {
            name: "pass" if judged(result, audit.policy) else "none" for name, result in audit.results.items()
        } | {finding.analysis: finding.severity for finding in reversed(audit.findings)}
        opened = view.query.value("analysis") if page.name == "analysis" else None
        order = sorted(audit.results, key=lambda name: {"fail": 0, "warn": 1}.get(verdicts[name], 2))
        order = preflight_first(order)
        analyses = [
            to(name, link(page="analysis", audit=entry.id, analysis=name), name == opened, verdicts[name])
            for name in order
        ]
        groups += [group("This audit", [first]), group("Analyses", analyses), group("More", more)]
    return [*groups, group("Library", pages("library"))]


def group(title: str, links: list[Any]) -> html.Div | None:
    """Links under a common title; nothing without links."""
    if not links:
        return None
    return html.Div([html.P(title, className="nav-title"), html.Ul([html.Li(item) for item in links])])


def to(title: str, href: str, active: bool = False, verdict: str = "") -> html.A:
    """One link of the navigation."""
    props = {"aria-current": "page"} if active else {}
    text = [parts.badge(verdict, " "), title] if verdict else title
    return parts.going(text, href, className="nav-link" + " active" * active, **props)


def title(view: View, page: Page) -> str:
    """The title of the browser's tab."""
    name = view.query.value("analysis") if page.name == "analysis" else page.title
    return " · ".join(filter(None, (name, view.audit_id, "tunescope")))


def identity(query: Query, page: Page) -> list[list[str]]:
    """The values that make it this page: it stays in place until one of them changes."""
    return [list(query.many(key)) for key in ("page", "audit", *page.identity)]
