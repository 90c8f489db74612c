"""Routes of a mixture of experts: how much of a sample's tokens each router sends to each expert.

A sample's routing is the mean over its tokens of the router's weights, layer by layer; padding never counts.
Source: "Grokking in LLM Pretraining?", arXiv:2506.21551, which leaves open whether the weights are the whole
distribution or those of the chosen experts: both are given. Sums are made batch by batch: what a single token
chose is never kept.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.errors import InputError
from probes.experts.router_weights import router_matrices as router_matrices
from probes.experts.routers import NoRoutersError as NoRoutersError
from probes.experts.routers import Router, find_routers, forward, reading
from probes.models.body import evaluating
from probes.passes import activations
from probes.passes.batched import gathered, not_finite
from probes.text.batches import Batch, Example, PaddingSide, batches
from probes.text.rows import Task

Weights: TypeAlias = Literal["full", "top"]

log = logging.getLogger(__name__)
# Rows and tokens of each that are run once to see what a model's routers compute.
TRIAL_ROWS, TRIAL_TOKENS = 2, 16
# Sums over a trial row by the bridge and by the routers themselves; half precision takes other ways to them.
SAME = 1e-2


@dataclass(frozen=True, kw_only=True)
class Routes:
    """What the routers of a model did with each sample.

    Attributes:
        full: mean over a sample's tokens of all that a router weighs: the softmax over all experts, or the
            sigmoid of each; NaN where its routers tell only of those that they chose.
        top: mean of the weights with which the chosen experts are combined, 0 of the others; without scaling
            factors common to all experts. They need not sum to 1.
        tokens: how many tokens of each sample count; where it is 0, `full` and `top` are NaN.
        layers: the block of each router, from 0, rising.
        top_k: experts chosen for a token.
        via: how they were captured: hooks of TransformerLens' bridge, or of the model's own modules.
    """

    full: Float[np.ndarray, "samples layers experts"]
    top: Float[np.ndarray, "samples layers experts"]
    tokens: Int[np.ndarray, " samples"]
    layers: tuple[int, ...]
    top_k: int
    via: Literal["bridge", "modules"] = "modules"

    def select(self, kind: str) -> Float[np.ndarray, "samples layers experts"]:
        """The weights of a kind.

        Raises:
            InputError: there is no such kind, or the model has no weights of it.
        """
        if kind not in ("full", "top"):
            raise InputError(f"weights are {kind!r}; give full or top")
        if kind == "full" and len(self.full) and np.isnan(self.full[self.tokens > 0]).any():
            raise InputError(
                "its routers tell the weights of the experts that they chose, and no full "
                "distribution over all; give top"
            )
        return self.full if kind == "full" else self.top

    def record(self) -> dict[str, np.ndarray]:
        """All of it as plain arrays, which `of` reads."""
        return {
            "full": self.full,
            "top": self.top,
            "tokens": self.tokens,
            "layers": np.array(self.layers, dtype=np.int64),
            "top_k": np.array(self.top_k),
            "bridged": np.array(self.via == "bridge"),
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Routes":
        """Routes out of what `record` gave; other entries are passed over."""
        return cls(
            full=np.asarray(record["full"]),
            top=np.asarray(record["top"]),
            tokens=np.asarray(record["tokens"]),
            layers=tuple(int(layer) for layer in record["layers"]),
            top_k=int(record["top_k"]),
            via="bridge" if bool(record["bridged"]) else "modules",
        )


def samples(task: Task, examples: Sequence[Example]) -> list[Example]:
    """The sequence of each row whose routes are its own: one a row, in the order of the rows.

    A row with choices is its prompt alone: what stands in a choice would tell them apart. Of others it is all
    that the model reads.

    Args:
        examples: what `encode` made of the task.
    """
    first: dict[int, Example] = {}
    for example in examples:
        first.setdefault(example.row, example)
    found = [first[row] for row in range(len(task.rows))]
    return [_prompt(example) for example in found] if task.shape == "choices" else found


def _prompt(example: Example) -> Example:
    """An example up to the first token that is scored."""
    stop = example.scored.index(True) if True in example.scored else len(example.ids)
    return replace(example, ids=example.ids[:stop], scored=example.scored[:stop])


def capture(
    model: Any,
    examples: Sequence[Example],
    *,
    drop_first: bool = False,
    routers: Sequence[str] | None = None,
    top_k: int | None = None,
    bridge: bool = True,
    pad_id: int = 0,
    tokens: int = 16384,
    side: PaddingSide = "right",
    progress: Callable[[int, int, str], None] | None = None,
    where: Callable[[int], str] = "row index {}".format,
) -> Routes:
    """The routes of every example, through the expert hooks of TransformerLens' bridge where it has them.

    Where the bridge has no adapter for an architecture, or no hooks on its routers, hooks on the model's own
    routers serve: `Routes.via` says which. Experts that are always on, and shared, are not among the experts.

    Args:
        model: a transformers model, an `Editable`, or with `routers` any torch module that takes token ids.
            It is run without dropout and stays bit for bit as it is.
        examples: one a sample, such as `samples` gives.
        drop_first: leave the first token out, whose route is often the same whatever follows.
        routers: modules that are its routers, first to last; without them they are found.
        top_k: how many experts are chosen where these give logits alone.
        bridge: try the bridge first.
        pad_id, tokens, side: how examples are batched; no result depends on it, but for float round-off.
        progress, where: as in `gathered`.

    Raises:
        NoRoutersError: the model has no experts to choose among.
        UnknownNameError: it has no module of that name.
        InputError: routers that do not go together, no token at all, token ids that the model does not have.
        NonFiniteError: weights that are NaN or infinite; the message names the row.
    """
    model = model if isinstance(model, nn.Module) else model.model
    few = [
        replace(example, ids=example.ids[:TRIAL_TOKENS], scored=example.scored[:TRIAL_TOKENS])
        for example in examples
        if example.ids
    ][:TRIAL_ROWS]
    if not few:
        raise InputError("no row has a token whose route could be read")
    trial = next(iter(batches(few, pad_id=pad_id, side=side)))
    with evaluating(model), ExitStack() as stack:
        found = find_routers(model, trial, names=routers, top_k=top_k)
        own = _by_modules(model, found, drop_first)
        theirs = None
        if bridge and routers is None:
            theirs = stack.enter_context(_bridged(model, found, drop_first))
        # What a hook of the bridge holds depends on the architecture: it is held against the router itself.
        bridged = theirs is not None and _agree(own, theirs, trial)
        run = theirs if theirs is not None and bridged else own
        measured = gathered(
            examples,
            batches(examples, tokens=tokens, pad_id=pad_id, side=side),
            lambda batch: _means(model, run(batch), batch),
            progress,
            where,
            "routed",
        )
    return Routes(
        full=measured["full"].numpy(),
        top=measured["top"].numpy(),
        tokens=measured["tokens"].numpy(),
        layers=tuple(router.layer for router in found),
        top_k=found[0].top_k,
        via="bridge" if bridged else "modules",
    )


class RouteSums(NamedTuple):
    """Sums over each row's tokens of the weights of all experts, and of the chosen ones.

    Attributes:
        tokens: how many are in them.
    """

    full: Float[Tensor, "rows layers experts"]
    top: Float[Tensor, "rows layers experts"]
    tokens: Int[Tensor, " rows"]


def _counted(batch: Batch, drop_first: bool) -> Bool[Tensor, "rows length"]:
    """Which tokens count."""
    mask = batch.attention_mask.bool()
    return mask & (batch.position_ids > 0) if drop_first else mask


def _summed(
    values: Float[Tensor, "..."], mask: Bool[Tensor, "rows length"], name: str
) -> tuple[Float[Tensor, "rows experts"], Int[Tensor, " rows"]]:
    """The sum over each row's tokens, and how many these are; what is routed at padding may be anything."""
    values = values.reshape(-1, values.shape[-1])
    if len(values) == mask.numel():
        here = mask.to(values.device)
        values = values.unflatten(0, mask.shape).masked_fill(~here[..., None], 0).sum(dim=1)
        return values.cpu(), mask.sum(dim=1).cpu()
    if len(values) == len(mask):  # one route a row
        return values.cpu(), torch.ones(len(mask), dtype=torch.long)
    raise InputError(f"{name}: gives {len(values)} routes for {mask.shape[0]} rows of {mask.shape[1]} tokens")


def _agree(own: Callable[[Batch], RouteSums], theirs: Callable[[Batch], RouteSums], batch: Batch) -> bool:
    """Whether two ways give the same sums, but for round-off."""
    try:
        pairs = list(zip(own(batch), theirs(batch), strict=True))
    except ValueError as error:
        log.debug("the bridge's hooks hold something else: %s", error)
        return False
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=SAME, atol=SAME, equal_nan=True)
        for one, other in pairs
    )


def _by_modules(
    model: nn.Module, routers: Sequence[Router], drop_first: bool
) -> Callable[[Batch], RouteSums]:
    """Sums by hooks on the routers themselves."""

    def run(batch: Batch) -> RouteSums:
        mask = _counted(batch, drop_first)
        full: dict[int, Tensor] = {}
        top: dict[int, Tensor] = {}
        tokens = mask.sum(dim=1)

        def see(place: int, all_of: Tensor | None, chosen: Tensor) -> None:
            nonlocal tokens
            name = routers[place].name
            if place in top:
                raise InputError(f"{name}: ran twice in one pass, so that no one route is a token's")
            top[place], tokens = _summed(chosen, mask, name)
            nothing = torch.full_like(top[place], torch.nan)
            full[place] = nothing if all_of is None else _summed(all_of, mask, name)[0]

        with reading(model, routers, see):
            forward(model, batch)
        return RouteSums(_by_place(full), _by_place(top), tokens.cpu())

    return run


def _by_place(sums: Mapping[int, Tensor]) -> Tensor:
    """What each router gave, in order."""
    return torch.stack([sums[place] for place in range(len(sums))], dim=1)


@contextmanager
def _bridged(
    model: nn.Module, routers: Sequence[Router], drop_first: bool
) -> Iterator[Callable[[Batch], RouteSums] | None]:
    """Sums by the bridge's hooks on routers; None where it has none, or is not to be used."""
    by_layer = {router.layer: router for router in routers}

    def keep(name: str, value: Tensor, batch: Batch) -> Tensor:
        router, value = by_layer[int(name.split(".")[1])], value.float()
        weights = value / router.scale if name.endswith("weights") else router.full(value)
        return _summed(weights, _counted(batch, drop_first), name)[0]

    with ExitStack() as stack:
        captured = None if routers[0].top_k == routers[0].experts else _captured(model, routers, keep, stack)
        if captured is None:
            yield None
            return

        def run(batch: Batch) -> RouteSums:
            sums = captured.activations(batch)
            full, top = (
                torch.stack([sums[name] for name in captured.names if name.endswith(ending)], dim=1)
                for ending in ("hook_out", "hook_expert_weights")
            )
            if routers[0].logits is None:
                full = torch.full_like(top, torch.nan)
            return RouteSums(full, top, _counted(batch, drop_first).sum(dim=1).cpu())

        yield run


def _captured(
    model: nn.Module, routers: Sequence[Router], keep: activations.Keep, stack: ExitStack
) -> activations.Capture | None:
    """The bridge around the routers, if it knows all of them.

    Where all experts are chosen its weights are in the order of choice, and tell no expert's.
    """
    layers = [router.layer for router in routers]
    # As transformers calls the router, or as nearly every adapter does.
    for key in dict.fromkeys((routers[0].name.rpartition(".")[2], "gate")):
        names = [f"mlp.{key}.hook_out", "mlp.hook_expert_weights"]
        try:
            captured = stack.enter_context(activations.capture(model, names, layers=layers, keep=keep))
        except (LookupError, ValueError) as error:
            log.debug("no bridge for routes: %s", error)
            continue
        return captured if len(captured.names) == 2 * len(layers) else None
    return None


def _means(model: nn.Module, sums: RouteSums, batch: Batch) -> dict[str, Tensor]:
    """Means over the tokens that count, NaN where none does."""
    full, top, tokens = sums
    bad = (tokens > 0) & ~top.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise not_finite(model, batch, int(bad.nonzero()[0, 0]))
    count = torch.where(tokens > 0, tokens, torch.nan)[:, None, None]
    return {"full": full / count, "top": top / count, "tokens": tokens}
