"""What one app serves, and what one address of it selects."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dashboard.state.audit_library import AuditLibrary, Entry
from dashboard.state.figure_cache import Drawn, FigureCache
from dashboard.state.filters import Filters
from dashboard.state.query import Query, parse
from diagnostics.core.analysis import Result
from diagnostics.store.audit_store import Audit


@dataclass(frozen=True)
class Site:
    """Everything that the pages of one app share.

    Attributes:
        library: all audits.
        allowed: what visitors may do beyond reading audits, by name.
        figures: the figures drawn so far; each app has its own, because ids repeat between apps.
    """

    library: AuditLibrary
    allowed: Mapping[str, Any] = field(default_factory=dict)
    figures: FigureCache = field(default_factory=FigureCache)

    def view(self, search: str | None) -> "View":
        """The view that an address selects."""
        return View(self, parse(search))

    def drawn(self, entry: Entry | None, analysis: str, filters: Filters | None = None) -> Drawn:
        """The figures of one analysis of one audit, limited to the rows that pass the filters."""
        version = entry.version if entry else None
        audit = entry.audit if entry else None
        result = audit.results.get(analysis) if audit else None
        if entry is None or result is None:
            return [], ["This result no longer exists. Reload the page."]
        kept = filters or Filters()
        return self.figures.get((entry.id, version, analysis, kept), lambda: kept.only(result))


@dataclass(frozen=True)
class View:
    """One address, and the audit that it selects."""

    site: Site
    query: Query

    @property
    def library(self) -> AuditLibrary:
        """All audits of the app."""
        return self.site.library

    @cached_property
    def entry(self) -> Entry | None:
        """The audit or series that the address names. Without a name: the only one there is."""
        return self.library.selected(self.query)

    @cached_property
    def readable_audit(self) -> Audit | None:
        """The selected audit; None when the address names none or it cannot be read."""
        return self.entry.audit if self.entry else None

    @property
    def audit(self) -> Audit:
        """The selected audit, for pages of an audit: the frame shows those only when it can be read."""
        assert self.readable_audit is not None
        return self.readable_audit

    @property
    def audit_id(self) -> str:
        """The id of the selected audit or series; empty without one."""
        return self.entry.id if self.entry else ""

    def result(self, analysis: str) -> Result | None:
        """The result of an analysis of the selected audit."""
        return self.readable_audit.results.get(analysis) if self.readable_audit else None
