"""The figures that an app keeps: its own, each drawn once, and no failures; none waits for another."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dashboard import create_app
from tests.dashboard.invented import draw, tables

WAIT = 20  # seconds


def shown(app, audit_id="it", analysis="angles"):
    """What the server answers a browser that asks for the figures of an analysis, as text."""
    client = app.server.test_client()
    callbacks = client.get("/_dash-dependencies").get_json()
    redraw = next(c for c in callbacks if "pictures" in c["output"] and "data-of" in c["output"])
    about = {"role": "pictures", "analysis": analysis}
    body = {
        "output": redraw["output"],
        "outputs": [{"id": about, "property": name} for name in ("children", "data-of")],
        "inputs": [{"id": "url", "property": "search", "value": f"?audit={audit_id}&analysis={analysis}"}],
        "state": [
            {"id": about, "property": "id", "value": about},
            {"id": about, "property": "data-of", "value": None},
            [],
            [],
            {"id": "scheme", "property": "data", "value": "light"},
        ],
        "changedPropIds": ["url.search"],
    }
    answer = client.post("/_dash-update-component", json=body)
    assert answer.status_code == 200
    return json.dumps(answer.get_json())


@pytest.fixture
def audit(made_up, audit_of):
    """An audit of `angles` with a drawing function."""

    def audit(draw, layers=4, name="angles"):
        return audit_of(made_up(name, tables(layers), draw, {"widest": 0.25}))

    return audit


def test_two_apps_of_one_process_show_their_own_figures(audit):
    first, second = (create_app({"it": audit(draw, layers)}) for layers in (4, 6))
    assert "Angles of 12 matrices" in shown(first)
    # six layers of three components
    assert "Angles of 18 matrices" in shown(second)


def test_figures_that_failed_are_drawn_again(audit):
    attempts = []

    def flaky(result):
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("no ink")
        return draw(result)

    app = create_app({"it": audit(flaky)})
    assert "no ink" in shown(app)
    assert "Angles of 12 matrices" in shown(app)
    assert "Angles of 12 matrices" in shown(app)
    assert len(attempts) == 2  # the failure was not kept, the figures were


def test_a_slow_figure_keeps_no_other_waiting_and_is_drawn_once(audit):
    begun, go_on, drawings = threading.Event(), threading.Event(), []

    def slow(result):
        drawings.append(1)
        begun.set()
        assert go_on.wait(WAIT)
        return draw(result)

    app = create_app({"slow": audit(slow, name="slowness"), "it": audit(draw)})
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(shown, app, "slow", "slowness") for _ in range(2)]
        try:
            assert begun.wait(WAIT)
            other = threads.submit(shown, app)
            assert "Angles of 12 matrices" in other.result(WAIT)
        finally:
            go_on.set()
        assert all("Angles of 12 matrices" in answer.result(WAIT) for answer in waiting)
    assert len(drawings) == 1
