"""How transformer families name and store their weights, after their modelling code; without `.weight`."""

from typing import Literal, NamedTuple

from probes.files.layout import Part


def _by_path(table: dict[str, str]) -> dict[str, str]:
    return {path: component for component, paths in table.items() for path in paths.split()}


# Paths inside a block. The longest that ends a tensor's path names its component; a tensor whose path ends in
# none of these, nor of FUSED, is named by its own last segment (`in_proj`, `kv_a_proj_with_mqa`, `A_log`…).
IN_BLOCK = _by_path(
    {
        "q_proj": """
            q_proj query q_lin query_proj q_head linear_q wq Wq q_attn to_q attn.q rel_attn.q SelfAttention.q
            EncDecAttention.q LocalSelfAttention.q TransientGlobalSelfAttention.q
            self_attention.experts.input_linear""",
        "k_proj": """
            k_proj key k_lin key_proj k_head linear_k wk Wk to_k attn.k rel_attn.k SelfAttention.k
            EncDecAttention.k LocalSelfAttention.k TransientGlobalSelfAttention.k""",
        "v_proj": """
            v_proj value v_lin value_proj v_head linear_v wv Wv to_v attn.v rel_attn.v SelfAttention.v
            EncDecAttention.v LocalSelfAttention.v TransientGlobalSelfAttention.v""",
        "o_proj": """
            o_proj out_lin linear_out to_out post_proj attn_out attn.o attn.Wo attn.proj attn.c_proj
            attn.out_proj self_attn.Wo self_attn.dense self_attn.output self_attn.out_proj
            self_attn.projection cross_attn.out_proj encoder_attn.out_proj crossattention.c_proj
            crossattention.output.dense attention.wo attention.dense attention.output attention.output.dense
            attention.out_proj attention.proj attention.projection_layer self_attention.dense
            multi_head_attention.dense rel_attn.o SelfAttention.o EncDecAttention.o LocalSelfAttention.o
            TransientGlobalSelfAttention.o self_attention.experts.output_linear""",
        "gate_proj": "gate_proj wi_0 w1 experts.mlp.w1",
        "up_proj": """
            up_proj fc1 fc_in c_fc lin1 linear1 linear_1 linear_fc1 intermediate.dense intermediate_dense
            feed_forward.intermediate dense_h_to_4h wi wi_1 w3 proj_up pwconv1 mlp.dense1 mlp.proj_in
            mlp.in_proj experts.mlp.v1 feed_forward.key ffn ffn.0 ff.layer_1""",
        "down_proj": """
            down_proj fc2 fc_out mlp.c_proj lin2 linear2 linear_2 linear_fc2 output.dense output_dense
            feed_forward.output dense_4h_to_h wo w2 proj_down pwconv2 mlp.dense2 mlp.proj_out mlp.out_proj
            mlp.Wo experts.mlp.w2 feed_forward.value ffn_output ffn.2 ff.layer_2 ff_out output_linear""",
        "router": """
            router router.layer router.classifier router.gate mlp.gate mixer.gate moe.gate feed_forward.gate
            block_sparse_moe.gate gate.wg shared_expert_gate""",
    }
)
# What a leaf means only where the same module has a `c_proj` too: Qwen 1 activates w2, not w1.
BESIDE_C_PROJ = {"w1": "up_proj", "w2": "gate_proj"}
# A second attention or feed-forward of the same block is another component: `cross_q_proj`, `shared_up_proj`.
VARIANTS = {
    "cross_": {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention"},
    "shared_": {"shared_expert", "shared_experts", "shared_mlp"},
}
PARTS: dict[str, Part] = {
    "router": "router", "relative_attention_bias": "embedding", "relative_position_bias_table": "embedding",
    "rel_pos_h": "embedding", "rel_pos_w": "embedding",
}  # fmt: skip

# Last segments of embedding tables, wherever they stand.
EMBEDDINGS = _by_path(
    {
        "embed": """
            embed_tokens wte word_embeddings word_embedding embed_in tok_embeddings token_embedding
            tokens_embed embeddings shared""",
        "position_embed": """
            wpe position_embeddings position_embedding embed_positions positions_embed
            positional_embedding""",
        "token_type_embed": "token_type_embeddings",
    }
)
UNEMBEDDING = (
    r"(?:^|\.)(?:(?:generator_)?lm_head(?:\.decoder|\.out_proj)?|embed_out|output_layer|predictions\.decoder"
    r"|vocab_projector|pred_layer\.proj)$|^(?:output|decoder|lm_loss|proj_out|output_projection)$"
)
HEAD = r"(?:^|[._])(?:heads?|score|classifier|pooler|qa_outputs|cls|predictions|vocab_\w+|logits)(?:\.|$)"

# Blocks count from 0; those inside stages (Swin, ALBERT's groups) count on from stage to stage.
STAGED = (
    r"(?:layers|stages?|albert_layer_groups)\.\d{1,9}\.(?:blocks|layers|albert_layers)"
    r"|block\.\d{1,9}(?=\.\d{1,9}\.)"
)
PLAIN = (
    r"(?!conv_|in_|res_skip_|fpn_|scale_)\w*layers?|h|blocks?|resblocks|attentions|ffns|encoders|self_attends"
)
BLOCK = rf"(?:^|\.)((?:{STAGED}|{PLAIN})\.\d{{1,9}})\.(?!weight$|bias$)"

NOT_WEIGHTS = (
    r"(?i)(?:^|[._])(?:bias(?:es)?|bias_[a-z]|inv_freq|(?:cos|sin)_cached|causal_mask|freqs_cis"
    r"|(?:query|key|diagonal)_decay)$|norm\d*(?:\.weight)?$|(?:^|\.)ln_\w+\.weight$"
)

# Buffers that old releases stored with the weights.
BUFFERS = (
    r"(?:inv_freq|(?:cos|sin)_cached|causal_mask|masked_bias|freqs_cis|position_ids|relative_position_index)$"
)


class Fused(NamedTuple):
    """The order of a fused tensor's parts, and what it repeats for, in models of these types and this switch.

    The gate is the half that the activation is applied to, whatever the modelling code calls it.
    """

    order: tuple[str, ...]
    per: Literal["tensor", "head", "kv head", "rank", "row", "unknown"] = "tensor"
    types: tuple[str, ...] = ()
    when: tuple[str, bool] | None = None


_QKV, _KV, _GATED = ("q", "k", "v"), ("k", "v"), ("gate", "up")
# The component of a fused tensor that is left whole.
WHOLE = {frozenset(_QKV): "qkv_proj", frozenset(_KV): "kv_proj", frozenset(_GATED): "gate_up_proj"}

# By path; the first layout whose types and switch agree with the config. One without types fits every model.
FUSED: dict[str, tuple[Fused, ...]] = {
    "query_key_value": (
        Fused(_QKV, "kv head", ("falcon",), ("new_decoder_architecture", True)),
        Fused(_QKV, "kv head", ("RefinedWeb",)),
        Fused(_QKV, "head", ("falcon", "RefinedWebModel"), ("multi_query", False)),
        Fused(_QKV, "tensor", ("falcon", "RefinedWebModel")),
        Fused(_QKV, "tensor", ("chatglm",), ("multi_query_attention", True)),
        Fused(_QKV, "head", ("chatglm", "gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")),
        Fused(_QKV, "unknown"),
    ),
    "wqkv": (Fused(_QKV, "kv head", ("internlm2",)), Fused(_QKV, "unknown")),
    "qkv_proj": (
        Fused(("q", "v", "k"), "rank", ("codegen",)),
        Fused(_QKV, "head", ("minimax", "minimax_text_01")),
        Fused(_QKV),
    ),
    "c_attn": (Fused(_QKV, "head", ("gpt_bigcode",), ("multi_query", False)), Fused(_QKV)),
    "attention.self.in_proj": (Fused(_QKV, "head"),),  # DeBERTa
    **dict.fromkeys(
        ("qkv", "Wqkv", "W_pack", "att_proj", "qkv_linear", "to_qkv", "in_proj_weight"), (Fused(_QKV),)
    ),
    **dict.fromkeys(("kv_proj", "to_kv", "crossattention.c_attn"), (Fused(_KV),)),
    **dict.fromkeys(
        ("gate_up_proj", "experts.gate_up_proj", "Wi", "input_linear", "weights_in"), (Fused(_GATED),)
    ),
    "experts.fc1": (Fused(_GATED),),  # Aria
    "feed_forward_in.gate_up_proj": (Fused(("up", "gate")),),  # Phi-4's audio encoder
    "feed_forward_out.gate_up_proj": (Fused(("up", "gate")),),
    "ff_proj": (Fused(("up", "gate")),),  # OLMo before it came to transformers
    "fc1": (Fused(("up", "gate"), "tensor", ("moonshine", "moonshine_streaming")),),
    "dense_h_to_4h": (Fused(_GATED, "tensor", ("chatglm",)),),
}
# Experts with a bias come in two orders.
FUSED_WITH_BIAS = {
    "experts.gate_up_proj": (
        Fused(_GATED, "row", ("gpt_oss",)),
        Fused(_GATED, "tensor", ("openai_privacy_filter",)),
        Fused(_GATED, "unknown"),
    )
}
CODEGEN_RANKS = 4  # the accelerators that CodeGen was trained on, frozen into its layout
HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KV_HEAD_KEYS = ("num_kv_heads", "n_head_kv", "multi_query_group_num", "num_key_value_heads")

# Stored as (in, out): Conv1D of GPT-2 and its kin (where the shapes say so), and products written x @ W.
CONV1D = r"\.(?:c_attn|c_proj|c_fc|q_attn)\.weight$"
TRANSPOSED = r"rel_attn\.[qkvr]$|experts\.mlp\.w2$|mm_input_projection_weight$"
# Stacks of experts with an axis of their own, and DBRX's, one expert below the other.
STACK = r"\.(?:shared_)?experts\.|\.(?:in|out)put_linear\.weight$"
ROWS_OF_EXPERTS = r"\.experts\.mlp\.(?:w1|v1|w2)$"

# The norm that a block's experts and their router read through, as its neighbours call it; the first that
# there is. One behind the experts instead says that there is none before them.
NORM_BEFORE_EXPERTS = (
    "pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ffn_norm",
    "post_attention_layernorm",
)  # fmt: skip
NORM_BEHIND_EXPERTS = "post_feedforward_layernorm"
# Models with routers whose norms multiply by one more than their weight.
GAIN_FROM_ONE = {
    "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text", "minimax_m3_vl",
    "muse_spark", "step3p7",
}  # fmt: skip
