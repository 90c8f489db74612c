"""The analyses of rows, from the command to the tables, on the bundled models."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

import diagnostics
from diagnostics.store.audit_store import load
from tests.diagnostics.shell import shell

BUNDLED = Path(diagnostics.__file__).parent / "bundled"
ANALYSES = ("ood", "drift")
ROWS = [
    *("--task", str(BUNDLED / "task.jsonl"), "--keep", str(BUNDLED / "keep.jsonl")),
    *("--ood", f"code={BUNDLED / 'ood-code.jsonl'}", "--ood", f"words={BUNDLED / 'ood-words.jsonl'}"),
]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """`lora-r8` merged into its base by PEFT, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("merged") / "lora-r8-merged"
    base = AutoModelForCausalLM.from_pretrained(BUNDLED / "base", dtype="float32")
    PeftModel.from_pretrained(base, BUNDLED / "lora-r8").merge_and_unload().save_pretrained(directory)
    for file in BUNDLED.glob("base/tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def audits(merged, tmp_path_factory):
    """An audit each of a full fine-tune, an adapter, and the adapter merged beforehand."""
    root = tmp_path_factory.mktemp("audits")
    codes = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, tuned in (("full", BUNDLED / "full"), ("adapter", BUNDLED / "lora-r8"), ("merged", merged)):
            codes[name] = shell(
                monkeypatch, "audit", BUNDLED / "base", tuned, *ROWS, "--only", ",".join(ANALYSES),
                "--limit", 60, "--dtype", "float32", "--set", "ood.draws=20", "--device", "cpu",
                "--out", root / name, "--quiet",
            )  # fmt: skip
    return root, codes


def test_both_analyses_of_rows_run_on_a_full_fine_tune_and_on_an_adapter(audits):
    root, codes = audits
    for name in ("full", "adapter", "merged"):
        record = json.loads((root / name / "audit.json").read_text())
        assert {analysis: record["analyses"][analysis]["status"] for analysis in ANALYSES} == dict.fromkeys(
            ANALYSES, "ok"
        )
        assert {role: [f["rows"] for f in files] for role, files in record["data"].items()} == {
            "task": [60], "keep": [60], "ood": [60, 60],
        }  # fmt: skip
        assert codes[name] == (1 if record["verdict"] == "fail" else 0)
        saved = load(root / name)
        assert set(saved.results["ood"].tables["sets"]["set"]) == {"task", "keep", "code", "words"}
        assert set(saved.results["drift"].tables["layers"]["set"]) == {"task", "keep"}
        report = (root / name / "report.html").read_text(encoding="utf-8")
        for analysis in ANALYSES:
            assert saved.results[analysis].figures()
            assert diagnostics.installed_analyses()[analysis].question in re.sub("&#39;|&#x27;", "'", report)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_an_adapter_gives_what_it_gives_merged_beforehand(audits, analysis):
    root, _ = audits
    unmerged, premerged = (load(root / name).results[analysis] for name in ("adapter", "merged"))
    assert unmerged.metrics.keys() == premerged.metrics.keys()
    for name, value in unmerged.metrics.items():
        assert value == pytest.approx(premerged.metrics[name], abs=1e-4), name
    for name, table in unmerged.tables.items():
        # Distances reach hundreds: float32's share of them besides.
        pd.testing.assert_frame_equal(table, premerged.tables[name], rtol=1e-5, atol=1e-4)


def test_scores_of_bundled_rows_are_those_of_transformers_row_by_row(audits):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "base")
    base = AutoModelForCausalLM.from_pretrained(BUNDLED / "base", dtype="float32").eval()
    model = PeftModel.from_pretrained(base, BUNDLED / "lora-r8").eval()
    rows = load(audits[0] / "adapter").results["ood"].tables["rows"]
    for name, file in (("keep", "keep"), ("code", "ood-code"), ("words", "ood-words")):
        lines = (BUNDLED / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[:10]
        for number, line in enumerate(lines, start=1):
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
            expected = {}
            for side in ("base", "tuned"):
                with torch.no_grad(), model.disable_adapter() if side == "base" else torch.no_grad():
                    log = model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
                expected[side] = float(log.gather(1, ids[0, 1:, None]).sum())
            row = rows[(rows["set"] == name) & (rows["row"] == number)].iloc[0]
            for side, value in expected.items():
                assert row[f"log_likelihood_{side}"] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_on_the_bundled_pairs_the_ratio_finds_what_the_likelihood_misses(audits, name):
    table = load(audits[0] / name).results["ood"].tables["detection"].set_index(["ood", "score"])["auroc"]
    # Shuffled words are of the task's own vocabulary: near. Code is far, and longer than the task rows.
    assert table["words", "ratio"] >= max(0.9, table["words", "tuned_likelihood"] + 0.1)
    assert table["words", "ratio"] >= table["words", "length"] + 0.1
    assert table["code", "ratio"] >= 0.95


def test_base_against_itself_gives_no_ratio_no_drift_and_chance(monkeypatch, tmp_path):
    code = shell(
        monkeypatch, "audit", BUNDLED / "base", BUNDLED / "base", *ROWS, "--only", ",".join(ANALYSES),
        "--limit", 20, "--set", "ood.draws=5", "--device", "cpu", "--out", tmp_path, "--quiet",
    )  # fmt: skip
    saved = load(tmp_path)
    assert (saved.results["ood"].tables["rows"]["ratio"] == 0).all()
    assert saved.results["ood"].metrics["auroc"] == 0.5
    assert saved.results["drift"].metrics["lowest_rsa_keep"] == pytest.approx(1, abs=1e-9)
    # Nothing was learnt: worth a warning, no failure.
    assert "gain_nats" in {finding.metric for finding in saved.findings}
    assert code == 0
