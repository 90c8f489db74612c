"""Make the bundled checkpoints: a small base, a full fine-tune and two LoRA fine-tunes.

    python examples/make_bundled.py --out bundled

The base is a Llama of a million weights that has read what every Python carries: the documentation strings of
the standard library, and `pydoc_data.topics`. The task has a right answer: do these ten words or so stand in
the order in which they were written? Every fine-tune stops at the same loss on validation rows, so that their
weights differ by how they were tuned and not by what they learned.

A quarter of an hour on one core. The same Python, torch and processor make the same files; another Python
carries other text.
"""

import argparse
import json
import os
import platform
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from library_text import (
    CHOICES,
    SEED,
    Row,
    documentation,
    keep_rows,
    library,
    random_words,
    read_by_base,
    source_code,
    task_rows,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diagnostics import intruder_dimensions
from probes import CheckpointPair

CONTEXT = 128
BASE_STEPS = 800
# Loss at which every fine-tune stops: nats of the right choice of two, mean of the last evaluations, because
# single ones jump. Chance is ln 2 = 0.69.
TARGET, EVALUATIONS = 0.45, 3


@dataclass(frozen=True)
class Recipe:
    """A way of tuning the linear weights of the blocks; rank None tunes them directly. Alpha is 2 r."""

    name: str
    lr: float
    rank: int | None = None


RECIPES = (Recipe("full", lr=3e-4), Recipe("lora-r1", lr=1e-2, rank=1), Recipe("lora-r8", lr=2e-3, rank=8))


# Models


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 1536 tokens; the start of a text is marked as in Llama's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=256
    )


def made_base(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Four layers of width 128, trained on the concatenated texts."""
    ids = torch.tensor([token for text in texts for token in tokenizer(text, verbose=False).input_ids])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=BASE_STEPS, pct_start=0.05)
    order = torch.empty(0, dtype=torch.long)
    for done in range(BASE_STEPS):
        if len(order) < 32:
            order = torch.randperm(len(windows))
        batch, order = windows[order[:32]], order[32:]
        loss = model(batch, labels=batch).loss
        descend(loss, model, optimizer)
        schedule.step()
        if done % 100 == 0:
            print(f"base, step {done} of {BASE_STEPS}: {loss:.2f} nats per token", flush=True)
    return model


def descend(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step down the clipped gradient."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Encoded:
    """Rows as token ids: the prompts, and the token of each choice."""

    def __init__(self, rows: list[Row], tokenizer: PreTrainedTokenizerFast):
        choices = [tokenizer(choice, add_special_tokens=False).input_ids for choice in CHOICES]
        for choice, ids in zip(CHOICES, choices, strict=True):
            if len(ids) != 1:
                raise ValueError(f"{choice!r} is {len(ids)} tokens in this vocabulary; choose another word")
        self.choices = torch.tensor(choices)[:, 0]
        self.prompts = [torch.tensor(tokenizer(row["prompt"]).input_ids) for row in rows]
        self.answers = torch.tensor([row["answer"] for row in rows])

    def choice_logits(self, model: LlamaForCausalLM) -> Tensor:
        """Logits of the choices (rows, choices) after each prompt."""
        ends = torch.tensor([len(prompt) - 1 for prompt in self.prompts])
        with torch.no_grad():
            hidden = model.model(pad_sequence(self.prompts, batch_first=True)).last_hidden_state
            return model.lm_head(hidden[torch.arange(len(ends)), ends])[:, self.choices]

    def choice_loss(self, model: LlamaForCausalLM) -> float:
        """Mean loss of the right choice among the choices, in nats."""
        return float(cross_entropy(self.choice_logits(model), self.answers))

    def accuracy(self, model: LlamaForCausalLM) -> float:
        """Share of rows whose likeliest choice is the right one."""
        return float((self.choice_logits(model).argmax(-1) == self.answers).float().mean())

    def batches(self, per_choice: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless batches: ids, labels of prompts and of answers; `per_choice` rows for each choice."""
        draw = random.Random(SEED)
        of_choice = [(self.answers == i).nonzero().flatten().tolist() for i in range(len(self.choices))]
        while True:
            chosen = [row for rows in of_choice for row in draw.sample(rows, per_choice)]
            ends = self.choices[self.answers[chosen]]
            texts = [torch.cat([self.prompts[row], end[None]]) for row, end in zip(chosen, ends, strict=True)]
            labels = pad_sequence(texts, batch_first=True, padding_value=-100)[:, 1:]
            last = torch.tensor([len(text) - 2 for text in texts])[:, None]
            answers = torch.full_like(labels, -100).scatter(1, last, ends[:, None])
            yield pad_sequence(texts, batch_first=True)[:, :-1], labels.scatter(1, last, -100), answers


def tuned(recipe: Recipe, base: Path, train: Encoded, validation: Encoded) -> tuple[nn.Module, int]:
    """A fine-tune of the base that has just reached TARGET, and its number of steps."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    wrapped: nn.Module = model
    if recipe.rank is None:
        for name, weight in model.named_parameters():
            weight.requires_grad_("_proj" in name)
    else:
        torch.manual_seed(SEED)
        components = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=components, task_type="CAUSAL_LM"
            ),
        )
    optimizer = torch.optim.AdamW(
        [p for p in wrapped.parameters() if p.requires_grad], recipe.lr, weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20))
    losses: list[float] = []
    for done, (ids, prompts, answers) in zip(count(), train.batches(), strict=False):
        if done % 10 == 0:
            losses.append(validation.choice_loss(model))
            print(f"{recipe.name}, step {done}: {losses[-1]:.3f} nats per choice", flush=True)
            # Itself below as well: the last model is the one that is kept.
            if max(losses[-1], mean(losses[-EVALUATIONS:])) <= TARGET:
                return wrapped, done
        logits = model(ids).logits.mT
        descend(cross_entropy(logits, prompts) + cross_entropy(logits, answers), wrapped, optimizer)
        schedule.step()
    raise AssertionError("batches are endless")


# Files


def save_rows(path: Path, rows: list[Row]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """What `save_rows` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def save(model: nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save a model in bfloat16 with its tokenizer, or an adapter without paths of this machine."""
    if not isinstance(model, PeftModel):
        model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return
    # Else peft asks the hub whether the vocabulary was resized.
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()
    settings = directory / "adapter_config.json"
    config = json.loads(settings.read_text())
    config |= {"base_model_name_or_path": "../base", "target_modules": sorted(config["target_modules"])}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def opened(out: Path, name: str) -> LlamaForCausalLM:
    """A saved model in float32, an adapter merged."""
    full = not (out / name / "adapter_config.json").exists()
    model = LlamaForCausalLM.from_pretrained(out / (name if full else "base"), dtype=torch.float32)
    return model if full else PeftModel.from_pretrained(model, out / name).merge_and_unload()


def text_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Mean loss on the rows' texts, in nats per token."""
    ids = [torch.tensor(tokenizer(row["text"]).input_ids) for row in rows]
    labels = pad_sequence(ids, batch_first=True, padding_value=-100)
    with torch.no_grad():
        return float(model(pad_sequence(ids, batch_first=True), labels=labels).loss)


README = """\
# The bundled checkpoints

`base` is a Llama of {parameters:,} weights (4 layers, width 128, bfloat16) with its own tokenizer. It was
trained for {steps} steps on the documentation strings of Python {python}'s standard library and on
`pydoc_data.topics`. `full`, `lora-r1` and `lora-r8` are fine-tunes of it on one task: whether eight to twelve
words stand in the order in which they were written, or were shuffled. Only the 28 linear matrices of the
blocks were tuned; LoRA with alpha = 2 r. Each stopped as soon as its loss on 720 validation rows was {target}
nats per choice in the mean of {evaluations} evaluations (chance is 0.69); below are {task} other rows.

| | lr | steps | task accuracy | task nats per choice | keep | {oods} | intruders |
|---|---|---|---|---|---|{lines}---|
{table}

Task figures are of `task.jsonl`; the others are nats per token. Intruders: k = 10, epsilon = 0.5, of 280
directions, by `tunescope audit base full`, or `lora-r1`, `lora-r8`.

| file | rows | what |
|---|---|---|
| `task.jsonl` | {task} | held-out task rows, half of them in order; neither base nor tuned has seen them |
| `keep.jsonl` | {keep} | documentation that neither base nor tuned has seen |
| `ood-words.jsonl` | {words} | words of the documentation in random order |
| `ood-code.jsonl` | {code} | functions of the standard library |

Made by `examples/make_bundled.py`, which runs in minutes on a CPU. The texts are Python's: copyright © 2001
Python Software Foundation, all rights reserved, under the PSF License Agreement (`LICENSE-PSF.txt`); excerpts
were cut and put on one line.
"""


def described(out: Path, tokenizer: PreTrainedTokenizerFast, steps: dict[str, int]) -> str:
    """The README, with measurements of the saved files."""
    rows = {path.stem: read_rows(path) for path in sorted(out.glob("*.jsonl"))}
    task = Encoded(rows["task"], tokenizer)
    texts = ["keep", *(name for name in rows if name.startswith("ood-"))]
    lines = []
    for name in ("base", *(recipe.name for recipe in RECIPES)):
        model = opened(out, name)
        recipe = next((recipe for recipe in RECIPES if recipe.name == name), None)
        cells = [f"`{name}`", f"{recipe.lr:g}" if recipe else "", str(steps.get(name, ""))]
        cells += [f"{task.accuracy(model):.3f}", f"{task.choice_loss(model):.3f}"]
        cells += [f"{text_loss(model, tokenizer, rows[text]):.2f}" for text in texts]
        pair = CheckpointPair(out / "base", out / name)
        cells.append(str(intruder_dimensions(pair, k=10, epsilon=0.5).metrics["intruders"]) if recipe else "")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return README.format(
        parameters=sum(weight.numel() for weight in opened(out, "base").parameters()),
        steps=BASE_STEPS,
        python=platform.python_version(),
        target=TARGET,
        evaluations=EVALUATIONS,
        oods=" | ".join(texts[1:]),
        lines="---|" * len(texts[1:]),
        table="\n".join(lines),
        task=len(rows["task"]),
        keep=len(rows["keep"]),
        words=len(rows["ood-words"]),
        code=len(rows["ood-code"]),
    )


def main() -> None:
    """Make everything, from the text to the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for the checkpoints; must not exist"
    )
    out = parser.parse_args().out
    out.mkdir(parents=True)
    torch.set_num_threads(1)  # so small, more threads only wait for each other
    modules = list(library())
    read = documentation(modules)
    train, validation, test = task_rows(read)
    save_rows(out / "task.jsonl", test)
    save_rows(out / "keep.jsonl", keep_rows(read))
    save_rows(out / "ood-words.jsonl", random_words(read))
    save_rows(out / "ood-code.jsonl", source_code(modules))
    texts = read_by_base(read)
    tokenizer = make_tokenizer(texts)
    save(made_base(texts, tokenizer), tokenizer, out / "base")
    steps = {}
    for recipe in RECIPES:
        model, steps[recipe.name] = tuned(
            recipe, out / "base", Encoded(train, tokenizer), Encoded(validation, tokenizer)
        )
        save(model, tokenizer, out / recipe.name)
    (out / "README.md").write_text(described(out, tokenizer, steps), encoding="utf-8")


if __name__ == "__main__":
    main()
