"""The pages of the dashboard, one a file: a new file beside this one that calls `@page` is a new page."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dashboard.state.audit_library import AuditLibrary, Entry
from dashboard.state.query import Query
from diagnostics.store.audit_store import Audit

if TYPE_CHECKING:
    import dash

Content = Any  # a Dash component, or a list of them


@dataclass(frozen=True)
class View:
    """What a page is asked to show.

    Attributes:
        shelf: all audits.
        query: what is selected.
        allowed: what the server was started with beyond looking at audits, by name.
    """

    shelf: AuditLibrary
    query: Query
    allowed: "dict[str, Any]"

    @cached_property
    def entry(self) -> Entry | None:
        """The entry that the query names."""
        return self.shelf.meant(self.query)

    @property
    def audit(self) -> Audit:
        """The audit that the query names; only of pages of an audit, for these are shown when it reads."""
        assert self.entry is not None
        audit = self.entry.audit
        assert audit is not None
        return audit


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page.

    Attributes:
        name: the `page` of its addresses.
        title: how links call it.
        of: whether it shows one audit, one series, or the whole shelf.
        order: its place among the links, small first.
        identity: the keys of the query that make it another page; a change of any other key leaves the
            page standing, and reaches its callbacks through the `selection` store.
        linked: whether it is offered, for a view of its kind.
        content: what it shows.
        callbacks: adds its callbacks to the app, once.
    """

    name: str
    title: str
    of: Literal["audit", "series", "shelf"]
    order: int
    identity: tuple[str, ...]
    linked: Callable[[View], bool]
    content: Callable[[View], Content]
    callbacks: "Callable[[dash.Dash, AuditLibrary, dict[str, Any]], None] | None"


PAGES: dict[str, Page] = {}


def page(
    name: str,
    *,
    title: str,
    of: Literal["audit", "series", "shelf"] = "audit",
    order: int = 50,
    identity: tuple[str, ...] = (),
    linked: Callable[[View], bool] = lambda view: True,
    callbacks: "Callable[[dash.Dash, AuditLibrary, dict[str, Any]], None] | None" = None,
) -> Callable[[Callable[[View], Content]], Callable[[View], Content]]:
    """Register a function from a view to a page's content; the arguments are explained at `Page`."""

    def register(content: Callable[[View], Content]) -> Callable[[View], Content]:
        PAGES[name] = Page(
            name=name,
            title=title,
            of=of,
            order=order,
            identity=("page", "audit", *identity),
            linked=linked,
            content=content,
            callbacks=callbacks,
        )
        return content

    return register


def pages() -> dict[str, Page]:
    """Every page by name, in order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(PAGES.items(), key=lambda item: (item[1].order, item[0])))
