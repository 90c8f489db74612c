"""`tunescope check`, and the merge check of an audit, from the shell."""

import json
import shutil

import pytest

from diagnostics.audit.demo import BUNDLED
from diagnostics.store.audit_store import load
from tests.diagnostics.shell import shell

BASE, FULL, ADAPTER = BUNDLED / "base", BUNDLED / "full", BUNDLED / "lora-r8"


def test_a_tuned_model_passes(monkeypatch, capsys, tmp_path):
    assert shell(monkeypatch, "check", BASE, FULL, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PASS")
    saved = load(tmp_path / "out")
    assert list(saved.results) == ["integrity"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_base_against_itself_fails(monkeypatch, capsys, tmp_path):
    assert shell(monkeypatch, "check", BASE, BASE, "--out", tmp_path / "out") == 1
    assert "nothing was tuned: every weight equals base's" in capsys.readouterr().out


def test_json_is_the_audit(monkeypatch, capsys, tmp_path):
    shell(monkeypatch, "check", BASE, FULL, "--out", tmp_path / "out", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["analyses"]["integrity"]["metrics"]["nothing_tuned"] == 0
    assert record["verdict"] == "pass"


def test_the_notes_that_name_the_matrices_are_printed(monkeypatch, capsys, tmp_path):
    arguments = "check", BASE, BASE, "--adapter", ADAPTER, "--out", tmp_path / "out"
    assert shell(monkeypatch, *arguments) == 1
    assert "The adapter is not merged in 28 matrices: layer 0 " in capsys.readouterr().out


def test_an_adapter_that_is_none_is_one_line(monkeypatch, capsys, tmp_path):
    arguments = "check", BASE, FULL, "--adapter", BASE, "--out", tmp_path / "out"
    assert shell(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds full weights and no adapter; name the directory with adapter_config.json" in error


def test_a_policy_may_allow_what_equals_base(monkeypatch, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text("integrity.nothing_tuned = {}")
    arguments = "check", BASE, BASE, "--policy", policy, "--out", tmp_path / "out"
    assert shell(monkeypatch, *arguments) == 0


def test_an_audit_checks_the_merge_and_remembers_which_adapter(monkeypatch, tmp_path):
    arguments = "audit", BASE, FULL, "--only", "integrity", "--out", tmp_path / "out", "--quiet"
    assert shell(monkeypatch, *arguments) == 0
    assert "adapted" not in load(tmp_path / "out").results["integrity"].metrics
    copy = tmp_path / "adapter"
    shutil.copytree(ADAPTER, copy)
    assert shell(monkeypatch, *arguments, "--adapter", copy) == 1
    audit = load(tmp_path / "out")
    assert audit.results["integrity"].metrics["other_delta"] == 28
    assert audit.options["adapter"] == str(copy)
    assert shell(monkeypatch, *arguments, "--adapter", copy) == 1
    assert load(tmp_path / "out").analyses["integrity"].reused
    (copy / "adapter_model.safetensors").write_bytes((ADAPTER / "adapter_model.safetensors").read_bytes())
    shell(monkeypatch, *arguments, "--adapter", copy)  # another file now
    assert not load(tmp_path / "out").analyses["integrity"].reused


def test_what_checks_the_files_comes_first(monkeypatch, tmp_path):
    from diagnostics.report.content import build_sections

    arguments = "audit", BASE, ADAPTER, "--only", "intruders,integrity", "--out", tmp_path / "out", "--quiet"
    shell(monkeypatch, *arguments)
    audit = load(tmp_path / "out")
    assert list(audit.results) == ["integrity", "intruders"]
    # intruders warns and integrity passes; the check of the files comes first nevertheless
    assert [(section.name, section.verdict) for section in build_sections(audit)] == [
        ("integrity", "pass"),
        ("intruders", "warn"),
    ]


@pytest.mark.parametrize("command", ["audit", "check"])
def test_help_names_the_option(command, monkeypatch, capsys):
    shell(monkeypatch, command, "--help")
    assert "--adapter" in capsys.readouterr().out
