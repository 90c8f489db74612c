"""An adapter is run, merged and written as its user runs it: logits are those of PEFT on the same files."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diagnostics.edits.interpolate import interpolate
from diagnostics.edits.mitigate import mitigate
from probes import CheckpointPair
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.save import write_checkpoint
from probes.models.interpolated import InterpolatedModel
from probes.models.runnable import RunnablePair
from probes.models.two_sided import TwoSidedModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "tied llama": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "gemma": (
        "GemmaForCausalLM",
        SMALL | {"head_dim": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "bert": ("BertForMaskedLM", SMALL | {"max_position_embeddings": 16}),
    "classifier": ("BertForSequenceClassification", SMALL | {"max_position_embeddings": 16, "num_labels": 3}),
    "mixtral": ("MixtralForCausalLM", SMALL | {"num_local_experts": 3, "num_key_value_heads": 2}),
    "square mixtral": (
        "MixtralForCausalLM",
        SMALL | {"num_local_experts": 3, "num_key_value_heads": 2, "intermediate_size": 16},
    ),
    # Its experts are stacked as (experts, in, out), and the module says so.
    "gpt-oss": (
        "GptOssForCausalLM",
        SMALL
        | {
            "num_local_experts": 3,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 16,
            "num_experts_per_tok": 2,
        },
    ),
}
EMBED = {"gpt2": "wte", "bert": "word_embeddings"}
HEAD = {"bert": "decoder"}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    name, settings = MODELS[kind]
    model_class = getattr(transformers, name)
    wide = {"initializer_range": 0.3}
    return model_class(model_class.config_class(vocab_size=20, **wide, **settings)).eval()


def adapted(model: Any, **settings: Any) -> Any:
    """The model with an adapter, every trained tensor of which has moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6} | settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return peft.eval()


IDS = torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(IDS).logits


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without PEFT's remarks on tied weights and fan_in_fan_out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def save(directory: Path, kind: str, **settings: Any) -> Any:
    """Write `base` and `adapter`; the PeftModel as trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(kind).save_pretrained(directory / "base")
        peft = adapted(build(kind), **settings)
        peft.save_pretrained(directory / "adapter")
    return peft


def loaded(directory: Path, kind: str) -> Tensor:
    """Logits of full weights as transformers alone loads them."""
    return logits(getattr(transformers, MODELS[kind][0]).from_pretrained(directory).eval())


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def assert_as_run(directory: Path, kind: str, expected: Tensor, tuned: Any = None) -> None:
    """Base and tuned as two models, as one, and as written, are transformers' and PEFT's."""
    base = loaded(directory / "base", kind)
    assert (base - expected[..., : base.shape[-1]]).abs().max() > 1e-2, "the adapter changes nothing"
    pair = CheckpointPair(directory / "base", tuned or directory / "adapter")
    with RunnablePair(pair) as runnable:
        with runnable.base() as model:
            assert torch.equal(logits(model), base)
        with runnable.tuned() as model:
            assert_alike(logits(model), expected)
        with runnable.base() as model:
            assert torch.equal(logits(model), base)
    with TwoSidedModel(pair) as model:
        assert_alike(logits(model.model), expected)
        model.become("base")
        assert_alike(logits(model.model), base)
        model.become("tuned")
        interpolated = InterpolatedModel(model)
        for alpha, ends in ((0.0, base), (0.5, None), (1.0, expected)):
            interpolated.set_alpha(alpha)
            if ends is not None:
                assert_alike(logits(model.model), ends)
    write_checkpoint(pair.tuned, directory / "merged")
    assert_alike(loaded(directory / "merged", kind), expected)


def ways(kind: str) -> dict[str, dict[str, Any]]:
    """Ways to train a tied embedding or its head."""
    embed, head = EMBED.get(kind, "embed_tokens"), HEAD.get(kind, "lm_head")
    inner = {"gpt2": "c_attn", "bert": "query"}.get(kind, "q_proj")
    return {
        "factors of the embedding": {"target_modules": [inner, embed]},
        "factors of the head": {"target_modules": [inner, head]},
        "factors of both": {"target_modules": [inner, embed, head]},
        "dora of both": {"target_modules": [embed, head], "use_dora": True},
        "a copy of the embedding": {"target_modules": [inner], "modules_to_save": [embed]},
        "a copy of the head": {"target_modules": [inner], "modules_to_save": [head]},
        "copies of both": {"target_modules": [inner], "modules_to_save": [embed, head]},
        "one copy of both": {
            "target_modules": [inner], "modules_to_save": [embed, head], "ensure_weight_tying": True,
        },
        "tied factors": {"target_modules": [inner, embed], "ensure_weight_tying": True},
        "factors and a copy": {"target_modules": [inner, head], "modules_to_save": [embed]},
        "tokens": {"target_modules": [inner], "trainable_token_indices": [7, 2]},
        "tokens of the head": {"target_modules": [inner], "trainable_token_indices": {head: [7, 2]}},
        "other tokens": {"target_modules": [inner], "trainable_token_indices": {head: [7], embed: [2]}},
    }  # fmt: skip


TIED = [
    *(("tied llama", way) for way in ways("tied llama")),
    *(
        (kind, way)
        for kind in ("gpt2", "gemma", "bert")
        for way in ("factors of the embedding", "factors of the head", "one copy of both", "tied factors")
    ),
]


@pytest.mark.parametrize(("kind", "way"), TIED)
def test_a_tied_embedding_is_trained_apart_wherever_peft_trains_it_apart(kind, way, tmp_path):
    peft = save(tmp_path, kind, **ways(kind)[way])
    expected = logits(peft)
    assert_as_run(tmp_path, kind, expected)
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    tied = {"tokens"} if kind == "bert" else {"tokens", "one copy of both"}
    # PEFT ties factors only where the embedding has the name that Llama gives it.
    apart = way not in tied | ({"tied factors"} if kind in ("tied llama", "gemma") else set())
    assert bool(tuned.source.targets.untied) == apart
    assert any("trains them apart" in note for note in tuned.notes) == apart
    assert (tuned.config != tuned.base.config) == apart


def test_trained_tokens_of_a_head_with_a_bias_are_refused_because_peft_leaves_the_bias_out(tmp_path):
    peft = save(tmp_path, "bert", target_modules=["query"], trainable_token_indices=[7, 2])
    with torch.no_grad():
        peft.get_base_model().cls.predictions.decoder.original_module.bias += 100
    assert logits(peft).abs().max() < 50
    with pytest.raises(ValueError, match=r"PEFT runs a head with trained tokens without its bias.*merge it"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize("way", ways("tied llama"))
def test_a_peft_model_in_memory_is_run_and_merged_as_it_is(way, tmp_path):
    peft = save(tmp_path, "tied llama", **ways("tied llama")[way])
    before = {name: tensor.clone() for name, tensor in peft.state_dict().items()}
    expected = logits(peft)
    assert_as_run(tmp_path, "tied llama", expected, peft)
    assert torch.equal(logits(peft), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in peft.state_dict().items())


@pytest.mark.parametrize("way", ways("tied llama"))
def test_full_weights_that_an_edit_writes_are_what_the_adapters_user_runs(way, tmp_path):
    expected = logits(save(tmp_path, "tied llama", **ways("tied llama")[way]))
    paths = tmp_path / "base", tmp_path / "adapter"
    interpolate(*paths, 1.0, tmp_path / "interpolated")
    mitigate(*paths, tmp_path / "mitigated", scale=1.0, full=True)
    mitigate(*paths, tmp_path / "scaled", scale=1.0, mode="update", full=True)
    for directory in ("interpolated", "mitigated", "scaled"):
        assert_alike(loaded(tmp_path / directory, "tied llama"), expected)
    interpolate(*paths, 0.0, tmp_path / "start")
    assert_alike(loaded(tmp_path / "start", "tied llama"), loaded(tmp_path / "base", "tied llama"))


def test_an_adapter_scaled_in_its_factors_keeps_tied_copies_equal(tmp_path):
    for number, way in enumerate(("one copy of both", "tied factors")):
        directory = tmp_path / str(number)
        save(directory, "tied llama", **ways("tied llama")[way])
        mitigate(directory / "base", directory / "adapter", directory / "half", scale=0.5, mode="update")
        half = PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(directory / "base"), directory / "half"
        )
        interpolate(directory / "base", directory / "adapter", 0.5, directory / "full")
        assert_alike(logits(half.eval()), loaded(directory / "full", "tied llama"))


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-stabilised": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"up_proj": 9},
        },
    ),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "without some": ("llama", {"target_modules": r".*_proj", "exclude_modules": ["k_proj", "down_proj"]}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "bias of factors": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "own biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "biases beside a head": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "classifier": (
        "classifier",
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "copies": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "down_proj"]}),
    "experts": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts as modules": ("mixtral", {"target_modules": ["w1", "w2", "w3"]}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_every_variant_of_lora_runs_and_merges_as_in_peft(case, tmp_path):
    kind, settings = OTHERS[case]
    assert_as_run(tmp_path, kind, logits(save(tmp_path, kind, **settings)))


# Layouts of stacked experts


def relay(directory: Path, name: str, change: Any, **fields: Any) -> None:
    """Write the adapter again, with other factors of its experts and other fields."""
    shutil.copytree(directory / "adapter", directory / name)
    tensors = load_file(directory / "adapter/adapter_model.safetensors")
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = change(tensors[key], tensors[other])
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, directory / name / "adapter_model.safetensors", {"format": "pt"})
    config = directory / name / "adapter_config.json"
    settings = json.loads(config.read_text()) | fields
    config.write_text(json.dumps({field: value for field, value in settings.items() if value != "absent"}))


E, R = 3, 2


def exchanged(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as a PEFT that exchanges the features of a stack keeps them."""
    return (
        B.reshape(B.shape[0], R, E).permute(2, 1, 0).reshape(E * R, -1),
        A.reshape(E, R, -1).permute(2, 1, 0).reshape(A.shape[1], -1),
    )


def by_expert(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """B with the columns of one expert next to each other."""
    return A, B.reshape(B.shape[0], R, E).transpose(1, 2).reshape(B.shape[0], -1)


def both(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return by_expert(*exchanged(A, B))


UNSLOTH = {"auto_mapping": {"unsloth_fixed": True}}
DETAIL = {
    "lora_A_layout": "grouped_by_expert",
    "parameters": {"down_proj": {"lora_B_layout": "grouped_by_expert"}},
}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "as today": (lambda A, B: (A, B), {}),
    "of 0.18": (exchanged, {"peft_version": "0.18.1"}),
    "of 0.19.0": (exchanged, {"peft_version": "0.19.0"}),
    "of 0.19.1": (lambda A, B: (A, B), {"peft_version": "0.19.1"}),
    "of Unsloth": (by_expert, {"lora_B_layout": "grouped_by_expert", **UNSLOTH}),
    "of Unsloth by parameter": (by_expert, {"unsloth_fused_expert_lora": DETAIL, **UNSLOTH}),
    "of Unsloth today": (lambda A, B: (A, B), {"lora_B_layout": "rank_major", **UNSLOTH}),
    "of Unsloth on 0.18": (both, {"lora_B_layout": "grouped_by_expert", "peft_version": "0.18.0"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["mixtral", "square mixtral"])
def test_factors_of_experts_are_read_as_their_writer_meant_them(kind, layout, tmp_path):
    change, fields = LAYOUTS[layout]
    peft = save(tmp_path, kind, r=R, target_modules=[], target_parameters=["experts.down_proj"])
    relay(tmp_path, "other", change, **fields)
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "other").rename(tmp_path / "adapter")
    assert_as_run(tmp_path, kind, logits(peft))
    # An edited adapter stays in its layout.
    mitigate(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", scale=0.5, mode="update")
    mitigate(tmp_path / "base", tmp_path / "adapter", tmp_path / "top", scale=0.5, epsilon=0.99)
    tuned = open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    half = open_checkpoint(tmp_path / "half", base=tmp_path / "base")
    name = next(name for name in tuned.matrices if tuned.touched(name))
    torch.testing.assert_close(half.delta(name).dense(), tuned.delta(name).dense() / 2)


@pytest.mark.parametrize(
    ("version", "change"),
    [("0.18.1", lambda A, B: (A, B)), ("0.19.0", exchanged), ("0.21.0", lambda A, B: (A, B))],
)
def test_experts_stored_as_in_by_out_follow_the_flag_of_their_module(version, change, tmp_path):
    peft = save(tmp_path, "gpt-oss", r=R, target_modules=[], target_parameters=["experts.down_proj"])
    relay(tmp_path, "other", change, peft_version=version)
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "other").rename(tmp_path / "adapter")
    assert_as_run(tmp_path, "gpt-oss", logits(peft))


def test_a_rectangular_stack_tells_the_layout_of_the_square_ones_with_it(tmp_path):
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    peft = save(tmp_path, "square mixtral", r=R, target_modules=[], target_parameters=parameters)
    relay(tmp_path, "other", exchanged, peft_version="absent")
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "other").rename(tmp_path / "adapter")
    assert_as_run(tmp_path, "square mixtral", logits(peft))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_version": "absent"}, r"fit as PEFT before 0.19.1 lays them out.*peft_version is None"),
        ({"peft_version": "0.19.1.dev0"}, r"peft_version is '0.19.1.dev0': set it in adapter_config.json"),
        (UNSLOTH, r"Unsloth trained factors of the experts' down_proj.*lora_B_layout"),
        (
            {"lora_B_layout": "mixed"},
            r"packs the factors of down_proj as 'mixed', which this version does not",
        ),
    ],
)
def test_what_neither_shapes_nor_a_field_tell_is_refused(fields, message, tmp_path):
    save(tmp_path, "square mixtral", r=R, target_modules=[], target_parameters=["experts.down_proj"])
    relay(tmp_path, "other", lambda A, B: (A, B), **fields)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "other", base=tmp_path / "base")


# Vocabularies


@pytest.mark.parametrize("way", ["copies of both", "factors of the embedding", "one copy of both"])
def test_a_vocabulary_that_grew_is_run_with_all_of_its_rows(way, tmp_path):
    settings = ways("tied llama")[way]
    build("tied llama").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(24, mean_resizing=False)
    peft = adapted(model, **settings)
    peft.save_pretrained(tmp_path / "adapter")
    assert_as_run(tmp_path, "tied llama", logits(peft))


@pytest.mark.parametrize("way", ["a copy of the embedding", "a copy of the head", "tokens"])
def test_a_vocabulary_of_which_rows_were_not_saved_is_refused(way, tmp_path):
    settings = ways("tied llama")[way]
    settings |= {"trainable_token_indices": [3, 21]} if way == "tokens" else {}
    build("tied llama").save_pretrained(tmp_path / "base")
    model = build("tied llama")  # not loaded: PEFT does not see that it grew
    model.resize_token_embeddings(24, mean_resizing=False)
    adapted(model, **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Resize the base as in training .`base.resize_token_embeddings"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


# Files


def test_copies_under_the_names_of_old_versions_are_loaded(tmp_path):
    peft = save(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = {
        key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"): tensor
        for key, tensor in load_file(path).items()
    }
    original = load_file(tmp_path / "base/model.safetensors")["lm_head.weight"]
    save_file(tensors | {"base_model.model.lm_head.original_module.weight": original}, path)
    assert_as_run(tmp_path, "llama", logits(peft))


def test_factors_that_the_config_does_not_target_are_refused_when_they_are_run(tmp_path):
    save(tmp_path, "llama", target_modules=["q_proj", "k_proj"])
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj"]}))
    message = (
        r"holds factors of model.layers.0.self_attn.k_proj, which its adapter_config.json does not target"
    )
    with (
        pytest.raises(ValueError, match=message),
        RunnablePair(CheckpointPair(tmp_path / "base", tmp_path / "adapter")) as runnable,
        runnable.tuned(),
    ):
        pass
