"""Base's loss on the same rows is one number, whichever analysis prints it, and it is transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import diagnostics as d
from diagnostics.analyses.ood.detector import LikelihoodRatioDetector
from diagnostics.audit.run import audit
from diagnostics.core.analysis import NotApplicableError
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch
from probes.errors import InputError
from tests.cases import make_case
from tests.diagnostics.shell import shell

WORDS = ["<unk>", "<pad>", "<s>", "</s>", *(f"w{index}" for index in range(37))]
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.6,
}  # fmt: skip
EXPERTS = SMALL | {"num_experts": 4, "num_local_experts": 4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
# Of each pair: the model type, what base's configuration has, and what tuned's has instead.
ONE_FUNCTION = {
    "equal": ("llama", SMALL, {}),
    "legacy spelling": (
        "llama", SMALL | {"rope_parameters": LINEAR},
        {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "tied": ("llama", SMALL | {"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    "training alone": ("llama", SMALL, {"attention_dropout": 0.5, "use_cache": False, "eos_token_id": 9}),
}  # fmt: skip
TWO_FUNCTIONS = {
    "rms_norm_eps": ("llama", SMALL, {"rms_norm_eps": 1.0}),
    "hidden_act": ("llama", SMALL, {"hidden_act": "relu"}),
    "rope_parameters.factor": ("llama", SMALL, {"rope_parameters": LINEAR}),
    "sliding_window": ("mistral", SMALL | {"sliding_window": None}, {"sliding_window": 2}),
    "num_experts_per_tok": ("mixtral", EXPERTS, {"num_experts_per_tok": 1}),
    "final_logit_softcapping": ("gemma2", SMALL | {"head_dim": 4}, {"final_logit_softcapping": 0.5}),
    "logit_scale": ("cohere", SMALL, {"logit_scale": 1.0}),
    "attention_multiplier": ("granite", SMALL, {"attention_multiplier": 0.1}),
}  # fmt: skip


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def write_pair(out: Path, model_type: str, fields: dict[str, Any], other: dict[str, Any]) -> CheckpointPair:
    """Base, and tuned a little away from it under a configuration with other fields."""
    torch.manual_seed(0)
    config_class = transformers.CONFIG_MAPPING[model_type]
    chosen = {name: value for name, value in fields.items() if name in config_class.__dataclass_fields__}
    base = transformers.AutoModelForCausalLM.from_config(config_class(**chosen)).eval()
    tuned = transformers.AutoModelForCausalLM.from_config(config_class.from_dict(chosen | other)).eval()
    tuned.load_state_dict(base.state_dict())
    for parameter in tuned.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(out / name)
        tokenizer().save_pretrained(out / name)
    config = json.loads((out / "tuned" / "config.json").read_text())
    spelled = {name: value for name, value in (config | other).items() if value is not None}
    (out / "tuned" / "config.json").write_text(json.dumps(spelled))
    generator = torch.Generator().manual_seed(1)
    for role, least, rows in (("task", 4, 12), ("keep", 20, 40)):
        drawn = [torch.randint(least, len(WORDS), (12,), generator=generator).tolist() for _ in range(rows)]
        lines = [json.dumps({"text": " ".join(WORDS[index] for index in row)}) for row in drawn]
        (out / f"{role}.jsonl").write_text("\n".join(lines))
    return CheckpointPair(out / "base", out / "tuned")


@torch.no_grad()
def own_loss(directory: Path, rows: Path) -> float:
    """Mean nats of a token, as a user of transformers measures it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    reader = transformers.AutoTokenizer.from_pretrained(directory)
    nats, tokens = 0.0, 0
    for line in rows.read_text().splitlines():
        ids = reader(json.loads(line)["text"], return_tensors="pt").input_ids
        logs = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
        nats -= float(logs.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    return nats / tokens


def by_rows(result: Any, role: str) -> tuple[float, float]:
    """The losses of `ood`."""
    row = result.tables["sets"].query("role == @role and group.isna()").iloc[0]
    return row["loss_base"], row["loss_tuned"]


def unpruned(sparsity: Any) -> tuple[float, float]:
    """The task losses of `sparsity` without a mask."""
    curve = sparsity.tables["curve"].query("sparsity == 0 and role == 'task' and pattern == 'magnitude'")
    return tuple(curve.set_index("model")["value"][["base", "tuned"]])


def apart(pair: CheckpointPair, task: Path, keep: Path) -> dict[str, tuple[float, float]]:
    """The losses of base and tuned on the task rows, by the analyses that run any pair."""
    ood = d.likelihood_ratio_ood(pair, task, keep, draws=10)
    sparsity = d.essential_sparsity(pair, task, grid=(0.0, 0.3, 0.6, 0.9), patterns=(), draws=100, refine=0.0)
    dense = unpruned(sparsity)
    mitigation = d.judged_mitigation(pair, task, keep, scales=(0.5,), draws=100, epsilon=0.999)
    detector = LikelihoodRatioDetector(pair)
    read = detector._read(task)
    totals = [
        -sum(getattr(text, side).full.log_likelihood for text in read) / sum(text.length for text in read)
        for side in ("base", "tuned")
    ]
    series = [pair.base, *[pair.tuned] * 3]
    steps = d.training_trajectory(series, task).tables["steps"]["loss"]
    return {
        "ood": by_rows(ood, "task"), "sparsity": dense, "trajectory": (steps.iloc[0], steps.iloc[-1]),
        "mitigation": (mitigation.metrics["task_loss_base"], mitigation.metrics["task_loss_tuned"]),
        "detector": (totals[0], totals[1]),
    }  # fmt: skip


def between(pair: CheckpointPair, task: Path, keep: Path) -> dict[str, tuple[float, float]]:
    """The same, by the analyses that need one model between the two."""
    path = d.interpolation_path(pair, task, keep, alphas=(0.5,))
    few = {"rhos": (0.5,), "steps": 2, "pairs": 0, "curvature": False, "sharpness_alphas": (0.0, 1.0)}
    alphas = dict.fromkeys(("alphas", "layer_alphas"), (0.0, 0.5, 1.0))
    sharp = d.layer_sharpness(pair, task, **few, **alphas).tables["sets"].iloc[0]
    # It scores the task rows that it kept for its report; another role it scores whole.
    skills = d.skill_localization(pair, {"held": keep}, task, search="movement", budgets=(0.1,), draws=100)
    on_task = skills.tables["sets"].query("role == 'keep'").set_index("model")["metric"]
    return {
        "path": (path.metrics["base_task_nats"], path.metrics["tuned_task_nats"]),
        "sharpness": (sharp["loss_base"], sharp["loss_tuned"]),
        "skills": (on_task["base"], on_task["tuned"]),
    }


def assert_one_loss(losses: dict[str, tuple[float, float]], out: Path) -> None:
    expected = [own_loss(out / side, out / "task.jsonl") for side in ("base", "tuned")]
    for name, measured in losses.items():
        assert measured == pytest.approx(expected, abs=2e-5), name


@pytest.mark.parametrize("case", ONE_FUNCTION)
def test_of_one_function_every_analysis_prints_the_same_loss(case, tmp_path):
    pair = write_pair(tmp_path, *ONE_FUNCTION[case])
    rows = tmp_path / "task.jsonl", tmp_path / "keep.jsonl"
    assert_one_loss(apart(pair, *rows) | between(pair, *rows), tmp_path)


@pytest.mark.parametrize("case", TWO_FUNCTIONS)
def test_of_two_functions_each_side_runs_under_its_own(case, tmp_path):
    pair = write_pair(tmp_path, *TWO_FUNCTIONS[case])
    task, keep = tmp_path / "task.jsonl", tmp_path / "keep.jsonl"
    assert_one_loss(apart(pair, task, keep), tmp_path)
    for analysis in (d.interpolation_path, d.layer_sharpness, d.skill_localization):
        with pytest.raises(NotApplicableError, match=rf"differ in .*{case} \(.*run each under its own"):
            analysis(pair, task)


@pytest.mark.parametrize("at", [0, 1])
def test_nothing_is_written_between_two_functions_but_an_edit_of_tuned_is(at, tmp_path, monkeypatch, capsys):
    opened = write_pair(tmp_path, *TWO_FUNCTIONS["rms_norm_eps"])
    Patch.of(opened, {"model.layers.0.mlp.up_proj.weight": torch.arange(3)}).save(tmp_path / "mask")
    pair, out = (tmp_path / "base", tmp_path / "tuned"), tmp_path / "out"
    named = "base and tuned differ in rms_norm_eps (1e-06 and 1), so no weights lead from one to the other"
    for command in (
        ("interpolate", *pair, "--alpha", at, "--out", out),
        ("graft", *pair, "--mask", tmp_path / "mask", "--out", out),
        ("mitigate", *pair, "--mode", "update", "--scale", at, "--out", out),
    ):
        assert shell(monkeypatch, *command) == 2
        error = capsys.readouterr().err
        assert named in error
        assert "Traceback" not in error
        assert not out.exists()
    assert shell(monkeypatch, "mitigate", *pair, "--scale", 1, "--epsilon", "0.999", "--out", out) == 0
    assert own_loss(out, tmp_path / "task.jsonl") == own_loss(pair[1], tmp_path / "task.jsonl")
    assert json.loads((out / "config.json").read_text())["rms_norm_eps"] == 1.0


def test_in_an_audit_of_everything_what_needs_one_model_is_skipped_and_named(tmp_path):
    make_case("config_rope", tmp_path)
    task = tmp_path / "task.jsonl"
    few = {"sparsity": {"grid": (0.0, 0.3, 0.6, 0.9), "patterns": (), "draws": 100, "refine": 0.0}}
    few["mitigation"] = {"scales": (0.5,), "draws": 100}
    only = ["ood", "sparsity", "mitigation", "path"]
    done = audit(
        tmp_path / "base", tmp_path / "tuned", out=tmp_path / "audit", settings=few, skip=["pathways"],
        task=[task], keep=[task], ood=[make_ood(tmp_path)], device="cpu", cache=tmp_path / "cache",
    )  # fmt: skip
    by_name = {name: outcome for name, outcome in done.analyses.items() if name in only}
    assert by_name["path"].status == "skipped"
    assert "rope_parameters.rope_theta (100 and 1e+06)" in by_name["path"].reason
    for name in ("skills", "sharpness"):
        assert done.analyses[name].status == "skipped"
    expected = own_loss(tmp_path / "base", task)
    for loss in (
        by_name["mitigation"].result.metrics["task_loss_base"],
        by_name["mitigation"].result.metrics["keep_loss_base"],
        unpruned(by_name["sparsity"].result)[0],
        by_rows(by_name["ood"].result, "task")[0],
    ):
        assert loss == pytest.approx(expected, abs=2e-5)
    for name in ("sparsity", "mitigation", "ood"):
        notes = " ".join(by_name[name].result.notes)
        assert "differ in rope_parameters.rope_theta" in notes, name


def make_ood(tmp_path: Path) -> Path:
    rows = tmp_path / "other.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"w{index} w1 w2 w3 w{index}"}) for index in range(8)))
    return rows


def test_rows_longer_than_one_side_takes_are_cut_alike(tmp_path):
    pair = write_pair(tmp_path, "llama", SMALL, {"max_position_embeddings": 6})
    task, keep = tmp_path / "task.jsonl", tmp_path / "keep.jsonl"
    losses = apart(pair, task, keep) | between(pair, task, keep)
    for losses_of_side in zip(*losses.values(), strict=True):
        assert losses_of_side == pytest.approx([losses_of_side[0]] * len(losses), abs=2e-5)


def test_a_changed_configuration_is_never_served_from_an_earlier_audit(tmp_path):
    write_pair(tmp_path, *ONE_FUNCTION["equal"])
    task, settings = tmp_path / "task.jsonl", {"path": {"alphas": (0.5,)}}
    options = {"only": ["path"], "settings": settings, "task": [task], "device": "cpu"}
    losses = []
    for eps in (1e-6, 1.0):
        for side in ("base", "tuned"):
            file = tmp_path / side / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": eps}))
        done = audit(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "audit", **options)
        losses.append(done.analyses["path"].result.metrics["base_task_nats"])
        assert losses[-1] == pytest.approx(own_loss(tmp_path / "base", task), abs=2e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_detector_is_not_loaded_under_another_configuration(tmp_path):
    pair = write_pair(tmp_path, *ONE_FUNCTION["equal"])
    LikelihoodRatioDetector.fit(pair, tmp_path / "task.jsonl").save(tmp_path / "detector.json")
    LikelihoodRatioDetector.load(tmp_path / "detector.json").close()
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1.0}))
    with pytest.raises(InputError, match="rms_norm_eps"):
        LikelihoodRatioDetector.load(tmp_path / "detector.json")


def test_an_interpolated_model_in_bfloat16_leaves_base_what_it_is(tmp_path):
    write_pair(tmp_path, *ONE_FUNCTION["equal"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype="bfloat16")
    model.save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    task, keep = tmp_path / "task.jsonl", tmp_path / "keep.jsonl"
    mitigation = d.judged_mitigation(pair, task, keep, scales=(0.5,), draws=100)
    assert mitigation.metrics["task_loss_base"] == pytest.approx(own_loss(tmp_path / "base", task), abs=2e-5)


def test_each_side_answers_in_the_order_of_its_own_classes(tmp_path):
    make_case("label_orders", tmp_path)
    pair, rows = CheckpointPair(tmp_path / "base", tmp_path / "tuned"), tmp_path / "nli.jsonl"
    sparsity = d.essential_sparsity(pair, rows, grid=(0.0, 0.3, 0.6, 0.9), patterns=(), draws=100, refine=0.0)
    mitigation = d.judged_mitigation(pair, rows, rows, scales=(0.5,), draws=100).metrics
    # The labels are base's own answers, and tuned's are nearly all the same.
    assert unpruned(sparsity)[0] == mitigation["task_accuracy_base"] == 1.0
    assert unpruned(sparsity)[1] == mitigation["task_accuracy_tuned"] > 0.8
    with pytest.raises(NotApplicableError, match="differ in id2label"):
        d.interpolation_path(pair, rows)


def test_numbers_of_classes_in_two_orders_are_asked_about_and_stars_are_what_they_can_be(tmp_path):
    make_case("label_orders", tmp_path)
    numbered = tmp_path / "numbered.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "nli.jsonl").read_text().splitlines()]
    names = sorted({row["label"] for row in rows})
    numbers = [row | {"label": names.index(row["label"])} for row in rows]
    numbered.write_text("".join(json.dumps(row) + "\n" for row in numbers))
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(
        InputError, match="its labels are numbers, and the models number their classes differently"
    ):
        d.judged_mitigation(pair, numbered, numbered, scales=(0.5,), draws=100)
    stars = CheckpointPair(tmp_path / "stars-base", tmp_path / "stars-tuned")
    for file in ("stars-ids.jsonl", "stars-names.jsonl"):
        sets = d.interpolation_path(stars, tmp_path / file, alphas=(0.5,)).tables["sets"]
        assert sets["accuracy_base"].tolist() == [1.0]
        assert sets["accuracy_tuned"].item() > 0.8


def test_without_a_control_the_modes_are_shown_and_none_is_recommended(tmp_path):
    pair = write_pair(tmp_path, *TWO_FUNCTIONS["rms_norm_eps"])
    rows = tmp_path / "task.jsonl", tmp_path / "keep.jsonl"
    result = d.judged_mitigation(pair, *rows, scales=(0.5, 1.0), draws=100, epsilon=0.999)
    curve = result.tables["curve"]
    assert result.metrics["edited"] > 0
    assert set(curve.loc[curve["mode"] == "update", "scale"]) == {0.0, 1.0}
    assert not curve["recommended"].any()
    assert curve["over_control_nats"].isna().all()
    assert "recommended" not in result.metrics
    assert result.summary().endswith("no control lies between two functions")
    assert list(result.figures()) == ["retention"]
    assert result.findings() == []


def test_workers_run_each_side_under_its_own_too(tmp_path, simulated_workers):
    pair = write_pair(tmp_path, *TWO_FUNCTIONS["rms_norm_eps"])
    assert_one_loss(apart(pair, tmp_path / "task.jsonl", tmp_path / "keep.jsonl"), tmp_path)
    assert simulated_workers
