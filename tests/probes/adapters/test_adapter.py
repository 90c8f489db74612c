"""Adapters are merged as PEFT's own `merge_and_unload` merges them, and refused where that cannot be."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.adapters.config_fields import HARMLESS, READ, VARIANTS
from probes.adapters.parts import LowRank
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.opening import open_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from peft import IA3Config, LoraConfig, get_peft_model

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "bert": (
        "BertForSequenceClassification",
        {key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        | {"num_attention_heads": 2, "max_position_embeddings": 8, "num_labels": 3},
    ),
    "phi": ("Phi3ForCausalLM", LLAMA | {"pad_token_id": 0}),
    "neox": (
        "GPTNeoXForCausalLM",
        {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"} | {"max_position_embeddings": 8},
    ),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 3}),
    "square mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 3, "intermediate_size": 16}),
    "qwen": (
        "Qwen2MoeForCausalLM",
        LLAMA | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 3},
    ),
    # Its experts are stored as (in, out), gate and up rows alternating.
    "gpt-oss": ("GptOssForCausalLM", LLAMA | {"num_local_experts": 3, "head_dim": 4}),
    "square gpt-oss": (
        "GptOssForCausalLM",
        LLAMA | {"num_local_experts": 3, "head_dim": 4, "intermediate_size": 16},
    ),
    "vit": (
        "ViTForImageClassification",
        {key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    ),
}


def build(name: str) -> Any:
    """A tiny model of this kind, always the same."""
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    model = getattr(transformers, kind)
    vocabulary = {} if name == "vit" else {"vocab_size": 20}
    return model(model.config_class(**vocabulary, **settings))


def adapted(model: Any, **config: Any) -> Any:
    """The model with an adapter whose every trainable tensor is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: tied weights, fan_in_fan_out, deprecated calls
        peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6} | config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return peft


def save(directory: Path, kind: str, **config: Any) -> Any:
    """Write `base` and `adapter`; the PEFT model."""
    model = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory / "base")
        peft = adapted(model, **config)
        peft.save_pretrained(directory / "adapter")
    return peft


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wide and tall": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5},
            "alpha_pattern": {r"^model\.layers\.0\.mlp\.down_proj": 1, "self_attn.k_proj": 9},
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "scaling 0": ("llama", {"target_modules": ["q_proj"], "lora_alpha": 0}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "down_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}),
    "named tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}},
    ),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens"]}),
    "tied head": ("tied", {"target_modules": ["lm_head"]}),
    "both tied": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied on purpose": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "a head of its own": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "an embedding of its own": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both of their own": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "factors and a copy": ("tied", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}),
    "tied head dora": ("tied", {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}),
    "tied tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}),
    "tokens of the head": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 2]}},
    ),
    "other tokens of the head": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7], "embed_tokens": [2]}},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True}),
    "conv1d embedding": ("gpt2", {"target_modules": ["wte", "wpe"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "own biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "bias of factors": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "encoder": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "fused": ("phi", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "heads interleaved": ("neox", {"target_modules": ["query_key_value", "lm_head"], "use_dora": True}),
    "router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "square experts": ("square mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    # PEFT turns these modules, which transformers stacked, into parameters called by their bare names.
    "experts as modules": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "every linear layer": ("qwen", {"target_modules": "all-linear"}),
    "one kind of expert": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "shared expert": (
        "qwen",
        {"target_modules": ["shared_expert.up_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    ),
    "stored experts": ("gpt-oss", {"target_modules": [], "target_parameters": EXPERTS}),
    "square stored experts": ("square gpt-oss", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "convolution": ("vit", {"target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"]}),
    "convolution dora": ("vit", {"target_modules": ["projection"], "use_dora": True}),
}


# PEFT merges into the one weight of both, which is not what ran in training.
APART = {
    "tied embedding", "tied head", "both tied", "a head of its own", "an embedding of its own",
    "both of their own", "factors and a copy", "tied head dora", "tokens of the head",
    "other tokens of the head", "conv1d embedding",
}  # fmt: skip


def untied(model: Any) -> Any:
    """The model with a head of its own, which holds the values of its embedding."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return model


@pytest.fixture(scope="module", params=CASES)
def merged(request, tmp_path_factory) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """An adapter as it is opened, and the tensors that PEFT merges it into."""
    kind, config = CASES[request.param]
    directory = tmp_path_factory.mktemp("adapters")
    peft = save(directory, kind, **config)
    if request.param in APART:
        peft = adapted(untied(build(kind)), **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.merge_and_unload().save_pretrained(directory / "merged")
    tuned = open_checkpoint(directory / "adapter", base=directory / "base")
    return tuned, load_file(directory / "merged" / "model.safetensors")


def test_every_tensor_equals_what_peft_merges(merged):
    tuned, expected = merged
    assert set(tuned.headers) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(tuned.tensor(name), tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_matrix_merged_alone_is_the_part_of_the_tensor_merged_whole(merged):
    tuned, expected = merged
    for name, matrix in tuned.matrices.items():
        part = matrix.take(expected[matrix.tensor])
        torch.testing.assert_close(tuned.matrix(name), part, rtol=1e-5, atol=1e-6, msg=name)


def test_base_plus_delta_is_tuned_and_what_is_not_touched_is_the_bases_own(merged):
    tuned, _ = merged
    touched = 0
    for name, matrix in tuned.matrices.items():
        delta, touches = tuned.delta(name), tuned.touched(name)
        touched += touches
        same_place = tuned.source.location(matrix.tensor) == (
            tuned.base.source.location(matrix.tensor) if matrix.tensor in tuned.base.headers else None
        )
        if delta is not None:
            assert touches
            before = tuned.base.matrices.get(name)
            before = name if before else tuned.source.original(matrix.tensor)
            sum_ = tuned.base.matrix(before) + delta.dense()
            torch.testing.assert_close(sum_, tuned.matrix(name), rtol=1e-5, atol=1e-6)
        elif not touches:
            before = name if name in tuned.base.matrices else tuned.source.original(matrix.tensor)
            assert torch.equal(tuned.base.matrix(before), tuned.matrix(name))
        assert not (touches and same_place)
    assert touched


def test_the_parts_of_a_fused_tensor_share_one_factor(tmp_path):
    save(tmp_path, "gpt2", target_modules=["c_attn"])
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    low = [tuned.delta(f"transformer.h.0.attn.c_attn.weight:{part}") for part in "qkv"]
    assert {tuple(delta.A.shape) for delta in low} == {(3, 16)}
    assert torch.equal(low[0].A, low[2].A)
    B = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    assert torch.equal(torch.cat([delta.B for delta in low]), B[key])


def test_low_rank_is_scaling_times_the_product():
    low = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]), 0.5)
    assert low.rank == 1
    assert torch.equal(low.dense(), torch.tensor([[1.5, 3.0], [0.0, 0.0]]))


def test_half_precision_factors_are_multiplied_in_float32(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    A, B = (
        load_file(path)[f"base_model.model.{name.replace('weight', factor)}.weight"]
        for factor in ("lora_A", "lora_B")
    )
    expected = tuned.base.matrix(name).double() + 2 * B.double() @ A.double()
    torch.testing.assert_close(tuned.matrix(name).double(), expected, rtol=1e-6, atol=1e-7)


def test_an_adapter_describes_itself_and_its_fingerprint_follows_its_settings(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"], use_rslora=True)
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert {key: tuned.adapter[key] for key in ("type", "r", "alpha", "rslora", "dora", "updated")} == {
        "type": "LORA", "r": 3, "alpha": 6, "rslora": True, "dora": False, "updated": 2,
    }  # fmt: skip
    before = tuned.fingerprint(), tuned.stamp()
    edit(tmp_path, lora_alpha=7)
    again = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert again.fingerprint() != before[0]
    assert again.stamp() != before[1]


def test_an_opened_adapter_can_be_sent_to_another_process(tmp_path):
    save(tmp_path, "gpt2", target_modules=["c_attn", "wte"])
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    again = pickle.loads(pickle.dumps(tuned))
    for name in tuned.matrices:
        assert torch.equal(again.matrix(name), tuned.matrix(name))


# Names as other versions and other tools write them


@pytest.fixture
def renamed(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Opens the adapter of a kind of model after renaming its tensors, or those of its base."""

    def make(
        kind: str, config: dict[str, Any], *, adapter: Callable = str, base: Callable = str
    ) -> Checkpoint:
        peft = save(tmp_path, kind, **config)
        for path, rename in (("adapter/adapter_model", adapter), ("base/model", base)):
            file = tmp_path / f"{path}.safetensors"
            save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
        tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.merge_and_unload()
        name = next(name for name in tuned.matrices if tuned.touched(name))
        wanted = next(
            tensor
            for key, tensor in peft.state_dict().items()
            if key.endswith(base("h.0.attn.c_attn.weight"))
        )
        torch.testing.assert_close(tuned.tensor(tuned.matrices[name].tensor), wanted, rtol=1e-5, atol=1e-6)
        return tuned

    return make


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("transformer.", "model.transformer."),
    ],
    ids=["with the adapter's name", "without prefix", "compiled", "in a wrapper"],
)
def test_names_of_other_versions_are_understood(rename, renamed):
    renamed("gpt2", {"target_modules": ["c_attn"]}, adapter=rename)


def test_a_base_without_the_models_prefix_is_found(renamed):
    tuned = renamed(
        "gpt2", {"target_modules": ["c_attn"]}, base=lambda name: name.removeprefix("transformer.")
    )
    assert tuned.touched("h.0.attn.c_attn.weight:q")


def test_experts_adapted_one_by_one_fit_a_base_that_stacks_them(tmp_path):
    """Adapters of older versions name every expert; a model in memory stacks them."""
    save(tmp_path, "mixtral", target_modules=["q_proj"])
    model = build("mixtral")
    generator = torch.Generator().manual_seed(3)
    A, B = torch.randn(2, 16, generator=generator), torch.randn(24, 2, generator=generator)
    module = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3"
    save_file(
        {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    edit(tmp_path, r=2, lora_alpha=2, target_modules=["w3"])
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
    )
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    expected = model.state_dict()[stack].clone()
    expected[2, 24:] += B @ A  # up comes after gate
    torch.testing.assert_close(tuned.tensor(stack), expected)
    assert [name for name in tuned.matrices if tuned.touched(name)] == [f"{stack}:2:up"]
    torch.testing.assert_close(tuned.delta(f"{stack}:2:up").dense(), B @ A)
    assert "called otherwise in the base's file" in tuned.adapter["notes"][0]


def test_a_file_with_both_copies_of_a_tied_weight_changes_in_the_adapted_one(tmp_path):
    save(tmp_path, "tied", target_modules=["embed_tokens"])
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert "lm_head.weight" in tuned.matrices
    assert not torch.equal(tuned.tensor("lm_head.weight"), tuned.tensor("model.embed_tokens.weight"))
    assert torch.equal(tuned.tensor("lm_head.weight"), tuned.base.tensor("lm_head.weight"))


def test_a_resized_vocabulary_comes_with_the_adapter(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], torch.ones(4, 16)])
    save_file(tensors, path)
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert tuned.headers["model.embed_tokens.weight"].shape == (24, 16)
    assert tuned.matrix("model.embed_tokens.weight")[20:].eq(1).all()


@pytest.mark.parametrize("copies", [None, ["embed_tokens"]])
def test_a_resized_vocabulary_comes_with_its_tied_head(copies, tmp_path):
    model = build("tied")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(24, mean_resizing=False)
    peft = adapted(model, target_modules=["q_proj"], modules_to_save=copies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        expected = peft.merge_and_unload().state_dict()
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    if copies is None:
        expected.pop("lm_head.weight")  # still the embedding
    assert set(tuned.headers) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(tuned.tensor(name), tensor, rtol=1e-5, atol=1e-6, msg=name)
    # Unless a copy of the embedding was trained, the two are still one.
    assert ("lm_head.weight" in tuned.matrices) == (copies is not None)
    assert len(tuned.source.notes) == (copies is not None)


def test_a_pickled_adapter_is_read_like_a_safe_one(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"])
    safe = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    expected = safe.matrix("model.layers.0.self_attn.q_proj.weight")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert torch.equal(tuned.matrix("model.layers.0.self_attn.q_proj.weight"), expected)


# Refusals


def edit(directory: Path, **settings: Any) -> None:
    """Change adapter_config.json."""
    path = directory / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, r"adapter of type LOHA; .*merge_and_unload\(\)\.save_pretrained"),
        ({"peft_type": "VERA"}, "adapter of type VERA"),
        ({"peft_type": "PREFIX_TUNING"}, "a PREFIX_TUNING adapter changes no weights"),
        ({"peft_type": None}, "adapter of type NONE"),
        ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4' also changed the base's weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        (
            {"layer_replication": [[0, 2], [1, 2]]},
            "layer_replication is set .it repeats layers of its base.; no weights compute the same",
        ),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set.*; no weights compute the same"),
        ({"peft_type": "XLORA"}, "adapter of type XLORA; what it adds depends on the input"),
        ({"peft_type": "LILY"}, "adapter of type LILY; what it adds depends on the input"),
        ({"enable_lora": [True, False, True]}, "enable_lora is set"),
        ({"lora_nums": 3}, "has `lora_nums`, which this version does not know; merge it where.*or update"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"r": 8}, "factors of rank 3, but adapter_config.json says 8"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 4}},
            r"layers.1.self_attn.q_proj: factors of rank 3.*says 4",
        ),
        ({"use_dora": True}, "q_proj: use_dora is set, but lora_magnitude_vector is missing"),
    ],
)
def test_what_is_no_delta_to_its_base_is_refused_by_name(settings, message, tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"])
    edit(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


def test_fields_that_change_no_weight_are_accepted(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"])
    expected = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base").fingerprint()
    edit(tmp_path, lora_dtype="fp32", merge_weights=True, velora_config={"scale": 2}, of_tomorrow=None)
    assert open_checkpoint(tmp_path / "adapter", base=tmp_path / "base").fingerprint() == expected


def test_every_field_that_peft_writes_is_read_harmless_or_refused():
    judged = READ | HARMLESS | VARIANTS.keys()
    assert set(LoraConfig.__dataclass_fields__) <= judged
    assert not READ & HARMLESS
    assert not (READ | HARMLESS) & VARIANTS.keys()


def test_an_adapter_of_mlx_is_told_how_to_be_fused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}'
    )
    save_file({"a": torch.ones(1)}, tmp_path / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"is an adapter of MLX.*mlx_lm.fuse --model BASE"):
        open_checkpoint(tmp_path)


def test_ia3_as_peft_saves_it_is_refused_by_name(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], inference_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter of type IA3; LoRA, rsLoRA and DoRA are read as they are"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


def test_an_adapter_of_a_model_of_another_size_is_refused_with_both_shapes(tmp_path):
    save(tmp_path, "llama", target_modules=["k_proj"])
    config = transformers.LlamaConfig(vocab_size=20, **LLAMA | {"num_key_value_heads": 4})
    shutil.rmtree(tmp_path / "base")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    message = (
        r"layers.0.self_attn.k_proj: the adapter is for 8x16, the base holds 16x16; was it trained on another"
    )
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize("kind", ["gpt2", "vit", "bert"])
def test_an_adapter_of_another_architecture_is_refused(kind, tmp_path):
    save(tmp_path, "llama", target_modules=["gate_proj"])
    shutil.rmtree(tmp_path / "base")
    build(kind).save_pretrained(tmp_path / "base")
    message = r"mlp.gate_proj: is not in the base; was it trained on another model than .*base\?"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


def test_an_adapter_with_more_layers_than_its_base_names_the_missing_module(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"])
    path = tmp_path / "base" / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "layers.1." not in name}, path)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj: is not in the base"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "has lora_A but not both lora_A and lora_B"),
        (lambda t: t.clear() or t.update({"x": torch.ones(1)}), r"x: is not in the base"),
        (
            lambda t: t.update({k.replace("lora_A", "lora_A.other"): v for k, v in list(t.items())}),
            r"holds several adapters \(default, other\)",
        ),
        (lambda t: t.update({"base_model.model.model.lora_diag.weight": torch.ones(1)}), "variant of LoRA"),
        (
            lambda t: t.update({k: torch.ones(16, 2) for k in t if "lora_B" in k}),
            r"factors 3x16 and 16x2 do not multiply",
        ),
    ],
    ids=["half a pair", "nothing known", "two adapters", "unknown factor", "ranks differ"],
)
def test_a_damaged_adapter_is_refused_with_what_is_wrong(change, message, tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


def test_a_head_stored_beside_the_embedding_does_not_follow_a_trained_copy_of_it(tmp_path):
    save(tmp_path, "tied", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    path = tmp_path / "base" / "model.safetensors"
    embed = load_file(path)["model.embed_tokens.weight"]
    save_file(load_file(path) | {"lm_head.weight": embed.clone()}, path)
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    assert torch.equal(tuned.matrix("lm_head.weight"), embed)
    assert not tuned.touched("lm_head.weight")
    assert not torch.equal(tuned.matrix("model.embed_tokens.weight"), embed)


def test_trained_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj"], trainable_token_indices=[2, 3])
    edit(tmp_path, trainable_token_indices=[2, 20])
    message = r"trained the token 20 of a vocabulary that had grown; .*base has 20 rows, .*Resize the base as"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


def test_factors_that_fit_no_target_parameter_are_refused_with_the_shapes(tmp_path):
    save(tmp_path, "gpt-oss", target_modules=[], target_parameters=EXPERTS)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    # 3 experts of rank 3, and one column too many
    save_file({n: torch.cat([t, t[:, :1]], dim=1) if "lora_A" in n else t for n, t in tensors.items()}, path)
    targets = r"target_parameters \(down_proj 3x16x24, gate_up_proj 3x48x16\)"
    message = rf"layers.0.mlp.experts: a delta of 48x17 fits none of {targets}"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
