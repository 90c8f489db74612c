"""Tiny models of many families, made from configs in code, and the matrices found in them."""

import warnings
from functools import cache

import torch

from probes.files.layout import Header
from probes.naming.matrices import matrices

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Tiny models: two blocks, four heads, and sizes of which no two are equal, so that no wrong orientation fits.
TOKENS = {"vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TOKENS | {
    "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
MOE = LLAMA | {
    "num_experts": 3, "num_local_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}  # fmt: skip
MLA = MOE | {
    "q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 2,
}  # fmt: skip
GPT = TOKENS | {
    "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 8, "n_ctx": 8, "n_inner": 28, "rotary_dim": 2,
}  # fmt: skip
BERT = TOKENS | {
    "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 12, "embedding_size": 8, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
T5 = {"vocab_size": 37, "d_model": 16, "d_kv": 3, "d_ff": 28, "num_layers": 2, "num_heads": 4}
BART = TOKENS | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 28, "decoder_ffn_dim": 28, "max_position_embeddings": 12,
}  # fmt: skip

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
PLAIN = ATTENTION | {"up_proj", "down_proj"}
GATED = PLAIN | {"gate_proj"}
CROSS = {f"cross_{component}" for component in ATTENTION}
SHARED = {"shared_gate_proj", "shared_up_proj", "shared_down_proj"}

# The model, its config, and the components that its blocks have together.
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, GATED),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, GATED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA, GATED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA, GATED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", LLAMA, GATED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA, GATED),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA, GATED),
    "cohere": ("CohereForCausalLM", "CohereConfig", LLAMA | {"use_qk_norm": True}, GATED),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", LLAMA, GATED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA, GATED),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", LLAMA, GATED),
    "phi": ("PhiForCausalLM", "PhiConfig", LLAMA, PLAIN),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", LLAMA, PLAIN),
    "opt": ("OPTForCausalLM", "OPTConfig", BERT | {"ffn_dim": 28, "word_embed_proj_dim": 8}, PLAIN),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT, PLAIN),
    "gpt_neo": (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        TOKENS | {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 28,
                  "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 8},
        PLAIN,
    ),
    # Fused.
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, PLAIN),
    "gpt2_cross": ("GPT2LMHeadModel", "GPT2Config", GPT | {"add_cross_attention": True}, PLAIN | CROSS),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, PLAIN),
    "gpt_bigcode_mqa": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT | {"multi_query": True}, PLAIN),
    "gpt_bigcode_mha": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT | {"multi_query": False}, PLAIN),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT, PLAIN),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT, PLAIN),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", BERT, PLAIN),
    "bloom": ("BloomForCausalLM", "BloomConfig", GPT | {"hidden_size": 16}, PLAIN),
    "falcon_rw": ("FalconForCausalLM", "FalconConfig", BERT | {"multi_query": False}, PLAIN),
    "falcon_7b": ("FalconForCausalLM", "FalconConfig", BERT | {"multi_query": True}, PLAIN),
    "falcon_40b": (
        "FalconForCausalLM", "FalconConfig", BERT | {"num_kv_heads": 2, "new_decoder_architecture": True},
        PLAIN,
    ),
    "mpt": (
        "MptForCausalLM", "MptConfig",
        {"vocab_size": 37, "d_model": 16, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2,
         "max_seq_len": 8},
        PLAIN,
    ),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", BERT | {"qk_layernorm": False}, PLAIN),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA, GATED),
    "glm": ("GlmForCausalLM", "GlmConfig", LLAMA, GATED),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", LLAMA, GATED),
    "dbrx": (
        "DbrxForCausalLM", "DbrxConfig",
        {"vocab_size": 37, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 8,
         "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 99.0},
         "ffn_config": {"ffn_hidden_size": 10, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 16}},
        GATED,
    ),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", MOE | {"kv_channels": 6}, GATED),
    "minimax": (
        "MiniMaxForCausalLM", "MiniMaxConfig", MOE | {"layer_types": ["linear_attention", "full_attention"]},
        GATED | {"output_gate"},
    ),
    # Encoders.
    "bert": ("BertForMaskedLM", "BertConfig", BERT, PLAIN),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", BERT, PLAIN),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", BERT, PLAIN),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", BERT, PLAIN),
    "deberta": ("DebertaForMaskedLM", "DebertaConfig", BERT, PLAIN),
    "deberta-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", BERT, PLAIN),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": 37, "dim": 16, "hidden_dim": 28, "n_layers": 2, "n_heads": 4,
         "max_position_embeddings": 12},
        PLAIN,
    ),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", BERT, GATED),
    "xlnet": (
        "XLNetLMHeadModel", "XLNetConfig",
        {"vocab_size": 37, "d_model": 16, "n_layer": 2, "n_head": 4, "d_head": 4, "d_inner": 28},
        PLAIN | {"r"},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, PLAIN),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
         "window_size": 2},
        PLAIN,
    ),
    "clip": (
        "CLIPModel", "CLIPConfig", {"text_config": BERT, "vision_config": VIT, "projection_dim": 7}, PLAIN
    ),
    # Encoders with decoders.
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, PLAIN | CROSS),
    "t5_gated": (
        "T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}, GATED | CROSS
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, PLAIN | CROSS),
    "moonshine": (
        "MoonshineForConditionalGeneration", "MoonshineConfig",
        {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 28, "encoder_num_hidden_layers": 2,
         "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
         "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        GATED | CROSS,
    ),
    # Experts.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MOE, GATED),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 6}, GATED | SHARED
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE, GATED),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {"text_config": MOE, "vision_config": {
            "hidden_size": 16, "depth": 2, "num_heads": 4, "intermediate_size": 28, "out_hidden_size": 16,
            "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}},
        GATED,
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", MOE, GATED),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config", MLA,
        GATED - ATTENTION | SHARED | {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", MOE, GATED),
    "openai_privacy_filter": (
        "OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig", MOE, GATED
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        MOE | {"intermediate_size_mlp": 36, "interleave_moe_layer_step": 1}, GATED | SHARED,
    ),
    "aria": (
        "AriaTextForCausalLM", "AriaTextConfig", MOE | {"moe_num_experts": 3, "moe_topk": 2}, GATED | SHARED
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", MOE, GATED),
    # No attention.
    "mamba": (
        "MambaForCausalLM", "MambaConfig",
        TOKENS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 3},
        {"in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj"},
    ),
}  # fmt: skip


@cache
def model_of(family):
    """The family's model with every parameter random, biases too, so that nothing agrees by being zero."""
    model_class, config_class, settings, _ = FAMILIES[family]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def headers_of(state):
    return {name: Header(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def found_in(family):
    model = model_of(family)
    state = model.state_dict()
    return state, matrices(headers_of(state), model.config.to_dict())
