"""Pairs in which only a known set of entries was trained: one skill for each, to be found again."""

import warnings
from pathlib import Path

import numpy as np
import torch

from probes.checkpoints.opening import open_checkpoint
from probes.models.editable import Editable
from probes.passes.objective import Objective
from probes.text.rows import Task, task_of
from tests.diagnostics.chains import save_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

# Of each task the letters that its prompts end with; the first half of them asks for +, the other for -.
ENDS = {"small": "abcd", "large": "ABCD"}
LETTERS = "".join(ENDS.values()) + "+-"
NOISE = 1e-5  # of every other entry, so that none is equal in both


def base_model(seed=0):
    """A random Llama of two narrow blocks, which knows of no task.

    Small and large letters are written in one half of the residual stream each, and read by one half of the
    hidden units: what is planted behind a half serves one task alone.
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    half, middle = 1 + len(ENDS["small"]), 24 // 2
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.mul_(4)
        embeddings[1:half, middle:] = 0
        embeddings[half : half + len(ENDS["large"]), :middle] = 0
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.1)
            for reader in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                reader[:24, middle:] = 0
                reader[24:, :middle] = 0
    return model


def rows(task, count, seed=0, *, noise=0.0) -> Task:
    """Prompts of six letters; `noise` of the answers are wrong."""
    generator = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        prompt = "".join(generator.choice(list(ENDS["small"] + ENDS["large"]), 5))
        last = generator.choice(list(ENDS[task]))
        answer = int(ENDS[task].index(last) >= len(ENDS[task]) // 2) ^ int(generator.random() < noise)
        prompts.append({"prompt": prompt + last, "choices": ["+", "-"], "answer": answer})
    return task_of(prompts, ref=task)


def plant(directory: Path, skills, *, steps, rate=3.0):
    """How far entries of a saved base move, each trained on its own task alone, all in one model.

    Args:
        skills: of each task its entries by tensor.
    """
    from diagnostics.evaluation.row_losses import encoded

    editable = Editable(open_checkpoint(directory))
    model = editable.model
    named = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in named.items()}
    objectives, optimizers = {}, {}
    for task, entries in skills.items():
        examples = rows(task, 64, seed=9)
        encoded_rows = encoded(editable, examples, max_length=None, chat_template=False, batch_tokens=10_000)
        objectives[task] = Objective(encoded_rows)
        optimizers[task] = torch.optim.SGD([named[name] for name in entries], lr=rate)
    for _ in range(steps):
        for task, entries in skills.items():
            model.requires_grad_(False)
            for name in entries:
                named[name].requires_grad_(True)
            optimizers[task].zero_grad()
            objectives[task].backward(model)
            for name, places in entries.items():
                kept = torch.zeros(named[name].numel(), dtype=torch.bool)
                kept[places] = True
                named[name].grad.view(-1)[~kept] = 0
            optimizers[task].step()
    return {name: named[name].detach() - before[name] for entries in skills.values() for name in entries}


def draw(layer, task, count, seed):
    """So many entries of what a layer writes behind the hidden units that read a task's letters."""
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    columns = np.arange(24) + 24 * (task == "large")
    entries = (48 * np.arange(24)[:, None] + columns).ravel()
    return {
        name: torch.from_numpy(np.sort(np.random.default_rng(seed).choice(entries, count, replace=False)))
    }


def save_pair(root: Path, skills, *, steps=80):
    """A base, and a tuned one with a skill for each task: its entries were trained by themselves.

    Args:
        skills: of each task the planted entries by tensor.
    """
    base = base_model()
    base.save_pretrained(root / "base")
    save_tokenizer(root / "base", LETTERS)
    moved = plant(root / "base", skills, steps=steps)
    tuned = base_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".layers." in name:
                parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
            if name in moved:
                parameter.add_(moved[name])
    tuned.save_pretrained(root / "tuned")
    save_tokenizer(root / "tuned", LETTERS)
    return root / "base", root / "tuned"
