"""Requests that the dashboard refuses, and the scripts that its pages may run."""

import json

import pytest

from dashboard import create_app

ORIGIN = "http://localhost"  # of Flask's test client


@pytest.fixture
def client():
    return create_app().server.test_client()


@pytest.fixture
def turn(client):
    """The callback request of a browser that opens the dashboard."""
    callbacks = client.get("/_dash-dependencies").get_json()
    output = next(callback["output"] for callback in callbacks if "page.children" in callback["output"])
    names = [part.rpartition(".") for part in output.strip(".").split("...")]
    return {
        "output": output,
        "outputs": [{"id": name, "property": prop} for name, _, prop in names],
        "inputs": [{"id": "place", "property": "data", "value": "?"}],
        "state": [
            {"id": "url", "property": "search", "value": ""},
            {"id": "shown", "property": "data", "value": None},
        ],
        "changedPropIds": ["place.data"],
    }


def post(client, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        "/_dash-update-component", data=data, headers={"Content-Type": "application/json", **headers}
    )


def test_a_callback_of_its_own_page_is_answered(client, turn):
    assert post(client, turn).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"", b"\xff", b"[" * 100_000, b"[]", b"3", b"null", b"{}"], ids=lambda body: repr(body[:4])
)
def test_a_body_that_is_no_callback_is_refused(client, body):
    answer = post(client, body)
    assert answer.status_code == 400
    assert "Malformed callback" in answer.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": "nothing.children"}, "no such callback"),
        ({"output": ["page.children"]}, "no such callback"),
        ({"output": None}, "no such callback"),
        ({"outputs": None}, "outputs: 5 expected"),
        ({"outputs": [{"id": "page", "property": "children"}]}, "outputs: 5 expected"),
        ({"inputs": None}, "inputs: 1 expected"),
        ({"inputs": []}, "inputs: 1 expected"),
        ({"inputs": ["place"]}, "inputs[0]: not a data of place"),
        ({"inputs": [{"id": "place"}]}, "inputs[0]"),
        ({"inputs": [{"id": "else", "property": "data"}]}, "inputs[0]"),
        ({"inputs": [{"id": {"role": "place"}, "property": "data"}]}, "inputs[0]"),
        ({"inputs": [{"id": "place", "property": "data", "value": {"a": 1}}]}, "inputs[0]"),
        ({"state": "url"}, "state: 2 expected"),
        ({"changedPropIds": {"place": 1}}, "changedPropIds"),
        ({"changedPropIds": ['{"a.data']}, "changedPropIds"),
        ({"changedPropIds": [1]}, "changedPropIds"),
    ],
)
def test_a_malformed_callback_is_refused_with_what_is_wrong(client, turn, change, reason):
    answer = post(client, turn | change)
    assert answer.status_code == 400
    assert reason in answer.text


def test_an_id_that_no_table_can_have_is_refused(client):
    callbacks = client.get("/_dash-dependencies").get_json()
    fill = next(callback for callback in callbacks if "getRowsResponse" in callback["output"])
    about = {"role": "grid", "analysis": "a", "table": "t", "spot": ""}
    body = {
        "output": fill["output"],
        "outputs": [
            {"id": about, "property": "getRowsResponse"},
            {"id": {**about, "role": "count"}, "property": "children"},
        ],
        "inputs": [{"id": about, "property": "getRowsRequest", "value": {"startRow": 0}}],
        "state": [
            {"id": about, "property": "id", "value": about},
            {"id": "url", "property": "search", "value": ""},
        ],
    }
    assert post(client, body).get_json()["response"] == {}  # there is no such table: nothing changes
    for wrong in ({**about, "spot": 3}, {**about, "more": "x"}, {**about, "role": "graph"}, "grid"):
        body["inputs"] = [{"id": wrong, "property": "getRowsRequest", "value": {}}]
        assert post(client, body).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": ORIGIN},
    ],
)
def test_a_post_of_another_site_is_refused(client, turn, headers):
    assert post(client, turn, **headers).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": ORIGIN},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://seen.example"},
        {"Origin": "https://seen.example", "X-Forwarded-Host": "seen.example"},
    ],
)
def test_a_post_of_its_own_page_is_answered_behind_a_proxy_too(client, turn, headers):
    assert post(client, turn, **headers).status_code == 200


def test_the_pages_allow_no_script_but_those_of_the_server(client):
    policy = client.get("/").headers["Content-Security-Policy"]
    directives = dict(directive.split(" ", 1) for directive in policy.split("; "))
    scripts = directives["script-src"].split()
    assert scripts[0] == "'self'"
    assert all(source.startswith("'sha256-") for source in scripts[1:])
    assert directives["default-src"] == "'self'"
    assert "unsafe-eval" not in policy
    # the style sheet of the page itself is inline; no script is
    assert "'unsafe-inline'" not in directives["script-src"]


@pytest.mark.browser
def test_a_script_from_outside_does_not_run(chromium, served):
    page = chromium.new_context().new_page()
    page.goto(served(create_app()) + "/")
    page.wait_for_selector("#heading")
    script = "document.createElement('script')"
    page.evaluate(f"document.body.append(Object.assign({script}, {{text: 'window.ran = 1'}}))")
    assert page.evaluate("window.ran") is None
