"""Tiny models that run, made from configs in code, and rows of token ids for them."""

import warnings
from functools import cache
from pathlib import Path

import torch

from probes.text.batches import Example, batches

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, LAYERS = 41, 2
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TOKENS | {
    "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip
MOE = LLAMA | {
    "num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 6,
}  # fmt: skip
# Of its six experts two groups of three, of which a token chooses in one; the first block has none.
DEEPSEEK = MOE | {
    "n_routed_experts": 6, "num_experts": 6, "num_local_experts": 6, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
    "n_shared_experts": 1, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
    "v_head_dim": 4, "num_key_value_heads": 4, "head_dim": 2,
}  # fmt: skip
GPT = TOKENS | {"n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 32, "n_inner": 28}
BERT = TOKENS | {
    "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 32, "embedding_size": 8,
}  # fmt: skip

FAMILIES = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", BERT),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    "olmoe": ("OlmoeForCausalLM", MOE),
    "mixtral": ("MixtralForCausalLM", MOE),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK | {"norm_topk_prob": True}),
    "granitemoe": ("GraniteMoeForCausalLM", MOE),
    "gpt_oss": ("GptOssForCausalLM", MOE),
    "bert": ("BertForMaskedLM", BERT),
    # Logits that the head does not give alone.
    "cohere": ("CohereForCausalLM", LLAMA | {"logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", LLAMA | {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    # Bodies that are called in other ways.
    "opt": ("OPTForCausalLM", BERT | {"ffn_dim": 28, "word_embed_proj_dim": 8}),
    "bloom": ("BloomForCausalLM", TOKENS | {"hidden_size": 16, "n_layer": LAYERS, "n_head": 4}),
    "mamba": ("MambaForCausalLM", TOKENS | {"hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 3}),
    "mamba2": (
        "Mamba2ForCausalLM",
        TOKENS
        | {
            "hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4, "num_heads": 4, "head_dim": 8,
            "n_groups": 2, "chunk_size": 8,
        },
    ),  # whose config.json holds an infinity
    # Without a bridge, or with one that gives other logits.
    "persimmon": ("PersimmonForCausalLM", BERT | {"qk_layernorm": False}),
    "stablelm": ("StableLmForCausalLM", LLAMA),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT),
    "albert": ("AlbertForMaskedLM", BERT),
    "xlnet": (
        "XLNetLMHeadModel",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": LAYERS, "n_head": 4, "d_inner": 28},
    ),
    "roberta": ("RobertaForMaskedLM", BERT),
    # Classifiers.
    "bert_classes": ("BertForSequenceClassification", BERT | {"num_labels": 3}),
    "roberta_classes": ("RobertaForSequenceClassification", BERT | {"num_labels": 3}),
    "llama_classes": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3}),
    "gpt2_classes": ("GPT2ForSequenceClassification", GPT | {"num_labels": 3, "pad_token_id": None}),
}  # fmt: skip


def make(family, seed=0, **settings):
    """A family's model with every parameter random, so that nothing agrees by being zero; in eval mode."""
    name, config = FAMILIES[family]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config | settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


@cache
def model_of(family):
    """A family's model, made once: to be left as it is."""
    return make(family)


def rows_of(*lengths, seed=0, skip=1):
    """Examples of random ids, none of them special; all but the first `skip` tokens of each are scored."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(
            ids=torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(),
            scored=[position >= skip for position in range(length)],
            row=row,
        )
        for row, length in enumerate(lengths)
    ]


def batch_of(*lengths, side="right", **how):
    """One batch of such examples."""
    (batch,) = batches(rows_of(*lengths, **how), pad_id=0, side=side)
    return batch


def state_of(model):
    """All that a model is: its tensors and where they lie, its modules, their modes, hooks and settings."""
    tensors = {
        name: (tensor.clone(), tensor.data_ptr(), tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    kept = ("_parameters", "_buffers", "_modules")
    modules = {
        name: (module, {key: _copied(value) for key, value in vars(module).items() if key not in kept})
        for name, module in model.named_modules()
    }
    return tensors, modules, model.config.to_dict()


def _copied(value):
    return dict(value) if isinstance(value, dict) else value


def assert_same(before, after):
    """Hold two states against each other, bit for bit."""
    assert before[0].keys() == after[0].keys()
    for name, (tensor, *rest) in before[0].items():
        assert torch.equal(tensor, after[0][name][0])
        assert rest == list(after[0][name][1:]), name
    assert before[1] == after[1]
    assert before[2] == after[2]


def saved(model, directory: Path) -> str:
    """Write a model as a Hugging Face directory."""
    model.save_pretrained(directory)
    return str(directory)
