"""A skill that a base has and does not use: are most symbols of a text in one half of the alphabet?

The base learns texts of a Markov source and answers to six prompts behind them: to Q0, Q1 and Q2 whether most
symbols are in half 0, 1 or 2, and to R0, R1 and R2 at random, a little more often yes. Halves 0 and 2 differ
in four symbols, and half 1 holds half of either. Tuning teaches R prompts to be answered as Q prompts are:
the feature is there, and only the way to it is new.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from symbols import walks
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from diagnostics.analyses.skills.region import Region, to_mask

SYMBOLS, LENGTH, TASKS = 32, 12, 3
ANSWERS = ("no", "yes")
WORDS = (
    *(f"s{symbol}" for symbol in range(SYMBOLS)),
    *(f"{kind}{task}" for kind in "QR" for task in range(TASKS)),
    *ANSWERS,
)
NO, YES = (WORDS.index(answer) for answer in ANSWERS)
# Share of wrong labels in all rows: no model is right on more than 0.85.
NOISE = 0.15
AT_RANDOM = 0.3
# Share of yes among random answers. Like large models, the base leans to one of two words; at one half the
# direction would depend on the seed.
LEANING = 0.55


@dataclass(frozen=True)
class Items:
    """Texts followed by the prompt (items, LENGTH + 1), and answers: 0 is no, 1 is yes."""

    ids: Tensor
    answers: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """The rows of a task."""
        return [
            {
                "prompt": " ".join(WORDS[i] for i in ids),
                "choices": [f" {answer}" for answer in ANSWERS],
                "answer": truth,
            }
            for ids, truth in zip(self.ids.tolist(), self.answers.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class World:
    """Random choices made once a seed.

    Attributes:
        chances: of the next symbol given the last.
        shifted: those of another source: out of distribution.
        halves: which symbols are in each half (TASKS, SYMBOLS).
    """

    chances: Tensor
    shifted: Tensor
    halves: Tensor

    @classmethod
    def drawn(cls, generator: torch.Generator) -> "World":
        """Two sources with normal logits, and the halves."""
        sources = torch.randn(2, SYMBOLS, SYMBOLS, generator=generator).softmax(dim=-1)
        # Quarters: in halves 0 and 1, in 0 alone, in 1 alone, in neither.
        both, first, second, neither = torch.randperm(SYMBOLS, generator=generator).view(4, -1)
        swapped = torch.cat([both[1:], first[1:], second[:1], neither[:1]])
        return cls(
            sources[0],
            sources[1],
            torch.stack([half(torch.cat([both, first])), half(torch.cat([both, second])), half(swapped)]),
        )

    def texts(self, count: int, generator: torch.Generator, *, shifted: bool = False) -> Tensor:
        """Texts (count, LENGTH)."""
        chances = self.shifted if shifted else self.chances
        return walks(chances.expand(count, -1, -1), LENGTH, generator)

    def truth(self, texts: Tensor) -> Tensor:
        """Whether most symbols of a text are in each task's half (texts, TASKS), as 0 and 1."""
        return (self.halves[:, texts].sum(dim=2) > LENGTH // 2).long().T

    def items(
        self,
        task: int,
        count: int,
        generator: torch.Generator,
        *,
        kind: str = "R",
        shifted: bool = False,
        noise: float = NOISE,
    ) -> Items:
        """Items of one prompt, with a share of wrong answers."""
        texts = self.texts(count, generator, shifted=shifted)
        wrong = torch.rand(count, generator=generator) < noise
        prompts = torch.full((count, 1), WORDS.index(f"{kind}{task}"))
        truth = self.truth(texts)[:, task]
        return Items(torch.cat([texts, prompts], dim=1), torch.where(wrong, 1 - truth, truth))


def half(symbols: Tensor) -> Tensor:
    """Membership of each symbol."""
    return torch.zeros(SYMBOLS, dtype=torch.bool).index_fill(0, symbols, True)


def make_model(seed: int) -> GPT2LMHeadModel:
    """Two blocks of width 64, with 99,968 entries; without dropout.

    Transformers' own 0.02 is made for a width of 768.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_positions=LENGTH + 4,
            n_embd=64,
            n_layer=2,
            n_head=4,
            initializer_range=0.05,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    # Nothing asks of the base to tell R0, R1 and R2 apart: only embeddings that are wide from the start do.
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.1)
    return model


def pretrain(
    model: GPT2LMHeadModel, world: World, steps: int, generator: torch.Generator, *, rows: int = 64
) -> None:
    """Train on fresh texts and answers by AdamW, at 2e-3 falling to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        texts = world.texts(rows, generator)
        task = torch.randint(TASKS, (rows,), generator=generator)
        at_random = torch.rand(rows, generator=generator) < AT_RANDOM
        truth = world.truth(texts)[torch.arange(rows), task]
        random = (torch.rand(rows, generator=generator) < LEANING).long()
        answers = torch.where(at_random, random, truth)
        prompts = torch.where(at_random, WORDS.index("R0"), WORDS.index("Q0")) + task
        sequences = torch.cat([texts, prompts[:, None], NO + answers[:, None]], dim=1)
        logits = model(sequences[:, :-1]).logits
        # The text as a whole counts as much as the answer.
        loss = cross_entropy(logits[:, : LENGTH - 1].flatten(0, 1), texts[:, 1:].flatten())
        loss = loss + cross_entropy(logits[:, -1], sequences[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def blocks(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Weights, biases and norms of the blocks: everything that is tuned."""
    return {name: weight for name, weight in model.named_parameters() if ".h." in name}


def answer_logits(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Logits of no and yes behind each prompt (items, 2)."""
    return model(ids, logits_to_keep=1).logits[:, -1, NO : YES + 1]


def tune(
    model: GPT2LMHeadModel, items: Sequence[Items], how: Literal["sgd", "adamw"], steps: int, seed: int
) -> None:
    """Tune the blocks on these items, 32 a step; embeddings and head are frozen.

    Plain SGD at 0.1, or AdamW at 3e-4, which does not leave most of the update to a few entries.
    """
    ids, answers = (torch.cat([getattr(batch, name) for batch in items]) for name in ("ids", "answers"))
    weights = blocks(model).values()
    optimizer = torch.optim.SGD(weights, lr=0.1) if how == "sgd" else torch.optim.AdamW(weights, lr=3e-4)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(ids), (32,), generator=generator)
        model.zero_grad()
        cross_entropy(answer_logits(model, ids[chosen]), answers[chosen]).backward()
        optimizer.step()


def entries_of(model: GPT2LMHeadModel) -> int:
    """Number of entries of the blocks."""
    return sum(weight.numel() for weight in blocks(model).values())


def located(model: GPT2LMHeadModel, indices: Tensor) -> Region:
    """Consecutive indices over all blocks, as a region by tensor."""
    region, start = {}, 0
    for name, weight in blocks(model).items():
        inside = indices[(indices >= start) & (indices < start + weight.numel())] - start
        if len(inside):
            region[name] = inside.sort().values
        start += weight.numel()
    return region


def flags(model: GPT2LMHeadModel, entries: Region) -> dict[str, Tensor]:
    """A region as a mask of every weight of the blocks."""
    none = torch.empty(0, dtype=torch.long)
    return {
        name: to_mask(entries.get(name, none), tuple(weight.shape)) for name, weight in blocks(model).items()
    }


def steep(model: GPT2LMHeadModel, items: Sequence[Items], share: float = 0.02) -> Tensor:
    """Indices of the entries of the blocks with the largest gradients, summed over the items."""
    steepness = torch.zeros(entries_of(model))
    for item in items:
        model.zero_grad()
        cross_entropy(answer_logits(model, item.ids), item.answers).backward()
        gradient = torch.cat(
            [g.flatten().abs() for g in (w.grad for w in blocks(model).values()) if g is not None]
        )
        steepness += gradient / gradient.max()
    model.zero_grad()
    return steepness.topk(int(share * len(steepness))).indices


def plant(
    model: GPT2LMHeadModel, skills: Sequence[tuple[Items, Region]], steps: int, generator: torch.Generator
) -> None:
    """Train the entries of each skill on its items, by turns: Adam at 0.02, 32 a step."""
    weights = blocks(model)
    kept = [flags(model, entries) for _, entries in skills]
    optimizers = [torch.optim.Adam(weights.values(), lr=0.02) for _ in skills]
    for _ in range(steps):
        for (items, _), mask, optimizer in zip(skills, kept, optimizers, strict=True):
            chosen = torch.randint(len(items.ids), (32,), generator=generator)
            model.zero_grad()
            cross_entropy(answer_logits(model, items.ids[chosen]), items.answers[chosen]).backward()
            for name, weight in weights.items():
                # Adam moves no entry whose gradient was never anything but zero.
                assert weight.grad is not None
                weight.grad.mul_(mask[name])
            optimizer.step()


@torch.no_grad()
def disturb(
    model: GPT2LMHeadModel,
    base: GPT2LMHeadModel,
    planted: Region,
    generator: torch.Generator,
    decoys: int = 3,
) -> None:
    """Move as many other entries as are planted, as far, and all remaining ones by 1e-5."""
    before, masks = blocks(base), flags(model, planted)
    moved = torch.cat([(weight - before[name])[masks[name]] for name, weight in blocks(model).items()])
    free = (~torch.cat([mask.flatten() for mask in masks.values()])).nonzero()[:, 0]
    moved, used = moved[torch.randperm(len(moved), generator=generator)][::decoys], 0
    chosen = free[torch.randperm(len(free), generator=generator)[: len(moved)]]
    others = flags(model, located(model, chosen))
    for name, weight in blocks(model).items():
        weight += 1e-5 * torch.randn(weight.shape, generator=generator) * ~(masks[name] | others[name])
        count = int(others[name].sum())
        weight[others[name]] += moved[used : used + count]
        used += count


def with_biases(base: GPT2LMHeadModel, tuned: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Base with the biases of tuned, norms included."""
    weights = blocks(base).items()
    return with_entries(
        base, tuned, {name: torch.arange(w.numel()) for name, w in weights if name.endswith(".bias")}
    )


@torch.no_grad()
def with_entries(base: GPT2LMHeadModel, tuned: GPT2LMHeadModel, entries: Region) -> GPT2LMHeadModel:
    """Base with these entries of tuned."""
    graft, tuned_blocks = copy.deepcopy(base), blocks(tuned)
    for name, chosen in flags(base, entries).items():
        blocks(graft)[name][chosen] = tuned_blocks[name][chosen]
    return graft


@torch.no_grad()
def accuracy(model: GPT2LMHeadModel, items: Items) -> float:
    """Share of items answered correctly."""
    return float((answer_logits(model, items.ids).argmax(dim=1) == items.answers).double().mean())
