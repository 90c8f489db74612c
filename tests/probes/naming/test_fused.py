"""Fused and stacked tensors divide as the models' own code divides them."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.probes.zoo import found_in, model_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Fused attention, against what the model itself attends with.

# Methods that give or are given q, k and v, in models that do not use transformers' attention interface.
SPLITS = {
    "bloom": "_reshape",
    "falcon_rw": "_split_heads",
    "falcon_7b": "_split_heads",
    "falcon_40b": "_split_heads",
    "codegen": "_attn",
    "gpt_neox_japanese": "_attn",
    "openai-gpt": "_attn",
}
INTERFACED = (
    "gpt2", "gpt_bigcode_mqa", "gpt_bigcode_mha", "gpt_neox", "persimmon", "phi3", "dbrx", "jetmoe",
    "modernbert",
)  # fmt: skip


def fused_in(family, *letters, within=""):
    """The first module that holds these parts, its parent, and the parts by letter: functions of an input."""
    state, named = found_in(family)
    names = (m.tensor for m in named.values() if m.name.endswith(f":{letters[0]}") and within in m.name)
    tensor = next(names)
    name = tensor.removesuffix(".weight")
    bias = state.get(f"{name}.bias")

    def part(letter):
        matrix = named[f"{tensor}:{letter}"]
        weight = matrix.take(state[tensor])
        if bias is None:
            return lambda x: x @ weight.T
        rows = matrix.take(bias[None] if matrix.transposed else bias[:, None]).flatten()
        return lambda x: x @ weight.T + rows

    model = model_of(family)
    parent = model.get_submodule(name.rpartition(".")[0])
    return model.get_submodule(name), parent, {letter: part(letter) for letter in letters}


@torch.no_grad()
@pytest.mark.parametrize("family", [*INTERFACED, *SPLITS])
def test_fused_queries_keys_and_values_are_those_the_model_attends_with(family, monkeypatch):
    # One token at position 0, where every rotary embedding is the identity: q, k and v as projected.
    module, attention, parts = fused_in(family, *("kv" if family == "jetmoe" else "qkv"))
    inputs, attended = [], []

    if family in SPLITS:
        original = getattr(type(attention), SPLITS[family])

        def spied(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            attended.append(args[:3] if SPLITS[family] == "_attn" else result)
            return result

        monkeypatch.setattr(type(attention), SPLITS[family], spied)
    else:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def spied(module, query, key, value, *args, **kwargs):
            attended.append((query, key, value))
            return sdpa(module, query, key, value, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spied)

    with module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        model_of(family)(input_ids=torch.tensor([[5]]))
    for letter, theirs in zip("qkv", attended[0], strict=True):
        if letter in parts:
            ours = parts[letter](inputs[0]).flatten()
            # Repeated for the queries that share them: head by head here, all heads one after another there.
            if family == "falcon_40b" and letter != "q":
                ours = ours.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten()
            elif family == "jetmoe":
                ours = ours.repeat(2)
            torch.testing.assert_close(ours, theirs.flatten())


@torch.no_grad()
def test_keys_and_values_of_mpt_are_those_it_caches():
    # It has no method of its own for the split; what is left of the rows is q.
    module, _, parts = fused_in("mpt", "q", "k", "v")
    inputs = []
    with module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        cache = model_of("mpt")(input_ids=torch.tensor([[5]]), use_cache=True).past_key_values
    torch.testing.assert_close(parts["k"](inputs[0]).flatten(), cache.layers[0].keys.flatten())
    torch.testing.assert_close(parts["v"](inputs[0]).flatten(), cache.layers[0].values.flatten())
    assert torch.equal(torch.cat([parts[letter](inputs[0]) for letter in "qkv"], -1), module(inputs[0]))


@torch.no_grad()
def test_linear_attention_of_minimax_caches_the_product_of_its_keys_and_values():
    _, attention, parts = fused_in("minimax", "q", "k", "v")
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))
    _, product = attention(x, position_embeddings=None, attention_mask=None)
    keys, values = (attention.act_fn(parts[letter](x)).unflatten(-1, (4, 6)) for letter in "kv")
    # One token, no decay yet: the state of each head is k^T v.
    torch.testing.assert_close(torch.einsum("bthi,bthj->bhij", keys, values), product)


@torch.no_grad()
def test_attention_of_deberta_is_that_of_its_fused_parts():
    _, attention, parts = fused_in("deberta", "q", "k", "v")
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    context, weights = attention(x, torch.ones(1, 1, 3, 3), output_attentions=True)
    # Only q and v have biases, so q and k are not interchangeable.
    queries, keys, values = (
        (parts[letter](x) + bias).unflatten(-1, (4, 4)).transpose(1, 2)
        for letter, bias in (("q", attention.q_bias), ("k", 0), ("v", attention.v_bias))
    )
    expected = (queries @ keys.mT / 2).softmax(-1)  # 2: the root of the size of a head
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(context, (expected @ values).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("side", ["k", "v"])
def test_keys_and_values_of_cross_attention_in_gpt2_are_those_it_attends_with(side, monkeypatch):
    attended = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spied(module, query, key, value, *args, **kwargs):
        attended.append({"k": key, "v": value})
        return sdpa(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spied)
    _, _, parts = fused_in("gpt2_cross", side, within="crossattention")
    encoded = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(1))
    model_of("gpt2_cross")(input_ids=torch.tensor([[5]]), encoder_hidden_states=encoded)
    torch.testing.assert_close(parts[side](encoded).flatten(), attended[1][side].flatten())


# Fused and stacked feed-forwards, against what goes into the down projection or comes out of an expert.


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "down"),
    [
        ("phi3", "down_proj"),
        ("glm", "down_proj"),
        ("glm4", "down_proj"),
        ("modernbert", "Wo"),
        ("moonshine", "fc2"),
    ],
)
def test_the_gate_is_the_half_that_is_activated(family, down):
    _, feed_forward, parts = fused_in(family, "gate", "up")
    inputs = []
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with feed_forward.get_submodule(down).register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        feed_forward(x)
    activation = next(module for name, module in feed_forward.named_modules() if "act" in name)
    torch.testing.assert_close(activation(parts["gate"](x)) * parts["up"](x), inputs[0])


def swish(gate, up):
    return nn.functional.silu(gate) * up


def clipped_swish(gate, up):
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


STACKS = {
    "mixtral": swish, "qwen2_moe": swish, "qwen3_moe": swish, "qwen3_vl_moe": swish, "olmoe": swish,
    "deepseek_v3": swish, "aria": swish, "granitemoe": swish, "dbrx": swish, "llama4": swish,
    "gpt_oss": clipped_swish, "openai_privacy_filter": clipped_swish,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", STACKS)
def test_an_expert_of_a_stack_computes_what_the_model_computes_with_it(family):
    state, named = found_in(family)
    down = next(m for m in named.values() if m.component == "down_proj" and m.expert == 1)
    experts = deepcopy(model_of(family).get_submodule(down.tensor.partition(".experts.")[0] + ".experts"))
    weights = {
        m.component: m.take(state[m.tensor])
        for m in named.values()
        if m.expert == 1 and m.layer == down.layer and m.part == "block"
    }
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)) / 8
    for name, parameter in experts.named_parameters():
        if "bias" in name:  # not under test
            parameter.zero_()
    gate, up = x @ weights["gate_proj"].T, x @ weights["up_proj"].T
    expected = STACKS[family](gate, up) @ weights["down_proj"].T
    if family == "llama4":  # takes one group of tokens for each expert
        computed = experts(x.repeat(3, 1)).unflatten(0, (3, -1))[1]
    else:
        computed = experts(x, torch.ones(3, 1, dtype=torch.long), torch.ones(3, 1))
    torch.testing.assert_close(computed.reshape(3, 16), expected)
