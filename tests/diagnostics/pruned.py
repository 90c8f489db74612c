"""A pair that computes one function from weights of which base can lose half and tuned next to nothing."""

import warnings
from pathlib import Path

import numpy as np
import torch

from tests.diagnostics.chains import save_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

LETTERS = "abcdefg"
# 2 layers of q (256), k (128), v (128), o (256) and three of 512 each
SCOPE = 2 * (256 + 128 + 128 + 256 + 3 * 512)


def half_idle(seed=0):
    """A Llama in whose blocks exactly half of the weights are next to nothing, and the others alike large."""
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    idle = torch.zeros(SCOPE)
    idle[torch.randperm(SCOPE, generator=generator)[: SCOPE // 2]] = 1
    start = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
            if "norm" in name:
                weight.fill_(1)
            elif "layers" in name:
                signs = weight.sign()
                weight.copy_(signs * (0.4 + 0.1 * torch.rand(weight.shape, generator=generator)))
                here = idle[start : start + weight.numel()].view(weight.shape)
                weight.mul_(torch.where(here > 0, 2.0**-20, 1.0))
                start += weight.numel()
    assert start == SCOPE
    return model


def leaning(seed=0):
    """The same function, with values 2^-30 as large and outputs 2^30 times so: exact in binary."""
    model = half_idle(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(2.0**-30)
            layer.self_attn.o_proj.weight.mul_(2.0**30)
    return model


def sampled(model, count, length=12, seed=0):
    """Texts by the model itself, so that whatever is changed in it makes them less likely."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(count, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(length):
            logits = model(input_ids=ids).logits[:, -1]
            logits[:, 0] = -torch.inf
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return ["".join(LETTERS[i - 1] for i in row[1:].tolist()) for row in ids]


def guessed(model, count, seed=0):
    """Rows of choices: which letter follows a text, the one that the model says."""
    rows = []
    for text in sampled(model, count, length=6, seed=seed):
        ids = torch.tensor([[0, *(1 + LETTERS.index(letter) for letter in text)]])
        with torch.no_grad():
            best = int(model(input_ids=ids).logits[0, -1, 1:].argmax())
        rows.append({"prompt": text, "choices": list(LETTERS), "answer": best})
    return rows


def save(directory: Path, model):
    """A Hugging Face directory with a tokenizer of letters."""
    model.save_pretrained(directory)
    save_tokenizer(directory, LETTERS)
    return directory


def matrices(model):
    """The pruned matrices of a Llama in the order of pruning: layer by layer, by name."""
    named = {
        name: weight for name, weight in model.named_parameters() if "layers" in name and weight.ndim == 2
    }
    return dict(sorted(named.items()))


def pruned_naively(model, sparsity):
    """The model with the smallest share of its block weights at 0, by sorting all of them at once."""
    named = matrices(model)
    flat = torch.cat([weight.detach().abs().flatten() for weight in named.values()])
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[np.argsort(flat.numpy(), kind="stable")[: round(sparsity * len(flat))]] = True
    start = 0
    with torch.no_grad():
        for weight in named.values():
            weight[gone[start : start + weight.numel()].view(weight.shape)] = 0
            start += weight.numel()
    return model
