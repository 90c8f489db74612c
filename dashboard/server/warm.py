"""What a first look at an analysis would wait for, loaded while the overview is being read."""

import logging
import threading
from typing import Any

from dashboard.state.audit_library import AuditLibrary
from diagnostics.core.registry import find

log = logging.getLogger(__name__)

PAUSE = 1.5  # seconds after the first page was asked for: importing would slow its drawing


def meanwhile(shelf: AuditLibrary) -> threading.Thread:
    """Read the first audit while the browser still loads the page that will most likely ask for it."""

    def load() -> None:
        for entry in shelf.audits[:1]:
            entry.refresh()

    thread = threading.Thread(target=load, name="tables", daemon=True)
    thread.start()
    return thread


def afterwards(server: Any, shelf: AuditLibrary) -> threading.Event:
    """Load the analyses that the shelf's audits hold, once a Flask server has answered the first time.

    Returns:
        An event that is set when all are loaded.
    """
    begun, done = threading.Lock(), threading.Event()

    @server.teardown_request
    def begin(_: BaseException | None) -> None:
        if begun.acquire(blocking=False):
            timer = threading.Timer(PAUSE, load)
            timer.daemon = True
            timer.start()

    def load() -> None:
        names = dict.fromkeys(n for entry in shelf.audits if entry.audit for n in entry.audit.results)
        for name in names:
            try:
                find(name)
            except LookupError as error:  # its page says so
                log.info("%s", error)
        done.set()

    return done
