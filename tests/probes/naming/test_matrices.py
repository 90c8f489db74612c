"""Every weight of every family is found once, as (out, in), with its layer, component and part."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from probes.files.layout import Header
from probes.naming.matrices import is_weight, matrices
from tests.probes.zoo import FAMILIES, found_in, headers_of, model_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.pytorch_utils import Conv1D


def shapes_to_headers(shapes):
    return {name: Header(name, shape, torch.bfloat16) for name, shape in shapes.items()}


def assert_partition(state, named):
    """Every entry of every weight is in exactly one matrix; what is no weight is in none."""
    tied = {name for matrix in named.values() for name in matrix.tied}
    for name, header in headers_of(state).items():
        numbers = torch.arange(header.entries).reshape(header.shape)
        taken = [matrix.take(numbers) for matrix in named.values() if matrix.tensor == name]
        if not is_weight(header) or name in tied:
            assert not taken, name
            continue
        assert torch.equal(torch.cat([part.flatten() for part in taken]).sort().values, numbers.flatten()), (
            name
        )
    for key, matrix in named.items():
        assert key == matrix.name
        assert matrix.take(state[matrix.tensor]).shape == (matrix.rows, matrix.columns), key


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_model_in_memory_is_in_exactly_one_matrix(family):
    assert_partition(*found_in(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_checkpoint_holds_the_matrices_of_the_model_in_memory(family, tmp_path):
    # transformers stores some models under other names and layouts than it computes with: experts one by one.
    model = model_of(family)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    named = matrices(headers_of(stored), config)
    assert_partition(stored, named)

    state, in_memory = found_in(family)

    def content(matrices, tensors):
        return sorted(
            (matrix.layer if matrix.layer is not None else -1, matrix.component, matrix.part,
             matrix.take(tensors[matrix.tensor]).contiguous().numpy().tobytes())
            for matrix in matrices.values()
        )  # fmt: skip

    assert content(named, stored) == content(in_memory, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_that_multiplies_is_a_matrix_and_no_norm_is(family):
    state, named = found_in(family)
    tied = {name for matrix in named.values() for name in matrix.tied}
    for name, module in model_of(family).named_modules():
        parts = [matrix for matrix in named.values() if matrix.tensor == f"{name}.weight"]
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and f"{name}.weight" not in tied:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            assert sum(part.rows for part in parts) == weight.shape[0], name
            assert {part.columns for part in parts} == {weight.shape[1]}, name
            if len(parts) == 1:
                assert torch.equal(parts[0].take(state[f"{name}.weight"]), weight), name
        elif "Norm" in type(module).__name__:
            assert not parts, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_have_their_components_and_layers(family):
    _, named = found_in(family)
    blocks = [matrix for matrix in named.values() if matrix.part == "block"]
    assert {matrix.component for matrix in blocks} == FAMILIES[family][3]
    # ALBERT shares one block between its layers; two stages of Swin count through, 2 blocks and 1.
    layers = {"albert": {0}, "swin": {0, 1, 2}}.get(family, {0, 1})
    assert {matrix.layer for matrix in blocks} == layers
    assert not any(matrix.missing for matrix in named.values())


# Names and shapes alone: families whose code is not in transformers, and files without a config.


def test_qwen_1_activates_w2_and_keeps_its_linear_layers_as_they_are():
    named = matrices(
        shapes_to_headers(
            {
                "transformer.h.1.attn.c_attn.weight": (48, 16),
                "transformer.h.1.attn.c_proj.weight": (16, 16),
                "transformer.h.1.mlp.w1.weight": (24, 16),
                "transformer.h.1.mlp.w2.weight": (24, 16),
                "transformer.h.1.mlp.c_proj.weight": (16, 24),
            }
        ),
        {"model_type": "qwen", "num_attention_heads": 4},
    )
    assert {m.component: (m.layer, m.rows, m.columns, m.start) for m in named.values()} == {
        "q_proj": (1, 16, 16, 0),
        "k_proj": (1, 16, 16, 16),
        "v_proj": (1, 16, 16, 32),
        "o_proj": (1, 16, 16, 0),
        "up_proj": (1, 24, 16, 0),
        "gate_proj": (1, 24, 16, 0),
        "down_proj": (1, 16, 24, 0),
    }
    assert named["transformer.h.1.mlp.w2.weight"].component == "gate_proj"
    assert not any(m.transposed for m in named.values())


def rows_of(named, tensor):
    """For each part of a tensor, the stored rows that it has."""
    numbers = torch.arange(1000)
    return {
        m.component: m.take(numbers[: sum(p.rows for p in named.values() if p.tensor == tensor), None])
        .flatten()
        .tolist()
        for m in named.values()
        if m.tensor == tensor
    }


@pytest.mark.parametrize(
    ("tensor", "config", "queries", "keys", "values"),
    [
        # ChatGLM 2 and later: 4 heads of 2, then 1 for k and 1 for v.
        (
            "transformer.encoder.layers.0.self_attention.query_key_value.weight",
            {"model_type": "chatglm", "num_attention_heads": 4, "multi_query_attention": True},
            [0, 1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11],
        ),
        # ChatGLM 1: per head, 2 heads of 2.
        (
            "transformer.layers.0.attention.query_key_value.weight",
            {"model_type": "chatglm", "num_attention_heads": 2},
            [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11],
        ),
        # InternLM 2: 2 groups, each of 2 query heads of 2, k, v.
        (
            "model.layers.0.attention.wqkv.weight",
            {"model_type": "internlm2", "num_attention_heads": 4, "num_key_value_heads": 2},
            [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15],
        ),
        # Falcon 40B before transformers had it: the same.
        (
            "transformer.h.0.self_attention.query_key_value.weight",
            {"model_type": "RefinedWeb", "n_head": 4, "n_head_kv": 2},
            [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15],
        ),
        # Baichuan: thirds.
        (
            "model.layers.0.self_attn.W_pack.weight", {"model_type": "baichuan"},
            [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18, 19, 20, 21, 22, 23],
        ),
    ],
)  # fmt: skip
def test_fused_attention_of_models_with_code_of_their_own(tensor, config, queries, keys, values):
    rows = len(queries + keys + values)
    output = tensor.replace("query_key_value", "dense").replace("wqkv", "wo").replace("W_pack", "o_proj")
    named = matrices(shapes_to_headers({tensor: (rows, 8), output: (8, len(queries))}), config)
    assert rows_of(named, tensor) == {"q_proj": queries, "k_proj": keys, "v_proj": values}
    assert named[output].component == "o_proj"


@pytest.mark.parametrize(
    ("tensor", "down", "config", "order"),
    [
        (
            "encoder.layers.0.mlp.dense_h_to_4h",
            "dense_4h_to_h",
            {"model_type": "chatglm"},
            ["gate_proj", "up_proj"],
        ),
        # OLMo before transformers had it: x * silu(gate), x first.
        ("transformer.blocks.0.ff_proj", "ff_out", {"model_type": "hf_olmo"}, ["up_proj", "gate_proj"]),
    ],
)
def test_gated_feed_forwards_of_models_with_code_of_their_own(tensor, down, config, order):
    down = f"{tensor.rpartition('.')[0]}.{down}.weight"
    tensor = f"{tensor}.weight"
    named = matrices(shapes_to_headers({tensor: (12, 4), down: (4, 6)}), config)
    assert list(rows_of(named, tensor)) == order
    # The same name where nothing is doubled: a plain feed-forward.
    named = matrices(shapes_to_headers({tensor: (12, 4), down: (4, 12)}), config)
    assert [m.rows for m in named.values()] == [12, 4]


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt2_cross", "openai-gpt", "phi3", "modernbert", "mixtral", "llama4", "t5"]
)
def test_names_and_shapes_suffice_where_they_decide(family):
    state, named = found_in(family)
    bare = matrices(headers_of(state), {})
    # Without the config nothing is known to be tied; all else is the same.
    assert {name: m for name, m in bare.items() if m.component not in ("embed", "lm_head")} == {
        name: m for name, m in named.items() if m.component not in ("embed", "lm_head")
    }


@pytest.mark.parametrize(
    ("family", "component", "missing"),
    [
        ("gpt_neox", "qkv_proj", "model_type"),
        ("bloom", "qkv_proj", "model_type"),
        ("falcon_40b", "qkv_proj", "model_type"),
        ("deberta", "qkv_proj", "num_attention_heads"),
        ("gpt_oss", "gate_up_proj", "model_type"),
    ],
)
def test_what_only_the_config_could_divide_stays_whole_and_says_what_is_missing(family, component, missing):
    state, _ = found_in(family)
    named = matrices(headers_of(state), {})
    assert_partition(state, named)
    undivided = [m for m in named.values() if m.component == component]
    assert undivided
    assert {m.missing for m in undivided} == {(missing,)}
    assert not any(m.missing for m in named.values() if m.component != component)


@pytest.mark.parametrize("heads", [{}, {"num_kv_heads": 2}])
def test_a_config_without_heads_leaves_fused_attention_whole(heads):
    headers = shapes_to_headers({"transformer.h.0.self_attention.query_key_value.weight": (32, 16)})
    (matrix,) = matrices(headers, {"model_type": "falcon", "new_decoder_architecture": True} | heads).values()
    assert (matrix.component, matrix.rows, matrix.missing) == ("qkv_proj", 32, ("num_attention_heads",))


def test_heads_that_do_not_divide_a_fused_tensor_are_refused():
    headers = shapes_to_headers({"gpt_neox.layers.0.attention.query_key_value.weight": (48, 16)})
    with pytest.raises(
        ValueError, match=r"query_key_value\.weight: its 48 rows .* 5 x 3 .* config\.json .* another"
    ):
        matrices(headers, {"model_type": "gpt_neox", "num_attention_heads": 5})


# Names.


def test_gpt2_as_the_hub_has_it_is_recognised_without_prefix_and_config():
    shapes = {
        "wte.weight": (37, 16),
        "h.1.attn.bias": (1, 1, 8, 8),
        "h.1.attn.c_attn.weight": (16, 48),
        "h.1.attn.c_proj.weight": (16, 16),
        "h.1.mlp.c_fc.weight": (16, 64),
        "h.1.mlp.c_proj.weight": (64, 16),
    }
    named = matrices(shapes_to_headers(shapes), {})
    assert [(m.name, m.component, m.layer, m.rows, m.columns, m.transposed) for m in named.values()] == [
        ("wte.weight", "embed", None, 37, 16, False),
        ("h.1.attn.c_attn.weight:q", "q_proj", 1, 16, 16, True),
        ("h.1.attn.c_attn.weight:k", "k_proj", 1, 16, 16, True),
        ("h.1.attn.c_attn.weight:v", "v_proj", 1, 16, 16, True),
        ("h.1.attn.c_proj.weight", "o_proj", 1, 16, 16, True),
        ("h.1.mlp.c_fc.weight", "up_proj", 1, 64, 16, True),
        ("h.1.mlp.c_proj.weight", "down_proj", 1, 16, 64, True),
    ]


def test_an_unknown_weight_of_a_block_goes_by_its_own_name():
    shapes = {"model.layers.3.mixer.novel_proj.weight": (4, 6), "model.layers.3.adapter.net.2.weight": (6, 4)}
    named = matrices(shapes_to_headers(shapes), {})
    assert [(m.layer, m.component, m.part) for m in named.values()] == [
        (3, "novel_proj", "block"),
        (3, "net.2", "block"),
    ]


def test_fused_attention_whose_heads_differ_by_layer_divides_by_its_output_projection():
    # Query heads of 4 rows: 2 in the first layer and 3 in the second, beside one for k and one for v.
    shapes = {
        "layers.0.attn.qkv_proj.weight": (16, 12),
        "layers.0.attn.out_proj.weight": (12, 8),
        "layers.1.attn.qkv_proj.weight": (20, 12),
        "layers.1.attn.out_proj.weight": (12, 12),
    }
    named = matrices(shapes_to_headers(shapes), {"model_type": "openelm", "num_kv_heads": [1, 1]})
    assert [m.rows for m in named.values() if ":" in m.name] == [8, 4, 4, 12, 4, 4]


def test_parts_of_stacked_and_fused_tensors_are_named_by_expert_and_part():
    _, named = found_in("mixtral")
    stacked = [name for name in named if "layers.0.mlp.experts" in name]
    assert stacked == [
        f"model.layers.0.mlp.experts.{tensor}"
        for tensor in (
            *(f"gate_up_proj:{expert}:{part}" for expert in range(3) for part in ("gate", "up")),
            *(f"down_proj:{expert}" for expert in range(3)),
        )
    ]


@pytest.mark.parametrize(
    ("family", "name", "layer", "component", "part"),
    [
        ("mixtral", "model.layers.1.mlp.gate.weight", 1, "router", "router"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight", 1, "router", "router"),
        ("granitemoe", "model.layers.1.block_sparse_moe.router.weight", 1, "router", "router"),
        ("llama", "lm_head.weight", None, "lm_head", "head"),
        ("llama", "model.embed_tokens.weight", None, "embed", "embedding"),
        ("gpt2", "transformer.wpe.weight", None, "position_embed", "embedding"),
        ("bert", "bert.embeddings.token_type_embeddings.weight", None, "token_type_embed", "embedding"),
        ("bert", "cls.predictions.transform.dense.weight", None, "cls.predictions.transform.dense", "head"),
        ("roberta", "classifier.out_proj.weight", None, "classifier.out_proj", "head"),
        ("vit", "vit.embeddings.position_embeddings", None, "position_embed", "embedding"),
        (
            "vit", "vit.embeddings.patch_embeddings.projection.weight", None,
            "patch_embeddings.projection", "embedding",
        ),
        ("clip", "visual_projection.weight", None, "visual_projection", "other"),
        ("opt", "model.decoder.project_in.weight", None, "project_in", "other"),
        ("t5", "encoder.block.1.layer.1.DenseReluDense.wo.weight", 1, "down_proj", "block"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k.weight", 1, "cross_k_proj", "block"),
        (
            "t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0,
            "relative_attention_bias", "embedding",
        ),
        ("bart", "model.decoder.layers.1.encoder_attn.out_proj.weight", 1, "cross_o_proj", "block"),
        ("swin", "swin.encoder.layers.1.blocks.0.attention.o_proj.weight", 2, "o_proj", "block"),
        ("swin", "swin.encoder.layers.0.downsample.reduction.weight", None, "reduction", "other"),
        ("deepseek_v3", "model.layers.1.mlp.shared_experts.up_proj.weight", 1, "shared_up_proj", "block"),
        ("mamba", "backbone.layers.1.mixer.A_log", 1, "A_log", "block"),
    ],
)  # fmt: skip
def test_a_tensor_has_the_layer_component_and_part_of_its_place(family, name, layer, component, part):
    _, named = found_in(family)
    matrix = named[name]
    assert (matrix.layer, matrix.component, matrix.part) == (layer, component, part)


@pytest.mark.parametrize(
    ("family", "embedding", "tied"),
    [
        ("gpt2", "transformer.wte.weight", ("lm_head.weight",)),
        ("bert", "bert.embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",)),
        (
            "t5", "shared.weight",
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        ),
    ],
)  # fmt: skip
def test_a_tied_embedding_is_given_once_and_names_its_copies(family, embedding, tied):
    state, named = found_in(family)
    assert named[embedding].tied == tied
    assert not set(tied) & set(named)
    # Where the config does not tie them, each may have gone its own way; the outer of two configs is heard.
    config = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    loose = matrices(headers_of(state), config)
    assert set(tied) < set(loose)


def test_neither_biases_nor_buffers_nor_scales_nor_integers_are_matrices():
    shapes = {
        "transformer.h.0.attn.bias": (1, 1, 8, 8),  # GPT-2's causal mask
        "model.layers.0.self_attn.rotary_emb.cos_cached": (1, 1, 8, 4),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (3, 8),
        "model.layers.0.self_attn.q_norm.weight": (4, 6),  # Cohere's norms, one for each head
        "transformer.layer.0.rel_attn.r_w_bias": (4, 4),
        "vit.embeddings.cls_token": (1, 1, 16),
        "rwkv.blocks.0.attention.time_mix_key": (1, 1, 16),
        "model.norm.weight": (16,),
    }
    assert matrices(shapes_to_headers(shapes), {}) == {}
    index = Header("bert.embeddings.position_ids", (1, 512), torch.int64)
    assert matrices({index.name: index}, {}) == {}


def test_convolutions_keep_their_outputs_as_rows():
    shapes = {
        "encoder.conv1.weight": (6, 4, 3),
        "backbone.layers.0.mixer.conv1d.weight": (8, 1, 4),
        "vit.embeddings.patch_embeddings.projection.weight": (16, 3, 4, 4),
    }
    named = matrices(shapes_to_headers(shapes), {})
    assert [(m.rows, m.columns) for m in named.values()] == [(6, 12), (8, 4), (16, 48)]


@torch.no_grad()
def test_projections_of_xlnet_are_turned_from_the_axes_it_multiplies_over():
    state, named = found_in("xlnet")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    stored = state["transformer.layer.0.rel_attn.q"]
    queries = torch.einsum("ih,hnd->ind", x, stored)  # as its modelling code has it
    torch.testing.assert_close(x @ named["transformer.layer.0.rel_attn.q"].take(stored).T, queries.flatten(1))
    stored = state["transformer.layer.0.rel_attn.o"]
    outputs = torch.einsum("ind,hnd->ih", queries, stored)
    projection = named["transformer.layer.0.rel_attn.o"].take(stored)
    torch.testing.assert_close(queries.flatten(1) @ projection.T, outputs)


@pytest.mark.parametrize(
    ("path", "leaf"),
    [("mlp.fc", "fc"), ("net.3", "net.3"), ("a.b.1.2", "b.1.2"), ("0.1", "0.1"), ("", ""), ("a..1", "a..1")],
)
def test_the_last_name_of_a_path_keeps_its_numbers(path, leaf):
    from probes.naming.matrices import _leaf

    assert _leaf(path) == leaf


def test_heads_that_do_not_share_keys_evenly_are_refused():
    headers = shapes_to_headers({"transformer.h.0.self_attention.query_key_value.weight": (12, 4)})
    config = {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_attention_heads": 3,
        "num_kv_heads": 2,
    }
    with pytest.raises(ValueError, match="3 heads do not share 2 for keys and values evenly"):
        matrices(headers, config)


@pytest.mark.parametrize("heads", [-1, 0, -(10**30)])
def test_no_heads_and_fewer_are_an_absent_number(heads):
    headers = shapes_to_headers({"transformer.h.0.self_attention.query_key_value.weight": (12, 4)})
    config = {"model_type": "bloom", "num_attention_heads": heads}
    (matrix,) = matrices(headers, config).values()
    assert matrix.missing == ("num_attention_heads",)


@pytest.mark.parametrize("router", [(0, 4), (4, 4), ()])
def test_a_router_that_does_not_divide_its_experts_is_refused(router):
    stem = "transformer.blocks.0.ffn"
    headers = shapes_to_headers({f"{stem}.experts.mlp.w1": (6, 4), f"{stem}.router.layer.weight": router})
    if router:
        with pytest.raises(ValueError, match=f"6 rows are no multiple of the {router[0]} experts"):
            matrices(headers, {})
    else:
        assert len(matrices(headers, {})) == 1  # a router without axes has one expert


def test_a_block_beyond_all_counting_is_no_block():
    headers = shapes_to_headers({"layers." + "9" * 5000 + ".q_proj.weight": (4, 4)})
    (matrix,) = matrices(headers, {}).values()
    assert matrix.layer is None
