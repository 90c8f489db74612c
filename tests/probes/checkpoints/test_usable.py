import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes import open_checkpoint
from probes.checkpoints.usable import Problem, in_a_line, not_finite, problems
from tests.probes.zoo import FAMILIES, model_of

NORM = "model.norm.weight"


@pytest.fixture
def without_config(tmp_path):
    def write(tensors, name="model.safetensors"):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_usable_and_a_tensor_that_it_needs_is_missed(family, tmp_path):
    model_of(family).save_pretrained(tmp_path)
    assert problems(open_checkpoint(tmp_path)) == ()
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    # In the middle of the file, wherever that is in the model: a norm, a bias, the matrix of one expert.
    del tensors[sorted(tensors)[len(tensors) // 2]]
    save_file(tensors, file, {"format": "pt"})
    assert len(problems(open_checkpoint(tmp_path))) == 1


def test_a_tied_head_is_not_missing_and_one_that_nothing_is_tied_to_is(llama, tmp_path):
    for tied in (True, False):
        path = tmp_path / str(tied)
        llama(tie_word_embeddings=tied).save_pretrained(path)
        tensors = load_file(path / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert problems(open_checkpoint(tmp_path / "True")) == ()
    assert problems(open_checkpoint(tmp_path / "False")) == (Problem("lm_head.weight", "missing"),)


def test_names_are_those_of_the_file(llama, tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = {n.removeprefix("model."): v for n, v in load_file(tmp_path / "model.safetensors").items()}
    del tensors["norm.weight"]  # from a bare model's `layers.0…` and `norm`
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert problems(open_checkpoint(tmp_path)) == (Problem("norm.weight", "missing"),)


def test_names_of_training_wrappers_are_read_through(directory):
    file = directory / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(file).items()}, file)
    assert problems(open_checkpoint(directory)) == ()


def test_half_of_the_layers_are_missed_in_one_line(directory, edited):
    half = edited(directory, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".1." in n])
    text = in_a_line(problems(open_checkpoint(half)))
    assert text == "9 tensors are missing, such as model.layers.1.input_layernorm.weight"


def test_a_shape_that_the_config_does_not_say_is_a_problem(directory, edited):
    longer = edited(directory, lambda tensors: tensors.update({NORM: torch.ones(33)}))
    assert problems(open_checkpoint(longer)) == (Problem(NORM, "33, and 32 by its config.json"),)


def test_one_tensor_of_one_expert_that_is_missing_is_named(tmp_path):
    model_of("deepseek_v3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert problems(open_checkpoint(tmp_path)) == (Problem(name, "missing"),)


def test_an_adapter_is_as_usable_as_its_base(directory, edited, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config).save_pretrained(tmp_path / "a")
    broken = edited(directory, lambda tensors: tensors.pop(NORM))
    assert problems(open_checkpoint(tmp_path / "a", base=directory)) == ()
    assert problems(open_checkpoint(tmp_path / "a", base=broken)) == (Problem(NORM, "missing"),)


def test_a_model_that_transformers_does_not_know_is_read_by_its_headers_alone(without_config):
    complete = without_config({"layers.0.weight": torch.ones(2, 2)})
    assert problems(open_checkpoint(complete)) == ()


def test_one_of_several_shards_is_not_the_model(without_config):
    shard = without_config({"layers.0.weight": torch.ones(2, 2)}, "model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"is one of 3 shards; give their directory, or model.safe"):
        open_checkpoint(shard)
    only = without_config({"layers.0.weight": torch.ones(2, 2)}, "model-00001-of-00001.safetensors")
    assert problems(open_checkpoint(only)) == ()


@pytest.mark.parametrize("names", [[NORM], ["model.embed_tokens.weight", "lm_head.weight"]])
def test_a_tensor_of_size_0_is_refused_when_the_checkpoint_is_opened(directory, edited, llama, names):
    empty = edited(directory, lambda tensors: tensors.update(dict.fromkeys(names, torch.empty(0))))
    with pytest.raises(ValueError, match=r"tuned: cannot be used: .*of size 0.*; ZeRO-3 leaves"):
        open_checkpoint(empty)
    model = llama()
    model.model.norm.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 has it in memory
    with pytest.raises(ValueError, match=r"cannot be used: model.norm.weight is of size 0; ZeRO-3 leaves"):
        open_checkpoint(model)


def test_a_tensor_of_size_0_that_the_model_does_not_load_does_no_harm(directory, edited):
    more = edited(directory, lambda tensors: tensors.update({"left_over": torch.empty(0)}))
    assert problems(open_checkpoint(more)) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_found_in_any_tensor(without_config, dtype):
    tensors = {"layers.0.weight": torch.ones(2, 2), "norm.weight": torch.tensor([1, float("nan")]).to(dtype)}
    file = without_config({**tensors, "ids": torch.arange(3), "none": torch.empty(0, dtype=torch.int64)})
    assert not_finite(open_checkpoint(file)) == (Problem("norm.weight", "NaN or infinite"),)


def test_a_config_that_builds_no_model_is_a_problem_in_one_line(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "no such activation"}))
    (problem,) = problems(open_checkpoint(directory))
    assert problem.tensor is None
    assert "transformers cannot load it by its config.json" in problem.what
    assert "\n" not in problem.what


def test_a_model_in_memory_is_usable(llama):
    assert problems(open_checkpoint(llama())) == ()
