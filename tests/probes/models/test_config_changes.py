"""Which fields of a configuration change the function; the judge is transformers on the same weights."""

import json
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from probes import open_checkpoint
from probes.checkpoints.checkpoint import Checkpoint
from probes.models.config_changes import config_changes, function_changes

IDS = torch.tensor([[5, 9, 3, 22, 31, 40, 1, 7, 8, 10, 11, 12]])
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8, "n_embd": 32,
    "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "state_size": 8, "d_model": 32, "ffn_dim": 48, "num_layers": 2,
    "attention_heads": 4, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
MODELS = {
    "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "gemma2": "Gemma2ForCausalLM", "phi3": "Phi3ForCausalLM",
    "olmoe": "OlmoeForCausalLM", "mixtral": "MixtralForCausalLM", "mamba": "MambaForCausalLM",
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "granite": "GraniteForCausalLM",
    "cohere": "CohereForCausalLM", "esm": "EsmForMaskedLM", "xglm": "XGLMForCausalLM",
    "opt": "OPTForCausalLM", "phimoe": "PhimoeForCausalLM",
    "qwen2 classifier": "Qwen2ForSequenceClassification", "bert classifier": "BertForSequenceClassification",
}  # fmt: skip
WINDOW = {"use_sliding_window": True}
ROPE = {"rope_type": "default", "rope_theta": 100.0}


def config_of(model: str, **fields: Any) -> dict[str, Any]:
    """A small configuration as transformers writes it, every default included."""
    config_class = transformers.CONFIG_MAPPING[model.split()[0]]
    small = {name: value for name, value in SMALL.items() if name in config_class.__dataclass_fields__}
    config = config_class(**(small | fields), architectures=[MODELS[model]])
    return json.loads(config.to_json_string(use_diff=False))


def under(config: dict[str, Any]) -> Checkpoint:
    """A checkpoint with this config.json; its weights do not matter."""
    return open_checkpoint({"model.layers.0.mlp.up_proj.weight": torch.eye(2)}).described_by(config)


def changed_fields(base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, bool]:
    return {change.field: change.changes_function for change in config_changes(under(base), under(tuned))}


def running(model: str, config: dict[str, Any], state: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    parsed = transformers.CONFIG_MAPPING[model.split()[0]].from_dict(config)
    module = getattr(transformers, MODELS[model])(parsed).eval()
    if state is None:
        for parameter in module.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    else:
        module.load_state_dict(state, strict=True)
    return module


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    return module(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def others(name: str, value: Any) -> list[Any]:
    """Values that a field may have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2)]
    if isinstance(value, float):
        return [1.5 * value + 0.11]
    if isinstance(value, str):
        return ["relu", "gelu"] if "act" in name else []
    return [5, 9] if name.endswith("token_id") else [4, 0.37, True] if value is None else []


@pytest.mark.parametrize("model", MODELS)
def test_no_field_that_is_called_harmless_moves_a_logit(model):
    config = config_of(model)
    module = running(model, config)
    weights, state, expected = open_checkpoint(module), module.state_dict(), logits(module)
    harmless: set[str] = set()
    for name, value in config.items():
        for other in others(name, value):
            try:
                alike = torch.allclose(logits(running(model, config | {name: other}, state)), expected,
                                       rtol=0, atol=2e-5 * float(expected.abs().max()))  # fmt: skip
            except Exception:  # of another shape, or no value that the model takes
                continue
            sides = [weights.described_by(fields) for fields in (config, config | {name: other})]
            if not function_changes(*sides):
                harmless.add(name)
                assert alike, f"{name}: {value} and {other} give other logits"
    assert {"bos_token_id", "output_hidden_states"} <= harmless


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("llama", {"rope_parameters": ROPE}),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4, "use_sliding_window": True},
        ),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
        ("gemma2", {"query_pre_attn_scalar": 3}),
        ("gemma2", {"attn_logit_softcapping": 0.5}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"clip_qkv": 0.1}),
        ("granite", {"attention_multiplier": 0.3}),
        ("granite", {"logits_scaling": 3.0}),
        ("granite", {"residual_multiplier": 0.3}),
        ("cohere", {"logit_scale": 0.5}),
        ("roberta", {"pad_token_id": 2}),
        ("xglm", {"pad_token_id": 2}),
        ("esm", {"token_dropout": True, "mask_token_id": 9}),
        ("bert", {"layer_norm_eps": 0.1}),
        ("bert", {"is_decoder": True}),
        ("qwen2 classifier", {"pad_token_id": 12}),
    ],
)
def test_a_field_that_moves_logits_is_reported_with_both_values(model, fields):
    config = config_of(model)
    module = running(model, config)
    moved = logits(running(model, config | fields, module.state_dict()))
    assert not torch.allclose(moved, logits(module), rtol=0, atol=1e-4)
    changes = function_changes(under(config), under(config | fields))
    assert {change.field.partition(".")[0] for change in changes} & fields.keys()
    for change in changes:
        top, _, inner = change.field.partition(".")
        assert change.tuned == (fields[top][inner] if inner else fields[top]) or top not in fields


@pytest.mark.parametrize(
    ("model", "base", "tuned"),
    [
        # Older spellings of the same.
        ("llama", {"rope_parameters": ROPE}, {"rope_theta": 100.0}),
        (
            "llama",
            {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ("llama", {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        # A default, and the same left out.
        ("llama", {"rms_norm_eps": 1e-6}, {}),
        ("llama", {"head_dim": 8}, {"head_dim": None}),
        ("bert", {"layer_norm_eps": 1e-12}, {}),
        # A window that is switched off.
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9}, {"max_window_layers": 21}),
        # Fields that no model reads.
        ("llama", {}, {"is_decoder": False, "add_cross_attention": False, "tf_legacy_loss": False}),
        ("gpt2", {}, {"n_ctx": 64, "task_specific_params": {"text-generation": {"do_sample": True}}}),
        ("bert", {}, {"position_embedding_type": "absolute", "gradient_checkpointing": False}),
        ("mamba", {}, {"d_inner": 64, "rms_norm": True, "fused_add_norm": True, "time_step_min": 0.002}),
        ("opt", {}, {"prefix": "</s>", "layerdrop": 0.1}),
        ("llama", {}, {"use_mrope": False, "my_run": 7, "unsloth_version": "2026.1"}),
        # Longer sequences under plain rotary positions.
        ("llama", {}, {"max_position_embeddings": 4096}),
        ("llama", {}, {"attention_dropout": 0.3, "use_cache": False, "initializer_range": 0.5}),
        ("llama", {}, {"bos_token_id": 7, "eos_token_id": [3, 4], "pad_token_id": None}),
        ("gpt2", {}, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("bert", {"pad_token_id": 0}, {"pad_token_id": 3, "hidden_dropout_prob": 0.0}),
    ],
)
def test_spelling_and_training_alone_are_no_change_of_the_function(model, base, tuned):
    plain = {"architectures": [MODELS[model]], "model_type": model}
    keep = {name: value for name, value in SMALL.items() if name in config_of(model) and name != "head_dim"}
    assert function_changes(under(plain | keep | base), under(plain | keep | tuned)) == ()


def test_two_spellings_of_one_rotary_embedding_are_no_change_at_all():
    config = config_of("llama", rope_parameters=ROPE)
    legacy = {name: value for name, value in config.items() if name != "rope_parameters"}
    assert changed_fields(config, legacy | {"rope_theta": 100.0}) == {}


def test_a_scaled_rotary_embedding_depends_on_the_length_it_was_trained_for():
    yarn = config_of("llama", rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0})
    assert changed_fields(yarn, yarn | {"max_position_embeddings": 4096})["max_position_embeddings"]


def test_a_learned_table_of_positions_depends_on_its_length():
    config = config_of("gpt2")
    assert changed_fields(config, config | {"n_positions": 128}) == {"n_positions": True}


def test_the_text_part_of_a_larger_model_is_compared_with_the_same_saved_alone():
    text = transformers.Qwen2VLTextConfig(hidden_size=32, rope_parameters=ROPE | {"mrope_section": [2, 1, 1]})
    both = transformers.Qwen2VLConfig(text_config=text.to_dict())
    multimodal, alone = (json.loads(config.to_json_string(use_diff=False)) for config in (both, text))
    assert function_changes(under(multimodal), under(alone)) == ()
    alone["rope_parameters"]["rope_theta"] = 7.0
    (change,) = function_changes(under(multimodal), under(alone))
    assert (change.field, change.base, change.tuned) == ("rope_parameters.rope_theta", 100.0, 7.0)
    multimodal["text_config"] = alone
    both_changed = changed_fields(json.loads(both.to_json_string(use_diff=False)), multimodal)
    assert both_changed["text_config.rope_parameters.rope_theta"]


def test_classes_in_another_order_change_what_a_logit_means_and_new_names_do_not():
    config = config_of("bert classifier") | {"id2label": {"0": "no", "1": "yes"}}
    assert changed_fields(config, config | {"id2label": {"0": "YES", "1": "No"}}) == {"id2label": True}
    assert changed_fields(config, config | {"id2label": {"0": "a", "1": "b"}}) == {"id2label": False}
    assert changed_fields(config, config | {"id2label": {"0": "no", "1": "yes", "2": "?"}})["id2label"]
    causal = config | {"architectures": ["BertForMaskedLM"]}
    assert changed_fields(causal, causal | {"id2label": {"0": "yes", "1": "no"}}) == {"id2label": False}


def test_tying_counts_only_where_the_tied_model_has_no_room_for_the_head_of_base():
    config = config_of("llama") | {"tie_word_embeddings": False}
    model = running("llama", config)
    untied = open_checkpoint(model).described_by(config)
    tied_config = config | {"tie_word_embeddings": True}
    tied = open_checkpoint(running("llama", tied_config)).described_by(tied_config)
    (change,) = function_changes(untied, tied)
    assert (change.field, change.base, change.tuned) == ("tie_word_embeddings", False, True)
    # An untied model holds base's embedding as its head.
    assert function_changes(tied, untied) == ()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    assert function_changes(open_checkpoint(model).described_by(config), tied) == ()


def test_files_of_a_model_that_transformers_does_not_know_are_compared_as_they_are():
    config = {"model_type": "of_my_own", "gate": 1.0, "torch_dtype": "float32", "nested": {"depth": 2}}
    assert changed_fields(config, config | {"gate": 2.0, "torch_dtype": "bfloat16"}) == {
        "gate": True, "torch_dtype": False,
    }  # fmt: skip
    assert changed_fields(config, config | {"nested": {"depth": 3, "dropout": 0.1}}) == {
        "nested.depth": True, "nested.dropout": False,
    }  # fmt: skip
    assert changed_fields({}, {}) == {}


def test_models_of_two_kinds_differ_in_their_type():
    assert changed_fields(config_of("llama"), config_of("qwen2"))["model_type"]


@given(st.text("abcdefgh_", min_size=1), st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_field_that_nobody_has_thought_of_counts(name, value, other):
    config = {"model_type": "of_my_own", name: value}
    expected = () if value == other else ((name, value, other),)
    changes = function_changes(under(config), under(config | {name: other}))
    assert tuple((change.field, change.base, change.tuned) for change in changes) == expected


def test_a_change_reads_as_its_field_and_both_values():
    base, tuned = (config_of("llama", rope_parameters=ROPE | {"rope_theta": theta}) for theta in (100.0, 1e6))
    assert [str(change) for change in config_changes(under(base), under(tuned))] == [
        "rope_parameters.rope_theta (100 and 1e+06)"
    ]
