"""The inputs of contests: pairs of checkpoints and rows of text, seeded and written as files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

VOCABULARY = 8192


def llama(width: int, layers: int, vocabulary: int = VOCABULARY) -> Any:
    """A config of Llama's proportions."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), vocab_size=vocabulary, max_position_embeddings=512,
        tie_word_embeddings=False,
    )  # fmt: skip


def spectral_pair(folder: Path, *, width: int, layers: int, dtype: torch.dtype = torch.float32) -> None:
    """A pair whose block matrices have the spectra of trained ones, with four planted directions in tuned."""
    from tests.benchmarks.decision import trained_like

    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (width * 11 // 4, width) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (width, width * 11 // 4)
    generator = torch.Generator().manual_seed(0)
    norm = torch.ones(width, dtype=dtype)
    embedding = torch.randn(512, width, generator=generator).to(dtype)
    sides: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for side in sides.values():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            side[name] = embedding.clone()
        side["model.norm.weight"] = norm.clone()
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            for side in sides.values():
                side[f"model.layers.{layer}.{name}.weight"] = norm.clone()
        for name, shape in shapes.items():
            _, base, tuned = trained_like(*shape, small_end=False, generator=generator)
            for side, W in (("base", base), ("tuned", tuned)):
                sides[side][f"model.layers.{layer}.{name}.weight"] = W.to(dtype)
    for side, tensors in sides.items():
        (folder / side).mkdir()
        save_file(tensors, folder / side / "model.safetensors", metadata={"format": "pt"})
        config = llama(width, layers, vocabulary=512)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / side)


def moved(folder: Path, *, width: int, layers: int, steps: int = 1, noise: float = 2e-3) -> None:
    """A random Llama at `base` and models that moved on from it: `tuned`, or `tuned-1`, `tuned-2` …"""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(width, layers))
    model.save_pretrained(folder / "base")
    words(folder / "base")
    for step in range(1, steps + 1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".layers." in name:
                    parameter.add_(noise * torch.randn_like(parameter))
        out = folder / ("tuned" if steps == 1 else f"tuned-{step}")
        model.save_pretrained(out)
        words(out)


def words(folder: Path, size: int = VOCABULARY) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({f"w{word}": word for word in range(size)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0", pad_token="w0").save_pretrained(folder)


def texts(file: Path, rows: int, *, median: int = 40, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
    """Rows of random words, their lengths log-normal about a median."""
    draw = np.random.default_rng(seed)
    lengths = (median * draw.lognormal(0, 0.5, rows)).clip(4, 256).astype(int)
    lines = [
        json.dumps({"text": " ".join(f"w{word}" for word in draw.integers(1, vocabulary, length))})
        for length in lengths.tolist()
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def batched(folder: Path, file: Path, rows: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and attention mask of rows in the file's order, padded on the right: the usual data loader."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    lines = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    padded_batches = []
    for start in range(0, len(lines), rows):
        given = tokenizer(lines[start : start + rows], return_tensors="pt", padding=True)
        padded_batches.append((given["input_ids"], given["attention_mask"]))
    return padded_batches


def loaded(folder: Path) -> Any:
    """A model as transformers loads it, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_likelihoods(
    model: Any, padded_batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[list[float], int, int]:
    """The log-likelihood of every row, the tokens scored, and how many of them were the likeliest."""
    sums: list[float] = []
    tokens = right = 0
    with torch.no_grad():
        for ids, mask in padded_batches:
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            logs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            scored = mask[:, 1:].bool()
            sums += (logs.double() * scored).sum(1).tolist()
            tokens += int(scored.sum())
            right += int(((logits.argmax(-1) == ids[:, 1:]) & scored).sum())
    return sums, tokens, right
