import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diagnostics.cli import group
from diagnostics.cli.main import main
from diagnostics.core.analysis import Result
from diagnostics.store import files
from probes.errors import InputError

# A program that has one made-up analysis in place of the installed ones: as slow as its environment says.
DRIVER = """
import os, resource, signal, sys, time
from pathlib import Path
from diagnostics.core import analysis, registry
from diagnostics.core.analysis import Result

registry.entry_points = lambda **group: []

def register(name, work):
    @analysis.analysis(name, question="?", reading="-", paper="-", cost="-", draw=lambda result: {})
    def measure(pair, *, progress=None):
        work()
        return Result(metrics={"runs": 1}, tables={})

def slow():
    Path(os.environ["STARTED"]).write_text("x")
    time.sleep(float(os.environ["SLOW"]))

def quick():
    with open(os.environ["RUNS"], "a") as runs:
        runs.write("x")

def hash_slowly(tensor):
    with open("hashing", "a") as hashed:
        hashed.write("x")
    time.sleep(5)
    return b""

if "HASHING" in os.environ:
    from probes.files import sources
    os.cpu_count = lambda: 1
    sources.raw = hash_slowly

register("a_quick", quick)
register("b_slow", slow)
if "LIMIT" in os.environ:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
from diagnostics.cli.main import main
main()
"""


@pytest.fixture
def driver(tmp_path, checkpoints):
    """Starts the program: `driver("audit", …, slow=60)` gives the process."""
    (tmp_path / "driver.py").write_text(DRIVER)

    def start(*arguments, slow=0.0, **variables):
        environment = {
            **os.environ,
            "SLOW": str(slow),
            "STARTED": str(tmp_path / "started"),
            "RUNS": str(tmp_path / "runs"),
            **variables,
        }
        (tmp_path / "started").unlink(missing_ok=True)
        return subprocess.Popen(
            [sys.executable, tmp_path / "driver.py", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
        )  # fmt: skip

    return start


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"{path} did not appear")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(result):
    """The one line on standard error."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("tunescope: ")
    assert "Traceback" not in result.output
    return line


# --- an audit from the shell ---


def test_an_audit_prints_the_verdict_first_and_where_the_report_is(norms, checkpoints, tmp_path):
    result = run("audit", *checkpoints, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("PASS  ")
    assert re.search(r"\n  ok +norms +\d+\.\d s  norm 4, matrices 4\n", result.stdout)
    assert "1 note is in the report; --verbose prints it" in result.stdout
    assert "nothing was dropped" not in result.stdout
    assert "nothing was dropped" in (tmp_path / "out/report.html").read_text()
    assert lines[-2:] == [
        f"report   {tmp_path / 'out/report.html'}",
        f"results  {tmp_path / 'out/audit.json'}",
    ]


def test_a_failed_policy_is_exit_code_1_and_says_value_threshold_and_source(norms, checkpoints, tmp_path):
    (tmp_path / "policy.toml").write_text(
        '[norms]\nnorm = {fail = 3, source = "Doe 2024", message = "too far"}\n'
    )
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--policy", tmp_path / "policy.toml")
    assert result.exit_code == 1
    assert result.stdout.startswith("FAIL  ")
    assert "fail  norms: norm is 4, above 3\n        too far\n        source: Doe 2024" in result.stdout


def test_json_is_the_only_thing_on_standard_output(norms, checkpoints, tmp_path):
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "out/audit.json").read_text())


def test_verbose_prints_the_notes_and_what_was_not_asked_for(norms, register, checkpoints, tmp_path):
    register("other", lambda pair: Result(metrics={}, tables={}))
    asked = ("audit", *checkpoints, "--out", tmp_path / "out", "--only", "norms")
    short, long = run(*asked).stdout, run(*asked, "--verbose").stdout
    assert "note: norms: nothing was dropped" in long
    assert "skipped  other: not asked for: --only norms" in long
    assert "other" not in short


def test_a_screen_of_80_columns_holds_an_audit(norms, register, checkpoints, tmp_path, monkeypatch):
    """On a terminal each analysis is one line, cut to the width; findings are wrapped behind their head."""
    from rich import console

    from diagnostics.cli import terminal
    from diagnostics.store.audit_store import load

    notes = tuple(f"note {i}" for i in range(20))
    for i in range(12):
        register(
            f"analysis{i}",
            lambda pair: Result(metrics={}, tables={}, notes=notes),
            summary=lambda result: "word " * 60,
        )
    (tmp_path / "policy.toml").write_text(f'[norms]\nnorm = {{fail = 3, message = "{"far " * 40}"}}\n')
    run("audit", *checkpoints, "--out", tmp_path / "out", "--policy", tmp_path / "policy.toml")
    audit = load(tmp_path / "out")
    monkeypatch.setattr(
        terminal, "Console", lambda **_: console.Console(force_terminal=True, width=80, color_system=None)
    )
    shown = [str(line) for line in terminal.outcome_lines(audit, verbose=False)]
    assert len(shown) == 13
    assert all(len(line) <= 80 and "\n" not in line for line in shown)
    assert shown[0].endswith("…")
    message = str(terminal.finding_lines(audit)[2])
    assert all(len(line) <= 80 and line.startswith("        far") for line in message.splitlines())
    assert "far …" not in message  # a finding is never cut


def test_quiet_prints_nothing(norms, checkpoints, tmp_path):
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_progress_goes_to_standard_error(norms, checkpoints, tmp_path):
    result = run("audit", *checkpoints, "--out", tmp_path / "out")
    assert "norms" in result.stderr
    assert "/4" in result.stderr
    assert "━" not in result.stdout


def test_options_reach_the_analysis(norms, checkpoints, tmp_path):
    result = run(
        "audit", *checkpoints, "--out", tmp_path / "out", "--only", "norms", "--set", "norms.scale=2",
        "--set", "norms.parts=a,b", "--seed", "3", "--dtype", "float64", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0
    assert norms == [{"scale": 2.0, "parts": ("a", "b"), "device": "cpu", "dtype": "float64", "seed": 3}]


def test_how_rows_and_models_are_read_reaches_the_analyses_that_ask(register, checkpoints, tmp_path):
    got = {}

    def reads(pair, *, chat_template=False, approximate=False, trust_remote_code=False):
        got["reads"] = (chat_template, approximate, trust_remote_code)
        return Result(metrics={}, tables={})

    def weighs(pair, *, seed=0):
        got["weighs"] = seed
        return Result(metrics={}, tables={})

    register("reads", reads)
    register("weighs", weighs)
    given = ("audit", *checkpoints, "--out", tmp_path / "out", "--quiet")
    for flags, expected in [
        ((), (False, False, False)),
        (("--chat-template",), (True, False, False)),
        (("--approximate", "--trust-remote-code"), (False, True, True)),
    ]:
        assert run(*given, *flags).exit_code == 0
        assert got == {"reads": expected, "weighs": 0}


def test_names_may_be_given_with_commas_or_one_by_one(norms, register, checkpoints, tmp_path):
    for name in ("a", "b", "c"):
        register(name, lambda pair: Result(metrics={}, tables={}))
    run("audit", *checkpoints, "--out", tmp_path / "out", "--only", "a,b", "--only", "c", "--skip", "b")
    analyses = json.loads((tmp_path / "out/audit.json").read_text())["analyses"]
    assert [name for name, outcome in analyses.items() if outcome["status"] == "ok"] == ["a", "c"]


def test_what_was_skipped_is_said_with_the_option_that_would_enable_it(
    norms, register, checkpoints, tmp_path
):
    register("needy", lambda pair, task: None)
    result = run("audit", *checkpoints, "--out", tmp_path / "out")
    assert "  skipped  needy: needs --task F\n" in result.stdout


def test_a_file_that_nothing_reads_is_said_to_have_no_effect(norms, checkpoints, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--ood", f"a={tmp_path / 'rows.jsonl'}")
    assert "no installed analysis reads --ood" in result.stdout


def test_a_crash_is_exit_code_3_with_one_line(norms, register, checkpoints, tmp_path):
    def broken(pair):
        raise RuntimeError("boom")

    register("broken", broken)
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == "tunescope: broken: RuntimeError: boom (traceback in audit.log)"
    assert json.loads(result.stdout)["analyses"]["norms"]["status"] == "ok"


def test_a_refused_parameter_is_exit_code_2(register, checkpoints, tmp_path):
    def picky(pair, *, epsilon: float = 0.5):
        raise InputError(f"epsilon = {epsilon:g} is no cosine in (0, 1]")

    register("picky", picky)
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--set", "picky.epsilon=2", "--quiet")
    assert result.exit_code == 2
    assert error_line(result) == "tunescope: picky: epsilon = 2 is no cosine in (0, 1]"


def test_control_characters_of_a_file_do_not_reach_the_terminal(register, checkpoints, tmp_path):
    register("made", lambda pair: Result(metrics={}, tables={}, notes=("evil \x1b[31m[red]name[/red]",)))
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--verbose")
    assert "\x1b" not in result.stdout
    assert "[red]name[/red]" in result.stdout  # shown as text, not taken as markup


# --- wrong input: exit code 2 and one line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nrms"], "--only: unknown analysis 'nrms'; known: norms"),
        (["--set", "norms.k=1"], "norms has no parameter 'k'; it has: scale, parts, dtype, seed"),
        (["--set", "norms.scale=big"], "--set norms.scale=big: not a number"),
        (["--policy", "nowhere.toml"], "policy nowhere.toml: cannot be read: No such file or directory"),
        (["--device", "tpu"], "--device tpu: unknown; known: auto, cpu, cuda, cuda:N"),
        (["--dtype", "int4"], "--dtype int4: unknown; known: float32"),
        (["--engine", "slurm"], "--engine slurm: unknown; known: local"),
        (["--task", "nowhere.jsonl"], "--task nowhere.jsonl: there is no such file"),
        (["--seed", "x"], "'--seed'"),
        (["--nope"], "No such option"),
        (["--out", "/proc/audit"], "cannot write /proc/audit: "),
    ],
)
def test_wrong_usage_is_one_line(norms, checkpoints, tmp_path, arguments, message):
    result = run("audit", *checkpoints, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in error_line(result)
    assert not (tmp_path / "out").exists()


def test_an_output_path_that_is_a_file_is_one_line(norms, checkpoints, tmp_path):
    (tmp_path / "file").write_text("x")
    result = run("audit", *checkpoints, "--out", tmp_path / "file")
    assert (result.exit_code, "is a file, not a directory" in error_line(result)) == (2, True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_missing_checkpoint_is_one_line(norms, checkpoints, tmp_path):
    result = run("audit", checkpoints[0], tmp_path / "nowhere", "--out", tmp_path / "out")
    assert (result.exit_code, "nowhere" in error_line(result)) == (2, True)


def test_a_missing_argument_and_an_unknown_command_are_one_line(norms):
    assert "Missing argument 'TUNED'. (see " in error_line(run("audit", "base"))
    assert "No such command 'adit'; known: audit, check, series, mitigate," in error_line(run("adit"))


def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(
    norms, register, checkpoints, tmp_path, monkeypatch
):
    def fill(pair):
        def full(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        return Result(metrics={}, tables={})

    register("zz_fills", fill)
    result = run("audit", *checkpoints, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 2
    assert (
        "audit.json: No space left on device; mend that and run it again, finished analyses are kept"
        in error_line(result)
    )
    monkeypatch.undo()
    from diagnostics.store.audit_store import load

    assert load(tmp_path / "out").results["norms"].metrics["matrices"] == 4


def test_a_file_size_limit_of_the_system_is_one_line(driver, checkpoints):
    # A real refusal by the kernel: no file may grow beyond 2000 bytes, of bytecode neither.
    limits = {"LIMIT": "2000", "PYTHONDONTWRITEBYTECODE": "1"}
    code, out, err = finish(driver("audit", *checkpoints, "--quiet", **limits))
    assert (code, out) == (2, "")
    assert err.startswith("tunescope: cannot write audit/")
    assert "File too large" in err
    assert err.count("\n") == 1


def test_a_damaged_earlier_audit_is_one_line_and_fresh_mends_it(norms, checkpoints, tmp_path):
    arguments = ("audit", *checkpoints, "--out", tmp_path / "out", "--quiet")
    run(*arguments)
    (tmp_path / "out/audit.json").write_text("{")
    assert "start over with --fresh" in error_line(run(*arguments))
    assert run(*arguments, "--fresh").exit_code == 0


def test_a_bug_is_one_line_too_and_a_traceback_on_request(monkeypatch, norms, checkpoints):
    def bug(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("diagnostics.audit.run.audit", bug)
    result = run("audit", *checkpoints)
    assert result.exit_code == 3
    assert error_line(result) == "tunescope: TypeError: a bug (TUNESCOPE_TRACEBACK=1 shows where)"
    monkeypatch.setenv("TUNESCOPE_TRACEBACK", "1")
    assert isinstance(run("audit", *checkpoints).exception, TypeError)


# --- killed in the middle ---


def test_a_killed_audit_goes_on_where_it_stopped(driver, checkpoints, tmp_path):
    process = driver("audit", *checkpoints, slow=600)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGKILL)
    finish(process)
    analyses = json.loads((tmp_path / "audit/audit.json").read_text())["analyses"]
    assert (analyses["a_quick"]["status"], analyses["b_slow"]["status"]) == ("ok", "failed")
    code, out, _ = finish(driver("audit", *checkpoints))
    assert code == 0
    assert (tmp_path / "runs").read_text() == "x"  # once, before the kill
    assert re.search(r"ok +a_quick +reused  runs 1\n", out)
    assert not list((tmp_path / "audit").rglob(".*.part"))


def test_an_interrupt_is_one_line_that_says_what_is_kept(driver, checkpoints, tmp_path):
    process = driver("audit", *checkpoints, "--quiet", slow=600)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    kept = "1 finished analysis is kept in audit; run the same command again to continue"
    assert (code, out, err) == (130, "", f"tunescope: interrupted; {kept}\n")


def test_an_interrupt_waits_for_one_tensor_at_most_where_a_checkpoint_is_hashed(
    driver, checkpoints, tmp_path
):
    process = driver("audit", *checkpoints, "--quiet", HASHING="1")
    wait_for(tmp_path / "started")  # the analyses are done; the first tensor of base is hashed
    wait_for(tmp_path / "hashing")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, "2 finished analyses are kept" in err) == (130, True)
    assert (tmp_path / "hashing").read_text() == "x"  # of four


def test_two_audits_into_one_directory_are_refused(driver, checkpoints, tmp_path):
    first = driver("audit", *checkpoints, slow=600)
    wait_for(tmp_path / "started")
    code, _, err = finish(driver("audit", *checkpoints, "--quiet"))
    first.kill()
    finish(first)
    assert code == 2
    assert (
        err
        == "tunescope: --out audit: another tunescope is writing there; wait for it or name another place\n"
    )


# --- the other commands ---


def test_help_needs_neither_torch_nor_the_registry():
    script = (
        "import sys\nfrom diagnostics.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pandas', 'numpy', 'plotly', 'pyarrow', 'dash'}\n"
        "heavy |= {'diagnostics.core.analysis', 'diagnostics.core.registry'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stderr == "[]\n"
    assert "audit" in process.stdout


def test_without_a_command_the_help_is_shown():
    result = run()
    assert result.exit_code == 0
    assert "Exit codes: 0 the policy passes" in result.stdout


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert run("--version").stdout == f"tunescope {version('tunescope')}\n"


def test_analyses_are_listed_with_what_they_need_and_can_be_set_to(norms, register):
    register("needy", lambda pair, task, keep=None, *, top=None: None, question="Who needs it?")
    short = run("analyses").stdout
    assert "needy  Who needs it?\n       needs BASE TUNED, --task F\n" in short
    assert "--set" not in short
    out = run("analyses", "--verbose").stdout
    assert "needy  Who needs it?\n  needs   BASE TUNED, --task F\n  uses    --keep F" in out
    assert "--set   norms.parts=block" in out
    assert "--set   needy.top=none" in out
    assert "needy" not in run("analyses", "norms").stdout
    assert "unknown analysis 'nrms'; known: needy, norms" in error_line(run("analyses", "nrms"))
    listed = json.loads(run("analyses", "--json").stdout)
    assert listed["norms"]["parameters"] == {"scale": 1.0, "parts": ["block"], "dtype": "float32", "seed": 0}
    assert listed["norms"]["metrics"]["norm"] == "largest Frobenius norm"


def test_a_report_is_written_again_in_any_form(norms, checkpoints, tmp_path):
    out = tmp_path / "out"
    run("audit", *checkpoints, "--out", out)
    (out / "report.html").unlink()
    assert run("report", out).stdout == f"{out / 'report.html'}\n"
    assert "Norm of each delta" in (out / "report.html").read_text()
    assert json.loads(run("report", out, "--format", "json").stdout) == json.loads(
        (out / "audit.json").read_text()
    )
    run("report", out, "--format", "md", "--out", tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text() == run("report", out, "--format", "md").stdout
    assert "norms" in (tmp_path / "card.md").read_text()


def test_a_report_of_nothing_is_one_line(tmp_path):
    result = run("report", tmp_path)
    assert (result.exit_code, "no audit here" in error_line(result)) == (2, True)
    assert "'pdf' is not" in error_line(run("report", tmp_path, "--format", "pdf"))


def test_a_series_is_a_table_of_both_comparisons(norms, checkpoints, tmp_path):
    base, tuned = checkpoints
    result = run("series", base, tuned, base, "--steps", "0,10,20", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if "│" in line and "pass" in line]
    # Step 20 is the base again: 0 from the first, 4 from the one before.
    assert [[cell.strip() for cell in row.strip("│ ").split("│")] for row in rows] == [
        ["10", "pass", "4", "4"],
        ["20", "pass", "0", "4"],
    ]
    record = json.loads(run("series", base, tuned, base, "--out", tmp_path / "out", "--json").stdout)
    assert [
        checkpoint["against_first"]["metrics"]["norms"]["norm"] for checkpoint in record["checkpoints"]
    ] == [4.0, 0.0]


def test_a_mitigated_checkpoint_is_written_where_it_was_asked_for(checkpoints, tmp_path):
    from safetensors.torch import load_file

    arguments = ("mitigate", *checkpoints, "--out", tmp_path / "out", "--mode", "update", "--scale", "0.5")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"written  {tmp_path / 'out'}\n")
    base, written = (
        load_file(f"{directory}/model.safetensors") for directory in (checkpoints[0], tmp_path / "out")
    )
    for name, value in base.items():
        torch.testing.assert_close(written[name], value + 0.25)  # half of the 0.5 that tuning added
    assert "is not empty" in error_line(run(*arguments))
    described = json.loads(run(*arguments[:4], tmp_path / "other", *arguments[5:], "--json").stdout)
    assert (described["mode"], described["scale"]) == ("update", 0.5)


@pytest.fixture
def bundled(checkpoints, norms, monkeypatch):
    from diagnostics.audit import demo
    from diagnostics.core.policy import parse

    rules = parse({"norms": {"norm": {"fail": 1, "source": "made up"}}}, "a test")
    monkeypatch.setattr("diagnostics.audit.plan.default_policy", lambda: rules)
    monkeypatch.setattr(demo, "BUNDLED", Path(checkpoints[0]).parent)


def test_the_demonstration_explains_what_it_found_and_ends_well(bundled, tmp_path):
    result = run("demo", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output  # although the model fails its policy
    assert "  tuned  FAIL  norms: norm 4, matrices 4\n" in result.stdout
    assert "norms: What does norms find?\n  0 is nothing." in result.stdout
    assert "fail  norm: tuned 4\n        norm is 4, above 1\n        source: made up" in result.stdout
    assert f"report   {tmp_path / 'out/tuned/report.html'}" in result.stdout


def test_the_demonstration_is_of_the_models_tuned_from_the_base_alone():
    from diagnostics.audit.demo import tuned_models

    assert [path.name for path in tuned_models()] == ["full", "lora-r1", "lora-r8"]


def test_a_demonstration_that_breaks_does_not_end_well(bundled, register, tmp_path):
    def broken(pair):
        raise RuntimeError("boom")

    register("broken", broken)
    assert run("demo", "--out", tmp_path / "out").exit_code == 3


def test_a_demonstration_without_its_checkpoints_says_so(bundled, tmp_path, monkeypatch):
    monkeypatch.setattr("diagnostics.audit.demo.BUNDLED", tmp_path / "nowhere")
    assert "the bundled checkpoints are missing from this installation" in error_line(
        run("demo", "--out", tmp_path)
    )


# --- commands of other packages ---


def install(monkeypatch, tmp_path, source):
    """A package that adds the command `extra`."""
    (tmp_path / "extra_command.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "extra_command", raising=False)
    entry = EntryPoint("extra", "extra_command:command", group.GROUP)
    monkeypatch.setattr(group, "entry_points", lambda group, name="extra": [entry] if name == "extra" else [])


def test_a_command_of_another_package_is_listed_unimported_and_runs(monkeypatch, tmp_path):
    source = '"""Says a word.\n\nMore."""\ndef command(word: str) -> None:\n    print(word.upper())\n'
    install(monkeypatch, tmp_path, source)
    assert "Says a word." in run("--help").stdout
    assert "extra_command" not in sys.modules
    assert run("extra", "hello").stdout == "HELLO\n"
    assert "WORD" in run("extra", "--help").stdout.upper()
    sys.modules.pop("extra_command")


def test_a_command_of_another_package_may_be_a_typer_app(monkeypatch, tmp_path):
    source = (
        "import typer\ncommand = typer.Typer()\n@command.command()\ndef one() -> None:\n    print('one')\n"
    )
    install(monkeypatch, tmp_path, source)
    assert run("extra").stdout == "one\n"
    sys.modules.pop("extra_command")


def test_a_command_that_cannot_be_imported_is_one_line(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "import no_such_module_at_all")
    assert "the command extra of " in error_line(run("extra"))
    assert run("--help").exit_code == 0
