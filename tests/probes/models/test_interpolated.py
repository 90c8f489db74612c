"""A model anywhere on the line between base and tuned, each layer at a place of its own, and back."""

import pytest
import torch

from probes.checkpoints.pair import CheckpointPair
from probes.models.interpolated import InterpolatedModel, layers_of
from probes.models.two_sided import TwoSidedModel
from tests.probes.runnable import LAYERS, make, model_of

FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen2", "opt", "bloom", "bert", "olmoe", "mixtral", "llama_classes"]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def interpolated():
    base, tuned = make("llama", 0), make("llama", 1)
    with TwoSidedModel(CheckpointPair(base, tuned)) as two_sided:
        yield InterpolatedModel(two_sided), base, tuned


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_lies_in_exactly_one_layer(family):
    model = model_of(family)
    layers = layers_of(model)
    assert [layer.index for layer in layers] == list(range(-1, LAYERS + 1))
    held = [id(parameter) for layer in layers for parameter in layer.parameters]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    assert embeddings <= {id(parameter) for parameter in layers[0].parameters}


def test_norms_behind_the_blocks_and_a_head_of_its_own_are_the_heads():
    def inside(family):
        model = model_of(family)
        head = {id(parameter) for parameter in layers_of(model)[-1].parameters}
        return {name for name, parameter in model.named_parameters() if id(parameter) in head}

    assert inside("llama") == {"model.norm.weight", "lm_head.weight"}
    assert inside("gpt2") == {"transformer.ln_f.weight", "transformer.ln_f.bias"}  # its head is tied
    assert {"model.decoder.final_layer_norm.weight", "model.decoder.project_out.weight"} <= inside("opt")


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe"])
def test_tensors_are_given_to_the_layer_that_they_run_in(family):
    with TwoSidedModel(CheckpointPair(make(family, 0), make(family, 1))) as two_sided:
        layers = InterpolatedModel(two_sided).layers
        given = [name for layer in layers for name in layer.tensors]
        assert sorted(given) == sorted(two_sided.headers)
        for layer in layers[1:-1]:
            assert all(f".{layer.index}." in name for name in layer.tensors)


def test_the_ends_are_the_checkpoints_bit_for_bit_with_negative_zeros_and_all():
    base, tuned = make("llama", 0), make("llama", 1)
    with torch.no_grad():
        base.model.norm.weight[:3] = torch.tensor([-0.0, 1e-42, 3e38])
        tuned.model.norm.weight[:3] = torch.tensor([5.0, -0.0, 1.0])
    with TwoSidedModel(CheckpointPair(base, tuned)) as two_sided:
        interpolated = InterpolatedModel(two_sided)
        for alpha in (0.3, 0.0, 0.7, 1.0, 0.0):
            interpolated.set_alpha(alpha)
            if alpha in (0.0, 1.0):
                end = (base, tuned)[int(alpha)].state_dict()
                for name, value in two_sided.model.state_dict().items():
                    assert torch.equal(value.view(torch.int32), end[name].view(torch.int32)), name


def test_between_the_ends_it_is_the_blend_in_float64_rounded_once(interpolated):
    interpolated, base, tuned = interpolated
    interpolated.set_alpha(0.3)
    for name, value in interpolated.model.state_dict().items():
        base_value, tuned_value = (side.state_dict()[name].double() for side in (base, tuned))
        assert torch.equal(value, (base_value + 0.3 * (tuned_value - base_value)).float()), name


def test_a_layer_stands_where_it_is_told_and_the_others_where_they_are(interpolated):
    interpolated, base, tuned = interpolated
    interpolated.set_alpha(1.0, {0: 0.0})
    for name, value in interpolated.model.state_dict().items():
        side = base if ".layers.0." in name else tuned
        assert torch.equal(value, side.state_dict()[name]), name
    interpolated.set_alpha(0.0, {-1: 1.0, 2: 1.0})
    for name, value in interpolated.model.state_dict().items():
        side = base if ".layers." in name else tuned
        assert torch.equal(value, side.state_dict()[name]), name
    interpolated.set_alpha(1.0)
    assert same(tuned.state_dict(), interpolated.model.state_dict())


def test_displacement_is_the_norm_of_the_delta_and_of_base(interpolated):
    interpolated, base, tuned = interpolated
    moved, size = interpolated.displacement(interpolated.layers[1])
    names = [name for name in base.state_dict() if ".layers.0." in name]
    base_value, tuned_value = (
        torch.cat([side.state_dict()[n].double().flatten() for n in names]) for side in (base, tuned)
    )
    assert moved == pytest.approx(float((tuned_value - base_value).norm()), rel=1e-12)
    assert size == pytest.approx(float(base_value.norm()), rel=1e-12)


def test_what_is_changed_or_redirected_comes_back_also_after_an_error(interpolated):
    interpolated, base, tuned = interpolated
    interpolated.set_alpha(0.5)
    before = state(interpolated.model)
    layer = interpolated.layers[1]
    name = layer.tensors[0]
    with interpolated.changed(layer, lambda _, value: value + 1) as model:
        assert torch.equal(model.state_dict()[name], before[name] + 1)
    assert same(before, interpolated.model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), interpolated.changed(layer, lambda _, value: value * 0):
        raise RuntimeError("stop")
    assert same(before, interpolated.model.state_dict())
    with interpolated.other_end({name: base.state_dict()[name]}):  # both ends are base's: so is all between
        assert torch.equal(interpolated.model.state_dict()[name], base.state_dict()[name])
        interpolated.set_alpha(1.0)
    interpolated.set_alpha(0.5)
    assert same(before, interpolated.model.state_dict())
    interpolated.two_sided.restore()
    assert same(tuned.state_dict(), interpolated.model.state_dict())


def test_what_base_lacks_is_pinned_to_tuned():
    base, tuned = make("llama", 0), make("llama_classes", 1)
    with TwoSidedModel(CheckpointPair(base, tuned)) as two_sided:
        interpolated = InterpolatedModel(two_sided)
        interpolated.set_alpha(0.0)
        assert interpolated.pinned == ("score.weight",)
        assert torch.equal(interpolated.model.score.weight, tuned.score.weight)
        assert torch.equal(interpolated.model.model.norm.weight, base.model.norm.weight)
