"""Models in memory are read as what was trained, under their own names, and stay bit for bit as they were."""

import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from probes.checkpoints.in_memory import StateSource
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.pair import CheckpointPair

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "tied llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "phi-3": ("Phi3ForCausalLM", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", {"num_key_value_heads": 2, "num_local_experts": 3}),
    "bert": ("BertForMaskedLM", {"max_position_embeddings": 8}),
}


def build(name: str, seed: int = 0) -> Any:
    """A tiny model of this kind."""
    torch.manual_seed(seed)
    kind, settings = MODELS[name]
    model = getattr(transformers, kind)
    sizes = {} if name == "gpt2" else SIZES
    return model(model.config_class(vocab_size=20, architectures=[kind], **sizes, **settings)).eval()


def bridged(model: Any) -> Any:
    """The model inside a TransformerBridge, without a tokenizer."""
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def untied(model: Any) -> Any:
    """The model with a head of its own, which holds the values of its embedding."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return model


def adapted(model: Any, **settings: Any) -> Any:
    """The model with a LoRA whose factors are random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out of a Conv1D with a warning
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))


@pytest.fixture
def unchanged() -> Iterator[Callable[[Any], Any]]:
    """Watches a model: when the test ends, its tensors, their places and its flags must be as they were."""
    watched = []

    def state(model: Any) -> dict[str, Any]:
        return {
            name: (tensor.data_ptr(), tensor.requires_grad, tensor.detach().clone())
            for name, tensor in model.state_dict(keep_vars=True).items()
        } | {"training": [module.training for module in model.modules()]}

    def watch(model: Any) -> Any:
        watched.append((model, state(model)))
        return model

    yield watch
    for model, before in watched:
        after = state(model)
        assert before.pop("training") == after.pop("training")
        assert list(before) == list(after)
        for name in before:
            assert before[name][:2] == after[name][:2]
            assert torch.equal(before[name][2], after[name][2])


@pytest.mark.parametrize("kind", MODELS)
def test_a_module_has_the_matrices_of_the_directory_it_saves(kind, tmp_path, unchanged):
    model = unchanged(build(kind))
    model.save_pretrained(tmp_path)
    pair = CheckpointPair(tmp_path, model)
    saved = open_checkpoint(tmp_path)
    assert set(pair.matrices) == set(saved.matrices) == set(pair.tuned.matrices)
    assert all(pair.identical(name) for name in pair.matrices)
    assert pair.tuned.parameters == saved.parameters
    assert pair.tuned.fingerprint() == saved.fingerprint()
    loaded = type(model).from_pretrained(tmp_path)
    assert open_checkpoint(loaded).fingerprint() == saved.fingerprint()


@pytest.mark.parametrize("kind", MODELS)
def test_a_bridge_gives_the_weights_of_the_model_inside_under_its_own_names(kind, unchanged):
    expected = open_checkpoint(build(kind))
    opened = open_checkpoint(unchanged(bridged(build(kind))))
    assert opened.fingerprint() == expected.fingerprint()
    assert list(opened.matrices) == list(expected.matrices)
    assert opened.architecture == MODELS[kind][0]


def test_a_bridge_without_weight_processing_is_read_and_a_processed_one_is_refused():
    bridge = bridged(build("gpt2"))
    bridge.enable_compatibility_mode(no_processing=True)
    assert open_checkpoint(bridge).fingerprint() == open_checkpoint(build("gpt2")).fingerprint()
    bridge = bridged(build("gpt2"))
    bridge.enable_compatibility_mode()
    with pytest.raises(ValueError, match=r"folded and centred.*no_processing=True"):
        open_checkpoint(bridge)


def test_a_native_bridge_has_its_matrices_by_layer():
    bridge = TransformerBridge.boot_native(
        {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 8, "d_vocab": 20, "act_fn": "gelu"}
    )
    matrices = open_checkpoint(bridge).matrices.values()
    assert sorted((m.layer, m.component, m.rows, m.columns) for m in matrices if m.part == "block") == sorted(
        (layer, component, *shape)
        for layer in (0, 1)
        for component, shape in {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (16, 16)),
            "up_proj": (64, 16),
            "down_proj": (16, 64),
        }.items()
    )


def test_the_state_dict_of_a_bridge_is_refused_for_it_lost_the_orientation():
    with pytest.raises(ValueError, match="of a TransformerBridge"):
        open_checkpoint(bridged(build("gpt2")).state_dict())


def hooked(
    layers: int = 1, heads: int = 2, kv: int = 1, d: int = 6, d_head: int = 4
) -> dict[str, torch.Tensor]:
    """The state dict of an unprocessed HookedTransformer with grouped queries."""
    torch.manual_seed(0)
    state = {
        "embed.W_E": torch.randn(11, d),
        "pos_embed.W_pos": torch.randn(5, d),
        "unembed.W_U": torch.randn(d, 11),
        "ln_final.w": torch.ones(d),
    }
    for layer in range(layers):
        attn, mlp = f"blocks.{layer}.attn.", f"blocks.{layer}.mlp."
        state |= {
            attn + "W_Q": torch.randn(heads, d, d_head),
            attn + "_W_K": torch.randn(kv, d, d_head),
            attn + "_W_V": torch.randn(kv, d, d_head),
            attn + "W_O": torch.randn(heads, d_head, d),
            attn + "b_Q": torch.randn(heads, d_head),
            attn + "mask": torch.ones(5, 5, dtype=torch.bool),
            mlp + "W_in": torch.randn(d, 9),
            mlp + "W_gate": torch.randn(d, 9),
            mlp + "W_out": torch.randn(9, d),
            f"blocks.{layer}.ln1.w": torch.ones(d),
        }
    return state


def test_a_hooked_state_dict_maps_vectors_as_the_model_does():
    state = hooked()
    opened = open_checkpoint(state)
    x = torch.randn(6)
    q = opened.matrix("blocks.0.attn.q_proj.weight") @ x
    torch.testing.assert_close(q.reshape(2, 4), torch.einsum("d,hdk->hk", x, state["blocks.0.attn.W_Q"]))
    k = opened.matrix("blocks.0.attn.k_proj.weight") @ x
    torch.testing.assert_close(k.reshape(1, 4), torch.einsum("d,hdk->hk", x, state["blocks.0.attn._W_K"]))
    z = torch.randn(2, 4)
    o = opened.matrix("blocks.0.attn.o_proj.weight") @ z.flatten()
    torch.testing.assert_close(o, torch.einsum("hk,hkd->d", z, state["blocks.0.attn.W_O"]))
    for leaf, name in (("W_in", "up_proj"), ("W_gate", "gate_proj")):
        up = opened.matrix(f"blocks.0.mlp.{name}.weight") @ x
        torch.testing.assert_close(up, x @ state[f"blocks.0.mlp.{leaf}"])
    torch.testing.assert_close(opened.matrix("lm_head.weight") @ x, x @ state["unembed.W_U"])
    components = {(m.component, m.part) for m in opened.matrices.values()}
    assert components == {
        *((f"{c}_proj", "block") for c in ("q", "k", "v", "o", "up", "gate", "down")),
        ("embed", "embedding"),
        ("position_embed", "embedding"),
        ("lm_head", "head"),
    }


def test_a_hooked_mixture_has_its_router_and_its_experts():
    state = hooked()
    for leaf in ("W_in", "W_gate", "W_out"):
        matrix = state.pop(f"blocks.0.mlp.{leaf}")
        state |= {f"blocks.0.mlp.experts.{e}.{leaf}.weight": matrix.mT.clone() + e for e in range(3)}
    state["blocks.0.mlp.W_gate"] = torch.randn(6, 3)
    opened = open_checkpoint(state)
    router = next(m for m in opened.matrices.values() if m.part == "router")
    assert (router.rows, router.columns) == (3, 6)
    assert "blocks.0.mlp.experts.2.up_proj.weight" in opened.matrices


def test_folded_and_centred_hooked_weights_are_refused():
    folded = {name: tensor for name, tensor in hooked().items() if ".ln1." not in name}
    with pytest.raises(ValueError, match=r"layer norms are folded.*from_pretrained_no_processing"):
        open_checkpoint(folded)
    centred = hooked()
    centred["blocks.0.attn.W_O"] -= centred["blocks.0.attn.W_O"].mean(-1, keepdim=True)
    with pytest.raises(ValueError, match=r"blocks.0.attn.W_O is centred"):
        open_checkpoint(centred)


PEFT = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"]}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "tied": ("tied llama", {"target_modules": ["embed_tokens"]}),
}


@pytest.mark.parametrize("case", PEFT)
def test_a_peft_model_is_read_as_base_and_adapter_without_merging_it(case, unchanged):
    kind, settings = PEFT[case]
    model = unchanged(adapted(build(kind), **settings))
    opened = open_checkpoint(model)
    assert opened.kind == "adapter"
    assert opened.adapter["r"] == 2
    assert opened.base.fingerprint() == open_checkpoint(build(kind)).fingerprint()
    plain = build(kind)
    if {"wte", "embed_tokens"}.intersection(settings["target_modules"]):
        plain = untied(plain)  # PEFT merges into the one weight of both, and only one was adapted
    twin = adapted(plain, **settings)
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on tied embeddings
        merged = open_checkpoint(twin.merge_and_unload()).source.read
    for name in opened.headers:
        torch.testing.assert_close(opened.tensor(name), merged(name), rtol=1e-5, atol=1e-6, msg=name)


def test_a_peft_model_equals_the_directory_that_it_saves(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    saved = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    live = open_checkpoint(model)
    assert set(live.matrices) == set(saved.matrices)
    for name in live.matrices:
        assert torch.equal(live.matrix(name), saved.matrix(name))
        assert live.touched(name) == saved.touched(name)
    pair = CheckpointPair(tmp_path / "base", model)
    changed = [name for name in pair.matrices if not pair.identical(name)]
    assert sorted({pair.matrices[name].component for name in changed}) == ["q_proj", "v_proj"]


def test_the_base_of_a_peft_model_may_be_the_one_inside_it():
    model = adapted(build("llama"), target_modules=["q_proj"])
    inner = CheckpointPair(model.get_base_model(), model)
    apart = CheckpointPair(build("llama"), model)
    assert list(inner.matrices) == list(apart.matrices)
    for name in inner.matrices:
        assert inner.identical(name) == apart.identical(name)
        for ours, theirs in zip(inner.read(name), apart.read(name), strict=True):
            assert torch.equal(ours, theirs)


def test_a_module_with_adapters_inside_and_no_peft_model_around_is_refused():
    inside = adapted(build("llama"), target_modules=["q_proj"]).get_base_model()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: has adapters inside.*give the PeftModel"):
        open_checkpoint(inside)
    with pytest.raises(ValueError, match="has adapters inside"):
        CheckpointPair(build("llama"), inside)


def test_an_adapter_added_by_transformers_is_read_too():
    model = build("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    opened = open_checkpoint(model)
    assert opened.kind == "adapter"
    assert opened.base.fingerprint() == open_checkpoint(build("llama")).fingerprint()
    assert [m.component for n, m in opened.matrices.items() if opened.touched(n)] == ["q_proj"] * 2


def test_one_of_several_adapters_is_read_and_two_at_once_are_refused():
    model = adapted(build("llama"), target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=1, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    opened = open_checkpoint(model)
    assert [m.component for n, m in opened.matrices.items() if opened.touched(n)] == ["v_proj"] * 2
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 active adapters \(default, other\)"):
        open_checkpoint(model)


def test_a_merged_adapter_is_refused_for_its_base_is_gone():
    model = adapted(build("llama"), target_modules=["q_proj"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"default is merged into the base's weights.*unmerge_adapter"):
        open_checkpoint(model)


def test_a_prompt_is_refused_for_it_changes_no_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers in a way that is deprecated
        model = get_peft_model(
            build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter changes no weights"):
        open_checkpoint(model)


def test_weights_that_are_not_loaded_are_refused_by_name():
    with torch.device("meta"):
        model = build("llama")
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is on the meta device"):
        open_checkpoint(model)


def test_what_is_no_model_is_refused_with_what_would_be():
    with pytest.raises(ValueError, match=r"a list: is no checkpoint.*nn.Module, a PeftModel"):
        open_checkpoint([1, 2])
    with pytest.raises(ValueError, match="a dict: is no checkpoint"):
        open_checkpoint({"lr": 1e-3})


def test_tensors_that_share_their_bytes_are_given_once():
    a = torch.randn(4, 3)
    source = StateSource({"a": a, "again": a, "turned": a.mT, "b": a.clone()})
    assert list(source.headers) == ["a", "turned", "b"]


def test_the_stamp_follows_the_content_for_memory_changes_without_a_trace():
    model = build("llama")
    opened = open_checkpoint(model)
    before = opened.stamp()
    assert before == open_checkpoint(build("llama")).stamp()
    model.lm_head.weight.data[0, 0] += 1
    assert opened.stamp() != before


def test_a_source_in_memory_can_be_sent_to_another_process():
    opened = open_checkpoint(adapted(build("llama"), target_modules=["q_proj"]))
    again = pickle.loads(pickle.dumps(opened))
    assert again.fingerprint() == opened.fingerprint()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(again.matrix(name), opened.matrix(name))
