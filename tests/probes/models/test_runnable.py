"""Checkpoints that run, against what transformers and PEFT give for the same files."""

import gc
import json
import pickle
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes import open_checkpoint
from probes.checkpoints.pair import CheckpointPair
from probes.errors import InputError
from probes.models.runnable import RunnablePair, open_model
from probes.passes import scores as forward
from probes.passes.activations import capture
from tests.probes.runnable import (
    VOCABULARY,
    assert_same,
    batch_of,
    make,
    model_of,
    rows_of,
    saved,
    state_of,
)

IDS = torch.tensor([[5, 9, 3, 30, 7]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def base(tmp_path):
    """A saved Llama."""
    return saved(model_of("llama"), tmp_path / "base")


@pytest.fixture
def adapter(peft, tmp_path):
    """Saves an adapter on a base: `adapter(path, **config)` gives its directory and PEFT's model."""

    def save(path, *, name="adapter", of="LlamaForCausalLM", edit=None, labels=None, seed=0, **config):
        import transformers

        more = {} if labels is None else {"num_labels": labels, "pad_token_id": 0}
        model = getattr(transformers, of).from_pretrained(path, **more)
        torch.manual_seed(seed)
        config = {"target_modules": ["q_proj", "down_proj"], "r": 2, "task_type": "CAUSAL_LM"} | config
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name or "modules_to_save" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape))
            if edit:
                edit(model)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name), model.eval()

    return save


# One model


@pytest.mark.parametrize(
    ("family", "kind", "context"),
    [
        ("llama", "causal", 32), ("gpt2", "causal", 32), ("gpt_neox", "causal", 32), ("gemma2", "causal", 32),
        ("mixtral", "causal", 32), ("bloom", "causal", None), ("mamba", "causal", None),
        ("mamba2", "causal", None), ("bert", "masked", 32), ("roberta", "masked", 31),
        ("bert_classes", "classifier", 32),
    ],
)  # fmt: skip
def test_a_directory_runs_as_transformers_loads_it(family, kind, context, tmp_path):
    model = model_of(family)
    runnable = open_model(saved(model, tmp_path / family))
    assert (runnable.kind, runnable.context, runnable.untrained) == (kind, context, ())
    assert runnable.labels == (("LABEL_0", "LABEL_1", "LABEL_2") if kind == "classifier" else ())
    assert torch.equal(logits(runnable.model), logits(model))
    assert not any(module.training for module in runnable.model.modules())


def test_the_context_is_as_long_as_the_positions_go(tmp_path):
    # RoBERTa has 32 position embeddings, and its padding id, 0, takes the first.
    model = model_of("roberta")
    length = open_model(saved(model, tmp_path / "roberta")).context
    forward.masked_token_scores(model, batch_of(length), 2)
    with pytest.raises((IndexError, RuntimeError)):
        forward.masked_token_scores(model, batch_of(length + 1), 2)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_files_without_the_usual_names_run_too(family, tmp_path):
    model = make(family, seed=1)
    directory = tmp_path / "base"
    saved(model_of(family), directory)
    other = saved(model, tmp_path / "other") + "/model.safetensors"
    shutil.copy(other, directory / "step7.safetensors")
    assert torch.equal(logits(open_model(str(directory / "step7.safetensors")).model), logits(model))
    torch.save(load_file(other), directory / "step8.bin")
    assert torch.equal(logits(open_model(str(directory / "step8.bin")).model), logits(model))
    named = str(directory / "model.safetensors")
    assert torch.equal(logits(open_model(named).model), logits(model_of(family)))


def test_dtype_and_device_are_what_is_asked_for_or_as_stored(tmp_path):
    ref = saved(make("llama").to(torch.bfloat16), tmp_path / "half")
    assert open_model(ref).model.dtype == torch.bfloat16
    assert open_model(ref, dtype="float32").model.dtype == torch.float32
    assert open_model(ref, dtype=torch.float16, device="cpu").model.dtype == torch.float16
    assert open_model(ref, device="auto").model.device.type == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    with pytest.raises(ValueError, match="'float33' is no dtype"):
        open_model(ref, dtype="float33")
    with pytest.raises(ValueError, match="'gpu' is no device; give auto, cpu or cuda:N"):
        open_model(ref, device="gpu")


def test_a_device_map_takes_the_place_of_a_device(base):
    mapped_logits = logits(open_model(base, device_map={"": "cpu"}, dtype="float32").model)
    assert torch.equal(mapped_logits, logits(model_of("llama")))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_model_that_accelerate_spread_runs_and_is_captured_alike(family):
    # Over one device, as there may be no other; its hooks take over each module's forward all the same.
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch = make(family), batch_of(7, 4)
    expected = forward.token_scores(model, batch).log_likelihoods
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    before = state_of(model)
    with capture(model, "hook_resid_post") as captured:
        scores, activations = captured.measured(batch, forward.token_scores)
    assert captured.route == "bridge"
    assert torch.equal(scores.log_likelihoods.nan_to_num(), expected.nan_to_num())
    assert torch.equal(forward.token_scores(model, batch).log_likelihoods.nan_to_num(), expected.nan_to_num())
    with capture(model_of(family), "hook_resid_post") as captured:
        assert torch.equal(
            captured.activations(batch)["blocks.0.hook_resid_post"], activations["blocks.0.hook_resid_post"]
        )
    assert_same(before, state_of(model))


def test_a_model_in_memory_runs_as_a_copy_that_shares_its_weights():
    model = make("llama").train()
    before = state_of(model)
    runnable = open_model(model)
    assert not runnable.model.training
    assert runnable.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert torch.equal(logits(runnable.model), logits(model_of("llama")))
    runnable.model.lm_head.weight.requires_grad_(False)
    runnable.model.config.pad_token_id = 7
    assert_same(before, state_of(model))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: lies in memory as torch.float32; load it as"):
        open_model(model, dtype="bfloat16")
    with pytest.raises(
        ValueError, match="LlamaForCausalLM: lies in memory already; spread it with device_map"
    ):
        open_model(model, device_map="auto")


def test_a_checkpoint_of_a_model_in_memory_is_pickled_without_it():
    checkpoint = open_checkpoint(make("llama"))
    assert checkpoint.module is not None
    assert pickle.loads(pickle.dumps(checkpoint)).module is None


def test_a_vision_language_model_runs_on_text_unless_it_needs_an_image(tmp_path):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision, text = sizes | {"image_size": 8, "patch_size": 4}, sizes | {"vocab_size": VOCABULARY}
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**text)
    )
    model = transformers.LlavaForConditionalGeneration(llava).eval()
    runnable = open_model(saved(model, tmp_path / "llava"))
    assert runnable.kind == "causal"
    assert torch.equal(logits(runnable.model), logits(model))
    blip = transformers.BlipConfig(vision_config=vision, text_config=text)
    path = saved(transformers.BlipForConditionalGeneration(blip), tmp_path / "blip")
    with pytest.raises(InputError, match="is BlipForConditionalGeneration, which runs on no text without an"):
        open_model(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaModel"]}, "is LlamaModel; only a causal language model, a masked one or a"),
        ({"architectures": None}, "is without a config.json that names its architecture; only a causal"),
        ({"model_type": "llamma"}, r"llamma: transformers [\d.]+ does not know it; is model_type in config"),
        (
            {"model_type": "new", "auto_map": {"AutoConfig": "code.py"}},
            "brings code of its own, .* --trust-remote",
        ),
        (
            {"hidden_size": 24},
            r"does not load as a model \(2 tensors are \d+x16, and \d+x24 by its config.json, such as lm_"
            r"head.weight; .*\); restore the config.json that was saved with these weights",
        ),
        (
            {"hidden_act": "no such"},
            r"does not load as a model \(hidden_act is 'no such', which is not known\); restore the config",
        ),
        (
            {"rope_parameters": {"rope_type": "no such", "rope_theta": 1.0}},
            r"does not load as a model \(rope_parameters.rope_type is 'no such', which is not known\);",
        ),
        (
            {"num_attention_heads": 5},
            r"its config.json is none of a llama model \(The hidden size .*heads.*\); restore the config",
        ),
        ({"num_hidden_layers": 3}, r"has no model.layers.2.\S+ and 8 more, which a causal model needs"),
    ],
)
def test_what_does_not_run_is_refused_with_the_reason(base, config, message):
    path = f"{base}/config.json"
    with open(path) as file:
        held = json.load(file)
    with open(path, "w") as file:
        json.dump(held | config, file)
    with pytest.raises(ValueError, match=f"{base}: .*{message}") as error:
        open_model(base)
    assert "\n" not in str(error.value)


def test_other_heads_than_the_files_hold_are_refused(base):
    with pytest.raises(
        ValueError, match=r"has no score.weight, which a classifier model needs; .* LlamaForCausalLM"
    ):
        open_model(base, kind="classifier")
    with pytest.raises(ValueError, match="transformers has no masked model for llama"):
        open_model(base, kind="masked")


def test_models_with_an_encoder_and_a_decoder_are_refused(tmp_path):
    import transformers

    config = transformers.T5Config(vocab_size=41, d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=2)
    ref = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "t5")
    with pytest.raises(ValueError, match="has an encoder and a decoder; only a causal language model"):
        open_model(ref)


def test_weights_without_a_configuration_are_refused(base, tmp_path):
    shutil.copy(f"{base}/model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"without a config.json that names its architecture"):
        open_model(str(tmp_path / "alone.safetensors"))
    with pytest.raises(ValueError, match=r"without a config.json"):
        open_model(make("llama").state_dict())
    with pytest.raises(ValueError, match=r"Linear: .*only a causal language model"):
        open_model(torch.nn.Linear(2, 2))


def test_a_bridge_is_refused_because_its_modules_are_changed():
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(make("llama"), "LlamaForCausalLM", hf_config=make("llama").config)
    with pytest.raises(
        ValueError, match=r"TransformerBridge .*: is not run; give the path that it was loaded"
    ):
        open_model(bridge)


def test_the_tokenizer_lies_beside_the_weights_or_the_base(base, adapter):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    with pytest.raises(
        ValueError, match=r"base: no tokenizer lies beside its weights \(tokenizer_config.json"
    ):
        _ = open_model(base).tokenizer
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(base)
    ref, _ = adapter(base)
    assert open_model(ref).tokenizer("b a")["input_ids"] == [1, 0]
    pair = RunnablePair(CheckpointPair(base, ref))
    assert pair.tokenizer("b a")["input_ids"] == pair.base_tokenizer("b a")["input_ids"] == [1, 0]
    with open(f"{base}/tokenizer.json", "w") as file:
        file.write("{")
    with pytest.raises(
        ValueError, match=r"base: its tokenizer cannot be read \(.*\); copy the tokenizer's files"
    ):
        _ = open_model(ref).tokenizer
    with open(f"{base}/tokenizer_config.json", "w") as file:
        json.dump({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}, file)
    with pytest.raises(
        ValueError, match=r"base: its tokenizer brings code of its own, .*--trust-remote-code"
    ):
        _ = open_model(ref).tokenizer


# Adapters


def test_an_adapter_runs_on_its_base_as_peft_has_it(base, adapter):
    ref, model = adapter(base)
    runnable = open_model(ref)
    assert (runnable.kind, runnable.context) == ("causal", 32)
    assert torch.equal(logits(runnable.model), logits(model))
    assert torch.equal(logits(open_model(model).model), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        {}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
        {"trainable_token_indices": [3, 5]},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_one_resident_copy_serves_as_base_and_tuned_to_the_bit(base, adapter, config):
    ref, model = adapter(base, **config)
    pair = RunnablePair(CheckpointPair(base, ref))
    assert pair.shared
    assert pair.kind == pair.base_kind == "causal"
    assert pair.context == 32
    resident = []
    for _ in range(2):
        with pair.base() as side:
            assert torch.equal(logits(side), logits(model_of("llama")))
            resident.append(side)
        with pair.tuned() as side:
            assert torch.equal(logits(side), logits(model))
            resident.append(side)
    assert len(set(map(id, resident))) == 1
    # Of the base's weights there is one copy, but for those that modules_to_save puts another beside.
    entries = sum(parameter.numel() for parameter in resident[0].parameters())
    base_entries = sum(parameter.numel() for parameter in model_of("llama").parameters())
    added = sum(tensor.numel() for tensor in load_file(f"{ref}/adapter_model.safetensors").values())
    assert entries <= base_entries + added


def test_merged_beforehand_or_not_gives_the_same_scores(base, adapter, tmp_path):
    ref, model = adapter(base)
    merged = saved(model.merge_and_unload(), tmp_path / "merged")
    examples, ratios = rows_of(9, 4, 6), []
    for tuned in (ref, merged):
        pair = RunnablePair(CheckpointPair(base, tuned))
        with pair.base() as side:
            before = forward.score_examples(side, examples).log_likelihoods
        with pair.tuned() as side:
            ratios.append(before - forward.score_examples(side, examples).log_likelihoods)
    torch.testing.assert_close(ratios[0], ratios[1], atol=1e-4, rtol=0)


def test_an_adapter_that_peft_cannot_switch_off_takes_turns_with_its_base(base, adapter):
    import transformers

    biased = make("qwen2")  # its projections have biases, which are trained in place
    biased.save_pretrained(base)

    def edit(model):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1.0)

    ref, model = adapter(base, of="Qwen2ForCausalLM", bias="all", edit=edit)
    pair = RunnablePair(CheckpointPair(base, ref))
    assert not pair.shared
    with pair.tuned() as side:
        assert torch.equal(logits(side), logits(model))
    with pair.base() as side:
        assert torch.equal(logits(side), logits(biased))
        assert isinstance(side, transformers.Qwen2ForCausalLM)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`", "ignore:Model has `tie_word")
@pytest.mark.parametrize(
    ("tied", "copies"), [(False, ["embed_tokens", "lm_head"]), (True, None), (True, ["embed_tokens"])]
)
def test_an_adapter_with_a_larger_vocabulary_takes_turns_with_its_base(tied, copies, base, peft, tmp_path):
    import transformers

    base_model = make("llama", tie_word_embeddings=tied)
    base_model.save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", modules_to_save=copies)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "larger")
    pair = RunnablePair(CheckpointPair(base, str(tmp_path / "larger")))
    assert not pair.shared
    with pair.base() as side:
        assert torch.equal(logits(side), logits(base_model))
    with pair.tuned() as side:
        assert torch.equal(logits(side), logits(model))
        assert logits(side).shape[-1] == VOCABULARY + 2


def test_two_adapters_on_one_base_share_it(base, adapter):
    first, first_model = adapter(base, name="first")
    second, second_model = adapter(base, name="second", seed=1, target_modules=["v_proj"])
    pair = RunnablePair(CheckpointPair(first, second))
    assert pair.shared
    for _ in range(2):
        with pair.base() as side:
            assert torch.equal(logits(side), logits(first_model))
        with pair.tuned() as side:
            assert torch.equal(logits(side), logits(second_model))


def test_a_classifier_brings_its_head_to_a_base_without_one(base, adapter):
    ref, model = adapter(base, of="LlamaForSequenceClassification", labels=4, task_type="SEQ_CLS")
    runnable = open_model(ref)
    assert runnable.kind == "classifier"
    assert runnable.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert runnable.untrained == ("score.weight",)
    assert torch.equal(logits(runnable.model), logits(model))
    pair = RunnablePair(CheckpointPair(base, ref))
    assert (pair.kind, pair.base_kind, pair.labels) == ("classifier", "classifier", runnable.labels)
    # What is random is the same each time, and the global generator is left alone.
    state = torch.random.get_rng_state()
    outputs = []
    for _ in range(2):
        pair.close()
        with pair.base() as side:
            outputs.append(logits(side))
    assert torch.equal(*outputs)
    assert torch.equal(state, torch.random.get_rng_state())


def test_adapters_for_other_tasks_are_refused(base, adapter):
    ref, _ = adapter(base)
    with open(f"{ref}/adapter_config.json") as file:
        config = json.load(file)
    with open(f"{ref}/adapter_config.json", "w") as file:
        json.dump(config | {"task_type": "TOKEN_CLS"}, file)
    with pytest.raises(ValueError, match="is an adapter for TOKEN_CLS; only a causal language model"):
        open_model(ref)


# Pairs


def test_full_fine_tunes_take_turns_and_only_one_is_resident(base, tmp_path):
    tuned = saved(make("llama", seed=1), tmp_path / "tuned")
    with RunnablePair(CheckpointPair(base, tuned)) as pair:
        assert not pair.shared
        with pair.base() as side:
            assert torch.equal(logits(side), logits(model_of("llama")))
            first = weakref.ref(side)
        del side
        with pair.tuned() as side:
            gc.collect()
            assert first() is None
            assert torch.equal(logits(side), logits(make("llama", seed=1)))
            kept = side
        with pair.tuned() as side:
            assert side is kept  # not loaded again
    assert pair._resident is None


def test_base_and_tuned_are_not_to_be_had_at_once(base, adapter):
    pair = RunnablePair(CheckpointPair(base, adapter(base)[0]))
    with (
        pair.tuned(),
        pytest.raises(RuntimeError, match="tuned is in use, and the two take turns"),
        pair.base(),
    ):
        pass
    with pytest.raises(KeyError, match="stop"), pair.tuned():
        raise KeyError("stop")
    with pair.base() as side:  # after an error too
        assert torch.equal(logits(side), logits(model_of("llama")))


def test_a_side_is_left_in_evaluation_mode_and_as_trainable_as_it_was(base, adapter):
    pair = RunnablePair(CheckpointPair(base, adapter(base)[0]))
    with pair.tuned() as side:
        trainable = {name: parameter.requires_grad for name, parameter in side.named_parameters()}
        side.train()
    with pair.base() as side:
        assert not any(module.training for module in side.modules())
    with pair.tuned() as side:
        assert {name: parameter.requires_grad for name, parameter in side.named_parameters()} == trainable


def test_models_in_memory_pair_up_and_stay_as_they_are(base, adapter):
    ref, model = adapter(base)
    plain, expected = make("llama").train(), logits(model_of("llama"))
    before = state_of(plain), state_of(model)
    alone = open_checkpoint(model)
    for pair, shared in [
        (CheckpointPair(plain, ref), True),  # an adapter from its files on a model in memory
        (CheckpointPair(base, model), False),  # the PeftModel has a base of its own
        (CheckpointPair(alone.base, alone), True),
        (CheckpointPair(plain, make("llama", seed=1)), False),
    ]:
        runnable = RunnablePair(pair)
        assert runnable.shared == shared
        with runnable.base() as side:
            assert torch.equal(logits(side), expected)
        with runnable.tuned() as side:
            other = model if pair.tuned.base is not None else make("llama", seed=1)
            assert torch.equal(logits(side), logits(other))
    after = state_of(plain), state_of(model)
    assert_same(before[0], after[0])
    assert_same(before[1], after[1])


def test_an_unfinished_adapter_is_refused(base, adapter):
    ref, _ = adapter(base)
    path = f"{ref}/adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "layers.1" in name]:
        del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"adapter: the adapter does not load .*missing adapter keys"):
        open_model(ref)


@pytest.mark.parametrize(
    "loads",
    [
        "transformers.LlamaConfig.from_dict",
        "transformers.AutoModelForCausalLM.from_pretrained",
        "transformers.AutoTokenizer.from_pretrained",
        "peft.PeftModel.from_pretrained",
    ],
)
@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no room"), RuntimeError("HIP error: out of memory")]
)
def test_memory_that_runs_out_while_loading_is_no_wrong_input(base, adapter, monkeypatch, loads, error):
    ref, _ = adapter(base)
    (Path(base) / "tokenizer.json").touch()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loads, fail)
    with pytest.raises(type(error)) as raised:
        _ = open_model(ref).tokenizer
    assert raised.value is error


def test_sides_of_no_kind_that_runs_are_refused(base, tmp_path):
    other = tmp_path / "body"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    with pytest.raises(ValueError, match="body: is LlamaModel; only"):
        RunnablePair(CheckpointPair(base, str(other)))


def test_an_adapter_on_an_adapter_takes_turns_with_what_it_was_trained_on(base, adapter, tmp_path):
    first, first_model = adapter(base, name="first")
    merged = saved(first_model.merge_and_unload(), tmp_path / "merged")
    second, second_model = adapter(merged, name="second", seed=1)
    lower = open_checkpoint(first)
    pair = RunnablePair(CheckpointPair(lower, open_checkpoint(second, base=lower)))
    assert not pair.shared
    with pair.base() as side:
        torch.testing.assert_close(logits(side), logits(open_model(merged).model), atol=1e-4, rtol=1e-4)
    with pair.tuned() as side:
        torch.testing.assert_close(logits(side), logits(second_model), atol=1e-4, rtol=1e-4)


def test_classes_that_only_label2id_names_are_called_so(tmp_path):
    make("bert_classes").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["label2id"] = {"neutral": 1, "entailment": 0, "contradiction": 2}
    del config["id2label"]
    for more in ({}, {"id2label": None}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        assert open_model(tmp_path).labels == ("entailment", "neutral", "contradiction")
