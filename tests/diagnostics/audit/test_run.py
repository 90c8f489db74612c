import importlib
import json
import os
import sys
import threading
from importlib.metadata import EntryPoint
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from diagnostics.audit.demo import BUNDLED
from diagnostics.audit.run import audit
from diagnostics.core import registry as registry_module
from diagnostics.core.analysis import NotApplicableError, Result
from diagnostics.core.policy import parse
from diagnostics.store import keys
from diagnostics.store.audit_store import load
from probes.errors import InputError, UnknownNameError
from tests.conftest import save_model, weights


def nothing(*inputs, **parameters):
    return Result(metrics={}, tables={})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "audit"


def record(out):
    return json.loads((out / "audit.json").read_text())


def test_an_audit_writes_its_numbers_tables_and_report(norms, checkpoints, out):
    audited = audit(*checkpoints, out=out)
    # Every entry grew by 0.5: a delta of 8 by 8 entries has the norm 0.5 * 8 = 4.
    assert audited.results["norms"].metrics == {"norm": pytest.approx(4.0), "matrices": 4}
    assert audited.exit_code == 0
    stored = record(out)
    assert stored["analyses"]["norms"]["status"] == "ok"
    assert stored["analyses"]["norms"]["metrics"] == {"norm": pytest.approx(4.0), "matrices": 4}
    assert stored["analyses"]["norms"]["parameters"] == {
        "scale": 1.0, "parts": ["block"], "dtype": "float32", "seed": 0,
    }  # fmt: skip
    assert stored["analyses"]["norms"]["seconds"] >= 0
    assert stored["analyses"]["norms"]["peak_rss_mb"] > 10
    assert (out / "tables/norms.matrices.parquet").exists()
    assert "Norm of each delta" in (out / "report.html").read_text()
    assert load(out).record() == stored == audited.record()


def test_the_checkpoints_are_described_with_their_fingerprints(norms, checkpoints, out):
    from probes import open_checkpoint

    audited = audit(*checkpoints, out=out)
    for side, ref in zip(("base", "tuned"), checkpoints, strict=True):
        described = record(out)[side]
        assert described["ref"] == ref
        assert described["fingerprint"] == open_checkpoint(ref).fingerprint()
        assert described["parameters"] == 4 * 64
        assert described["kind"] == "full"
    assert audited.base["fingerprint"] != audited.tuned["fingerprint"]


def test_models_in_memory_are_audited_too(norms, out):
    base = {"model.layers.0.self_attn.q_proj.weight": torch.eye(4)}
    tuned = {name: 3 * value for name, value in base.items()}
    audited = audit(base, tuned, out=out)
    assert audited.results["norms"].metrics["norm"] == pytest.approx(4.0)  # |3 I - I| = 2 sqrt(4)


def test_settings_seed_and_dtype_reach_the_analyses_that_take_them(norms, register, checkpoints, out):
    register("plain", nothing_of_the_pair)
    audit(*checkpoints, out=out, settings={"norms": {"scale": 2.0}}, seed=7, dtype="float64", device="cpu")
    assert norms == [{"scale": 2.0, "parts": ("block",), "device": "cpu", "dtype": "float64", "seed": 7}]
    assert record(out)["options"]["seed"] == record(out)["environment"]["seed"] == 7


def nothing_of_the_pair(pair):
    return nothing()


def test_progress_names_the_analysis(norms, checkpoints, out):
    seen = []
    audit(*checkpoints, out=out, progress=lambda *step: seen.append(step))
    assert seen[0] == ("norms", 0, 4, "model.layers.0.self_attn.o_proj.weight") or seen[0][:3] == (
        "norms",
        0,
        4,
    )
    assert len(seen) == 4


def broken_entry(monkeypatch, name="harmed"):
    """Announces an analysis whose module is missing."""
    entry = EntryPoint(name, "no_such_module:measure", "tunescope.analyses")
    monkeypatch.setattr(
        registry_module,
        "entry_points",
        lambda group, name=None: [entry] if name in (None, entry.name) else [],
    )


def test_an_analysis_that_cannot_be_imported_is_left_out_and_named(norms, checkpoints, out, monkeypatch):
    broken_entry(monkeypatch)
    audited = audit(*checkpoints, out=out)
    assert (len(norms), audited.exit_code) == (1, 0)
    assert audited.analyses["harmed"].status == "skipped"
    why = "'harmed' of an unknown package cannot be loaded (ModuleNotFoundError: No module named"
    assert why in audited.analyses["harmed"].reason
    assert [note for note in audited.notes if why in note and note.startswith("Left out: ")]


def test_asked_for_by_name_it_is_an_error_of_the_input(norms, checkpoints, out, monkeypatch):
    broken_entry(monkeypatch)
    with pytest.raises(InputError, match="'harmed' of an unknown package cannot be loaded"):
        audit(*checkpoints, out=out, only=["harmed"])
    assert not norms
    audit(*checkpoints, out=out, skip=["harmed"])


def test_half_precision_of_the_models_is_not_the_arithmetic_of_weights(out):
    few = {
        "rows": 16, "batches": 1, "batch_rows": 8, "steps": 2, "pairs": 0, "rhos": (0.5,), "alphas": (0.5,),
        "layer_alphas": (0.5,), "sharpness_alphas": (1.0,), "curvature": False,
    }  # fmt: skip
    audited = audit(
        BUNDLED / "base", BUNDLED / "lora-r1", out=out, only=["intruders", "sharpness"], dtype="bfloat16",
        settings={"sharpness": few}, task=[BUNDLED / "task.jsonl"], limit=16,
    )  # fmt: skip
    assert {name: outcome.status for name, outcome in audited.analyses.items() if outcome.result} == {
        "intruders": "ok", "sharpness": "ok",
    }  # fmt: skip
    assert audited.results["intruders"].parameters["dtype"] == "float32"
    assert any("run in float32" in note for note in audited.results["sharpness"].notes)


# --- judged ---


def test_the_policy_decides_the_verdict_and_is_recorded(norms, checkpoints, out):
    rules = parse({"norms": {"norm": {"warn": 1, "fail": 3, "source": "made up"}}}, "a test")
    audited = audit(*checkpoints, out=out, policy=rules)
    assert (audited.verdict, audited.exit_code) == ("fail", 1)
    stored = record(out)
    assert stored["verdict"] == "fail"
    assert stored["findings"] == [
        {
            "analysis": "norms",
            "severity": "fail",
            "metric": "norm",
            "value": pytest.approx(4.0),
            "threshold": 3.0,
            "message": "norm is 4, above 3",
            "source": "made up",
        }
    ]
    assert stored["policy"]["origin"] == "a test"


def test_another_policy_judges_anew_without_running_anything(norms, checkpoints, out, tmp_path):
    audit(*checkpoints, out=out)
    (tmp_path / "policy.toml").write_text("[norms]\nnorm = {fail = 3}\n")
    assert audit(*checkpoints, out=out, policy=tmp_path / "policy.toml").exit_code == 1
    assert len(norms) == 1


# --- what fails stays where it is ---


def test_an_analysis_that_crashes_leaves_the_others(norms, register, checkpoints, out):
    def broken(pair):
        raise RuntimeError("boom\nand a second line")

    register("broken", broken)
    audited = audit(*checkpoints, out=out)
    assert audited.exit_code == 3
    assert audited.verdict == "fail"
    assert (
        audited.analyses["broken"].reason == "RuntimeError: boom and a second line (traceback in audit.log)"
    )
    assert audited.analyses["norms"].status == "ok"
    assert 'raise RuntimeError("boom' in (out / "audit.log").read_text()
    assert "Traceback" not in (out / "audit.json").read_text()
    assert "Traceback" not in (out / "report.html").read_text()


@pytest.mark.parametrize("error", [InputError, UnknownNameError])
def test_an_analysis_that_refuses_its_input_is_no_crash(norms, register, checkpoints, out, error):
    def picky(pair, *, epsilon=2.0):
        raise error("epsilon is 2; it is a cosine in (0, 1]")

    register("picky", picky)
    audited = audit(*checkpoints, out=out)
    assert audited.exit_code == 2
    assert audited.analyses["picky"].reason == "epsilon is 2; it is a cosine in (0, 1]"
    assert audited.analyses["norms"].status == "ok"
    assert not (out / "audit.log").exists()


SLIPS = {
    "a key": lambda: {}["missing"],
    "numpy's shapes": lambda: np.zeros(2) + np.zeros(3),  # ValueError
    "numpy's reshape": lambda: np.zeros(6).reshape(4, 2),  # ValueError
    "pandas' columns": lambda: pd.DataFrame({"a": [1]})["b"],  # KeyError
    "pandas' merge": lambda: pd.DataFrame({"a": [1]}).merge(
        pd.DataFrame({"b": [1]})
    ),  # MergeError, a ValueError
    "a number": lambda: int("four"),  # ValueError
}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS)
def test_an_error_of_a_library_inside_an_analysis_is_a_crash_with_its_traceback(
    norms, register, checkpoints, out, slip
):
    register("slips", lambda pair: slip())
    audited = audit(*checkpoints, out=out)
    assert (audited.exit_code, audited.analyses["slips"].fault) == (3, "crash")
    assert audited.analyses["slips"].reason.endswith("(traceback in audit.log)")
    log = (out / "audit.log").read_text()
    assert "slips\nTraceback (most recent call last):" in log
    assert "test_run.py" in log
    assert audited.analyses["norms"].status == "ok"


def test_a_table_that_cannot_be_stored_is_the_fault_of_its_analysis(norms, register, checkpoints, out):
    mixed = pd.DataFrame({"column": [1, "a", {}]})
    register("mixed", lambda pair: Result(metrics={}, tables={"t": mixed}))
    audited = audit(*checkpoints, out=out)
    assert audited.analyses["mixed"].status == "failed"
    assert audited.analyses["norms"].status == "ok"


def test_an_interrupt_keeps_what_was_finished_and_the_next_run_goes_on(norms, register, checkpoints, out):
    patience = [KeyboardInterrupt]

    def slow(pair):
        if patience:
            raise patience.pop()
        return nothing()

    register("slow", slow)  # after norms, in the order of names
    with pytest.raises(KeyboardInterrupt):
        audit(*checkpoints, out=out)
    stored = record(out)
    assert stored["analyses"]["norms"]["status"] == "ok"
    assert stored["analyses"]["slow"]["status"] == "failed"
    assert stored["analyses"]["slow"]["reason"] == "not finished; run the same command again to go on"
    assert stored["verdict"] == "fail"
    assert not (out / "report.html").exists()
    assert audit(*checkpoints, out=out).exit_code == 0
    assert len(norms) == 1


def test_a_report_that_cannot_be_drawn_costs_nothing_but_itself(norms, checkpoints, out, monkeypatch):
    def broken(audited, path):
        raise RuntimeError("no such colour")

    monkeypatch.setattr("diagnostics.report.render.write_html", broken)
    with pytest.raises(RuntimeError, match=r"report.html could not be drawn: RuntimeError: no such colour"):
        audit(*checkpoints, out=out)
    assert load(out).exit_code == 0
    assert "no such colour" in (out / "audit.log").read_text()


def test_a_fingerprint_that_cannot_be_taken_is_a_note(norms, checkpoints, out, monkeypatch):
    from probes.checkpoints.checkpoint import Checkpoint

    def vanished(self):
        raise InputError("model.safetensors is gone")

    monkeypatch.setattr(Checkpoint, "describe", vanished)
    audited = audit(*checkpoints, out=out)
    assert audited.notes == ("the checkpoints could not be fingerprinted: model.safetensors is gone",)
    assert audited.tuned["fingerprint"] is None
    assert audited.results


# --- what is done is not done again, and what changed is ---


def test_a_second_run_takes_everything_from_the_first(norms, checkpoints, out, monkeypatch):
    from probes.checkpoints.checkpoint import Checkpoint

    first = audit(*checkpoints, out=out)
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: pytest.fail("read everything again"))
    second = audit(*checkpoints, out=out)
    assert len(norms) == 1
    assert second.analyses["norms"].reused
    assert second.results["norms"].metrics == first.results["norms"].metrics
    assert second.tuned == first.tuned


def rewrite_tuned(checkpoints, **options):
    from safetensors.torch import load_file, save_file

    file = Path(checkpoints[1]) / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    os.utime(file, ns=(1, 1))  # clocks are coarse


CHANGES = {
    "a parameter": {"settings": {"norms": {"scale": 2.0}}},
    "the seed": {"seed": 1},
    "the dtype": {"dtype": "float64"},
    "starting over": {"fresh": True},
}


@pytest.mark.parametrize("options", CHANGES.values(), ids=CHANGES)
def test_other_options_are_never_served_from_old_results(norms, checkpoints, out, options):
    audit(*checkpoints, out=out)
    audited = audit(*checkpoints, out=out, **options)
    assert len(norms) == 2
    assert not audited.analyses["norms"].reused


def test_other_weights_are_never_served_from_old_results(norms, checkpoints, out):
    audit(*checkpoints, out=out)
    rewrite_tuned(checkpoints)
    audited = audit(*checkpoints, out=out)
    assert len(norms) == 2
    assert audited.results["norms"].metrics["norm"] == pytest.approx(12.0)  # 1.5 * 8
    audit(checkpoints[1], checkpoints[0], out=out, replace=True)  # the other way round
    assert len(norms) == 3


OTHERS = {
    "another tuned": lambda base, tuned, out: audit(base, base, out=out),
    "the other way round": lambda base, tuned, out: audit(tuned, base, out=out),
    "a model": lambda base, tuned, out: save_model(out, weights(1)),
    "an adapter": lambda base, tuned, out: written(out / "adapter_config.json"),
    "a report": lambda base, tuned, out: written(out / "report.html"),
    "an audit of another program": lambda base, tuned, out: written(out / "audit.json"),
    "a series": lambda base, tuned, out: written(out / "series.json"),
}


def written(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"by": "another"}')


@pytest.mark.parametrize("other", OTHERS)
def test_a_directory_keeps_what_it_holds_unless_it_is_to_be_replaced(other, norms, checkpoints, out):
    OTHERS[other](*checkpoints, out)
    count = len(norms)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for fresh in (False, True):
        with pytest.raises(
            InputError, match=f"--out {out}: holds .*; name another directory, or give --repl"
        ):
            audit(*checkpoints, out=out, fresh=fresh)
    assert len(norms) == count
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert audit(*checkpoints, out=out, replace=True).results["norms"].metrics["matrices"] == 4
    assert load(out).tuned["ref"] == checkpoints[1]
    assert len(norms) == count + 1
    audit(*checkpoints, out=out, replace=True)  # of the same pair, it is used again
    assert len(norms) == count + 1


def test_the_same_pair_is_started_over_with_fresh_alone_and_by_any_name(norms, checkpoints, out, monkeypatch):
    audit(*checkpoints, out=out)
    rewrite_tuned(checkpoints)
    audit(*checkpoints, out=out, fresh=True)
    assert len(norms) == 2
    base, tuned = map(Path, checkpoints)
    monkeypatch.chdir(base.parent)
    audit(base.name, f"./{tuned.name}", out=out)
    assert len(norms) == 2
    (out / "audit.json").write_text("{")  # damaged: of which pair it was cannot be told
    with pytest.raises(InputError, match="start over with --fresh"):
        audit(*checkpoints, out=out)
    audit(*checkpoints, out=out, fresh=True)
    assert len(norms) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_tensor_that_no_analysis_reads_must_be_finite_too(norms, checkpoints, out, value, side):
    file = Path(checkpoints[side], "model.safetensors")
    save_file({**load_file(file), "lm_head.weight": torch.tensor([[1.0, value]])}, file)
    for count in (1, 1):  # the second time from the first
        audited = audit(*checkpoints, out=out)
        assert (audited.verdict, audited.exit_code, len(norms)) == ("fail", 2, count)
        assert audited.results["norms"].metrics["matrices"] == 4
        reason = audited.analyses["integrity"].reason
        assert (
            f"{('base', 'tuned')[side]} {checkpoints[side]}: lm_head.weight is NaN or infinite: the "
            in reason
        )
    assert load(out).exit_code == 2


def test_files_of_others_are_never_removed(norms, checkpoints, out):
    files = [out / name for name in ("notes.txt", "tables/mine.parquet", "masks/mine.safetensors")]
    for file in files:
        written(file)
    audit(*checkpoints, out=out)
    audit(*checkpoints, out=out, fresh=True)
    audit(checkpoints[1], checkpoints[0], out=out, replace=True)
    assert all(file.is_file() for file in files)
    assert len(list((out / "tables").iterdir())) == 2


def test_another_version_is_never_served_from_old_results(norms, checkpoints, out, monkeypatch):
    audit(*checkpoints, out=out)
    monkeypatch.setattr(keys, "version", lambda package: "99")
    audit(*checkpoints, out=out)
    assert len(norms) == 2


SOURCE = """
from diagnostics.core.analysis import Result, analysis

@analysis("edited", question="", reading="", paper="", cost="", draw=lambda result: {})
def measure(pair):
    return Result(metrics={"number": 1}, tables={})
"""


def test_an_analysis_whose_source_was_edited_is_run_again(registry, checkpoints, out, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_analysis.py").write_text(SOURCE)
    module = importlib.import_module("edited_analysis")
    assert not audit(*checkpoints, out=out).analyses["edited"].reused
    assert audit(*checkpoints, out=out).analyses["edited"].reused
    (tmp_path / "edited_analysis.py").write_text(SOURCE.replace("1", "22"))
    importlib.reload(module)
    audited = audit(*checkpoints, out=out)
    assert audited.results["edited"].metrics == {"number": 22}
    monkeypatch.delitem(sys.modules, "edited_analysis")


def test_other_rows_are_never_served_from_old_results(register, checkpoints, out, tmp_path):
    register(
        "counts", lambda pair, task, *, seed=0: Result(metrics={"rows": len(task["rows"].rows)}, tables={})
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    assert audit(*checkpoints, out=out, task=[rows]).results["counts"].metrics == {"rows": 1}
    assert audit(*checkpoints, out=out, task=[rows]).analyses["counts"].reused
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert audit(*checkpoints, out=out, task=[rows]).results["counts"].metrics == {"rows": 2}


def test_rows_that_an_analysis_does_not_read_change_nothing_for_it(norms, checkpoints, out, tmp_path):
    audit(*checkpoints, out=out)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    audit(*checkpoints, out=out, task=[tmp_path / "rows.jsonl"])
    assert len(norms) == 1


def test_a_damaged_table_is_made_again(norms, checkpoints, out):
    audit(*checkpoints, out=out)
    (out / "tables/norms.matrices.parquet").write_bytes(b"PAR1")
    audited = audit(*checkpoints, out=out)
    assert len(norms) == 2
    assert len(audited.results["norms"].tables["matrices"]) == 4
    load(out)


def test_a_failed_analysis_is_tried_again(register, checkpoints, out):
    errors = [RuntimeError("boom")]

    def fickle(pair):
        if errors:
            raise errors.pop()
        return nothing()

    register("fickle", fickle)
    assert audit(*checkpoints, out=out).exit_code == 3
    assert audit(*checkpoints, out=out).exit_code == 0


def test_results_that_are_not_asked_for_are_kept_but_not_judged(norms, register, checkpoints, out):
    register("other", lambda pair: nothing())
    rules = parse({"norms": {"norm": {"fail": 1}}}, "a test")
    assert audit(*checkpoints, out=out, policy=rules).exit_code == 1
    only = audit(*checkpoints, out=out, policy=rules, only=["other"])
    assert only.exit_code == 0  # the same command gives the same verdict, whatever the directory held
    assert only.analyses["norms"].reason == "not asked for: --only other"
    assert list(only.kept) == ["norms"]
    again = audit(*checkpoints, out=out, policy=rules)
    assert again.exit_code == 1
    assert len(norms) == 1


# --- what is supplied ---


def test_an_analysis_gets_the_inputs_that_it_names(register, checkpoints, out, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    got = {}

    def measure(pair, ood, keep=None, guard=None):
        got.update(ood=ood, keep=keep, guard=guard)
        return nothing()

    register("made", measure)
    rows = str(tmp_path / "rows.jsonl")
    audit(*checkpoints, out=out, ood=[f"a={rows}", f"b={rows}"], keep=[rows])
    assert list(got["ood"]) == ["a", "b"]
    assert [task.ref for task in got["ood"].values()] == [rows, rows]
    assert [row.text for row in got["keep"]["rows"].rows] == ["a"]
    assert got["guard"] is None
    assert {role: len(files) for role, files in record(out)["data"].items()} == {"keep": 1, "ood": 2}


def test_what_lacks_its_inputs_is_skipped_with_the_option_that_would_enable_it(
    norms, register, checkpoints, out
):
    register("needy", lambda pair, task, ood: nothing())
    register("alien", lambda pair, planet: nothing())
    audited = audit(*checkpoints, out=out)
    reasons = {
        name: outcome.reason for name, outcome in audited.analyses.items() if outcome.status == "skipped"
    }
    assert reasons == {
        "needy": "needs --task F and --ood NAME=F",
        "alien": "needs 'planet', which this tunescope cannot supply",
    }
    assert audited.exit_code == 0


def test_of_two_checkpoints_a_series_is_made_and_one_that_is_too_short_is_left_out(
    norms, register, checkpoints, out
):
    seen = []

    def curve(series):
        seen.append(series.labels)
        series.at_least(4, "a curve")

    register("curve", curve)
    audited = audit(*checkpoints, out=out)
    assert seen == [("base", "tuned")]
    assert audited.analyses["curve"].status == "skipped"
    assert (
        audited.analyses["curve"].reason == "a series of 2 checkpoints: a curve needs at least 4; give more"
    )
    assert audited.exit_code == 0
    assert audit(*checkpoints, out=out, only=["curve"]).exit_code == 2  # asked for by name


def test_two_checkpoints_are_base_and_tuned_whatever_steps_their_names_tell(norms, register, tmp_path, out):
    base, tuned = weights(0), weights(1)
    late, early, again = (
        str(save_model(tmp_path / name, state))
        for name, state in (("checkpoint-9", base), ("checkpoint-3", tuned), ("other/checkpoint-9", tuned))
    )
    seen = []
    register(
        "order",
        lambda series: seen.append([checkpoint.ref for checkpoint in series.checkpoints]) or nothing(),
    )
    for other in (early, again):
        assert audit(late, other, out=out, replace=True).exit_code == 0
    assert seen == [[late, early], [late, again]]


def test_what_does_not_apply_to_a_model_is_left_out_unless_asked_for(norms, register, checkpoints, out):
    def routes(pair):
        raise NotApplicableError("has no expert; `dynamics` runs instead")

    register("routes", routes)
    audited = audit(*checkpoints, out=out)
    assert (audited.analyses["routes"].status, audited.exit_code) == ("skipped", 0)
    assert audited.analyses["routes"].reason == "has no expert; `dynamics` runs instead"
    asked = audit(*checkpoints, out=out, only=["routes"])
    assert (asked.analyses["routes"].fault, asked.exit_code) == ("input", 2)


def test_files_that_nothing_reads_are_recorded_and_said_to_have_no_effect(
    norms, register, checkpoints, out, tmp_path
):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    register("reader", lambda pair, keep: nothing())
    audited = audit(
        *checkpoints, out=out, task=[tmp_path / "rows.jsonl"], keep=[tmp_path / "rows.jsonl"], skip=["reader"]
    )
    assert audited.notes == (
        "no installed analysis reads --task; the file is recorded and has no other effect",
        "none of the analyses asked for reads --keep; reader would",
    )


@pytest.mark.parametrize("named", ["org/other", "runs/base"])
def test_an_adapter_that_names_another_base_is_said_to(norms, out, tmp_path, named):
    """A path that ends as the base's own directory does may be the same model elsewhere."""
    from safetensors.torch import save_file

    name = "model.layers.0.self_attn.q_proj"
    for directory in ("base", "tuned"):
        (tmp_path / directory).mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file({f"{name}.weight": torch.eye(8)}, tmp_path / "base/model.safetensors")
    factors = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    factors = {f"base_model.model.{name}.lora_{key}.weight": value for key, value in factors.items()}
    save_file(factors, tmp_path / "tuned/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": named}
    (tmp_path / "tuned/adapter_config.json").write_text(json.dumps(config))
    audited = audit(tmp_path / "base", tmp_path / "tuned", out=out)
    # delta = alpha / r * B A = 2 everywhere: its norm is 2 * 8
    assert audited.results["norms"].metrics["norm"] == pytest.approx(16.0)
    assert record(out)["tuned"]["adapter"]["base"] == named
    expected = f"trained on 'org/other' and is applied to {tmp_path / 'base'}: is that the same model?"
    assert [expected in note for note in audited.notes] == ([True] if named == "org/other" else [])


def test_an_audit_with_nothing_to_run_is_refused(register, checkpoints, out):
    register("needy", lambda pair, task: nothing())
    with pytest.raises(ValueError, match="nothing to run: needy needs --task F"):
        audit(*checkpoints, out=out)
    with pytest.raises(ValueError, match="nothing to run: every analysis is left out"):
        audit(*checkpoints, out=out, skip=["needy"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["nrms"]}, r"--only: unknown analysis 'nrms'; known: norms"),
        ({"skip": ["x"]}, r"--skip: unknown analysis 'x'; known: norms"),
        ({"settings": {"x": {}}}, r"unknown analysis 'x'; known: norms"),
        ({"settings": {"norms": {"k": 1}}}, r"norms has no parameter 'k'; it has: scale, parts, dtype, seed"),
        ({"settings": {"norms": {"device": "cpu"}}}, r"norms has no parameter 'device'"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_written(norms, checkpoints, out, options, message):
    with pytest.raises(LookupError, match=message):
        audit(*checkpoints, out=out, **options)
    assert not out.exists()


def test_a_checkpoint_that_is_not_there_leaves_no_directory(norms, checkpoints, out, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        audit(checkpoints[0], str(tmp_path / "nowhere"), out=out)
    assert not out.exists()


def test_tensors_without_a_partner_are_listed(norms, tmp_path, out):
    base = {"model.layers.0.self_attn.q_proj.weight": torch.eye(4)}
    extra = {**base, "model.layers.0.self_attn.extra.weight": torch.ones(2, 4)}
    audit(base, extra, out=out)
    (unmatched,) = record(out)["unmatched"]
    assert unmatched["tensor"] == "model.layers.0.self_attn.extra.weight"
    assert unmatched["tuned_shape"] == [2, 4]


def test_work_that_splits_runs_on_the_engine(register, checkpoints, out):
    def spread(pair):
        places = set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(4)))
        return Result(metrics={"here": int(places == {os.getpid()})}, tables={})

    register("spread", spread)
    assert audit(*checkpoints, out=out).results["spread"].metrics == {"here": 1}
    assert audit(*checkpoints, out=out, engine="local:2", fresh=True).results["spread"].metrics == {"here": 0}


def test_no_thread_is_left_behind(norms, checkpoints, out):
    before = set(threading.enumerate())
    audit(*checkpoints, out=out)
    assert set(threading.enumerate()) <= before


def test_one_file_and_one_name_may_be_given_as_they_are(norms, register, checkpoints, out, tmp_path):
    register("reads", lambda pair, task: Result(metrics={"rows": len(task["rows"].rows)}, tables={}))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    audited = audit(*checkpoints, out=out, task=str(tmp_path / "rows.jsonl"), only="reads")
    assert audited.results["reads"].metrics == {"rows": 1}
    assert list(audited.results) == ["reads"]
