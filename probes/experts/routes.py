"""Routes of a mixture of experts: how much of a sample's tokens each router sends to each expert.

A sample's routing is the mean of the router's weights over its tokens, layer by layer, without padding.
Source: "Grokking in LLM Pretraining?", arXiv:2506.21551, which leaves open whether the weights are the full
distribution or those of the chosen experts: both are returned.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.errors import InputError
from probes.experts.routers import Router, find_routers, forward
from probes.models.body import evaluating
from probes.passes import activations
from probes.passes.batched import measure_examples, require_finite
from probes.text.batches import Batch, Example, batches
from probes.text.rows import Task

RouteWeights: TypeAlias = Literal["full", "top"]

log = logging.getLogger(__name__)
# Rows and tokens of each for the trial pass that shows what a model's routers compute.
TRIAL_ROWS, TRIAL_TOKENS = 2, 16
# Tolerance between the sums of a trial row by the bridge and by the routers, in half precision too.
SAME = 1e-2


@dataclass(frozen=True, kw_only=True)
class Routes:
    """The routes of each sample.

    Attributes:
        full: mean over a sample's tokens of the weights of all experts: a softmax over them, or the sigmoid
            of each; NaN where the routers return the chosen experts alone.
        top: mean of the weights that combine the chosen experts, 0 for the others; without scaling factors
            common to all experts. They need not sum to 1.
        tokens: tokens of each sample that count; where it is 0, `full` and `top` are NaN.
        layers: index of the block of each router, rising.
        top_k: experts chosen for a token.
        via: captured by hooks of TransformerLens' bridge, or of the model's own modules.
    """

    full: Float[np.ndarray, "samples layers experts"]
    top: Float[np.ndarray, "samples layers experts"]
    tokens: Int[np.ndarray, " samples"]
    layers: tuple[int, ...]
    top_k: int
    via: Literal["bridge", "modules"] = "modules"

    def select(self, kind: str) -> Float[np.ndarray, "samples layers experts"]:
        """The weights of a kind; raises InputError if there is no such kind, or the model has none of it."""
        if kind not in ("full", "top"):
            raise InputError(f"weights are {kind!r}; give full or top")
        if kind == "full" and len(self.full) and np.isnan(self.full[self.tokens > 0]).any():
            raise InputError(
                "its routers return the weights of the chosen experts alone, no full distribution; give top"
            )
        return self.full if kind == "full" else self.top

    def record(self) -> dict[str, np.ndarray]:
        """The routes as plain arrays, which `of` reads."""
        arrays = {name: np.asarray(value) for name, value in vars(self).items() if name != "via"}
        return arrays | {"bridged": np.array(self.via == "bridge")}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Routes":
        """Routes from a record; other entries of it are ignored."""
        return cls(
            **{name: np.asarray(record[name]) for name in ("full", "top", "tokens")},
            layers=tuple(int(layer) for layer in record["layers"]),
            top_k=int(record["top_k"]),
            via="bridge" if bool(record["bridged"]) else "modules",
        )


def routed_examples(task: Task, examples: Sequence[Example]) -> list[Example]:
    """One sequence for each row: all that the model reads, or the prompt that a row's choices share.

    Args:
        examples: of the task, as `encode` returns them.
    """
    first: dict[int, Example] = {}
    for example in examples:
        first.setdefault(example.row, example)
    sequences = [first[row] for row in range(len(task.rows))]
    if task.shape != "choices":
        return sequences
    # The prompt ends before the first token that is scored.
    return [_shortened(example, [*example.scored, True].index(True)) for example in sequences]


def _shortened(example: Example, length: int) -> Example:
    return replace(example, ids=example.ids[:length], scored=example.scored[:length])


def capture_routes(
    model: Any,
    examples: Sequence[Example],
    *,
    drop_first: bool = False,
    routers: Sequence[str] | None = None,
    top_k: int | None = None,
    bridge: bool = True,
    **batching: Any,
) -> Routes:
    """The routes of every example, through the expert hooks of TransformerLens' bridge where it has them.

    Where the bridge has no adapter for an architecture, or no hooks on its routers, hooks on the model's own
    routers serve: `Routes.via` says which. Shared experts, which are always on, are left out.

    Args:
        model: a transformers model, an `Editable`, or with `routers` any torch module that takes token ids.
            It runs without dropout and stays bit for bit as it is.
        examples: one for each sample, such as `routed_examples` returns.
        drop_first: leave out the first token, whose route often is the same in all texts.
        routers: modules that are its routers, first to last; by default they are detected.
        top_k: experts chosen where these return logits alone.
        bridge: try the bridge first.
        batching: `pad_id`, `tokens`, `side`, `progress` and `where`, as in `measure_examples`; no result
            depends on the batches, up to float round-off.

    Raises:
        NoRoutersError, UnknownNameError: the model has no experts to choose among, or no module of a name.
        InputError: routers that do not go together, no token at all, token ids that the model does not have.
        NonFiniteError: weights that are NaN or infinite; the message names the row.
    """
    model = model if isinstance(model, nn.Module) else model.model
    few = [_shortened(example, TRIAL_TOKENS) for example in examples if example.ids][:TRIAL_ROWS]
    if not few:
        raise InputError("no row has a token whose route could be read")
    trial = next(batches(few, pad_id=0))
    with evaluating(model), ExitStack() as stack:
        model_routers = find_routers(model, trial, names=routers, top_k=top_k)
        by_modules = _by_modules(model, model_routers, drop_first)
        bridging = bridge and routers is None
        by_bridge = stack.enter_context(_bridged(model, model_routers, drop_first)) if bridging else None
        # The meaning of the bridge's hooks depends on the architecture: compare them with the router itself.
        bridged = by_bridge is not None and _agree(by_modules, by_bridge, trial)
        run = by_bridge if by_bridge is not None and bridged else by_modules
        measured = measure_examples(
            examples, lambda batch: _means(model, run(batch), batch), what="routed", **batching
        )
    return Routes(
        **{name: values.numpy() for name, values in measured.items()},
        layers=tuple(router.layer for router in model_routers),
        top_k=model_routers[0].top_k,
        via="bridge" if bridged else "modules",
    )


class RouteSums(NamedTuple):
    """Sums over each row's tokens of the weights of all experts, and of the chosen ones; counts of tokens."""

    full: Float[Tensor, "rows layers experts"]
    top: Float[Tensor, "rows layers experts"]
    tokens: Int[Tensor, " rows"]


def _counted(batch: Batch, drop_first: bool) -> Bool[Tensor, "rows length"]:
    mask = batch.attention_mask.bool()
    return mask & (batch.position_ids > 0) if drop_first else mask


def _summed(
    values: Float[Tensor, "..."], mask: Bool[Tensor, "rows length"], name: str
) -> tuple[Float[Tensor, "rows experts"], Int[Tensor, " rows"]]:
    """The sum over each row's tokens, and their number; routes at padding may be anything."""
    values = values.reshape(-1, values.shape[-1])
    if len(values) == mask.numel():
        counted = mask.to(values.device)
        values = values.unflatten(0, mask.shape).masked_fill(~counted[..., None], 0).sum(dim=1)
        return values.cpu(), mask.sum(dim=1).cpu()
    if len(values) == len(mask):  # one route a row
        return values.cpu(), torch.ones(len(mask), dtype=torch.long)
    raise InputError(f"{name}: gives {len(values)} routes for {mask.shape[0]} rows of {mask.shape[1]} tokens")


def _agree(
    by_modules: Callable[[Batch], RouteSums], by_bridge: Callable[[Batch], RouteSums], batch: Batch
) -> bool:
    """Whether two ways give the same sums, up to round-off."""
    try:
        pairs = list(zip(by_modules(batch), by_bridge(batch), strict=True))
    except ValueError as error:
        log.debug("the bridge's hooks hold something else: %s", error)
        return False
    return all(
        first.shape == second.shape and torch.allclose(first, second, rtol=SAME, atol=SAME, equal_nan=True)
        for first, second in pairs
    )


def _by_modules(
    model: nn.Module, routers: Sequence[Router], drop_first: bool
) -> Callable[[Batch], RouteSums]:
    """Sums by hooks on the routers themselves."""

    def run(batch: Batch) -> RouteSums:
        mask = _counted(batch, drop_first)
        tokens, sums = mask.sum(dim=1), dict[int, tuple[Tensor, Tensor]]()

        def see(module: nn.Module, args: Any, output: Any, *, index: int) -> None:
            nonlocal tokens
            full, top = routers[index].read(output)
            name = routers[index].name
            if index in sums:
                raise InputError(f"{name}: ran twice in one pass, so that a token has two routes")
            chosen, tokens = _summed(top, mask, name)
            nothing = torch.full_like(chosen, torch.nan)
            sums[index] = nothing if full is None else _summed(full, mask, name)[0], chosen

        with ExitStack() as stack:
            for index, router in enumerate(routers):
                module = model.get_submodule(router.name)
                stack.callback(module.register_forward_hook(partial(see, index=index)).remove)
            forward(model, batch)
        full, top = torch.stack([torch.stack(sums[index]) for index in range(len(sums))], dim=2)
        return RouteSums(full, top, tokens.cpu())

    return run


@contextmanager
def _bridged(
    model: nn.Module, routers: Sequence[Router], drop_first: bool
) -> Iterator[Callable[[Batch], RouteSums] | None]:
    """Sums by the bridge's hooks on routers; None where it has none, or cannot tell the experts."""
    by_layer = {router.layer: router for router in routers}

    def keep(name: str, value: Tensor, batch: Batch) -> Tensor:
        router, value = by_layer[int(name.split(".")[1])], value.float()
        weights = value / router.scale if name.endswith("weights") else router.full(value)
        return _summed(weights, _counted(batch, drop_first), name)[0]

    with ExitStack() as stack:
        # Where all experts are chosen the bridge's weights are in the order of choice and name no expert.
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
    """The bridge around the routers, if it has hooks on all of them."""
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
    """Means over the tokens that count; NaN without any."""
    full, top, tokens = sums
    require_finite(model, batch, (tokens == 0) | top.isfinite().flatten(1).all(dim=1))
    count = torch.where(tokens > 0, tokens, torch.nan)[:, None, None]
    return {"full": full / count, "top": top / count, "tokens": tokens}
