"""A dashboard served to a headless Chromium, over audits that are made up whole."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.dashboard.browsing import WAIT, until


@pytest.fixture(scope="module")
def made_up():
    """Registers made-up analyses for a whole module: `made_up("name", tables, draw, metrics=…)`."""
    from diagnostics.core import analysis, registry

    patch = pytest.MonkeyPatch()
    patch.setattr(registry, "REGISTRY", {})
    patch.setattr(registry, "entry_points", lambda **group: [])

    def register(name: str, tables: Any, draw: Any, metrics: dict[str, float]) -> Any:
        def measure(pair, *, k: int = 10):
            return analysis.Result(metrics=metrics, tables=tables, notes=("Nothing was dropped.",))

        return analysis.analysis(
            name,
            question=f"What do {name} say?",
            reading="0 is closed, 1 is open.",
            paper="Euclid, arXiv:0001.00001v2",
            cost="none",
            draw=draw,
            summary=lambda result: f"A line about {name}.",
            metrics={metric: f"what {metric} says" for metric in metrics},
        )(measure)(SimpleNamespace(base=None, tuned=None))

    yield register
    patch.undo()


@pytest.fixture(scope="module")
def audit_of() -> Callable[..., Any]:
    """Makes an audit of results: `audit_of(result, …, rules={"angles": {…}}, outcomes={…}, **about)`."""
    from diagnostics.core.policy import parse
    from diagnostics.store.audit_store import Audit, Outcome

    def build(*results: Any, rules: Any = None, outcomes: Any = None, **about: Any) -> Any:
        ran = {
            result.analysis: Outcome(
                status="ok",
                seconds=1.5,
                device="cpu",
                result=result,
                question=f"What do {result.analysis} say?",
            )
            for result in results
        }
        return Audit(
            **{
                "base": {
                    "ref": "org/base",
                    "kind": "full",
                    "fingerprint": "a1" * 16,
                    "parameters": 1_234_567,
                },
                "tuned": {"ref": "runs/tuned", "kind": "adapter", "adapter": {"type": "LORA", "r": 8}},
                "policy": parse(rules or {}, origin="a made-up policy"),
                "analyses": {**ran, **(outcomes or {})},
                "created": "2026-02-11T09:41:07Z",
                "tunescope": "0.1.0",
                **about,
            }
        )

    return build


@pytest.fixture(scope="module")
def served():
    """Serves apps until the module's tests are done: `served(app)` is the address, without its prefix."""
    from werkzeug.serving import make_server

    running = []

    def serve(app: Any) -> str:
        server = make_server("127.0.0.1", 0, app.server, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Visit:
    """A page in the browser, and what it complained of."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def go(self, address: str) -> Any:
        """Open an address and wait until nothing is loading."""
        self.page.goto(address)
        self.page.wait_for_selector("#heading, .state", timeout=WAIT)
        return self.settle()

    def settle(self) -> Any:
        """Wait until the server has answered everything, and what it answered is drawn."""
        self.page.wait_for_load_state("networkidle", timeout=WAIT)
        until(
            self.page,
            "!document.querySelector('[data-dash-is-loading=true], #page .mantine-Skeleton-root')",
        )
        return self.page

    def barriers(self) -> list[Any]:
        """What keeps people out, by axe-core: serious violations alone."""
        from axe_playwright_python.sync_playwright import Axe

        return [
            (violation["id"], node["html"][:200], node["failureSummary"])
            for violation in Axe().run(self.page).response["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]


@pytest.fixture
def visit(chromium):
    """Opens a tab: `visit(address, width=…, dark=…)`; afterwards, no tab may have complained."""
    opened = []

    def open_tab(address: str, *, width: int = 1440, dark: bool = False) -> Visit:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            accept_downloads=True,
        )
        tab = Visit(context.new_page())
        tab.page.set_default_timeout(WAIT)
        tab.page.on("console", lambda message: tab.complaints.append(f"{message.type}: {message.text}"))
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("request", lambda request: tab.asked.append(request.url))
        opened.append((context, tab))
        tab.go(address)
        return tab

    yield open_tab
    for context, _ in opened:
        context.close()
    asked = {urlsplit(url).hostname for _, tab in opened for url in tab.asked if url.startswith("http")}
    assert asked <= {"127.0.0.1"}
    assert [tab.complaints for _, tab in opened] == [[] for _ in opened]
