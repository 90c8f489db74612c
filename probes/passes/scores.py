"""What running a model gives: log-likelihoods of tokens and rows, scores of choices and classes.

Logits are made a chunk of positions at a time, in float32 where they are turned into likelihoods; sums over a
row are float64. Likelihoods are natural logarithms: nats, 0 is certain, more negative is less likely. Nothing
depends on how examples are batched or padded, but for float round-off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.errors import InputError
from probes.models.body import Pass, evaluating, inputs, padding_known, run, unwrapped
from probes.passes.batched import gathered, not_finite
from probes.text.batches import Batch, Example, PaddingSide, batches
from probes.text.rows import Row

T = TypeVar("T")
By = Literal["sum", "mean", "per_byte"]

# Logits held at once, in float32: 128 MB on a GPU; on a CPU 8 MB, which its caches hold. Fewer positions than
# 256 would read the head's weights too often.
LOGITS, LOGITS_CPU, POSITIONS = 2**25, 2**21, 256
# What is scored of each token.
NAMES = ("log_likelihoods", "top", "energy", "hit")


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What a language model says of each token of a batch; NaN where `Batch.scored` is False.

    Attributes:
        log_likelihoods: of the token that is there.
        top: probability of the token that is the likeliest in its place.
        energy: minus the logsumexp of the logits.
        hit: 1 where the token that is there is the likeliest, one of several equals included; else 0.
        hidden: what the head was given, in the model's dtype; None if the model does not let it be seen.
    """

    log_likelihoods: Float[Tensor, "rows length"]
    top: Float[Tensor, "rows length"]
    energy: Float[Tensor, "rows length"]
    hit: Float[Tensor, "rows length"]
    hidden: Float[Tensor, "rows length width"] | None


@dataclass(frozen=True, kw_only=True)
class SequenceScores:
    """What a language model says of each example, in the order of the examples, on the CPU.

    Attributes:
        log_likelihoods: sum over the scored tokens; NaN where there is none.
        tokens: how many are scored.
        top, energy, hit: mean over the scored tokens of what `TokenScores` has; NaN where there is none.
        pooled: mean over all tokens of the hidden states that the head is given; None unless asked for.
        by_token: of each example the log-likelihoods of its ids, NaN where not scored; None unless asked for.
    """

    log_likelihoods: Float[Tensor, " examples"]
    tokens: Int[Tensor, " examples"]
    top: Float[Tensor, " examples"]
    energy: Float[Tensor, " examples"]
    hit: Float[Tensor, " examples"]
    pooled: Float[Tensor, "examples width"] | None = None
    by_token: tuple[Float[Tensor, " _"], ...] | None = None

    @property
    def mean_loss(self) -> float:
        """Minus the mean log-likelihood of a scored token, in nats: long rows count for more."""
        return -float(self.log_likelihoods.nansum() / self.tokens.sum())


@dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """How likely each choice of a row is, given its prompt; the largest is what the model chooses.

    Attributes:
        row: index into the task's rows.
        sum: log-likelihood of the choice's tokens.
        mean: the same for each of its tokens.
        per_byte: the same for each byte of its text, which no tokenizer changes.
    """

    row: int
    sum: Float[Tensor, " choices"]
    mean: Float[Tensor, " choices"]
    per_byte: Float[Tensor, " choices"]

    def best(self, by: By = "sum") -> int:
        """The likeliest choice, from 0; the first of equals."""
        values: Tensor = getattr(self, by)
        return int(values.argmax())


def token_scores(
    model: nn.Module, batch: Batch, *, vocabulary: int | None = None, chunk: int | None = None
) -> TokenScores:
    """Score the tokens of a batch with a causal language model.

    Args:
        vocabulary: only the first so many tokens exist; the probabilities of others go to them. For two
            models of which one has rows that the other lacks.
        chunk: positions whose logits are made at once; by default as many as serve the device.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
    """
    with evaluating(model):
        passed = run(model, batch)
        rows, places = batch.scored[:, 1:].nonzero(as_tuple=True)
        scores = _scores(
            model, batch, passed, rows, places + 1, rows * batch.ids.shape[1] + places, vocabulary, chunk
        )
        return _finite(model, batch, scores)


def masked_token_scores(
    model: nn.Module, batch: Batch, mask_id: int, *, tokens: int | None = None, chunk: int | None = None
) -> TokenScores:
    """Score the tokens of a batch with a masked language model, each given all the others.

    Their sum is the pseudo-log-likelihood of a row (Salazar et al. 2020, arXiv:1910.14659): no probability of
    the row, but comparable between rows. It takes one forward pass a scored token; `hidden` is None.

    Args:
        mask_id: the mask token.
        tokens: most tokens in a forward pass; by default as many as the batch has.
        chunk: as in `token_scores`.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
    """
    length = batch.ids.shape[1]
    count = max(1, (tokens or batch.ids.numel()) // length)
    rows, places = batch.scored.nonzero(as_tuple=True)
    found = _empty(batch, batch.ids.device)
    with evaluating(model):
        for row, place in zip(rows.split(count), places.split(count), strict=True):
            here = torch.arange(len(row), device=row.device)
            ids = batch.ids[row]
            targets, ids[here, place] = ids[here, place], mask_id
            copies = Batch(
                ids=ids,
                attention_mask=batch.attention_mask[row],
                position_ids=batch.position_ids[row],
                scored=torch.zeros_like(ids, dtype=torch.bool),
                indices=batch.indices[row],
            )
            passed = run(model, copies)
            truth = replace(copies, ids=copies.ids.index_put((here, place), targets))
            scores = _scores(model, truth, passed, here, place, here * length + place, None, chunk)
            for name, values in found.items():
                values[row, place] = getattr(scores, name)[here, place].to(values.device)
        return _finite(model, batch, TokenScores(**found, hidden=None))


def score_examples(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int = 0,
    tokens: int = 16384,
    side: PaddingSide = "right",
    mask_id: int | None = None,
    vocabulary: int | None = None,
    pooled: bool = False,
    by_token: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    where: Callable[[int], str] = "row index {}".format,
) -> SequenceScores:
    """Score every example, in batches of like length that are halved when memory runs out.

    Args:
        pad_id, tokens, side: how they are batched; no result depends on it.
        mask_id: the mask token of a masked language model, which is scored as `masked_token_scores` does.
        vocabulary: as in `token_scores`.
        pooled, by_token: keep these too.
        progress, where: as in `gathered`.

    Raises:
        NonFiniteError: logits that are NaN or infinite; the message names the row.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import encode, open_model, task_of
    >>> base = open_model(BUNDLED / "base")
    >>> examples = encode(task_of(["Return a list."]), base.tokenizer, max_length=None)
    >>> scores = score_examples(base.model, examples)
    >>> scores.tokens.tolist(), scores.mean_loss < 10
    ([4], True)
    """

    def scored(batch: Batch) -> dict[str, Any]:
        if mask_id is None:
            scores = token_scores(model, batch, vocabulary=vocabulary)
        else:
            scores = masked_token_scores(model, batch, mask_id)
        counts = batch.scored.sum(dim=1).cpu()
        logs, top, energy, hit = (
            values.double().cpu()
            for values in (scores.log_likelihoods, scores.top, scores.energy, scores.hit)
        )
        found: dict[str, Any] = {
            "log_likelihoods": torch.where(counts > 0, logs.nansum(dim=1), torch.nan),
            "tokens": counts,
            "top": top.nansum(dim=1) / counts,
            "energy": energy.nansum(dim=1) / counts,
            "hit": hit.nansum(dim=1) / counts,
        }
        if pooled:
            if scores.hidden is None:
                raise InputError(f"{type(unwrapped(model)).__name__}: gives no hidden states to pool")
            found["pooled"] = mean_over_tokens(scores.hidden, batch).cpu()
        if by_token:
            here = batch.attention_mask.bool().cpu()
            found["by_token"] = [row[at] for row, at in zip(scores.log_likelihoods.cpu(), here, strict=True)]
        return found

    found = gathered(
        examples, batches(examples, tokens=tokens, pad_id=pad_id, side=side), scored, progress, where
    )
    if not found:
        nothing = torch.full((len(examples),), torch.nan, dtype=torch.float64)
        found = dict.fromkeys(NAMES, nothing)
        found["tokens"] = torch.zeros(len(examples), dtype=torch.long)
    if by_token:
        rows = found.get("by_token", [None] * len(examples))
        found["by_token"] = tuple(torch.empty(0) if row is None else row for row in rows)
    return SequenceScores(**found)


def choice_scores(
    scores: SequenceScores, examples: Sequence[Example], rows: Sequence[Row]
) -> list[ChoiceScores]:
    """Put the scores of the choices of each row side by side, in the order of the rows.

    Args:
        scores: of `examples`.
        examples: what `encode` made of `rows`: one for each choice.
    """
    found: dict[int, dict[int, int]] = {}
    for index, example in enumerate(examples):
        if example.choice is not None:
            found.setdefault(example.row, {})[example.choice] = index
    gathered = []
    for row, places in sorted(found.items()):
        choices = rows[row].choices
        assert choices is not None
        assert sorted(places) == list(range(len(choices)))
        order = torch.tensor([places[choice] for choice in range(len(choices))])
        total = scores.log_likelihoods[order]
        lengths = torch.tensor([len(choice.encode()) for choice in choices])
        gathered.append(
            ChoiceScores(row=row, sum=total, mean=total / scores.tokens[order], per_byte=total / lengths)
        )
    return gathered


def class_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "rows classes"]:
    """Logits of a sequence classifier, in float32.

    Raises:
        InputError: it is none, or has a single output.
        NonFiniteError: logits that are NaN or infinite.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if inner.get_output_embeddings() is not None or not hasattr(inner, "num_labels"):
        raise InputError(f"{name}: is no sequence classifier")
    if inner.num_labels < 2:
        raise InputError(f"{name}: has one output, a number and no class")
    # Those that pool at the first position need a token there.
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    rows = {name: value.gather(1, order) for name, value in vars(batch).items() if name != "indices"}
    batch = Batch(**rows, indices=batch.indices)
    given = inputs(inner, batch)
    with evaluating(model), padding_known(inner, given), torch.no_grad():
        logits = inner(**given).logits.float()
    bad = ~logits.isfinite().all(dim=1)
    if bad.any():
        raise not_finite(model, batch, int(bad.nonzero()[0, 0]))
    return logits


def classify_examples(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int = 0,
    tokens: int = 16384,
    side: PaddingSide = "right",
    progress: Callable[[int, int, str], None] | None = None,
    where: Callable[[int], str] = "row index {}".format,
) -> Float[Tensor, "examples classes"]:
    """Class logits of every example, in order, on the CPU; NaN for one without tokens.

    The arguments and errors are those of `score_examples` and `class_logits`.
    """
    found = gathered(
        examples,
        batches(examples, tokens=tokens, pad_id=pad_id, side=side),
        lambda batch: {"logits": class_logits(model, batch).cpu()},
        progress,
        where,
    )
    classes = unwrapped(model).num_labels
    return found["logits"] if found else torch.full((len(examples), classes), torch.nan)


def mean_over_tokens(hidden: Float[Tensor, "rows length width"], batch: Batch) -> Float[Tensor, "rows width"]:
    """Mean of a row's hidden states over its tokens, padding left out, in float32."""
    mask = batch.attention_mask.to(hidden.device).bool()
    # Row by row: all of it in float32 at once would take more than the model's own activations.
    return torch.stack([row[at].float().mean(dim=0) for row, at in zip(hidden, mask, strict=True)])


def _scores(
    model: nn.Module,
    batch: Batch,
    passed: Pass,
    rows: Int[Tensor, " positions"],
    places: Int[Tensor, " positions"],
    seen: Int[Tensor, " positions"],
    vocabulary: int | None,
    chunk: int | None,
) -> TokenScores:
    """Scores of the tokens at (rows, places), from the logits at `seen` in the flattened batch."""
    targets, size = batch.ids[rows, places], chunk or at_once(model)
    if vocabulary is not None and (targets >= vocabulary).any():
        raise InputError(f"token {int(targets.max())} is scored, but only {vocabulary} tokens are to exist")
    values: list[Tensor] = []
    for at, target in zip(seen.split(size), targets.split(size), strict=True):
        logits = passed.logits(at)[:, :vocabulary].float()
        largest = logits.amax(dim=1, keepdim=True)
        logits.sub_(largest)  # so that large logits cost no digits
        chosen = logits.gather(1, target.to(logits.device)[:, None])[:, 0]
        rest = logits.exp_().sum(dim=1).log()
        hit = (chosen == 0).float()
        values.append(torch.stack([chosen - rest, (-rest).exp(), -(largest[:, 0] + rest), hit]))
    device = values[0].device if values else batch.ids.device
    found = _empty(batch, device)
    if values:
        for tensor, part in zip(found.values(), torch.cat(values, dim=1), strict=True):
            tensor[rows.to(device), places.to(device)] = part
    return TokenScores(**found, hidden=passed.hidden)


def _empty(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.full(batch.ids.shape, torch.nan, device=device) for name in NAMES}


def at_once(model: nn.Module) -> int:
    """Positions whose logits fit into what is held at once."""
    inner = unwrapped(model)
    most = LOGITS_CPU if inner.get_input_embeddings().weight.device.type == "cpu" else LOGITS
    return max(POSITIONS, most // inner.config.get_text_config().vocab_size)


def _finite(model: nn.Module, batch: Batch, scores: TokenScores) -> TokenScores:
    """The scores, if every scored token has one."""
    bad = batch.scored & ~scores.log_likelihoods.isfinite().to(batch.scored.device)
    if bad.any():
        raise not_finite(model, batch, int(bad.any(dim=1).nonzero()[0, 0]))
    return scores
