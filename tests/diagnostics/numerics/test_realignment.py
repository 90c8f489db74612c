"""What relabelling did to a block is undone: the same function, and the labelling of base again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.numerics.realignment import matched, realigned
from probes.checkpoints.opening import open_checkpoint
from tests.probes.runnable import make


def block(model, layer=0):
    checkpoint = open_checkpoint(model)
    matrices = [matrix for matrix in checkpoint.matrices.values() if matrix.layer == layer]
    return checkpoint, matrices


def undone(base, tuned, *, rotary, layer=0, movable=True):
    ours, _ = block(base, layer)
    theirs, matrices = block(tuned, layer)
    heads = base.config.num_attention_heads
    return theirs, realigned(
        matrices, theirs.headers, ours.tensor, theirs.tensor, heads=heads, rotary=rotary, movable=movable
    )


def relabelled(model, matrices, layer=0, *, neurons=None, rows=None):
    """The same model with neurons in another order, or rows and columns of attention changed."""
    checkpoint = open_checkpoint(model)
    state = {name: checkpoint.tensor(name).clone() for name in checkpoint.headers}
    by = {matrix.component: matrix for matrix in matrices}
    if neurons is not None:
        for component in ("up_proj", "gate_proj"):
            if component in by:
                W = by[component].take(state[by[component].tensor])
                state[by[component].tensor] = by[component].put(state[by[component].tensor], W[neurons])
                bias = by[component].tensor.removesuffix("weight") + "bias"
                if bias in state:
                    state[bias] = state[bias][neurons]
        down = by["down_proj"]
        state[down.tensor] = down.put(state[down.tensor], down.take(state[down.tensor])[:, neurons])
    for component, change in (rows or {}).items():
        matrix = by[component]
        state[matrix.tensor] = matrix.put(state[matrix.tensor], change(matrix.take(state[matrix.tensor])))
    return state


def load(family, state):
    model = make(family)
    checkpoint = open_checkpoint(model)
    assert set(checkpoint.headers) == set(state)
    model.load_state_dict(state, strict=False)
    return model


IDS = torch.tensor([[1, 5, 9, 30, 7, 12]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_neurons_come_back_to_the_bit(family):
    base = make(family)
    _, matrices = block(base)
    order = torch.randperm(28, generator=torch.Generator().manual_seed(1))
    state = relabelled(base, matrices, neurons=order)
    tuned = load(family, state)
    assert torch.allclose(logits(tuned), logits(base), atol=1e-5)
    theirs, restored = undone(base, tuned, rotary=True)
    assert restored.moved == int((order != torch.arange(28)).sum())
    assert restored.turned == 0
    original = open_checkpoint(base)
    for name, value in restored.tensors.items():
        assert torch.equal(value, original.tensor(name)), name
        assert value.shape == theirs.tensor(name).shape


def flips(size, seed):
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_turned_signs_of_values_and_gated_neurons_come_back_to_the_bit(seed):
    base = make("llama", seed % 5)
    _, matrices = block(base)
    values, neurons = flips(8, seed), flips(28, seed + 1)  # 2 key-value heads of 4, each with 2 query heads
    columns = values.view(2, 1, 4).expand(2, 2, 4).flatten()
    rows = {
        "v_proj": lambda W: W * values[:, None],
        "o_proj": lambda W: W * columns,
        "up_proj": lambda W: W * neurons[:, None],
        "down_proj": lambda W: W * neurons,
    }
    tuned = load("llama", relabelled(base, matrices, rows=rows))
    assert torch.equal(logits(tuned), logits(base))  # signs are exact
    _, restored = undone(base, tuned, rotary=True)
    assert restored.turned == int((values < 0).sum() + (neurons < 0).sum())
    original = open_checkpoint(base)
    assert all(torch.equal(value, original.tensor(name)) for name, value in restored.tensors.items())


def test_heads_and_their_key_value_heads_come_back():
    base = make("llama")
    _, matrices = block(base)
    stores, queries = torch.tensor([1, 0]), torch.tensor([3, 2, 0, 1])  # heads 2, 3 belong to store 1

    def spread(order):
        return (order[:, None] * 4 + torch.arange(4)).flatten()

    rows = {
        "q_proj": lambda W: -W[spread(queries)],  # queries and keys turned together
        "k_proj": lambda W: -W[spread(stores)],
        "v_proj": lambda W: W[spread(stores)],
        "o_proj": lambda W: W[:, spread(queries)],
    }
    tuned = load("llama", relabelled(base, matrices, rows=rows))
    assert torch.allclose(logits(tuned), logits(base), atol=1e-5)
    _, restored = undone(base, tuned, rotary=True)
    assert restored.moved == 4
    original = open_checkpoint(base)
    assert all(torch.equal(value, original.tensor(name)) for name, value in restored.tensors.items())


def test_without_rotary_positions_single_dimensions_of_queries_and_keys_may_turn():
    base = make("gpt2")
    _, matrices = block(base)
    signs = flips(16, 3)
    state = relabelled(
        base, matrices, rows={f"{letter}_proj": lambda W: W * signs[:, None] for letter in "qk"}
    )
    state["transformer.h.0.attn.c_attn.bias"][:32] *= torch.cat([signs, signs])
    tuned = load("gpt2", state)
    assert torch.equal(logits(tuned), logits(base))
    _, restored = undone(base, tuned, rotary=False)
    assert restored.turned == int((signs < 0).sum())
    original = open_checkpoint(base)
    assert all(torch.equal(value, original.tensor(name)) for name, value in restored.tensors.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "opt", "bloom", "gemma2"])
def test_whatever_is_undone_the_function_stays(family):
    base, tuned = make(family, 0), make(family, 7)  # strangers: much is moved
    for layer in (0, 1):
        # In Bloom each head has a position bias of its own.
        rotary, movable = family not in ("gpt2", "opt"), family != "bloom"
        _, restored = undone(base, tuned, rotary=rotary, layer=layer, movable=movable)
        assert restored.moved
        after = {**{k: v.clone() for k, v in tuned.state_dict().items()}, **restored.tensors}
        other = load_any(family, tuned, after)
        assert torch.allclose(logits(other), logits(tuned), atol=2e-4), layer


def load_any(family, tuned, state):
    other = make(family)
    missing = other.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    return other


def test_what_was_not_relabelled_is_left_as_it_is():
    base, tuned = make("llama"), make("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    _, restored = undone(base, tuned, rotary=True)
    assert (restored.tensors, restored.moved, restored.turned) == ({}, 0, 0)


def test_a_matching_is_the_best_one_also_where_rows_want_the_same():
    A = torch.tensor([[3.0, 2.0], [2.5, 0.0]])
    # both rows want column 0: 2 + 2.5 is more than 3 + 0
    assert matched(A).tolist() == [1, 0]
    assert matched(torch.eye(3)[[2, 0, 1]]).tolist() == [2, 0, 1]
