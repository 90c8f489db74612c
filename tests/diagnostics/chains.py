"""Tiny causal language models with a tokenizer of characters, some of them Markov chains to the letter."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ALPHABET = "abc"


def save_tokenizer(
    directory: Path, characters: str, *, bos: bool = True, words: Sequence[str] = (), merged: bool = True
) -> None:
    """A tokenizer of single characters: id 0 begins every text, the characters follow from 1.

    Pairs of characters, `words`, follow these; only where `merged` are they ever split off.
    """
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<s>", *characters, *words])}
    merges = [(word[0], word[1]) for word in words if merged]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(
        directory
    )


def save_llama(
    directory: Path,
    *,
    seed: int,
    characters: str,
    shift: float = 0.0,
    rows: int | None = None,
    width: int = 16,
) -> Path:
    """A random Llama of two layers; `shift` moves all of its weights by noise of that size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows or len(characters) + 1, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shift * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    save_tokenizer(directory, characters)
    return directory


def save_chain(directory: Path, chain: Sequence[Sequence[float]], *, longest: int = 64) -> Path:
    """A Llama whose next character depends on the last alone: `chain[i][j]` is p(j | i), row 0 after the BOS.

    Its one layer adds nothing. Embeddings are unit vectors, which the last norm makes √d long; the head holds
    log-probabilities over √d.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    d = len(ALPHABET) + 1
    config = LlamaConfig(
        vocab_size=d, hidden_size=d, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=longest, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    probabilities = np.full((d, d), 1e-30)
    probabilities[:, 1:] = np.maximum(chain, 1e-30)
    with torch.no_grad():
        for parameter in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            parameter.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(1000 * torch.eye(d))  # so that the norm's epsilon is nothing
        model.lm_head.weight.copy_(torch.tensor(np.log(probabilities).T / math.sqrt(d)))
    model.save_pretrained(directory)
    save_tokenizer(directory, ALPHABET)
    return directory


def constant(*probabilities: float) -> list[list[float]]:
    """A chain without memory."""
    return [list(probabilities)] * (len(ALPHABET) + 1)
