"""What base holds is what transformers loads from it: under old names, moved prefixes and tied heads.

The oracle is transformers: at α = 0 the written model has base's parameters, as `from_pretrained` reads them
from base's own file.
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diagnostics.edits.interpolate import interpolate
from probes import CheckpointPair, open_model
from probes.checkpoints.blend import write_blend
from probes.checkpoints.mask_file import Patch, write_graft
from probes.errors import InputError, NotApplicableError
from probes.models.two_sided import TwoSidedModel
from tests.probes import zoo
from tests.probes.runnable import make, transformers

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION)
    )
    return transformers.LlavaForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def old_norms(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def new_llava(name):
    """As the model itself calls them; transformers still saves the older names."""
    name = re.sub(r"^(?=vision_tower|multi_modal_projector)", "model.", name)
    return re.sub(r"^language_model\.model\.", "model.language_model.", name).replace(
        "language_model.lm", "lm"
    )


def under_visual(name):
    """As Qwen2-VL was saved after its tower moved below `model`."""
    name = re.sub(r"^model\.(?!visual|language_model)", "model.language_model.", name)
    return re.sub(r"^visual\.", "model.visual.", name)


# A model, and the name of each of its tensors in base's file.
RENAMED = {
    "norms of BERT": (lambda: make("bert", 0), old_norms),
    "GPT-2 without its prefix": (lambda: make("gpt2", 0), lambda name: name.removeprefix("transformer.")),
    "a table of T5 by another name": (t5, lambda name: name.replace("shared", "encoder.embed_tokens")),
    "two prefixes of Qwen2-VL": (qwen2_vl, under_visual),
    "three prefixes of LLaVA": (llava, new_llava),
}


@pytest.fixture(params=RENAMED)
def renamed(request, tmp_path):
    """A model's class, its directory with other names, and another model's directory with today's."""
    make_model, rename = RENAMED[request.param]
    for seed, side in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        model = make_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / side)
    file = tmp_path / "base" / "model.safetensors"
    state = {rename(name): tensor for name, tensor in load_file(file).items()}
    assert state.keys() != load_file(file).keys()
    save_file(state, file, {"format": "pt"})
    return type(model), tmp_path / "base", tmp_path / "tuned"


def parameters(model_class, directory):
    model, info = model_class.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    return model.state_dict()


@pytest.mark.parametrize("turned", [False, True])
def test_every_tensor_has_the_counterpart_that_transformers_gives_it(renamed, tmp_path, turned):
    model_class, *sides = renamed
    base, tuned = reversed(sides) if turned else sides
    pair = CheckpointPair(base, tuned)
    assert pair.unmatched == []
    assert pair.between_problem() is None
    assert pair.compared == 1.0
    for alpha, side in ((0.0, base), (1.0, tuned)):
        interpolate(base, tuned, alpha, tmp_path / f"at-{alpha}")
        written, expected = (parameters(model_class, path) for path in (tmp_path / f"at-{alpha}", side))
        assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_two_sides_of_one_running_model_are_those_of_transformers(tmp_path):
    for seed, side in enumerate(("base", "tuned")):
        make("bert", seed).save_pretrained(tmp_path / side)
    file = tmp_path / "base" / "model.safetensors"
    save_file({old_norms(name): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    ids = torch.arange(3, 12)[None]
    logits = {side: open_model(tmp_path / side).model(ids).logits for side in ("base", "tuned")}
    for base, tuned in (("base", "tuned"), ("tuned", "base")):
        with TwoSidedModel(CheckpointPair(tmp_path / base, tmp_path / tuned)) as two_sided:
            assert torch.equal(two_sided.model(ids).logits, logits[tuned])
            two_sided.become("base")
            assert torch.equal(two_sided.model(ids).logits, logits[base])


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_file_with_the_models_own_names_aligns_with_one_that_transformers_saved(family, tmp_path):
    torch.manual_seed(0)
    model = zoo.model_of(family)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "own")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untied = {name: state[name].contiguous() for name in state.keys() - model.all_tied_weights_keys.keys()}
    save_file(untied, tmp_path / "own" / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "own", tmp_path / "tuned")
    assert pair.unmatched == []
    assert pair.compared == 1.0
    interpolate(tmp_path / "own", tmp_path / "tuned", 0.0, tmp_path / "out")
    written = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())


# ------------------------------------------------------------------------------------------- tied heads


@pytest.mark.parametrize("stored", [("bias",), ("decoder.bias",), ("bias", "decoder.bias")])
def test_a_tied_bias_is_one_tensor_too(stored, tmp_path):
    for seed, side in enumerate(("base", "tuned")):
        model = make("bert", seed)
        with torch.no_grad():
            model.cls.predictions.bias.normal_()
        model.save_pretrained(tmp_path / side)
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    bias = state.pop("cls.predictions.bias")
    state |= {f"cls.predictions.{name}": bias.clone() for name in stored}
    save_file(state, file, {"format": "pt"})
    for base, tuned in (("base", "tuned"), ("tuned", "base")):
        pair = CheckpointPair(tmp_path / base, tmp_path / tuned)
        assert pair.unmatched == []
        interpolate(tmp_path / base, tmp_path / tuned, 0.0, tmp_path / f"from-{base}")
        written, expected = (parameters(type(model), tmp_path / name) for name in (f"from-{base}", base))
        assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert"])
def test_a_tied_head_is_one_tensor_whichever_of_it_is_stored(family, stored, tmp_path):
    for seed, side in enumerate(("base", "tuned")):
        model = make(family, seed, tie_word_embeddings=True)
        model.save_pretrained(tmp_path / side)
        head, embedding = next(
            (alias, original)
            for alias, original in model.all_tied_weights_keys.items()
            if alias.endswith("weight")
        )
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    state = load_file(tmp_path / "base" / "model.safetensors")
    table = state.pop(embedding)
    both = {embedding: table, head: table.clone()}
    kept = {"embedding": [embedding], "head": [head], "both": [embedding, head]}[stored]
    state |= {name: both[name] for name in kept}
    save_file(state, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for base, tuned in (("other", "tuned"), ("tuned", "other"), ("other", "base")):
        pair = CheckpointPair(tmp_path / base, tmp_path / tuned)
        assert pair.unmatched == []
        assert pair.compared == 1.0
        out = tmp_path / f"{base}-{tuned}"
        interpolate(tmp_path / base, tmp_path / tuned, 0.0, out)
        written, expected = (parameters(type(model), path) for path in (out, tmp_path / base))
        assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_a_head_that_base_ties_is_its_embedding_where_tuned_has_its_own(tmp_path):
    make("llama", 0, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    make("llama", 1).save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    assert pair.tensors["lm_head.weight"] == "model.embed_tokens.weight"
    interpolate(tmp_path / "base", tmp_path / "tuned", 0.0, tmp_path / "out")
    ids = torch.arange(3, 12)[None]
    written, expected = (open_model(tmp_path / side).model(ids).logits for side in ("out", "base"))
    assert torch.equal(written, expected)


def test_a_head_that_only_tuned_ties_leaves_no_model_between(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    make("llama", 1, tie_word_embeddings=True).save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(NotApplicableError, match=r"1 tensor of base that tuned lacks, .*lm_head\.weight"):
        write_blend(pair, tmp_path / "out", 0.0)


# ------------------------------------------------------------------------------- tensors of other shapes


def saved(directory, family, seed=0, **settings):
    make(family, seed, **settings).save_pretrained(directory)
    return directory


OTHER_SHAPES = {
    "eight experts to six": (
        ("mixtral", {"num_experts": 8, "num_local_experts": 8}),
        ("mixtral", {"num_experts": 6, "num_local_experts": 6}),
    ),
    "dense to a mixture": (("llama", {}), ("mixtral", {})),
    "a wider MLP": (("llama", {}), ("llama", {"intermediate_size": 32})),
    "a layer less": (("llama", {"num_hidden_layers": 3}), ("llama", {})),
    "a layer more": (("llama", {}), ("llama", {"num_hidden_layers": 3})),
    "fewer heads for keys": (("llama", {}), ("llama", {"num_key_value_heads": 1})),
    "norms of queries": (("llama", {}), ("qwen3", {})),
    "longer positions": (("gpt2", {}), ("gpt2", {"n_positions": 48})),
}


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_nothing_stands_in_for_tensors_that_base_has_otherwise_or_not_at_all(case, tmp_path):
    (first, of_base), (second, of_tuned) = OTHER_SHAPES[case]
    base, tuned = saved(tmp_path / "base", first, **of_base), saved(tmp_path / "tuned", second, 1, **of_tuned)
    pair = CheckpointPair(base, tuned)
    problem = pair.between_problem()
    assert problem is not None
    assert re.search(r"(of another shape|that base lacks|that tuned lacks).*, such as [\w.]+", problem)
    assert "\n" not in problem
    patch = Patch.of(pair, {})
    for attempt in (
        lambda: write_blend(pair, tmp_path / "out", 0.0),
        lambda: write_graft(pair, patch, tmp_path / "out"),
        lambda: TwoSidedModel(pair),
    ):
        # Where it would run, the configurations are compared first, and these differ too.
        with pytest.raises(InputError, match=r"no model lies between the two|differ in .* does not run"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_new_task_head_is_tuneds_at_either_end(tmp_path):
    torch.manual_seed(0)
    base = saved(tmp_path / "base", "bert")
    config = transformers.AutoConfig.from_pretrained(base)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(base, tmp_path / "tuned")
    assert pair.between_problem() is None
    done = interpolate(base, tmp_path / "tuned", 0.0, tmp_path / "out")
    assert "4 tensors that base lacks come from tuned" in done.notes[0]  # pooler and classifier
    assert pair.compared < 1


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("rows", [44, 38])
def test_of_a_resized_vocabulary_the_logits_of_bases_tokens_are_bases(family, rows, tmp_path):
    base = make(family, 0)
    tuned = make(family, 1)
    tuned.resize_token_embeddings(rows, mean_resizing=False)
    before = base.config.vocab_size
    for model, side in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / side)
    done = interpolate(tmp_path / "base", tmp_path / "tuned", 0.0, tmp_path / "out")
    assert any(f"went from {before} to {rows} rows" in note for note in done.notes)
    ids = torch.arange(3, 12)[None]
    common = min(rows, before)
    written, expected = (open_model(tmp_path / side).model(ids).logits for side in ("out", "base"))
    # The width of the head's product differs, and with it the order of sums.
    assert torch.allclose(written[..., :common], expected[..., :common], atol=1e-6)
    with TwoSidedModel(CheckpointPair(tmp_path / "base", tmp_path / "tuned")) as two_sided:
        two_sided.become("base")
        assert torch.allclose(two_sided.model(ids).logits[..., :common], expected[..., :common], atol=1e-6)


def test_an_audit_skips_what_needs_a_model_between_and_says_why(tmp_path):
    from diagnostics import interpolation_path
    from probes.text.rows import task_of

    base = saved(tmp_path / "base", "llama")
    tuned = saved(tmp_path / "tuned", "llama", 1, intermediate_size=32)
    problem = CheckpointPair(base, tuned).between_problem()
    assert problem is not None
    assert re.search(r"6 tensors of another shape, such as .*16x28 in base, 16x32 in tuned", problem)
    with pytest.raises(NotApplicableError, match=r"differ in (?:more than values|intermediate_size)"):
        interpolation_path(CheckpointPair(base, tuned), task_of(["a text", "another"]))


def test_weights_of_the_file_that_edits_would_miss_are_refused(tmp_path, monkeypatch):
    from probes.models import editable

    saved(tmp_path / "model", "llama")
    aligned = editable.shared_tensors

    def without_norms(*sides):
        return {name: other for name, other in aligned(*sides).items() if "norm" not in name}

    monkeypatch.setattr(editable, "shared_tensors", without_norms)
    with pytest.raises(InputError, match=r"layers\.0\.input_layernorm\.weight .* not found in the file"):
        editable.Editable(CheckpointPair(tmp_path / "model", tmp_path / "model").base)
