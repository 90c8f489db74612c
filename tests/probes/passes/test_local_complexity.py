"""Units that switch between vertices, against each vertex run by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.passes.local_complexity import _moves, local_complexity, orthonormal, switches
from probes.text.batches import pad
from tests.probes.runnable import assert_same, make, model_of, rows_of, state_of


def naive(model, examples, radius, vertices, module_of):
    """Share of crossed units of each layer: every vertex in a forward pass of its own, from embeddings."""
    embeddings = model.get_input_embeddings()
    ids = [token for example in examples for token in example.ids]
    size = float(embeddings(torch.tensor(ids)).detach().double().norm(dim=1).mean())
    crossed, total = {}, {}
    for index, example in enumerate(examples):
        batch = pad(examples, [index], len(example.ids), 0, "right")
        moves = _moves(batch, embeddings.weight, vertices // 2, radius * size, seed=0)
        inputs = embeddings(torch.tensor([example.ids])).detach()
        signs = [signs_at(model, inputs + move, module_of) for move in moves[:, 0]]
        for layer in range(2):
            stack = torch.stack([sign[layer] for sign in signs])
            crossed[layer] = crossed.get(layer, 0) + int((stack != stack[:1]).any(dim=0).sum())
            total[layer] = total.get(layer, 0) + stack[0].numel()
    return {layer: crossed[layer] / total[layer] for layer in crossed}


def signs_at(model, inputs, module_of):
    """Signs of every unit at every token, by layer."""
    signs = {}
    handles = [
        module_of(model, layer).register_forward_hook(
            lambda module, args, output, layer=layer: signs.update(
                {layer: output.reshape(inputs.shape[1], -1) > 0}
            )
        )
        for layer in range(2)
    ]
    with torch.no_grad():
        model(inputs_embeds=inputs)
    for handle in handles:
        handle.remove()
    return signs


@pytest.mark.parametrize(
    ("family", "module_of"),
    [
        ("llama", lambda model, layer: model.model.layers[layer].mlp.gate_proj),
        ("gpt2", lambda model, layer: model.transformer.h[layer].mlp.c_fc),
        ("gpt_neox", lambda model, layer: model.gpt_neox.layers[layer].mlp.dense_h_to_4h),
        ("opt", lambda model, layer: model.model.decoder.layers[layer].fc1),
        ("qwen2_moe", lambda model, layer: model.model.layers[layer].mlp.shared_expert.gate_proj),
        ("bert", lambda model, layer: model.bert.encoder.layer[layer].intermediate.dense),
    ],
)
def test_crossings_are_those_of_each_vertex_by_itself(family, module_of):
    model, examples = model_of(family), rows_of(5, 7, 4)
    width = model.get_input_embeddings().weight.shape[1]
    vertices = min(8, 2 * width)
    for tokens in (1, 16384):  # in batches of one row and of all
        complexity = local_complexity(model, examples, radius=0.3, vertices=vertices, tokens=tokens)
        assert complexity.share == pytest.approx(naive(model, examples, 0.3, vertices, module_of))
        assert complexity.tokens == 16
        assert 0 < complexity.share[0] < 1


def test_no_radius_crosses_nothing_and_a_huge_one_nearly_all():
    model, examples = model_of("llama"), rows_of(5, 7)
    assert set(local_complexity(model, examples, radius=0.0, vertices=8).share.values()) == {0}
    # So far out each unit is on at one of two opposite vertices and off at the other, but for round-off.
    assert local_complexity(model, examples, radius=1e4, vertices=32).share[0] > 0.99


@settings(max_examples=10)
@given(st.integers(0, 20))
def test_a_larger_radius_crosses_all_that_a_smaller_did_where_vertices_are_nested(seed):
    # Without attention the first layer's units see a line through each token: beyond a sign change none back.
    model = make("llama", seed)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    shares = [
        local_complexity(model, rows_of(5, seed=seed), radius=r, vertices=6, seed=seed).share[0]
        for r in (0.01, 0.05, 0.2, 1.0)
    ]
    assert shares == sorted(shares)


def test_relu_units_scaled_up_before_and_down_after_cross_alike():
    model, examples = make("opt"), rows_of(5, 7, 4)
    assert model.config.activation_function == "relu"
    before = local_complexity(model, examples, radius=0.3, vertices=8)
    factors = 2.0 ** torch.randint(
        -3, 4, (28,), generator=torch.Generator().manual_seed(0)
    )  # exact in floats
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight.mul_(factors[:, None])
            layer.fc1.bias.mul_(factors)
            layer.fc2.weight.div_(factors)
    assert local_complexity(model, examples, radius=0.3, vertices=8).share == before.share


def test_directions_stand_at_right_angles_at_every_token_and_are_of_length_1():
    basis = orthonormal(3, 8, 5, torch.Generator().manual_seed(0))
    for token in range(3):
        torch.testing.assert_close(basis[:, token] @ basis[:, token].T, torch.eye(5, dtype=torch.float64))


def test_the_radius_is_a_share_of_the_mean_length_of_the_embeddings():
    model, examples = model_of("llama"), rows_of(5, 7)
    ids = torch.tensor([token for example in examples for token in example.ids])
    size = model.get_input_embeddings().weight.detach()[ids].double().norm(dim=1).mean()
    assert local_complexity(model, examples, radius=0.3, vertices=4).radius == pytest.approx(
        0.3 * float(size)
    )


def test_more_directions_than_embeddings_have_are_cut_to_these():
    assert local_complexity(model_of("llama"), rows_of(5), radius=0.1, vertices=100).vertices == 32


def test_routed_experts_are_told_from_dense_units():
    assert switches(model_of("olmoe")) == ([], [0, 1])
    places, routed = switches(model_of("qwen2_moe"))
    assert [switch.layer for switch in places] == routed == [0, 1]
    with pytest.raises(ValueError, match="OlmoeForCausalLM: has no dense MLP with units to watch"):
        local_complexity(model_of("olmoe"), rows_of(5), radius=0.1)


def test_embeddings_that_are_laid_out_otherwise_are_refused():
    with pytest.raises(ValueError, match=r"XLNetLMHeadModel: its embeddings are .*, not rows by tokens"):
        local_complexity(model_of("xlnet"), rows_of(5, 7), radius=0.1, vertices=4)


def test_a_model_is_left_as_it_was():
    model = make("llama")
    model.train()
    before = state_of(model)
    local_complexity(model, rows_of(5, 7), radius=0.1, vertices=4)
    assert_same(before, state_of(model))
