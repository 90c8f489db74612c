"""Work done in the background so that the next page opens faster. What fails is logged."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from dashboard.state.audit_library import AuditLibrary
from diagnostics.core.registry import find

log = logging.getLogger(__name__)

PAUSE = 1.5  # seconds after the first response: importing at once would slow down the first page


def in_background(task: Callable[[], None], *, pause: float = 0.0) -> threading.Event:
    """Run a task in a thread after a pause, and log its failure.

    Returns:
        An event that is set when the task has ended.
    """
    ended = threading.Event()

    def run() -> None:
        try:
            task()
        except Exception:
            log.exception("the dashboard could not %s", (task.__doc__ or task.__name__).rstrip(".").lower())
        finally:
            ended.set()

    timer = threading.Timer(pause, run)
    timer.daemon = True
    timer.start()
    return ended


def read_first(library: AuditLibrary) -> threading.Event:
    """Read the first audit while the browser loads the page that will most likely show it."""

    def read() -> None:
        """Read the first audit."""
        for entry in library.audits[:1]:
            entry.refresh()

    return in_background(read)


def import_after_first_response(server: Any, library: AuditLibrary) -> None:
    """Import the analyses of all audits once a Flask server has answered its first request."""
    begun = threading.Lock()

    def load() -> None:
        """Import the analyses."""
        for name in dict.fromkeys(name for e in library.audits if e.audit for name in e.audit.results):
            try:
                find(name)
            except LookupError as error:  # not installed: its page says so
                log.info("%s", error)
            except Exception:
                log.exception("the analysis %s cannot be imported", name)

    @server.teardown_request
    def begin(_: BaseException | None) -> None:
        if begun.acquire(blocking=False):
            in_background(load, pause=PAUSE)
