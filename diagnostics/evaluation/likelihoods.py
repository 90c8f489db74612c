"""Scores of texts from one forward pass: token log-likelihoods, confidence, energy and a pooled vector.

Likelihood ratios and all scores compared with them come from the same pass, and so from the same tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from diagnostics.execution.workers import RemoteModel
from probes.models.body import evaluating, unwrapped
from probes.passes.batched import NonFiniteError
from probes.passes.scores import score_examples
from probes.text.batches import Batch, Example, batches, halving, windows


@dataclass(frozen=True, kw_only=True)
class ExampleScores:
    """A model's scores of one example; NaN and None where it has no token to score."""

    tokens: Float[np.ndarray, " tokens"]  # log-likelihood in nats of each scored token, in order
    log_likelihood: float = np.nan  # their sum, in float64
    top: float = np.nan  # mean over scored tokens of the largest probability
    energy: float = np.nan  # mean over scored tokens of minus the log-sum-exp of the logits
    # Mean over all tokens of the last hidden state; for windows see `merge_windows`.
    pooled: Float[np.ndarray, " width"] | None = None


NOTHING = ExampleScores(tokens=np.empty(0, np.float32))


def score_texts(
    model: nn.Module | RemoteModel, examples: Sequence[Example], *, tokens: int = 16384,
    longest: int | None = None,
    where: Callable[[int], str] = "example {}".format,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[ExampleScores]:  # fmt: skip
    """Run a causal model over examples, batched by length; the batch size changes no score.

    Args:
        model: in this process, or on workers.
        longest: split longer examples into windows of this many tokens; None: never.
        where: names an example in an error, given its index.
    """
    owners, pieces = [], []
    for index, example in enumerate(examples):
        for piece in [example] if longest is None else windows(example, longest):
            if any(piece.scored):
                owners.append(index)
                pieces.append(piece)
    if not pieces:
        return [NOTHING] * len(examples)
    measure = partial(_score_pieces, tokens=tokens)
    try:
        if isinstance(model, RemoteModel):
            tell = None if progress is None else lambda done: progress(done, len(pieces), "scored")
            scores = [NOTHING] * len(pieces)
            for indices, batch in model.run_batches(measure, pieces, tokens, tell):
                for index, piece_scores in zip(indices, batch, strict=True):
                    scores[index] = piece_scores
        else:
            scores = measure(model, pieces, progress=progress)
    except NonFiniteError as error:
        raise NonFiniteError(error.example, error.layer, where(owners[error.example])) from error
    parts: list[list[ExampleScores]] = [[] for _ in examples]
    for owner, piece_scores in zip(owners, scores, strict=True):
        parts[owner].append(piece_scores)
    return [merge_windows(several) for several in parts]


def _score_pieces(
    model: nn.Module, examples: Sequence[Example], *, tokens: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[ExampleScores]:  # fmt: skip
    """Scores of examples that all have a scored token."""
    scores = score_examples(model, examples, tokens=tokens, pooled=True, by_token=True, progress=progress)
    assert scores.by_token is not None
    assert scores.pooled is not None
    return [
        ExampleScores(
            tokens=values.float().numpy()[np.array(example.scored)],
            log_likelihood=float(scores.log_likelihoods[index]), top=float(scores.top[index]),
            energy=float(scores.energy[index]), pooled=scores.pooled[index].float().numpy(),
        )
        for index, (example, values) in enumerate(zip(examples, scores.by_token, strict=True))
    ]  # fmt: skip


def merge_windows(parts: Sequence[ExampleScores]) -> ExampleScores:
    """The scores of an example from those of its windows; means weight each by its scored tokens."""
    if len(parts) < 2:
        return parts[0] if parts else NOTHING
    weights = np.array([len(part.tokens) for part in parts], dtype=np.float64)
    top, energy, pooled = (
        np.average(np.array([getattr(part, name) for part in parts]), axis=0, weights=weights)
        for name in ("top", "energy", "pooled")
    )
    return ExampleScores(
        tokens=np.concatenate([part.tokens for part in parts]),
        log_likelihood=math.fsum(part.log_likelihood for part in parts), top=float(top),
        energy=float(energy), pooled=pooled.astype(np.float32),
    )  # fmt: skip


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Example], *, longest: int, tokens: int = 4096
) -> list[str]:
    """Greedy answers to prompts, at most `longest` tokens each.

    The end tokens of the tokenizer and of the generation config end an answer. Its other settings, such as a
    repetition penalty, are ignored: with them the answer would not be greedy.
    """
    answers = [""] * len(prompts)
    eos = unwrapped(model).generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad = next((id for id in (tokenizer.pad_token_id, *sorted(ends)) if id is not None), 0)

    def generate(batch: Batch) -> list[str]:
        settings = {"max_new_tokens": longest, "pad_token_id": pad, "eos_token_id": sorted(ends) or None}
        output = generate_greedily(model, batch, **settings)
        rows = output.sequences[:, batch.ids.shape[1] :].tolist()
        kept = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
        return tokenizer.batch_decode(kept, skip_special_tokens=True)

    with evaluating(model), default_generation(model):
        if reads_padding(model, pad):
            tokens = 1  # one by one
        for batch, texts in halving(generate, batches(prompts, tokens=tokens, pad_id=pad, side="left")):
            for index, text in zip(batch.indices.tolist(), texts, strict=True):
                answers[index] = text
    return answers


def generate_greedily(model: Any, batch: Batch, **settings: Any) -> Any:
    """The output of transformers' `generate` after a batch."""
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": batch.ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    with torch.no_grad():
        return model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **settings)


@contextmanager
def default_generation(model: Any) -> Iterator[None]:
    """Inside, the model has no generation_config.json of its own."""
    inner = unwrapped(model)
    config = inner.generation_config
    inner.generation_config = type(config)()
    try:
        yield
    finally:
        inner.generation_config = config


def reads_padding(model: Any, pad: int) -> bool:
    """Whether padding on the left changes the logits: recurrent models may read it as text."""
    vocabulary = len(model.get_input_embeddings().weight)
    ids = [(7919 * position + 5) % vocabulary for position in range(8)]
    long, short = (Example(ids=ids[:size], scored=[False] * size, row=0) for size in (len(ids), 3))

    def next_logits(examples: Sequence[Example]) -> Tensor:
        (batch,) = batches(examples, pad_id=pad, side="left")
        output = generate_greedily(model, batch, max_new_tokens=1, pad_token_id=pad, output_logits=True)
        return output.logits[0][-1]

    padded, alone = next_logits([long, short]), next_logits([short])
    round_off = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 0.1
    return not torch.allclose(padded, alone, rtol=0, atol=round_off * float(alone.abs().max()))
