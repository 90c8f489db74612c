import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.core.analysis import Result
from diagnostics.core.policy import parse
from diagnostics.store import files
from diagnostics.store.audit_store import Audit, Outcome, Store, load
from diagnostics.store.files import CannotWriteError, read_table, replacing, to_json, write_table
from probes.checkpoints.mask_file import Patch

TABLE = pd.DataFrame({"matrix": ["a", "b"], "norm": [1.5, math.nan], "count": [1, 2], "new": [True, False]})


def audit(out=None, **metrics):
    result = Result(
        metrics=metrics or {"norm": 3.0},
        tables={"matrices": TABLE},
        notes=("b was not measured",),
        analysis="made",
        parameters={"k": 10, "parts": ["block"]},
    )
    return Audit(
        base={"ref": "base", "fingerprint": "00"},
        tuned={"ref": "tuned", "fingerprint": "01"},
        policy=parse({"made": {"norm": {"warn": 1, "fail": 2, "per": "k"}, "absent": {"warn": 1}}}, "a test"),
        analyses={"made": Outcome(status="ok", result=result, seconds=1.5, key="k")},
        created="2026-01-01T00:00:00Z",
        tunescope="0.1.0",
        notes=("a note",),
        unmatched=(
            {"tensor": "extra", "reason": "only in tuned", "base_shape": None, "tuned_shape": (2, 3)},
        ),
        path=out,
    )


def save(out, fresh=None):
    fresh = fresh or audit(out)
    with Store(out) as store:
        for name, result in fresh.results.items():
            store.write_result(name, result)
        store.write(fresh)
    return fresh


def test_a_saved_audit_says_all_that_a_fresh_one_does(tmp_path):
    fresh = save(tmp_path)
    again = load(tmp_path)
    assert again.record() == fresh.record()
    pd.testing.assert_frame_equal(again.results["made"].tables["matrices"], TABLE)
    assert replace(again.results["made"], tables={}) == replace(fresh.results["made"], tables={})
    assert again.findings == fresh.findings


def masked(out, **index):
    """An audit whose result has a mask."""
    patch = Patch(
        index={name: torch.tensor(entries) for name, entries in index.items()},
        values={name: torch.ones(len(entries)) for name, entries in index.items()},
        base="00",
        tuned="01",
    )
    unmasked = audit(out)
    outcome = unmasked.analyses["made"]
    return replace(
        unmasked, analyses={"made": replace(outcome, result=replace(outcome.result, masks={"task": patch}))}
    )


def test_masks_are_kept_beside_the_tables_and_known_again(tmp_path):
    fresh = save(tmp_path, masked(tmp_path, w=[1, 5]))
    again = load(tmp_path)
    assert again.record() == fresh.record()
    path = again.results["made"].masks["task"]
    assert path == tmp_path / "masks" / "made.task.safetensors"
    assert Patch.load(path).index["w"].tolist() == [1, 5]
    with Store(tmp_path) as store:  # one that is taken over is not written again, and stays
        store.write_result("made", again.results["made"])
        store.write(again)
        assert Patch.load(path).count == 2
        store.write(audit(tmp_path))  # and one that is no longer named goes
    assert not path.exists()


def test_an_audit_whose_mask_is_gone_is_damaged(tmp_path):
    save(tmp_path, masked(tmp_path, w=[1]))
    (tmp_path / "masks" / "made.task.safetensors").unlink()
    with pytest.raises(ValueError, match="damaged: mask task of made is missing"):
        load(tmp_path)
    assert load(tmp_path, damaged="drop").results == {}


def test_a_full_disk_is_said_when_a_mask_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    fresh = masked(tmp_path, w=[1])
    with (
        Store(tmp_path) as store,
        pytest.raises(CannotWriteError, match=r"made\.task\.safetensors: No space"),
    ):
        store.write_result("made", fresh.results["made"])
    assert list((tmp_path / "masks").iterdir()) == []


def test_a_saved_audit_is_judged_and_drawn_again(tmp_path, register):
    register("made", lambda: None, draw=lambda result: {"rows": len(result.tables["matrices"])})
    save(tmp_path, audit(norm=30.0))
    again = load(tmp_path / "audit.json")  # the file may be named as well as its directory
    assert again.results["made"].figures() == {"rows": 2}
    assert [finding.severity for finding in again.findings] == ["fail"]  # 30 is above 2 times k = 10
    mild = parse({"made": {"norm": {"warn": 1000}}}, "another")
    assert replace(again, policy=mild).verdict == "pass"
    assert again.results["made"].findings(mild) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_survive_as_valid_json(tmp_path, value):
    save(tmp_path, audit(norm=value))

    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    json.loads((tmp_path / "audit.json").read_text(), parse_constant=refuse)
    again = load(tmp_path).results["made"].metrics["norm"]
    assert again == value or (math.isnan(again) and math.isnan(value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_what_is_written_is_what_is_read(value):
    assert json.loads(to_json(value)) == value


def test_the_schema_is_the_one_that_scripts_rely_on(tmp_path):
    save(tmp_path)
    record = json.loads((tmp_path / "audit.json").read_text())
    assert record["schema"] == 1
    top = {"tunescope", "created", "base", "tuned", "data", "environment", "verdict", "findings", "analyses"}
    assert top <= set(record)
    entry = record["analyses"]["made"]
    assert {"status", "reason", "seconds", "peak_rss_mb", "parameters", "metrics", "tables"} <= set(entry)
    assert entry["tables"] == {"matrices": "tables/made.matrices.parquet"}
    assert record["not_measured"] == {"made": {"absent": "the analysis left it out"}}
    assert set(record["findings"][0] if record["findings"] else FINDING) == FINDING


FINDING = {"analysis", "severity", "metric", "value", "threshold", "message", "source"}


def outcome(fault):
    status = "ok" if fault is None else "failed"
    result = Result(metrics={}, tables={}, analysis="made") if fault is None else None
    return Outcome(status=status, fault=fault, result=result)


@pytest.mark.parametrize(
    ("faults", "verdict", "code"),
    [
        ([None], "pass", 0),
        ([], "pass", 0),
        ([None, "input"], "fail", 2),
        ([None, "crash"], "fail", 3),
        (["input", "crash"], "fail", 3),
        (["unfinished"], "fail", 3),
    ],
)
def test_an_audit_with_a_failed_analysis_never_passes(faults, verdict, code):
    analyses = {f"a{i}": outcome(fault) for i, fault in enumerate(faults)}
    combined = replace(audit(), analyses=analyses)
    assert (combined.verdict, combined.exit_code) == (verdict, code)


def test_findings_decide_the_exit_code_of_a_finished_audit():
    codes = {norm: audit(norm=norm).exit_code for norm in (10.0, 15.0, 25.0)}  # warn above 10, fail above 20
    assert codes == {10.0: 0, 15.0: 0, 25.0: 1}
    assert audit(norm=15.0).verdict == "warn"


# --- what can go wrong on a disk ---


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(tmp_path):
    path = tmp_path / "audit.json"
    path.write_text("old")
    # A device that is always full stands where the temporary file would be made.
    (tmp_path / f".audit.json.{os.getpid()}.part").symlink_to("/dev/full")
    with (
        pytest.raises(
            CannotWriteError, match=r"cannot write .*audit.json: No space left on device; mend that"
        ),
        replacing(path) as part,
    ):
        part.write_text("new" * 10_000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["audit.json"]


def test_a_disk_that_fills_under_a_table_names_the_table(tmp_path, monkeypatch):
    write_table(tmp_path / "t.parquet", TABLE)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CannotWriteError, match=r"cannot write .*t.parquet: No space left on device"):
        write_table(tmp_path / "t.parquet", TABLE.head(1))
    assert len(read_table(tmp_path / "t.parquet")) == 2
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "tables").mkdir()
    left = [tmp_path / ".audit.json.7.part", tmp_path / "tables/.made.matrices.parquet.7.part"]
    others = [tmp_path / "notes.txt", tmp_path / "tables/mine.csv", tmp_path / ".hidden"]
    for path in left + others:
        path.write_text("x")
    save(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_tables_that_an_audit_no_longer_names_are_removed(tmp_path):
    save(tmp_path)
    write_table(tmp_path / "tables/made.old.parquet", TABLE)
    save(tmp_path)
    assert os.listdir(tmp_path / "tables") == ["made.matrices.parquet"]


def test_two_writers_of_one_audit_are_refused(tmp_path):
    with (
        Store(tmp_path),
        pytest.raises(ValueError, match="another tunescope is writing there"),
        Store(tmp_path),
    ):
        pass
    with Store(tmp_path):
        pass


def test_a_killed_writer_holds_no_lock(tmp_path):
    script = f"""
import sys, time
from diagnostics.store.audit_store import Store
with Store({str(tmp_path)!r}):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another tunescope is writing there"), Store(tmp_path):
            pass
        writer.send_signal(signal.SIGKILL)
    with Store(tmp_path):
        pass


def test_an_output_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"--out .*file: is a file, not a directory; name another place"):
        Store(tmp_path / "file")


def test_an_output_path_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CannotWriteError, match=r"cannot write .*: Not a directory; mend"),
        Store(tmp_path / "file/a"),
    ):
        pass
    # Nobody may make a directory in /proc, not even root.
    with pytest.raises(CannotWriteError, match=r"cannot write /proc/a: "), Store("/proc/a"):
        pass


def test_starting_over_removes_only_what_audits_write(tmp_path):
    save(tmp_path)
    for name in ("report.html", "audit.log", "notes.txt", "tables/mine.csv"):
        (tmp_path / name).write_text("x")
    with Store(tmp_path) as store:
        store.clear()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".lock", "notes.txt", "tables/mine.csv"}


# --- what can be wrong with a saved audit ---


def test_a_place_without_an_audit_is_said_to_have_none(tmp_path):
    with pytest.raises(ValueError, match=r"no audit here \(there is no audit.json\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], r"audit.json: damaged, not JSON: "),
        (lambda text: "[]", r"audit.json: not an audit of tunescope"),
        (lambda text: '{"schema": 99}', r"schema 99 is newer than this tunescope reads \(1\); upgrade"),
        (lambda text: '{"schema": 1}', r"audit.json: damaged: KeyError 'policy'"),
        (
            lambda text: text.replace('"metrics": {', '"metrics": 3, "_": {'),
            r"audit.json: damaged: made: metrics is 3",
        ),
        (
            lambda text: text.replace("tables/made.m", "../made.m"),
            r"damaged: table matrices of made is said to be",
        ),
        (
            lambda text: text.replace('"made": {\n   "status"', '"../made": {\n   "status"'),
            "'../made' cannot name",
        ),
    ],
)
def test_a_damaged_audit_is_one_clear_error(tmp_path, damage, message):
    save(tmp_path)
    file = tmp_path / "audit.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (flip, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged"),
    ],
    ids=["missing", "flipped bit", "truncated"],
)
def test_a_damaged_table_is_named_and_its_analysis_can_be_run_again(tmp_path, damage, message):
    save(tmp_path)
    damage(tmp_path / "tables/made.matrices.parquet")
    with pytest.raises(ValueError, match=f"made.matrices.parquet: {message}; run the audit again"):
        load(tmp_path)
    with Store(tmp_path) as store:
        earlier = store.earlier()
    assert earlier is not None
    assert earlier.analyses == {}


def test_an_earlier_audit_that_is_damaged_points_to_starting_over(tmp_path):
    (tmp_path / "audit.json").write_text("{")
    with (
        Store(tmp_path) as store,
        pytest.raises(ValueError, match=r"damaged, not JSON: .*; start over with --fresh"),
    ):
        store.earlier()


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "a b"])
def test_names_that_would_leave_the_directory_are_refused(tmp_path, name):
    result = Result(metrics={}, tables={name: TABLE}, analysis="made")
    with Store(tmp_path) as store, pytest.raises(ValueError, match="cannot name an analysis or a table"):
        store.write_result("made", result)


# --- audits made to do harm ---


@pytest.mark.parametrize(
    "location", ["../../x.parquet", "/x.parquet", "tables/../../x.parquet", "tables/made.other.parquet"]
)
def test_a_table_said_to_lie_elsewhere_is_refused(tmp_path, location):
    save(tmp_path / "audit")
    TABLE.to_parquet(tmp_path / "x.parquet")
    file = tmp_path / "audit" / "audit.json"
    record = json.loads(file.read_text())
    record["analyses"]["made"]["tables"]["matrices"] = location
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="table matrices of made is said to be"):
        load(tmp_path / "audit")


@pytest.mark.parametrize(
    "name", ["tables/made.matrices.parquet", "audit.json", "tables", "masks/made.task.safetensors"]
)
def test_a_link_out_of_an_audit_is_not_followed(tmp_path, name):
    save(tmp_path / "audit", masked(tmp_path / "audit", w=[1]))
    path = tmp_path / "audit" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*, outside of the audit; not opened"):
        load(tmp_path / "audit")


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("base",), [], "base is"),
        (("notes",), [3], r"notes is \[3\]"),
        (("unmatched",), ["x"], "unmatched is"),
        (("policy", "rules"), 3, "policy: rules is 3"),
        (("policy", "rules"), {"made": {"norm": {"dail": 1}}}, "made.norm: unknown key 'dail'"),
        (("analyses", "made"), 3, "made: is no object"),
        (("analyses", "made", "status"), "perhaps", "made: status is 'perhaps'"),
        (("analyses", "made", "seconds"), "long", "made: seconds is 'long'"),
        (("analyses", "made", "metrics", "norm"), [], r"made: \[\] is not a number"),
        (("analyses", "made", "metrics", "norm"), "3", "made: '3' is not a number"),
        (("analyses", "made", "metrics", "norm"), 10**400, "made: 1000.* is not a number"),
        (("analyses", "made", "tables"), {"a" * 300: "x"}, "cannot name an analysis or a table"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(tmp_path, path, value, match):
    save(tmp_path)
    record = json.loads((tmp_path / "audit.json").read_text())
    part = record
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (tmp_path / "audit.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"audit.json: damaged: .*{match}"):
        load(tmp_path)


def test_an_audit_nested_without_end_is_damaged(tmp_path):
    (tmp_path / "audit.json").write_text('{"schema": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="damaged, not JSON: nested too deeply"):
        load(tmp_path)


def test_a_parameter_that_no_number_holds_judges_nothing(tmp_path):
    save(tmp_path)
    record = json.loads((tmp_path / "audit.json").read_text())
    record["analyses"]["made"]["parameters"]["k"] = 10**400
    (tmp_path / "audit.json").write_text(json.dumps(record))
    again = load(tmp_path)
    assert again.findings == []
    assert "per k" in again.not_measured["made"]["norm"]


def test_a_table_of_more_rows_than_fit_is_refused_unread(tmp_path, monkeypatch):
    write_table(tmp_path / "x.parquet", TABLE)  # 2 rows of 4 columns
    monkeypatch.setattr(files, "CELLS", 7)
    with pytest.raises(ValueError, match=r"x.parquet: is damaged"):
        read_table(tmp_path / "x.parquet")
    monkeypatch.setattr(files, "CELLS", 8)
    pd.testing.assert_frame_equal(read_table(tmp_path / "x.parquet"), TABLE)
