"""Work in the background: what fails is logged."""

import logging

from dashboard.server.warm import in_background, read_first
from dashboard.state.audit_library import AuditLibrary, Entry

WAIT = 20  # seconds


def test_a_failure_in_the_background_is_logged(caplog):
    def fails():
        """Make ink."""
        raise RuntimeError("no ink")

    with caplog.at_level(logging.ERROR):
        assert in_background(fails).wait(WAIT)
    assert "could not make ink" in caplog.text
    assert "RuntimeError: no ink" in caplog.text


def test_an_audit_that_cannot_be_read_ahead_is_logged(monkeypatch, caplog, audit_of):
    def fails(self):
        raise OSError("the disk is gone")

    library = AuditLibrary({"it": audit_of()})
    monkeypatch.setattr(Entry, "refresh", fails)
    assert read_first(library).wait(WAIT)
    assert "could not read the first audit" in caplog.text
    assert "the disk is gone" in caplog.text
