"""The analysis as a whole: what it says of pairs whose answer is known, and what it costs."""

import json
import shutil
import warnings
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from diagnostics import checkpoint_integrity
from diagnostics.analyses.integrity.merge import fit_merge
from diagnostics.audit.demo import BUNDLED
from diagnostics.edits.interpolate import interpolate
from probes import CheckpointPair
from probes.errors import InputError
from probes.files.sources import SafetensorsSource
from tests.conftest import weights


def integrity(base, tuned, adapter=None):
    return checkpoint_integrity(CheckpointPair(base, tuned), adapter)


def findings_of(result):
    return {finding.metric: finding.severity for finding in result.findings()}


@pytest.fixture
def bundled(tmp_path):
    """A copy of a bundled model, to be damaged: `bundled(edit)` with an edit of its tensors."""

    def damaged(edit, name="full"):
        folder = tmp_path / "damaged"
        shutil.copytree(BUNDLED / name, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return damaged


# --- nothing tuned ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_base_against_itself_in_any_dtype_was_not_tuned(stored, dtype):
    base = {name: value.to(stored) for name, value in weights(0).items()}
    result = integrity(base, {name: value.to(dtype) for name, value in base.items()})
    assert (result.metrics["nothing_tuned"], result.metrics["changed_share"]) == (1, 0)
    assert findings_of(result)["nothing_tuned"] == "fail"


def test_a_detour_through_half_precision_is_no_tuning():
    base = weights(0)
    result = integrity(base, {name: value.bfloat16().float() for name, value in base.items()})
    assert result.metrics["nothing_tuned"] == 1


def test_one_changed_entry_is_tuning():
    base = weights(0)
    tuned = {name: value.clone() for name, value in base.items()}
    name = next(iter(tuned))
    tuned[name][3, 5] += 1
    result = integrity(base, tuned)
    assert (result.metrics["nothing_tuned"], result.metrics["changed_tensors"]) == (0, 1)
    assert result.metrics["changed_share"] == pytest.approx(1 / (4 * 64))  # four 8 x 8 matrices
    table = result.tables["compared"].set_index("tensor")
    assert table.loc[name, "changed"] == 1
    assert table["changed"].sum() == 1


def test_a_new_head_on_equal_weights_is_tuning():
    base = weights(0)
    result = integrity(base, base | {"score.weight": torch.ones(2, 8)})
    assert result.metrics["nothing_tuned"] == 0
    assert any("score.weight" in note for note in result.notes)


def test_the_share_of_changed_entries_does_not_depend_on_which_side_is_base():
    base, tuned = weights(0), weights(0) | {next(iter(weights(0))): torch.zeros(8, 8)}
    there, back = (integrity(*sides).metrics for sides in ((base, tuned), (tuned, base)))
    assert there["changed_share"] == back["changed_share"] > 0


# --- how much was compared ---


def experts(count):
    generator = torch.Generator().manual_seed(0)
    return weights(0) | {
        f"model.layers.0.mlp.experts.{i}.up_proj.weight": torch.randn(8, 8, generator=generator)
        for i in range(count)
    }


def test_parts_of_tuned_without_a_counterpart_cannot_pass():
    # 4 matrices of 8 x 8 in both; 12 more in tuned alone
    result = integrity(weights(0), experts(12))
    assert result.metrics["compared_share"] == pytest.approx(4 / 16)
    assert findings_of(result)["compared_share"] == "fail"


# --- numerical health ---


def test_nan_and_infinity_in_any_tensor_of_either_side_fail(bundled):
    def damage(tensors):
        tensors["model.norm.weight"][0] = float("inf")  # no matrix
        tensors["model.embed_tokens.weight"][5, :3] = float("nan")

    damaged = bundled(damage)
    result = integrity(BUNDLED / "base", damaged)
    assert (result.metrics["nonfinite_tuned"], result.metrics["nonfinite_base"]) == (4, 0)
    assert findings_of(result) == {"nonfinite_tuned": "fail"}
    swapped = integrity(damaged, BUNDLED / "base")
    assert (swapped.metrics["nonfinite_tuned"], swapped.metrics["nonfinite_base"]) == (0, 4)
    first = result.tables["health"].iloc[0]
    assert (first["tensor"], first["nan"]) == ("model.embed_tokens.weight", 3)


def test_outputs_that_went_dead_are_counted_and_those_of_base_are_not(bundled):
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][[2, 7]] = 0

    result = integrity(BUNDLED / "base", bundled(damage))
    assert result.metrics["dead_rows"] == 2
    assert findings_of(result) == {"dead_rows": "warn"}
    assert integrity(BUNDLED / "full", BUNDLED / "base").metrics["dead_rows"] == 0


def test_weights_that_overflow_in_the_dtype_of_the_config_fail(bundled):
    folder = bundled(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[:2].fill_(7e4))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    result = integrity(BUNDLED / "base", folder)
    assert result.metrics["overflow_tuned"] == 2
    assert findings_of(result)["overflow_tuned"] == "fail"


def test_a_required_tensor_that_is_missing_fails(bundled):
    result = integrity(BUNDLED / "base", bundled(lambda tensors: tensors.pop("model.norm.weight")))
    assert (result.metrics["unusable_tuned"], result.metrics["unusable_base"]) == (1, 0)
    assert findings_of(result) == {"unusable_tuned": "fail"}
    assert any("model.norm.weight" in note for note in result.notes)


# --- the merge check ---


def test_an_adapter_is_merged_once_in_itself():
    result = integrity(BUNDLED / "base", BUNDLED / "lora-r8", BUNDLED / "lora-r8")
    metrics = result.metrics
    assert metrics["merged"] == metrics["adapted"] == 28
    assert metrics["factor"] == pytest.approx(1, abs=1e-6)
    assert findings_of(result) == {}


def test_a_full_fine_tune_is_no_merge_of_an_adapter():
    result = integrity(BUNDLED / "base", BUNDLED / "full", BUNDLED / "lora-r8")
    assert result.metrics["other_delta"] == result.metrics["adapted"] == 28
    assert findings_of(result)["other_delta"] == "fail"


def test_base_against_an_adapter_that_was_never_merged():
    result = integrity(BUNDLED / "base", BUNDLED / "base", BUNDLED / "lora-r8")
    assert result.metrics["unmerged"] == 28
    assert set(findings_of(result)) == {"nothing_tuned", "unmerged"}


def test_a_matrix_that_changed_outside_the_adapter_is_named(tmp_path):
    merged = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8").tuned
    tensors = {name: merged.tensor(name).clone() for name in merged.headers}
    tensors["model.embed_tokens.weight"][0, 0] += 1
    folder = tmp_path / "merged"
    shutil.copytree(BUNDLED / "base", folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = integrity(BUNDLED / "base", folder, BUNDLED / "lora-r8")
    assert (result.metrics["outside"], result.metrics["merged"]) == (1, 28)
    assert findings_of(result) == {"outside": "warn"}
    table = result.tables["merge"].set_index("matrix")
    assert table.loc["model.embed_tokens.weight", "verdict"] == "outside"


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_an_adapter_takes_off_a_tied_embedding_is_judged_by_itself(tied, tmp_path):
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.05, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        adapted.save_pretrained(tmp_path / "adapter")
    for alpha, verdict in ((1.0, "merged"), (0.5, "scaled")):
        out = tmp_path / str(alpha)
        interpolate(tmp_path / "base", tmp_path / "adapter", alpha, out)
        table = integrity(tmp_path / "base", out, tmp_path / "adapter").tables["merge"]
        assert table.set_index("matrix")["verdict"].to_dict() == {
            "model.layers.0.self_attn.q_proj.weight": verdict,
            "model.layers.1.self_attn.q_proj.weight": verdict,
            "lm_head.weight": verdict,
        }


def test_full_weights_are_no_adapter():
    with pytest.raises(
        InputError, match="holds full weights and no adapter; name the directory with adapter"
    ):
        integrity(BUNDLED / "base", BUNDLED / "full", BUNDLED / "base")


def test_without_an_adapter_no_rule_about_it_is_applied():
    from diagnostics.core.policy import default_policy, not_measured

    result = integrity(BUNDLED / "base", BUNDLED / "full")
    assert "adapted" not in result.metrics
    assert not_measured(result, default_policy()) == {}


# --- the cost ---


def test_each_tensor_of_both_sides_is_read_exactly_once(monkeypatch):
    read = Counter()
    plain_read = SafetensorsSource.read

    def counted(source, name):
        read[source.file(name), name] += 1
        return plain_read(source, name)

    pair = CheckpointPair(BUNDLED / "base", BUNDLED / "full")
    _ = pair.matrices, pair.tensors, pair.compared  # opening it may look at tied weights
    monkeypatch.setattr(SafetensorsSource, "read", counted)
    checkpoint_integrity(pair)
    assert set(read.values()) == {1}
    assert len(read) == len(pair.base.headers) + len(pair.tuned.headers)


def test_no_model_is_run(monkeypatch):
    import transformers

    def run(*args, **kwargs):
        raise AssertionError("a model was run")

    monkeypatch.setattr(transformers.LlamaModel, "forward", run)
    integrity(BUNDLED / "base", BUNDLED / "lora-r8", BUNDLED / "lora-r8")


def test_progress_ends_at_its_total():
    calls = []
    pair = CheckpointPair(BUNDLED / "base", BUNDLED / "full")
    checkpoint_integrity(pair, progress=lambda *call: calls.append(call))
    done, total, _ = calls[-1]
    assert done == total
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)


def test_the_bundled_pairs_are_what_they_seem():
    for name in ("full", "lora-r1", "lora-r8"):
        result = integrity(BUNDLED / "base", BUNDLED / name)
        assert findings_of(result) == {}, name
        assert result.metrics["compared_share"] == 1


def test_the_figures_are_those_of_the_tables():
    result = integrity(BUNDLED / "base", BUNDLED / "lora-r8", BUNDLED / "lora-r8")
    figures = result.figures()
    assert set(figures) == {"factors", "changed"}
    assert figures["factors"].layout.title.text == "Every matrix holds the adapter's delta once"
    assert set(integrity(BUNDLED / "base", BUNDLED / "base").figures()) == set()
    assert fit_merge(torch.eye(4), torch.eye(4), torch.zeros(4, 4)).verdict == "no delta"
