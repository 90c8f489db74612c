"""Recording a series while a Trainer trains: what is measured, and that the training does not notice."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from diagnostics.analyses.sparsification import analysis as sparsification
from diagnostics.audit.callback import AuditCallback
from diagnostics.core.analysis import NotApplicableError, Result
from diagnostics.core.registry import REGISTRY
from diagnostics.store.audit_store import load
from probes.checkpoints.series import read_measurement
from probes.errors import InputError

SPARSIFICATION = REGISTRY["sparsification"]


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=12,
        max_position_embeddings=16, attention_dropout=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def trainer(tmp_path, *callbacks, model=None, **arguments):
    """Six steps on 16 rows of 8 random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(12, (8,), generator=generator) for _ in range(16)]
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in ids]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, **arguments,
    )  # fmt: skip
    return Trainer(
        model or tiny(), settings, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks),
        processing_class=tokenizer(),
    )  # fmt: skip


@pytest.fixture
def norm(registry):
    """Registers `norm`, which measures a weight of every checkpoint of a series, and draws at random."""
    seen = []

    def measured(series, task=None, *, device="cpu", dtype="float32", seed=0, progress=None):
        import pandas as pd

        def measure(checkpoint):
            seen.append(checkpoint)
            torch.rand(3), np.random.rand()
            checkpoint.module.eval()
            return {"norm": checkpoint.tensor("model.embed_tokens.weight").norm().item()}

        rows = series.measured("norm", {"dtype": dtype}, measure)
        series.at_least(2, "a line")
        table = pd.DataFrame({"step": series.steps, "norm": [row["norm"].item() for row in rows]})
        return Result(metrics={"last": table["norm"].iloc[-1]}, tables={"steps": table})

    from diagnostics.core.analysis import analysis

    about = {"question": "?", "reading": "0 is nothing.", "paper": "made up", "cost": "none"}
    analysis("norm", draw=lambda result: {}, **about)(measured)
    registry["sparsification"] = SPARSIFICATION
    return seen


def test_a_run_is_measured_at_its_start_every_so_often_and_at_its_end(norm, tmp_path):
    out = tmp_path / "audit"
    model = tiny()
    first = model.model.embed_tokens.weight.norm().item()
    trainer(tmp_path, AuditCallback(out, every=4, only=["norm", "sparsification"]), model=model).train()
    saved = load(out)
    table = saved.results["norm"].tables["steps"]
    assert table["step"].tolist() == [0, 4, 6]
    assert table["norm"].iloc[0] == pytest.approx(first)
    assert table["norm"].iloc[-1] == pytest.approx(model.model.embed_tokens.weight.norm().item())
    assert saved.results["sparsification"].tables["checkpoints"]["label"].tolist() == ["0", "4", "6"]
    assert saved.base["ref"] == "LlamaForCausalLM at step 0"
    assert saved.tuned["ref"] == "LlamaForCausalLM at step 6"
    assert saved.exit_code == 0
    assert (out / "report.html").exists()
    assert (out / "tokenizer" / "tokenizer.json").exists()


def test_a_training_that_is_recorded_ends_in_the_same_weights(norm, tmp_path):
    alone, watched = tiny(), tiny()
    trainer(tmp_path, model=alone).train()
    trainer(tmp_path, AuditCallback(tmp_path / "audit", every=1), model=watched).train()
    assert len(norm) == 7
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert all(module.training for module in watched.modules())


def test_without_a_distance_it_is_measured_when_the_trainer_saves_or_evaluates(norm, tmp_path):
    callback = AuditCallback(tmp_path / "audit")
    training = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=2)
    training.train()
    assert callback.steps == [0, 2, 4, 6]


def test_a_resumed_training_goes_on_with_its_recording_and_a_new_one_starts_over(norm, tmp_path):
    out = tmp_path / "audit"
    AuditCallback(out).record(0, tiny())
    AuditCallback(out).record(0, tiny())
    state = type("State", (), {"is_world_process_zero": True, "global_step": 0})()
    first = AuditCallback(out)
    for step in (0, 5, 10):
        state.global_step = step
        (first.on_save if step else first.on_train_begin)(None, state, None, model=tiny())
    seen = len(norm)
    resumed = AuditCallback(out)
    state.global_step = 7  # the last checkpoint that was saved
    resumed.on_train_begin(None, state, None, model=tiny())
    assert resumed.steps == [0, 5, 7]
    assert len(norm) == seen + 1
    assert load(out).results["norm"].tables["steps"]["step"].tolist() == [0, 5, 7]
    state.global_step = 0
    anew = AuditCallback(out)
    anew.on_train_begin(None, state, None, model=tiny())
    assert anew.steps == [0]


def test_what_goes_wrong_at_the_start_stops_the_training_and_later_only_warns(
    norm, tmp_path, caplog, monkeypatch
):
    for error, raised in ((InputError, InputError), (ValueError, RuntimeError)):

        def broken(checkpoint, parts, error=error):
            raise error("no matrix here")

        with monkeypatch.context() as patch:
            patch.setattr(sparsification, "checkpoint_sparseness", broken)
            with pytest.raises(raised, match=r"sparsification: .*no matrix here"):
                trainer(tmp_path, AuditCallback(tmp_path / "a", every=2)).train()
    callback = AuditCallback(tmp_path / "b", every=2)
    training = trainer(tmp_path, callback)
    record = callback.record

    def dies(step, *given):
        if step == 4:
            raise OSError("disk full")
        return record(step, *given)

    monkeypatch.setattr(callback, "record", dies)
    training.train()
    assert callback.steps == [0, 2, 6]


def rows(path):
    """Rows of a and b."""
    texts = [" ".join("ab"[(row >> bit) % 2] for bit in range(6)) for row in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_as_the_readme_has_it_a_dense_model_passes_and_what_needs_experts_is_left_out(tmp_path, caplog):
    files = {"task": [rows(tmp_path / "held-out.jsonl")], "train": [rows(tmp_path / "train.jsonl")]}
    trainer(tmp_path, AuditCallback(tmp_path / "audit", **files, every=2)).train()
    recorded = load(tmp_path / "audit")
    assert recorded.verdict != "fail"
    assert not recorded.failed
    assert "trajectory" in recorded.results
    pathways = recorded.analyses["pathways"]
    assert pathways.status == "skipped"
    assert "is a dense model, and pathways need experts" in pathways.reason
    assert pathways.question
    assert not [line for line in caplog.messages if "failed" in line]


def test_what_does_not_apply_is_still_left_out_when_the_training_resumes(norm, register, tmp_path):
    def dense(series):
        raise NotApplicableError("no experts here")

    register("dense", dense)
    out = tmp_path / "audit"
    AuditCallback(out).record(0, tiny())
    resumed = AuditCallback(out)
    state = type("State", (), {"is_world_process_zero": True, "global_step": 5})()
    resumed.on_train_begin(None, state, None, model=tiny())
    assert load(out).analyses["dense"].reason == "no experts here"
    with pytest.raises(InputError, match="dense: no experts here"):
        AuditCallback(tmp_path / "asked", only="dense").record(0, tiny())


def test_a_measurement_that_fails_is_logged_when_it_does_and_later_steps_go_on_without_it(
    norm, register, tmp_path, caplog
):
    def shaky(series):
        def measure(checkpoint):
            if series.steps[-1] == 2:
                raise InputError("holds a NaN")
            return {"x": 1.0}

        return Result(metrics={"steps": len(series.measured("shaky", {}, measure))}, tables={})

    register("shaky", shaky)
    callback = AuditCallback(tmp_path / "audit", every=2)
    trainer(tmp_path, callback).train()
    assert caplog.messages.count("tunescope: step 2: shaky failed (holds a NaN)") == 1
    recorded = load(tmp_path / "audit")
    assert recorded.results["shaky"].metrics["steps"] == 3  # 0, 4 and 6
    assert "shaky failed at step 2, which it leaves out" in recorded.notes
    assert recorded.results["norm"].tables["steps"]["step"].tolist() == [0, 2, 4, 6]


def test_what_cannot_be_recorded_is_said_before_anything_trains(norm, registry, tmp_path):
    with pytest.raises(ValueError, match="every is 0; at least 1 step lies between measurements"):
        AuditCallback(tmp_path, every=0)
    with pytest.raises(LookupError, match="--only: unknown analysis 'nothing'"):
        AuditCallback(tmp_path, only=["nothing"])
    with pytest.raises(ValueError, match="nothing to record: "):
        AuditCallback(tmp_path, skip=["norm", "sparsification"])
    for task in ([tmp_path / "nowhere.jsonl"], str(tmp_path / "nowhere.jsonl"), tmp_path / "nowhere.jsonl"):
        with pytest.raises(InputError, match=r"--task .*nowhere\.jsonl: there is no such file"):
            AuditCallback(tmp_path, task=task)


def test_one_file_and_one_name_may_be_given_as_they_are(norm, tmp_path):
    (tmp_path / "task.jsonl").write_text('{"text": "a b"}\n')
    callback = AuditCallback(tmp_path / "audit", task=str(tmp_path / "task.jsonl"), only="norm")
    assert [[named.name for named in tasks] for tasks in callback.rows.values()] == [["task"]]
    assert list(callback.plan.parameters) == ["norm"]


def test_steps_of_more_than_six_digits_are_told_apart(norm, tmp_path):
    callback = AuditCallback(tmp_path / "audit")
    refs = [callback.record(step, tiny()).tuned["ref"] for step in (1_000_001, 1_000_002)]
    assert refs == ["LlamaForCausalLM at step 1000001", "LlamaForCausalLM at step 1000002"]


def test_measurements_are_those_of_a_series_of_saved_checkpoints(norm, tmp_path):
    model = tiny()
    callback = AuditCallback(tmp_path / "audit")
    callback.record(0, model)
    kept = next((tmp_path / "audit" / "measurements").glob("sparse.*.npz"))
    live = read_measurement(kept)
    model.save_pretrained(tmp_path / "saved")
    from probes import open_checkpoint

    files = sparsification.checkpoint_sparseness(open_checkpoint(tmp_path / "saved"))
    assert {name: value.item() for name, value in live.items()} == files
    assert json.loads((tmp_path / "audit" / "steps.json").read_text())["steps"] == [0]
