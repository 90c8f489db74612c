"""Log-likelihoods of tokens and rows, scores of choices and classes.

Logits are computed a chunk of positions at a time and turned into likelihoods in float32; sums over a row are
float64. Likelihoods are in nats: 0 is certain, more negative is less likely. Up to float round-off, no result
depends on batching or padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.errors import InputError
from probes.models.body import Pass, evaluating, full_pass, run, unwrapped
from probes.passes.batched import measure_examples, require_finite
from probes.progress import Progress
from probes.text.batches import Batch, Example, PaddingSide
from probes.text.rows import Row

By = Literal["sum", "mean", "per_byte"]

# Logits held at once, in float32: 128 MB on a GPU; on a CPU 8 MB, which its caches hold. Chunks of fewer than
# 256 positions would read the head's weights too often.
LOGITS, LOGITS_CPU, POSITIONS = 2**25, 2**21, 256
# The scores of each token.
NAMES = ("log_likelihoods", "top", "energy", "hit")


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """A language model's scores of each token of a batch; NaN where `Batch.scored` is False.

    Attributes:
        log_likelihoods: of the actual token.
        top: probability of the likeliest token at its position.
        energy: minus the logsumexp of the logits.
        hit: 1 where the actual token is the likeliest, or one of several equals; else 0.
        hidden: the input of the head, in the model's dtype; None if the model does not expose it.
    """

    log_likelihoods: Float[Tensor, "rows length"]
    top: Float[Tensor, "rows length"]
    energy: Float[Tensor, "rows length"]
    hit: Float[Tensor, "rows length"]
    hidden: Float[Tensor, "rows length width"] | None


@dataclass(frozen=True, kw_only=True)
class SequenceScores:
    """A language model's scores of each example, in order, on the CPU.

    Attributes:
        log_likelihoods: sum over the scored tokens; NaN without any.
        tokens: number of scored tokens.
        top, energy, hit: mean of the scores in `TokenScores` over the scored tokens; NaN without any.
        pooled: mean of the head's input over all tokens; None unless requested.
        by_token: the log-likelihoods of each example's ids, NaN where not scored; None unless requested.
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
    """The log-likelihoods of each choice of a row given its prompt; the model chooses the largest.

    Attributes:
        row: index into the task's rows.
        sum, mean, per_byte: over the choice's tokens; per token; per byte of the text, which is comparable
            between tokenizers.
    """

    row: int
    sum: Float[Tensor, " choices"]
    mean: Float[Tensor, " choices"]
    per_byte: Float[Tensor, " choices"]

    def best(self, by: By = "sum") -> int:
        """The likeliest choice, from 0; the first of equals."""
        return int(getattr(self, by).argmax())


def token_scores(
    model: nn.Module, batch: Batch, *, vocabulary: int | None = None, chunk: int | None = None
) -> TokenScores:
    """Score the tokens of a batch with a causal language model; raises NonFiniteError.

    Args:
        vocabulary: number of tokens that exist; the probability of later ones goes to them. For two models
            with vocabularies of unequal length.
        chunk: positions whose logits are computed at once; by default as many as suit the device.
    """
    with evaluating(model):
        passed = run(model, batch)
        rows, positions = batch.scored[:, 1:].nonzero(as_tuple=True)
        return _scores(model, batch, passed, rows, positions + 1, vocabulary=vocabulary, chunk=chunk)


def masked_token_scores(
    model: nn.Module, batch: Batch, mask_id: int, *, tokens: int | None = None, chunk: int | None = None
) -> TokenScores:
    """Score the tokens of a batch with a masked language model, each given all the others.

    Their sum is the pseudo-log-likelihood of a row (Salazar et al. 2020, arXiv:1910.14659): no probability of
    the row, but comparable between rows. It takes a forward pass for each scored token; `hidden` is None.

    Args:
        mask_id: the mask token.
        tokens: most tokens in a forward pass; by default those of the batch.
    """
    length = batch.ids.shape[1]
    count = max(1, (tokens or batch.ids.numel()) // length)
    rows, positions = batch.scored.nonzero(as_tuple=True)
    scored = _empty(batch, batch.ids.device)
    with evaluating(model):
        for row, masked in zip(rows.split(count), positions.split(count), strict=True):
            originals = Batch(**{name: values[row] for name, values in vars(batch).items()})
            copy = torch.arange(len(row), device=row.device)
            hidden = originals.ids.index_put((copy, masked), originals.ids.new_tensor(mask_id))
            passed = run(model, replace(originals, ids=hidden))
            scores = _scores(model, originals, passed, copy, masked, at_own=True, chunk=chunk)
            for name, values in scored.items():
                values[row, masked] = getattr(scores, name)[copy, masked].to(values.device)
    return TokenScores(**scored, hidden=None)


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
    progress: Progress | None = None,
    where: Callable[[int], str] = "row index {}".format,
) -> SequenceScores:
    """Score every example, in batches of similar length that are halved when memory runs out.

    Args:
        pad_id, tokens, side: of the batches; no result depends on them.
        mask_id: the mask token of a masked language model, which `masked_token_scores` scores.
        vocabulary: as in `token_scores`.
        pooled, by_token: return these too.
        progress, where: as in `measure_examples`.

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
        sums = {name: getattr(scores, name).double().cpu().nansum(dim=1) for name in NAMES}
        results: dict[str, Any] = {name: total / counts for name, total in sums.items()}
        results["log_likelihoods"] = torch.where(counts > 0, sums["log_likelihoods"], torch.nan)
        results["tokens"] = counts
        if pooled:
            if scores.hidden is None:
                raise InputError(f"{type(unwrapped(model)).__name__}: gives no hidden states to pool")
            results["pooled"] = mean_over_tokens(scores.hidden, batch).cpu()
        if by_token:
            at_tokens = batch.attention_mask.bool().cpu()
            logs = scores.log_likelihoods.cpu()
            results["by_token"] = [row[at] for row, at in zip(logs, at_tokens, strict=True)]
        return results

    results = measure_examples(
        examples, scored, pad_id=pad_id, tokens=tokens, side=side, progress=progress, where=where
    )
    if not results:
        results = dict.fromkeys(NAMES, torch.full((len(examples),), torch.nan, dtype=torch.float64))
        results["tokens"] = torch.zeros(len(examples), dtype=torch.long)
    if by_token:
        rows = results.get("by_token", [None] * len(examples))
        results["by_token"] = tuple(torch.empty(0) if row is None else row for row in rows)
    return SequenceScores(**results)


def choice_scores(
    scores: SequenceScores, examples: Sequence[Example], rows: Sequence[Row]
) -> list[ChoiceScores]:
    """The scores of the choices, in the order of the rows; `examples` are as `encode` returns them."""
    by_row: dict[int, dict[int, int]] = {}
    for index, example in enumerate(examples):
        if example.choice is not None:
            by_row.setdefault(example.row, {})[example.choice] = index
    scores_of_rows = []
    for row, by_choice in sorted(by_row.items()):
        choices = rows[row].choices
        assert choices is not None
        assert sorted(by_choice) == list(range(len(choices)))
        order = torch.tensor([by_choice[choice] for choice in range(len(choices))])
        total = scores.log_likelihoods[order]
        lengths = torch.tensor([len(choice.encode()) for choice in choices])
        mean = total / scores.tokens[order]
        scores_of_rows.append(ChoiceScores(row=row, sum=total, mean=mean, per_byte=total / lengths))
    return scores_of_rows


def class_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "rows classes"]:
    """Logits of a sequence classifier, in float32.

    Raises:
        InputError: the model is none, or has a single output.
        NonFiniteError: logits that are NaN or infinite.
    """
    inner = unwrapped(model)
    if inner.get_output_embeddings() is not None or not hasattr(inner, "num_labels"):
        raise InputError(f"{type(inner).__name__}: is no sequence classifier")
    if inner.num_labels < 2:
        raise InputError(f"{type(inner).__name__}: has one output, a number and no class")
    # Models that pool at the first position need a token there.
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    rows = {name: value.gather(1, order) for name, value in vars(batch).items() if name != "indices"}
    batch = replace(batch, **rows)
    with evaluating(model), torch.no_grad():
        logits = full_pass(model, batch).logits.float()
    require_finite(model, batch, logits.isfinite().all(dim=1))
    return logits


def classify_examples(
    model: nn.Module, examples: Sequence[Example], **batching: Any
) -> Float[Tensor, "examples classes"]:
    """Class logits of every example, in order, on the CPU; NaN for one without tokens.

    Raises what `class_logits` raises.

    Args:
        batching: `pad_id`, `tokens`, `side`, `progress` and `where`, as in `measure_examples`.
    """
    results = measure_examples(
        examples, lambda batch: {"logits": class_logits(model, batch).cpu()}, **batching
    )
    classes = unwrapped(model).num_labels
    return results["logits"] if results else torch.full((len(examples), classes), torch.nan)


def mean_over_tokens(hidden: Float[Tensor, "rows length width"], batch: Batch) -> Float[Tensor, "rows width"]:
    """Mean of a row's hidden states over its tokens, padding left out, in float32."""
    mask = batch.attention_mask.to(hidden.device).bool()
    # Row by row: in float32 all rows would take more memory than the model's own activations.
    return torch.stack([row[at].float().mean(dim=0) for row, at in zip(hidden, mask, strict=True)])


def _scores(
    model: nn.Module,
    batch: Batch,
    passed: Pass,
    rows: Int[Tensor, " positions"],
    positions: Int[Tensor, " positions"],
    *,
    at_own: bool = False,
    vocabulary: int | None = None,
    chunk: int | None = None,
) -> TokenScores:
    """Scores of the tokens at (rows, positions), predicted at their own positions or at those before."""
    targets, size = batch.ids[rows, positions], chunk or at_once(model)
    predicted_at = rows * batch.ids.shape[1] + positions - int(not at_own)
    if vocabulary is not None and (targets >= vocabulary).any():
        raise InputError(
            f"token {int(targets.max())} is scored, but the vocabulary is limited to {vocabulary}"
        )
    chunks: list[Tensor] = []
    for at, target in zip(predicted_at.split(size), targets.split(size), strict=True):
        logits = passed.logits(at)[:, :vocabulary].float()
        largest = logits.amax(dim=1, keepdim=True)
        logits.sub_(largest)  # so that large logits cost no digits
        chosen = logits.gather(1, target.to(logits.device)[:, None])[:, 0]
        rest = logits.exp_().sum(dim=1).log()
        hit = (chosen == 0).float()
        chunks.append(torch.stack([chosen - rest, (-rest).exp(), -(largest[:, 0] + rest), hit]))
    device = chunks[0].device if chunks else batch.ids.device
    scored = _empty(batch, device)
    if chunks:
        computed = torch.cat(chunks, dim=1)
        require_finite(model, batch, computed[0].isfinite(), rows)
        for table, values in zip(scored.values(), computed, strict=True):
            table[rows.to(device), positions.to(device)] = values
    return TokenScores(**scored, hidden=passed.hidden)


def _empty(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.full(batch.ids.shape, torch.nan, device=device) for name in NAMES}


def at_once(model: nn.Module) -> int:
    """Number of positions whose logits are held at once."""
    inner = unwrapped(model)
    most = LOGITS_CPU if inner.get_input_embeddings().weight.device.type == "cpu" else LOGITS
    return max(POSITIONS, most // inner.config.get_text_config().vocab_size)
