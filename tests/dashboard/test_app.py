"""The app without a browser: what it serves, to whom, and what its callbacks answer."""

import json
import re
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.dashboard.invented import draw, tables

ROOT = Path(__file__).parents[2]


@pytest.fixture
def angles(made_up, audit_of):
    """An audit of `angles`."""
    return audit_of(made_up("angles", tables(), draw, {"widest": 0.25}))


def texts(component):
    """Every string that a component shows, in order."""
    if isinstance(component, str | int | float):
        return [str(component)]
    if isinstance(component, list | tuple):
        return [text for child in component for text in texts(child)]
    children = getattr(component, "children", None)
    return [] if children is None else texts(children)


def within(component):
    """A component and all components in it."""
    if isinstance(component, list | tuple):
        return [part for child in component for part in within(child)]
    children = getattr(component, "children", None)
    return [component, *(within(children) if children is not None else [])]


def view_of(audits, search):
    """What a dashboard of some audits is asked to show by an address."""
    from dashboard.state.audit_library import AuditLibrary
    from dashboard.state.view import Site

    return Site(AuditLibrary(audits)).view(search)


def shown(audits, search):
    """The strings of the page that an address names."""
    from dashboard import frame

    return " ".join(texts(frame.body(*frame.resolve(view_of(audits, search)))))


def figures(view):
    """The strings of the figures of an analysis, and of what stands in their place."""
    from dashboard.pages.analysis_callbacks import drawn, pictures

    return texts(pictures(*drawn(view, view.query.value("analysis")), view, "dark"))


def test_an_analysis_that_nobody_knew_of_has_its_page_figures_and_tables(made_up, audit_of):
    from dashboard import frame
    from dashboard.pages.analysis_callbacks import table_rows

    table = pd.DataFrame({"layer": [0, 1], "warmth": [0.5, 0.75]})

    def warm(result):
        from diagnostics.plotting import theme

        return {"heat": theme.figure(title=f"{len(result.tables['heat'])} warm", x="layer", y="warmth")}

    audit = audit_of(made_up("warmth", {"heat": table}, warm, {"hottest": 0.75}))
    search = "?audit=it&analysis=warmth"
    view, page = frame.resolve(view_of({"it": audit}, search))
    text = " ".join(texts(frame.body(view, page)))
    for part in ("What do warmth say?", "0 is closed, 1 is open.", "hottest", "what hottest says", "heat"):
        assert part in text
    assert "warmth" in texts(frame.nav(view, page))
    assert "2 warm" in figures(view)
    filtered = view_of({"it": audit}, search + "&layer=1-1")
    assert "1 warm" in figures(filtered)
    control = {"analysis": "warmth", "table": "heat", "spot": ""}
    assert list(table_rows(filtered, control)["warmth"]) == [0.75]


def test_an_audit_shows_though_its_analysis_is_not_installed(made_up, audit_of, monkeypatch):
    from diagnostics.core import registry

    audit = audit_of(made_up("angles", tables(), draw, {"widest": 0.25}))
    monkeypatch.setattr(registry, "REGISTRY", {})
    text = shown({"it": audit}, "?audit=it&analysis=angles")
    assert "What do angles say?" in text
    assert "0.25" in text
    assert "Shown without figures and without the meaning of its numbers" in text


def test_the_less_important_of_many_numbers_are_folded_until_a_link_leads_there(made_up, audit_of):
    # 12 lead, and four more would not be worth a fold
    many = made_up("angles", tables(), draw, {f"number_{i}": float(i) for i in range(17)})
    audits = {"it": audit_of(many, rules={"angles": {"number_15": {"warn": 100.0}}})}

    def folds(search):
        from dashboard import frame

        body = frame.body(*frame.resolve(view_of(audits, search)))
        return [part for part in within(body) if type(part).__name__ == "Details"]

    (fold,) = folds("?audit=it&analysis=angles")
    hidden = texts(fold)
    assert "4 more numbers" in hidden
    assert "number_12" in hidden
    # what is judged always shows
    assert "number_15" not in hidden
    assert not fold.open
    (fold,) = folds("?audit=it&analysis=angles&metric=number_12")
    assert fold.open


def test_analyses_that_nobody_asked_for_take_one_line(audit_of, angles):
    from diagnostics.store.audit_store import Outcome

    skipped = {name: Outcome(status="skipped", reason="left out by --skip") for name in ("ood", "path")}
    asked = {"drift": Outcome(status="skipped", reason="needs --task F", question="Does it drift?")}
    text = shown({"it": replace(angles, analyses={**angles.analyses, **skipped, **asked})}, "?audit=it")
    assert "not requested ood, path left out by --skip" in text
    assert "drift Does it drift? needs --task F" in text


def test_figures_that_break_are_told_of_and_the_rest_of_the_page_stands(made_up, audit_of):
    def broken(result):
        raise RuntimeError("no ink")

    audit = audit_of(made_up("angles", tables(), broken, {"widest": 0.25}))
    assert "no ink" in " ".join(figures(view_of([audit], "?analysis=angles")))
    # what filters leave may be too little for a figure: that is nobody's fault
    text = " ".join(figures(view_of([audit], "?analysis=angles&layer=2-2")))
    assert "no ink" not in text
    assert "Widen" in text


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("?audit=nowhere", "no such audit"),
        ("?page=nowhere", "no such page"),
        ("?audit=it&page=series", "but it is an audit"),
        ("?audit=it&analysis=nothing", "no such analysis"),
        ("?audit=../../etc/passwd", "no such audit"),
    ],
)
def test_an_address_that_leads_nowhere_says_so(angles, search, words):
    assert words in shown({"it": angles, "other": angles}, search)


def test_an_audit_in_which_nothing_was_judged_cannot_say_that_it_may_ship(angles):
    assert "cannot decide whether the checkpoint may ship" in shown([angles], "")


def test_the_token_lets_in_once_and_leaves_the_address(angles):
    from dashboard import create_app

    client = create_app([angles], token="open sesame", prefix="/x").server.test_client()
    for path in ("/x/", "/x/_dash-layout", "/x/_dash-dependencies", "/x/assets/tunescope.js"):
        refused = client.get(path)
        assert refused.status_code == 401
        assert "token" in refused.text
    assert client.post("/x/_dash-update-component", json={}).status_code == 401
    assert client.get("/x/?token=wrong").status_code == 401
    let_in = client.get("/x/?audit=it&token=open+sesame")
    assert (let_in.status_code, let_in.location) == (302, "/x/?audit=it")
    cookie = let_in.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get("/x/_dash-layout").status_code == 200


def test_a_name_that_someone_else_points_here_is_refused(angles):
    from dashboard import create_app
    from dashboard.server.guard import LOCAL, only_called

    app = create_app([angles])
    only_called(app.server, LOCAL)
    client = app.server.test_client()
    for host in ("localhost:8050", "127.0.0.1:8050", "127.0.0.1", "[::1]:8050", "[::1]"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example:8050"}).status_code == 421


def test_debug_is_refused_where_others_can_reach_it(angles):
    from dashboard import create_app

    with pytest.raises(ValueError, match=r"debug=True on host 0\.0\.0\.0: others could run code"):
        create_app([angles]).run(host="0.0.0.0", debug=True)


def test_it_is_a_wsgi_application_of_its_own(angles):
    from werkzeug.test import Client

    from dashboard import create_app

    client = Client(create_app({"it": angles}, prefix="/under/this"))
    page = client.get("/under/this/")
    assert page.status_code == 200
    config = json.loads(re.search(r'id="_dash-config" type="application/json">(.*?)</script>', page.text)[1])
    assert config["requests_pathname_prefix"] == "/under/this/"
    assert client.get("/").status_code == 404


def test_nothing_on_the_page_comes_from_elsewhere(angles):
    from dashboard import create_app

    text = create_app([angles]).server.test_client().get("/").text
    text = text.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace, which nothing asks for
    assert "http://" not in text
    assert "https://" not in text


@pytest.fixture
def saved(tmp_path, angles):
    """The audit of `angles` in a directory."""
    from diagnostics.store.audit_store import Store

    with Store(tmp_path / "one") as store:
        for name, result in angles.results.items():
            store.write_result(name, result)
        store.write(angles)
    return tmp_path / "one"


def turned(app, search):
    """What the server answers a browser that opens an address."""
    client = app.server.test_client()
    callbacks = client.get("/_dash-dependencies").get_json()
    turn = next(callback for callback in callbacks if "page.children" in callback["output"])
    parts = [part.rpartition(".") for part in turn["output"].strip(".").split("...")]
    body = {
        "output": turn["output"],
        "outputs": [{"id": name, "property": prop} for name, _, prop in parts],
        "inputs": [{"id": "place", "property": "data", "value": "?"}],
        "state": [
            {"id": "url", "property": "search", "value": search},
            {"id": "shown", "property": "data", "value": None},
        ],
        "changedPropIds": ["place.data"],
    }
    return client.post("/_dash-update-component", json=body).get_json()


def test_the_overview_is_answered_without_torch_or_any_analysis(saved):
    code = """
import json, sys
import dashboard.app
early = {"pandas", "pyarrow"} & set(sys.modules)
from dashboard import create_app
from tests.dashboard.test_app import turned
answer = turned(create_app([sys.argv[1]]), "")
heavy = {"torch", "transformers", "transformer_lens", "peft", "sklearn", "datasets"} & set(sys.modules)
decided = "cannot decide whether the checkpoint may ship" in json.dumps(answer)
print(json.dumps([sorted(heavy | early), decided]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [[], True]


def test_it_runs_under_gunicorn_behind_a_prefix(saved):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = f"dashboard:create_app([{str(saved)!r}], prefix='/t')"
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "1", app]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "Booting worker" in line:
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/t/", timeout=60) as answer:
            assert "tunescope" in answer.read().decode()
    finally:
        process.terminate()
        process.communicate()


def test_an_answer_that_fails_is_said_on_the_page_and_not_only_in_the_log(angles, monkeypatch):
    from dashboard import create_app, frame

    def fails(*_):
        raise RuntimeError("<b>no ink</b>")

    app = create_app([angles])
    monkeypatch.setattr(frame, "body", fails)
    answer = turned(app, "")
    notice = answer["sideUpdate"]["trouble"]["children"]
    assert "RuntimeError: <b>no ink</b>" in json.dumps(notice)
    assert "page" not in answer.get("response", {})


def test_what_checks_the_files_is_linked_first(made_up, audit_of, monkeypatch):
    from dataclasses import replace

    from dashboard import frame
    from diagnostics.core import registry

    results = [made_up(name, tables(), draw, {"widest": 0.25}) for name in ("angles", "zenith")]
    audit = audit_of(*results, rules={"angles": {"widest": {"fail": 0.1}}})
    monkeypatch.setitem(registry.REGISTRY, "zenith", replace(registry.REGISTRY["zenith"], preflight=True))
    view, page = frame.resolve(view_of({"it": audit}, "?audit=it"))
    linked = [text for text in texts(frame.nav(view, page)) if text in ("angles", "zenith")]
    assert linked == ["zenith", "angles"]  # though angles fails
