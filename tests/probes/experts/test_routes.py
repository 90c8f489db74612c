"""Routes against a plain double-precision computation from what each router is given."""

import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from probes.checkpoints.opening import open_checkpoint
from probes.experts.router_weights import router_matrices
from probes.experts.routers import NoRoutersError
from probes.experts.routes import Routes, capture_routes, routed_examples
from probes.models.editable import Editable
from probes.passes.batched import NonFiniteError
from probes.text.batches import Example
from probes.text.rows import task_of
from tests.probes.runnable import assert_same, make, model_of, rows_of, state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

# Whether the bridge has hooks on the routers of a family, and these hold what the model combines experts by.
VIA = {
    "olmoe": "bridge", "mixtral": "bridge", "qwen2_moe": "bridge", "qwen3_moe": "bridge", "gpt_oss": "bridge",
    "deepseek_v2": "modules", "deepseek_v3": "modules", "granitemoe": "modules",
}  # fmt: skip
# These weigh only the experts that they chose.
CHOSEN_ALONE = ("gpt_oss", "granitemoe")
LENGTHS = (7, 4, 1, 6)


def routers_of(model):
    """The routers of a model by their blocks, found by what the families call them."""
    routers = {}
    for layer, block in enumerate(model.model.layers):
        mlp = getattr(block, "block_sparse_moe", None) or block.mlp
        router = getattr(mlp, "router", None) or getattr(mlp, "gate", None)
        if router is not None:
            routers[layer] = router
    return routers


def softmax(values):
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def by_hand(family, router, config, hidden):
    """One token: the weights of all experts, and of those chosen in their places, as the papers have them."""
    weight = getattr(router, "weight", None)
    weight = (router.layer.weight if weight is None else weight).detach().double().numpy()
    logits = weight @ hidden
    if family == "gpt_oss":
        logits = logits + router.bias.detach().double().numpy()
    count = config.num_experts_per_tok
    top = np.zeros(len(logits))
    if family in CHOSEN_ALONE:
        chosen = np.argsort(-logits)[:count]
        top[chosen] = softmax(logits[chosen])
        return np.full(len(logits), np.nan), top
    if family.startswith("deepseek"):
        sigmoid = family == "deepseek_v3"
        full = 1 / (1 + np.exp(-logits)) if sigmoid else softmax(logits)
        # A bias steers the choice and is in no weight; the scaling factor of the config is in none either.
        ranked = full + router.e_score_correction_bias.double().numpy() if sigmoid else full
        groups = ranked.reshape(config.n_group, -1)
        worth = np.sort(groups, axis=1)[:, -2:].sum(axis=1) if sigmoid else groups.max(axis=1)
        kept = np.repeat(
            np.isin(np.arange(config.n_group), np.argsort(-worth)[: config.topk_group]), groups.shape[1]
        )
        chosen = np.argsort(-np.where(kept, ranked, -np.inf))[:count]
        top[chosen] = full[chosen] / (full[chosen].sum() if sigmoid else 1)
        return full, top
    full = softmax(logits)
    chosen = np.argsort(-full)[:count]
    top[chosen] = full[chosen]
    if family == "mixtral" or getattr(config, "norm_topk_prob", False):
        top /= top.sum()
    return full, top


def expected(family, model, examples, drop_first=False):
    """Means over the tokens of each example run alone."""
    full, top = [], []
    for example in examples:
        given: list[torch.Tensor] = []
        layers = routers_of(model)

        def keep(module, args, seen=given):
            seen.append(args[0])

        handles = [router.register_forward_pre_hook(keep) for router in layers.values()]
        with torch.no_grad():
            model(input_ids=torch.tensor([example.ids]))
        for handle in handles:
            handle.remove()
        rows = [
            [
                by_hand(family, router, model.config, token)
                for token in hidden.double().reshape(-1, hidden.shape[-1]).numpy()
            ]
            for router, hidden in zip(layers.values(), given, strict=True)
        ]
        kept = slice(1 if drop_first else 0, None)
        full.append([np.mean([weights for weights, _ in row[kept]], axis=0) for row in rows])
        top.append([np.mean([weights for _, weights in row[kept]], axis=0) for row in rows])
    return np.array(full), np.array(top)


@cache
def mixture(family):
    """A family's model whose choice is steered by a bias too, where it has one."""
    model = make(family)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(0.5, -0.5, len(buffer)))
    return model


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, atol=2e-6, rtol=1e-5)


# What is captured


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", VIA)
def test_routes_are_the_means_of_what_the_paper_of_the_architecture_has(family, side):
    model, examples = mixture(family), rows_of(*LENGTHS)
    routes = capture_routes(model, examples, side=side)
    full, top = expected(family, model, examples)
    close(routes.full, full)
    close(routes.top, top)
    assert routes.via == VIA[family]
    assert routes.layers == tuple(routers_of(model))
    assert routes.top_k == 2
    assert routes.tokens.tolist() == list(LENGTHS)


@pytest.mark.parametrize("family", [family for family, via in VIA.items() if via == "bridge"])
def test_the_bridge_and_the_models_own_routers_give_the_same(family):
    model, examples = mixture(family), rows_of(*LENGTHS)
    bridged, by_modules = capture_routes(model, examples), capture_routes(model, examples, bridge=False)
    assert (bridged.via, by_modules.via) == ("bridge", "modules")
    close(bridged.top, by_modules.top)
    close(bridged.full, by_modules.full)


def test_experts_that_are_all_chosen_are_told_apart_where_the_bridge_would_not():
    # Of three experts all three: then the bridge's weights stand in the order of choice.
    model, examples = (
        make("mixtral", num_experts=3, num_local_experts=3, num_experts_per_tok=3),
        rows_of(*LENGTHS),
    )
    routes = capture_routes(model, examples)
    assert routes.via == "modules"
    close(routes.top, expected("mixtral", model, examples)[1])
    close(routes.top, routes.full)  # normalised, the chosen are all of the distribution


def test_layers_without_experts_are_left_out():
    model = make("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 2])
    routes = capture_routes(model, rows_of(5))
    assert routes.layers == (1, 3)
    close(routes.full, expected("qwen3_moe", model, rows_of(5))[0])


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("scale", [2.5, 16.0])
def test_a_scaling_factor_common_to_all_experts_does_not_enter(scale, normalised):
    plain = make("deepseek_v3", routed_scaling_factor=1.0, norm_topk_prob=normalised)
    scaled = make("deepseek_v3", routed_scaling_factor=scale, norm_topk_prob=normalised, num_hidden_layers=2)
    routes, wanted = (capture_routes(model, rows_of(*LENGTHS), bridge=False) for model in (scaled, plain))
    # The first mixture's own input is before any expert's output, and so before the factor.
    close(routes.top[:, 0], wanted.top[:, 0])
    sums = routes.top.sum(axis=2)
    assert np.allclose(sums, 1, atol=1e-5) == normalised


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_the_first_token_can_be_left_out(family):
    model, examples = mixture(family), rows_of(7, 4)
    routes = capture_routes(model, [*examples, *rows_of(1)], drop_first=True)
    full, top = expected(family, model, examples, drop_first=True)
    close(routes.full[:2], full)
    close(routes.top[:2], top)
    assert routes.tokens.tolist() == [6, 3, 0]
    assert np.isnan(routes.top[2]).all()
    assert np.isnan(routes.full[2]).all()


def test_a_row_without_tokens_is_missing_and_the_others_are_not():
    rows = rows_of(7, 0, 4)
    routes = capture_routes(mixture("olmoe"), rows)
    assert np.isnan(routes.top).any(axis=(1, 2)).tolist() == [False, True, False]
    close(routes.top[[0, 2]], expected("olmoe", mixture("olmoe"), [rows[0], rows[2]])[1])
    assert routes.select("full") is routes.full  # a row without tokens is not one without a distribution


# Properties


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    tokens=st.integers(1, 40),
    side=st.sampled_from(["right", "left"]),
    pad_id=st.integers(0, 40),
    family=st.sampled_from(["olmoe", "deepseek_v3", "gpt_oss"]),
)
def test_batches_and_padding_change_nothing(lengths, tokens, side, pad_id, family):
    model, examples = mixture(family), rows_of(*lengths)
    routes = capture_routes(model, examples, tokens=tokens, side=side, pad_id=pad_id, bridge=False)
    alone = [capture_routes(model, [example], bridge=False) for example in examples]
    np.testing.assert_allclose(routes.top, np.concatenate([single.top for single in alone]), atol=1e-6)
    np.testing.assert_allclose(routes.full, np.concatenate([single.full for single in alone]), atol=1e-6)


class Blocks(nn.Module):
    """Each block routes a token by itself: no attention, so that a token's route is the same anywhere."""

    def __init__(self, router, count=3, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(41, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({"router": router(width)}) for _ in range(count))

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            block["router"](hidden)
            hidden = hidden.roll(1, dims=-1).tanh()
        return hidden


def linear(width):
    return nn.Linear(width, 5, bias=False)


class Choosing(nn.Module):
    """A router that gives two of its experts and their weights, and nothing of the others."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, width))

    def forward(self, hidden):
        values, ids = (hidden @ self.weight.T).topk(2)
        return ids, values.softmax(dim=-1)


NAMES = [f"blocks.{layer}.router" for layer in range(3)]


@given(
    ids=st.lists(st.integers(0, 40), min_size=1, max_size=6), times=st.integers(2, 3), seed=st.integers(0, 9)
)
@settings(max_examples=15, deadline=None)
def test_repeating_or_reordering_a_samples_tokens_leaves_its_routes(ids, times, seed):
    model = Blocks(linear)
    shuffled = np.random.default_rng(seed).permutation(ids * times).tolist()
    first, second = (
        capture_routes(model, [Example(ids=order, scored=[True] * len(order), row=0)], routers=NAMES, top_k=2)
        for order in (ids, shuffled)
    )
    np.testing.assert_allclose(first.full, second.full, atol=1e-6)
    np.testing.assert_allclose(first.top, second.top, atol=1e-6)


# Models of any kind


def test_named_routers_that_give_logits_are_a_softmax_of_which_the_largest_sum_to_one():
    model, examples = Blocks(linear), rows_of(7, 4)
    routes = capture_routes(model, examples, routers=NAMES, top_k=2)
    for row, example in enumerate(examples):
        hidden = model.embed.weight[example.ids].detach().double().numpy()
        for layer in range(3):
            weight = model.blocks[layer]["router"].weight.detach().double().numpy()
            shares = np.array([softmax(weight @ token) for token in hidden])
            second = np.sort(shares, axis=1)[:, [-2]]
            top = np.where(shares >= second, shares, 0)
            close(routes.full[row, layer], shares.mean(axis=0))
            close(routes.top[row, layer], (top / top.sum(axis=1, keepdims=True)).mean(axis=0))
            hidden = np.tanh(np.roll(hidden, 1, axis=1))
    assert (routes.layers, routes.via, routes.top_k) == ((0, 1, 2), "modules", 2)


def test_a_router_that_tells_only_of_the_experts_it_chose_has_no_full_distribution():
    routes = capture_routes(Blocks(Choosing), rows_of(7, 4), routers=NAMES)
    close(routes.top.sum(axis=2), np.ones((2, 3)))
    assert routes.top.shape == (2, 3, 5)
    with pytest.raises(ValueError, match="chosen experts alone, no full distribution; give top"):
        routes.select("full")


class Pooled(Blocks):
    """One route for the whole of a sample, as where all of its features are one input."""

    def forward(self, ids):
        self.blocks[0]["router"](self.embed(ids).mean(dim=1))


def test_a_sample_may_be_one_token_to_its_routers():
    model, examples = Pooled(linear, count=1), rows_of(4, 4)
    routes = capture_routes(model, examples, routers=NAMES[:1], top_k=2)
    weight = model.blocks[0]["router"].weight.detach().double().numpy()
    for row, example in enumerate(examples):
        pooled = model.embed.weight[example.ids].detach().double().numpy().mean(axis=0)
        close(routes.full[row, 0], softmax(weight @ pooled))
    assert routes.tokens.tolist() == [1, 1]


def test_a_router_that_runs_twice_in_a_pass_is_refused():
    class Looped(Blocks):
        def forward(self, ids):
            for _ in range(2):
                super().forward(ids)

    with pytest.raises(ValueError, match=r"blocks.0.router: ran twice in one pass"):
        capture_routes(Looped(linear), rows_of(4), routers=NAMES, top_k=2)


def test_routers_of_a_transformers_model_can_be_named():
    model = mixture("olmoe")
    routes = capture_routes(model, rows_of(7), routers=["model.layers.1.mlp.gate"])
    assert routes.layers == (1,)
    close(routes.top[:, 0], capture_routes(model, rows_of(7)).top[:, 1])


# What is left behind


@pytest.mark.parametrize("bridge", [True, False])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_the_model_is_bit_for_bit_as_it_was(family, bridge):
    model = make(family)
    model.model.layers[0].train()
    before = state_of(model)
    capture_routes(model, rows_of(*LENGTHS), bridge=bridge)
    assert_same(before, state_of(model))


def test_the_model_is_as_it_was_after_an_exception():
    model = make("olmoe")
    before = state_of(model)

    def fail(*_):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        capture_routes(model, rows_of(7), progress=fail)
    assert_same(before, state_of(model))


def test_dropout_is_off_and_the_mode_is_kept():
    model = make("mixtral", attention_dropout=0.9, router_jitter_noise=0.5)
    wanted = capture_routes(model, rows_of(7, 4))
    routes = capture_routes(model.train(), rows_of(7, 4))
    assert model.training
    assert np.array_equal(routes.top, wanted.top)


# Other forms of a model


def test_half_precision_gives_nearly_the_same_routes():
    # Not 28: transformers' product of grouped matrices needs rows of 16 bytes.
    model = make("olmoe", intermediate_size=32)
    wanted = capture_routes(model, rows_of(*LENGTHS))
    routes = capture_routes(model.bfloat16(), rows_of(*LENGTHS))
    # One token more or less of at most seven for an expert, where bfloat16 breaks a near tie otherwise.
    assert np.abs(routes.full - wanted.full).max() < 0.05
    assert np.abs(routes.top - wanted.top).mean() < 0.05
    close(routes.full.sum(axis=2), np.ones((4, 2)))
    assert routes.top.dtype == routes.full.dtype == np.float32


def test_an_adapter_routes_as_its_merged_weights_do():
    torch.manual_seed(0)
    model = get_peft_model(make("olmoe"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    routes = capture_routes(model, rows_of(*LENGTHS))
    close(routes.top, capture_routes(model.merge_and_unload(), rows_of(*LENGTHS)).top)


def test_an_editable_is_taken_as_its_model():
    model = make("olmoe")
    routes = capture_routes(Editable(open_checkpoint(model)), rows_of(7))
    assert np.array_equal(routes.top, capture_routes(model, rows_of(7)).top)


# Samples


def test_a_row_with_choices_is_its_prompt_and_other_rows_are_whole():
    prompt = [5, 6, 7]
    examples = [
        Example(ids=[*prompt, choice], scored=[False, False, False, True], row=row, choice=choice)
        for row in range(2)
        for choice in (8, 9)
    ]
    task = task_of([{"prompt": "a", "choices": ["b", "c"], "answer": 0}] * 2)
    routed = routed_examples(task, examples)
    assert [(example.ids, example.row) for example in routed] == [(prompt, 0), (prompt, 1)]
    text = rows_of(4, 3)
    assert routed_examples(task_of(["a", "b"]), text) == text


# A record


def test_a_record_gives_the_same_routes_again():
    routes = capture_routes(mixture("gpt_oss"), rows_of(7, 4))
    again = Routes.of(routes.record() | {"loss": np.zeros(2)})
    assert (again.layers, again.top_k, again.via) == (routes.layers, routes.top_k, routes.via)
    for name in ("full", "top", "tokens"):
        assert np.array_equal(getattr(again, name), getattr(routes, name), equal_nan=True)


def test_weights_of_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="weights are 'best'; give full or top"):
        capture_routes(mixture("olmoe"), rows_of(4)).select("best")


# Weights of routers


@pytest.mark.parametrize("family", VIA)
def test_router_matrices_are_what_the_running_routers_multiply_by(family, tmp_path):
    model = mixture(family)
    weights = [getattr(router, "weight", None) for router in routers_of(model).values()]
    layers = [
        router.layer.weight if weight is None else weight
        for router, weight in zip(routers_of(model).values(), weights, strict=True)
    ]
    wanted = torch.stack(layers).detach().numpy()
    model.save_pretrained(tmp_path)
    for ref in (tmp_path, model):
        assert np.array_equal(router_matrices(open_checkpoint(ref)), wanted)


@pytest.mark.parametrize("family", [family for family in VIA if family != "gpt_oss"])
def test_with_the_gain_folded_in_a_router_reads_the_normalised_stream(family):
    model, seen = mixture(family), []
    layers = routers_of(model)
    blocks = [model.model.layers[layer] for layer in layers]
    handles = [
        block.post_attention_layernorm.register_forward_hook(
            lambda m, given, out: seen.append((m, given[0], out))
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    for handle in handles:
        handle.remove()
    plain, folded = (router_matrices(open_checkpoint(model), fold_gain=fold) for fold in (False, True))
    for layer, (norm, stream, out) in enumerate(seen):
        unit = stream * torch.rsqrt(stream.pow(2).mean(dim=-1, keepdim=True) + norm.variance_epsilon)
        close(unit.numpy() @ folded[layer].T, out.numpy() @ plain[layer].T)


def test_router_matrices_of_named_routers_are_read_from_memory():
    model = Blocks(linear)
    matrices = router_matrices(open_checkpoint(model), routers=NAMES)
    assert np.array_equal(matrices, torch.stack([b["router"].weight for b in model.blocks]).detach().numpy())


# Bad input


@pytest.mark.parametrize(("family", "kind"), [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
def test_a_dense_model_has_no_routers(family, kind):
    with pytest.raises(NoRoutersError, match=f"{kind}: has no routers"):
        capture_routes(model_of(family), rows_of(4))
    with pytest.raises(NoRoutersError, match="has no router among its weights"):
        router_matrices(open_checkpoint(model_of(family)))


def test_a_module_that_is_no_transformers_model_needs_its_routers_named():
    with pytest.raises(NoRoutersError, match="Blocks: its blocks are not recognised; name its routers"):
        capture_routes(Blocks(linear), rows_of(4))


def test_what_cannot_be_read_is_said():
    model = Blocks(linear)
    with pytest.raises(LookupError, match=r"Blocks: has no module blocks.9.router"):
        capture_routes(model, rows_of(4), routers=["blocks.9.router"], top_k=2)
    with pytest.raises(ValueError, match=r"blocks.0.router: gives 5 logits and no choice; say with top_k"):
        capture_routes(model, rows_of(4), routers=NAMES)
    with pytest.raises(ValueError, match=r"blocks.0.router: gives 5 logits and no choice; say with top_k"):
        capture_routes(model, rows_of(4), routers=NAMES, top_k=6)
    with pytest.raises(ValueError, match="no row has a token"):
        capture_routes(model, rows_of(0), routers=NAMES, top_k=2)
    with pytest.raises(LookupError, match=r"has no embedding.weight; the nearest of its 4: embed.weight"):
        router_matrices(open_checkpoint(model), routers=["embedding"])


def test_routers_with_unlike_numbers_of_experts_do_not_go_together():
    model = Blocks(linear)
    model.blocks[1]["router"] = nn.Linear(6, 4, bias=False)
    message = r"blocks.0.router chooses 2 of 5 experts and blocks.1.router 2 of 4"
    with pytest.raises(ValueError, match=message):
        capture_routes(model, rows_of(4), routers=NAMES, top_k=2)
    with pytest.raises(ValueError, match=r"blocks.0.router.weight is 5x6, blocks.1.router.weight 4x6"):
        router_matrices(open_checkpoint(model), routers=NAMES)


def test_a_broken_model_is_named_with_the_row_and_the_layer():
    model, examples = make("olmoe"), rows_of(3, 4)
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = torch.nan
    examples[1] = replace(examples[1], ids=[4, 39, 4, 4])
    with pytest.raises(NonFiniteError, match=r"row index 1: .*first at layer 0"):
        capture_routes(model, examples)
