"""What one pass of a language model says of each text: token likelihoods, confidence, and a pooled vector.

Everything that likelihood ratios and the scores beside them are made of comes from this one pass, so that all
of them are of the same tokens.
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
    """What a model makes of one example; NaN and None where it has no token to score.

    Attributes:
        tokens: log-likelihood in nats of each scored token, in order.
        log_likelihood: their sum, in float64.
        top: mean over these of the largest probability.
        energy: mean over these of minus the logarithm of the summed exponentials of the logits.
        pooled: mean over all tokens of the last hidden state; in windows see `joined`.
    """

    tokens: Float[np.ndarray, " tokens"]
    log_likelihood: float = np.nan
    top: float = np.nan
    energy: float = np.nan
    pooled: Float[np.ndarray, " width"] | None = None


NOTHING = ExampleScores(tokens=np.empty(0, np.float32))


def read(
    model: nn.Module | RemoteModel,
    examples: Sequence[Example],
    *,
    tokens: int = 16384,
    vocabulary: int | None = None,
    longest: int | None = None,
    where: Callable[[int], str] = "example {}".format,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[ExampleScores]:
    """Run a causal model over examples, in batches of like length that do not change what is found.

    Args:
        model: here, or on workers.
        tokens: most tokens in a batch, padding included.
        vocabulary: the model's first so many tokens are all there are; None: as many as it has.
        longest: examples with more tokens are read in windows of so many; None: whole.
        where: from the index of an example to what an error calls it.
        progress: called with (done, total, what).

    Raises:
        InputError: a likelihood is not finite; the message says of which example.
    """
    places, pieces = [], []
    for place, example in enumerate(examples):
        for piece in [example] if longest is None else windows(example, longest):
            if any(piece.scored):
                places.append(place)
                pieces.append(piece)
    if not pieces:
        return [NOTHING] * len(examples)
    measure = partial(read_whole, tokens=tokens, vocabulary=vocabulary)
    try:
        if isinstance(model, RemoteModel):
            tell = None if progress is None else lambda done: progress(done, len(pieces), "scored")
            found = [NOTHING] * len(pieces)
            for own, made in model.run_batches(measure, pieces, tokens, tell):
                for index, one in zip(own, made, strict=True):
                    found[index] = one
        else:
            found = measure(model, pieces, progress=progress)
    except NonFiniteError as error:
        raise NonFiniteError(error.example, error.layer, where(places[error.example])) from error
    parts: list[list[ExampleScores]] = [[] for _ in examples]
    for place, one in zip(places, found, strict=True):
        parts[place].append(one)
    return [joined(several) for several in parts]


def read_whole(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    tokens: int,
    vocabulary: int | None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[ExampleScores]:
    """What a model makes of each example, all of which have a scored token; as `read`."""
    found = score_examples(
        model, examples, tokens=tokens, vocabulary=vocabulary, pooled=True, by_token=True, progress=progress
    )
    assert found.by_token is not None
    assert found.pooled is not None
    return [
        ExampleScores(
            tokens=values.float().numpy()[np.array(example.scored)],
            log_likelihood=float(found.log_likelihoods[at]),
            top=float(found.top[at]),
            energy=float(found.energy[at]),
            pooled=found.pooled[at].float().numpy(),
        )
        for at, (example, values) in enumerate(zip(examples, found.by_token, strict=True))
    ]


def joined(parts: Sequence[ExampleScores]) -> ExampleScores:
    """What was read in windows, as one: in means each window counts for the tokens that it scores."""
    if len(parts) < 2:
        return parts[0] if parts else NOTHING
    weights = np.array([len(part.tokens) for part in parts], dtype=np.float64)
    top, energy, pooled = (
        np.average(np.array([getattr(part, name) for part in parts]), axis=0, weights=weights)
        for name in ("top", "energy", "pooled")
    )
    return ExampleScores(
        tokens=np.concatenate([part.tokens for part in parts]),
        log_likelihood=math.fsum(part.log_likelihood for part in parts),
        top=float(top),
        energy=float(energy),
        pooled=pooled.astype(np.float32),
    )


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Example], *, longest: int, tokens: int = 4096
) -> list[str]:
    """What a model writes after each prompt, always taking the likeliest token, at most `longest` tokens.

    It stops where the tokenizer or the model's own settings end a text. What else these ask for, such as a
    penalty on repetition, is not done: that would take other tokens than the likeliest.
    """
    answers = [""] * len(prompts)
    own = unwrapped(model).generation_config.eos_token_id
    ends = {
        id for id in (tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])) if id is not None
    }
    pad = next((id for id in (tokenizer.pad_token_id, *sorted(ends)) if id is not None), 0)

    def generate(batch: Batch) -> list[str]:
        made = written(
            model, batch, max_new_tokens=longest, pad_token_id=pad, eos_token_id=sorted(ends) or None
        )
        rows = made.sequences[:, batch.ids.shape[1] :].tolist()
        kept = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
        return tokenizer.batch_decode(kept, skip_special_tokens=True)

    with evaluating(model), without_settings(model):
        if moved_by_padding(model, pad):
            tokens = 1  # one by one
        for batch, texts in halving(generate, batches(prompts, tokens=tokens, pad_id=pad, side="left")):
            for index, text in zip(batch.indices.tolist(), texts, strict=True):
                answers[index] = text
    return answers


def written(model: Any, batch: Batch, **settings: Any) -> Any:
    """transformers' record of what a model writes after a batch, token by token the likeliest."""
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        return model.generate(
            input_ids=batch.ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            do_sample=False,
            return_dict_in_generate=True,
            **settings,
        )


@contextmanager
def without_settings(model: Any) -> Iterator[None]:
    """The model as if no generation_config.json had come with it."""
    inner = unwrapped(model)
    own = inner.generation_config
    inner.generation_config = type(own)()
    try:
        yield
    finally:
        inner.generation_config = own


def moved_by_padding(model: Any, pad: int) -> bool:
    """Whether padding on the left changes what follows: recurrent models may read it as text."""
    vocabulary = len(model.get_input_embeddings().weight)
    ids = [(7919 * place + 5) % vocabulary for place in range(8)]
    both = [Example(ids=ids[:size], scored=[False] * size, row=0) for size in (len(ids), 3)]

    def following(examples: Sequence[Example]) -> Tensor:
        (batch,) = batches(examples, pad_id=pad, side="left")
        return written(model, batch, max_new_tokens=1, pad_token_id=pad, output_logits=True).logits[0][-1]

    padded, alone = following(both), following(both[1:])
    round_off = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 0.1
    return not torch.allclose(padded, alone, rtol=0, atol=round_off * float(alone.abs().max()))
