"""Adapters are merged as PEFT's own `merge_and_unload` merges them, and refused where that cannot be."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.adapters import LowRank
from probes.checkpoint import Checkpoint, open_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )


def llama(**settings):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, **settings,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, num_labels=3,
        )
    )  # fmt: skip


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=3,
        )
    )  # fmt: skip


def trained(model, config, seed=1):
    """The model with an adapter whose every trainable tensor is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapted


@pytest.fixture
def saved(tmp_path):
    """Save a base and its adapter as directories, and open the adapter."""

    def save(build, config) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / "base")
            adapted = trained(model, config)
            adapted.save_pretrained(tmp_path / "adapter")
            merged = adapted.merge_and_unload()
            merged.save_pretrained(tmp_path / "merged")
        tuned = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
        return tuned, load_file(tmp_path / "merged" / "model.safetensors")

    return save


LORA = {"r": 3, "lora_alpha": 6}
CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5},
            "alpha_pattern": {r"^model\.layers\.0\.mlp\.down_proj": 1, "self_attn.k_proj": 9},
        },
    ),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "scaling 0": (llama, {"target_modules": ["q_proj"], "lora_alpha": 0}),
    "modules to save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "down_proj"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": (llama, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}),
    "named tokens": (
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}}
    ),
    "tied embedding": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}),
    "tied head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": (gpt2, {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True}),
    "conv1d embedding": (gpt2, {"target_modules": ["wte", "wpe"]}),
    "biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "own biases": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "bias of factors": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "encoder": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "router": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "experts": (
        mixtral,
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "some experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_equals_what_peft_merges(case, saved):
    build, config = CASES[case]
    tuned, merged = saved(build, LoraConfig(**LORA | config))
    assert set(tuned.headers) == set(merged)
    for name, expected in merged.items():
        torch.testing.assert_close(tuned.tensor(name), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_is_cut_out_of_the_same_tensor_whether_merged_whole_or_alone(case, saved):
    build, config = CASES[case]
    tuned, merged = saved(build, LoraConfig(**LORA | config))
    for name, matrix in tuned.matrices.items():
        expected = matrix.take(merged[matrix.tensor])
        torch.testing.assert_close(tuned.matrix(name), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_base_plus_delta_is_tuned_and_what_is_untouched_is_the_bases_own(case, saved):
    build, config = CASES[case]
    tuned, _ = saved(build, LoraConfig(**LORA | config))
    touched = 0
    for name in tuned.matrices:
        delta = tuned.delta(name)
        touched += tuned.touched(name)
        if delta is not None:
            assert tuned.touched(name)
            torch.testing.assert_close(
                tuned.base.matrix(name) + delta.dense(), tuned.matrix(name), rtol=1e-5, atol=1e-6
            )
        elif not tuned.touched(name):
            assert torch.equal(tuned.base.matrix(name), tuned.matrix(name))
    assert touched
