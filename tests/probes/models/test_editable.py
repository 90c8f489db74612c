"""A model whose weights are replaced for a while computes what the file with these weights would."""

import warnings

import pytest
import torch

from probes.checkpoints.opening import open_checkpoint
from probes.models.editable import Editable
from tests.probes.runnable import batch_of, make, state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "olmoe", "mixtral", "gpt_oss"])
def saved(request, tmp_path):
    """Two models of a family in files."""
    for seed, name in enumerate(("first", "second")):
        make(request.param, seed).save_pretrained(tmp_path / name)
    return tmp_path / "first", open_checkpoint(tmp_path / "second")


def test_with_every_tensor_of_another_model_it_is_that_model_and_afterwards_itself(saved):
    first, second = saved
    editable = Editable(open_checkpoint(first))
    before = tensors_of(editable.model)
    with editable.holding(editable.checkpoint.headers, lambda name, _: second.tensor(name)) as model:
        inside = tensors_of(model)
    assert same(inside, tensors_of(Editable(second).model))
    assert not same(inside, before)
    assert same(tensors_of(editable.model), before)


def test_one_matrix_changes_and_no_other(saved):
    first, second = saved
    editable = Editable(open_checkpoint(first))
    changed = [m.tensor for m in editable.checkpoint.matrices.values() if m.component == "down_proj"][-1]
    before = tensors_of(editable.model)
    with editable.holding([changed], lambda name, _: second.tensor(name)) as model:
        inside = tensors_of(model)
        seen = open_checkpoint(model)
        assert torch.equal(seen.tensor(changed), second.tensor(changed))
    moved = sum(int((inside[name] != before[name]).sum()) for name in before)
    assert moved == second.headers[changed].entries
    assert same(tensors_of(editable.model), before)


@pytest.mark.parametrize("when", ["while it is read", "inside"])
def test_it_is_bit_for_bit_as_it_was_after_an_exception(saved, when):
    first, _ = saved
    editable = Editable(open_checkpoint(first))
    before = tensors_of(editable.model)
    names = list(editable.checkpoint.headers)

    def change(name, stored):
        if when != "inside" and name == names[3]:
            raise KeyError("stopped")
        return stored + 1

    with pytest.raises(KeyError, match="stopped"), editable.holding(names, change):
        raise KeyError("stopped")
    assert same(tensors_of(editable.model), before)


def test_a_change_is_rounded_to_the_dtype_of_the_file(tmp_path):
    make("llama").bfloat16().save_pretrained(tmp_path)
    editable = Editable(open_checkpoint(tmp_path), dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    with editable.holding([name], lambda name, stored: stored.double() + 1e-3) as model:
        held = model.state_dict()[name]
        expected = (editable.checkpoint.tensor(name).double() + 1e-3).bfloat16().float()
        assert held.dtype == torch.float32
        assert torch.equal(held, expected)


def adapted(tmp_path, **config):
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (p for p in peft.parameters() if p.requires_grad):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4 + (tensor.ndim == 1))
    peft.save_pretrained(tmp_path / "adapter")
    return peft.eval()


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"modules_to_save": ["v_proj"]}])
def test_an_adapter_is_its_merged_weights(tmp_path, config):
    peft = adapted(tmp_path, **config)
    editable = Editable(open_checkpoint(tmp_path / "adapter", base=str(tmp_path / "base")))
    for name in editable.checkpoint.headers:
        assert torch.equal(editable.model.state_dict()[name], editable.checkpoint.tensor(name))
    ids = batch_of(6, 9).ids
    with torch.no_grad():
        torch.testing.assert_close(editable.model(ids).logits, peft(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_model_in_memory_is_copied_and_never_written_to(tmp_path):
    for given in (make("llama"), adapted(tmp_path)):
        before = state_of(given)
        editable = Editable(open_checkpoint(given))
        with editable.holding(editable.checkpoint.headers, lambda name, stored: stored * 2):
            pass
        after = state_of(given)
        assert all(torch.equal(before[0][name][0], tensor) for name, (tensor, *_) in after[0].items())
        assert before[0].keys() == after[0].keys()
        assert before[1].keys() == after[1].keys()
