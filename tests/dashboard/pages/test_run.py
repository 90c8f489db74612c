"""Audits started from the page: of the server's own pairs alone, followed, cancelled, opened."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dashboard.server import job
from dashboard.server.runs import UNFINISHED, Log, Runs, pairs
from dashboard.state.audit_library import AuditLibrary
from diagnostics.audit.demo import BUNDLED
from tests.dashboard.browsing import until
from tests.dashboard.invented import HOSTILE

POPEN = subprocess.Popen
BASE, TUNED = str(BUNDLED / "base"), str(BUNDLED / "lora-r1")


@pytest.fixture
def runs(tmp_path):
    """Two pairs; the second is of checkpoints that are not there."""
    return Runs(tmp_path / "audits", {"r1": (BASE, TUNED), "lost": (BASE, str(tmp_path / "nowhere"))})


def stand_in(monkeypatch, script):
    """Have a short script run in place of the audit; `OUT` is the audit's directory in it."""

    def begun(command, **about):
        out = json.loads(command[-1])["out"]
        return POPEN([sys.executable, "-c", script.replace("OUT", repr(out))], **about)

    monkeypatch.setattr("dashboard.server.runs.subprocess.Popen", begun)


def test_pairs_are_read_from_the_command_line():
    given = ["r8=runs/base runs/r8", "hub = org/base 'my models/tuned'"]
    assert pairs(given) == {"r8": ("runs/base", "runs/r8"), "hub": ("org/base", "my models/tuned")}


@pytest.mark.parametrize("text", ["base tuned", "=base tuned", "x=base", "x=a b c", "x='a b"])
def test_a_pair_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="--pair"):
        pairs([text])
    with pytest.raises(ValueError, match="already named"):
        pairs(["x=a b", "x=c d"])


def test_only_what_the_server_was_started_with_is_run(runs):
    asked = runs.request("r1", ["intruders"], 5)
    assert (asked["base"], asked["tuned"], asked["only"], asked["limit"]) == (BASE, TUNED, ["intruders"], 5)
    for pair in ("../../etc", TUNED, None, ["r1"], HOSTILE):
        with pytest.raises(LookupError, match="unknown pair"):
            runs.request(pair, [], None)
    with pytest.raises(LookupError, match=r"unknown analysis '\.\./x'"):
        runs.request("r1", ["../x"], None)
    for limit in (0, -1, 2.5, "9; rm", True):
        with pytest.raises(ValueError, match="whole number"):
            runs.request("r1", [], limit)


def test_an_audit_is_listed_only_when_it_is_whole(runs, monkeypatch):
    events = []
    stand_in(
        monkeypatch,
        "import json, pathlib; out = pathlib.Path(OUT); out.mkdir(parents=True)\n"
        "print(json.dumps({'analysis': 'angles', 'done': 1, 'total': 2, 'what': 'a', 'share': 0.5}))\n"
        "print('a library speaks')\n"
        "(out / 'audit.json').write_text('{}')\n"
        "print(json.dumps({'verdict': 'warn'}))",
    )
    name = runs.run("r1", {}, lambda *about: events.append((*about, list(runs.finished()))))
    # While it ran, nothing was finished.
    assert all(finished == [] for *_, finished in events[:-1])
    assert [path.name for path in runs.finished()] == [name]
    assert (0.5, "angles: 1 of 2 a") in [event[:2] for event in events]
    assert events[-1][0] == 1.0
    assert "a library speaks" in events[-1][2]
    library = AuditLibrary()
    runs.add_finished(library)
    runs.add_finished(library)
    assert list(library.entries) == [name]
    assert runs.entry(library, name).id == name
    assert runs.entry(library, "../" + name) is None
    assert runs.entry(library, None) is None


def test_a_run_that_fails_says_why_and_leaves_nothing(runs, monkeypatch):
    stand_in(monkeypatch, "import sys; print('a traceback'); sys.exit(3)")
    with pytest.raises(ValueError, match=r"exit code 3:[\s\S]*a traceback"):
        runs.run("r1", {}, lambda *_: None)
    stand_in(monkeypatch, """print('{"error": "no such checkpoint"}')""")
    with pytest.raises(ValueError, match=r"^no such checkpoint$"):
        runs.run("r1", {}, lambda *_: None)
    assert runs.finished() == []


def test_one_audit_runs_at_a_time_and_what_was_cancelled_is_swept_away(runs, monkeypatch):
    (runs.directory / UNFINISHED / "left").mkdir(parents=True)

    def second(*_):
        with pytest.raises(ValueError, match="another audit is running"):
            runs.run("r1", {}, lambda *_: None)

    stand_in(monkeypatch, "import pathlib; pathlib.Path(OUT).mkdir(parents=True)")
    runs.run("r1", {}, second)
    assert list((runs.directory / UNFINISHED).iterdir()) == []


def test_names_of_pairs_make_names_of_directories(runs):
    unpaired = Runs(runs.directory, {})
    assert unpaired.unused_name("../../up up").startswith("up-up-") or "/" not in unpaired.unused_name(
        "../../up up"
    )
    assert "/" not in unpaired.unused_name(HOSTILE)
    assert not unpaired.unused_name("...").startswith(".")


def test_the_log_keeps_to_lines_that_are_progress():
    events = []
    log = Log(lambda *about: events.append(about))
    for line in ("[1, 2]\n", '{"other": 1}\n', "\n", "plain\n"):
        log.read(line)
    assert [line.split(" ", 1)[1] for line in log.lines] == ["[1, 2]", '{"other": 1}', "plain"]


def test_an_audit_in_a_process_of_its_own_tells_how_far_it_is(tmp_path):
    out = io.StringIO()
    request = {"base": BASE, "tuned": TUNED, "out": str(tmp_path / "a"), "only": ["intruders"]}
    assert job.main(json.dumps(request), out) == 0
    messages = [json.loads(line) for line in out.getvalue().splitlines()]
    shares = [message["share"] for message in messages if "share" in message]
    assert shares == sorted(shares)
    assert {message["analysis"] for message in messages if "analysis" in message} == {"intruders"}
    assert set(messages[-1]) == {"verdict"}
    assert (tmp_path / "a" / "audit.json").exists()
    wrong = {"base": BASE, "tuned": str(tmp_path / "no"), "out": str(tmp_path / "b")}
    out = io.StringIO()
    assert job.main(json.dumps(wrong), out) == 2
    assert str(tmp_path / "no") in json.loads(out.getvalue())["error"]


def test_a_server_that_ends_does_not_wait_for_what_runs(runs):
    import multiprocess
    import psutil

    from dashboard.server.runs import stop

    manager = runs.manager()
    process = multiprocess.Process(target=time.sleep, args=(600,))
    process.start()
    assert psutil.pid_exists(process.pid)
    stop(manager)
    assert not psutil.pid_exists(process.pid)
    process.join()  # what Python does as it ends: at once


def test_without_leave_nothing_can_be_run(tmp_path):
    from dashboard import create_app
    from dashboard.cli import dashboard

    app = create_app()
    assert not any("run-start" in str(callback["inputs"]) for callback in app._callback_list)
    with pytest.raises(ValueError, match="add --allow-run"):
        dashboard(pair=[f"x={BASE} {TUNED}"])
    with pytest.raises(ValueError, match="add --pair"):
        dashboard(allow_run=True)
    with pytest.raises(ValueError, match="no such file"):
        dashboard(allow_run=True, pair=["x=a b"], policy=str(tmp_path / "policy.toml"))


@pytest.mark.browser
def test_an_audit_is_run_cancelled_and_run_to_its_end_in_a_browser(visit, served, runs):
    from dashboard import create_app

    address = served(create_app(allowed={"run": runs}))
    tab = visit(address + "/?page=run")
    page = tab.page
    start, cancel = (page.get_by_role("button", name=name, exact=True) for name in ("Run", "Cancel"))
    assert cancel.is_disabled()
    assert tab.barriers() == []
    page.get_by_role("textbox", name="Analyses").click()
    page.get_by_role("option", name="intruders").click()
    page.keyboard.press("Escape")
    start.click()
    until(page, "document.querySelector('#run-log').textContent.includes('starting')")
    assert start.is_disabled()
    cancel.click()
    until(page, "document.querySelector('#run-message').textContent.includes('Cancelled')")
    until(page, "!document.querySelector('#run-start').disabled")
    deadline = time.monotonic() + 10
    while processes(runs.directory) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(runs.directory) == []
    assert runs.finished() == []

    start.click()
    until(page, "document.querySelector('#run-log').textContent.includes('intruders')")
    page.wait_for_selector(".verdict")
    tab.settle()
    (done,) = runs.finished()
    assert f"audit={done.name}" in page.url
    tab.go(address + "/?page=audits")
    assert page.locator(".library .card strong").all_text_contents() == [done.name]

    tab.go(address + "/?page=run")
    page.get_by_role("textbox", name="Checkpoints").click()
    page.get_by_role("option", name="lost").click()
    start.click()
    page.wait_for_selector("#run-message [role=alert]")
    assert "nowhere" in page.inner_text("#run-message")
    tab.settle()


def processes(directory: Path) -> list[int]:
    """The jobs that write below a directory."""
    import psutil

    pids = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "dashboard.server.job" in command and str(directory) in command:
            pids.append(process.pid)
    return pids
