"""Waiting for a page in the browser."""

import time
from typing import Any

WAIT = 30_000  # milliseconds


def until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression is true.

    `wait_for_function` of Playwright evaluates inside the page, which its Content-Security-Policy forbids.
    """
    deadline = time.monotonic() + WAIT / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never true: {expression}"
        page.wait_for_timeout(30)
