"""The routers of a mixture of experts: found by what they give, and read by what they compute.

A router is a module inside a block that gives, for every token, the numbers of the experts it chose and as
many weights; nearly every one of transformers gives its logits besides. Whether it weighs all experts (by a
softmax, or each by a sigmoid) or only those it chose is seen by watching it compute once. So no table of
architectures is needed, and models with code of their own are read the same way.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from probes.errors import InputError, UnknownNameError
from probes.models.body import blocks, run, unwrapped
from probes.naming.families import BLOCK
from probes.text.batches import Batch

# What may lead from what a router gives to the weights of all experts.
ASPECTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda given: given,
    "softmax": lambda given: given.softmax(dim=-1),
    "sigmoid": lambda given: given.sigmoid(),
}
WEIGHING = {torch.ops.aten._softmax.default, torch.ops.aten.sigmoid.default}
# Two ways to the same number: relative round-off of float32, and of weights in half precision.
CLOSE, CLOSE_HALF = 1e-4, 2e-2


class NoRoutersError(InputError):
    """A model without experts to choose among, or whose routers do not tell what they chose."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """One router, and how its output is read.

    Attributes:
        name: its module in the model.
        layer: its block, from 0.
        experts: how many there are.
        top_k: how many are chosen for a token.
        logits: which part of its output tells of all experts; None where none does.
        aspect: of `ASPECTS`: how that part becomes the weights of all experts.
        weights, ids: which parts are the weights of the chosen experts and their numbers; None where the
            `top_k` largest of all are chosen, and weighed so that they sum to 1.
        scale: factor common to all experts that is in the weights.
    """

    name: str
    layer: int
    experts: int
    top_k: int
    logits: int | None
    aspect: str
    weights: int | None
    ids: int | None
    scale: float = 1.0

    def full(self, given: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
        """The weights of all experts from the part that tells of them, in float32."""
        return ASPECTS[self.aspect](given.float())

    def top(
        self, weights: Float[Tensor, "*tokens chosen"], ids: Shaped[Tensor, "*tokens chosen"]
    ) -> Float[Tensor, "*tokens experts"]:
        """The weights of the chosen experts in their places, 0 of the others, in float32."""
        spread = weights.new_zeros((*weights.shape[:-1], self.experts), dtype=torch.float32)
        return spread.scatter_(-1, ids.long(), weights.float() / self.scale)

    def read(self, output: Any) -> tuple[Tensor | None, Tensor]:
        """What a router gave as the weights of all experts, and of the chosen ones in their places."""
        parts = output if isinstance(output, tuple | list) else (output,)
        full = None if self.logits is None else self.full(parts[self.logits])
        if self.weights is not None and self.ids is not None:
            return full, self.top(parts[self.weights], parts[self.ids])
        assert full is not None
        values, ids = full.topk(self.top_k, dim=-1)
        return full, self.top(values / values.sum(dim=-1, keepdim=True), ids)


def find_routers(
    model: nn.Module, batch: Batch, *, names: Sequence[str] | None = None, top_k: int | None = None
) -> list[Router]:
    """The routers of a model in the order of their blocks, found by running a few tokens through it.

    Args:
        model: in evaluation mode; it stays bit for bit as it is.
        batch: a few tokens.
        names: modules that are routers, in order; of any torch module, whose `forward` takes token ids. One
            that gives a single tensor gives logits: all experts are weighed by their softmax.
        top_k: how many experts are chosen where `names` give logits alone; their weights then sum to 1.

    Raises:
        UnknownNameError: a name that the model does not have.
        NoRoutersError: none are found.
        InputError: several in one block, not as many experts or choices in all, a name that gives no routes.
    """
    kind = type(unwrapped(model)).__name__
    if names is None:
        places = dict(_in_blocks(model))
    else:
        known = dict(model.named_modules())
        missing = [name for name in names if name not in known]
        if missing:
            raise UnknownNameError(
                f"{kind}: has no module {missing[0]}; routers are named as in named_modules()"
            )
        places = {name: (layer, known[name]) for name, layer in zip(names, _numbers(names), strict=True)}
    seen: dict[str, Router] = {}
    with ExitStack() as stack:
        for name, (layer, module) in places.items():
            look = _look(name, layer, seen, named=names is not None, top_k=top_k)
            stack.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        forward(model, batch)
    # What hands on what a module inside of it gave is not itself the router.
    found = [
        router for name, router in seen.items() if not any(other.startswith(f"{name}.") for other in seen)
    ]
    found.sort(key=lambda router: router.layer)
    if not found:
        raise NoRoutersError(
            f"{kind}: has no routers that can be read: no module in its blocks gives the numbers of the "
            "chosen experts and their weights"
        )
    _alike(kind, found)
    return found


def _numbers(names: Sequence[str]) -> Sequence[int]:
    """The blocks that named modules are in, where the names tell; else their places."""
    blocks = [re.search(BLOCK, f"{name}.") for name in names]
    numbers = [int(block[1].rpartition(".")[2]) for block in blocks if block]
    return numbers if len(numbers) == len(names) else range(len(names))


def forward(model: nn.Module, batch: Batch) -> None:
    """Run a model on a batch for what its modules give: without logits where these are not needed."""
    inner = unwrapped(model)
    with torch.no_grad():
        if hasattr(inner, "get_input_embeddings") and hasattr(inner, "config"):
            run(model, batch)
        else:
            model(batch.ids, **_masked(model, batch))


def _masked(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The mask, if a module of any kind asks for it."""
    known = inspect.signature(model.forward).parameters
    return {"attention_mask": batch.attention_mask} if "attention_mask" in known else {}


def _in_blocks(model: nn.Module) -> Iterator[tuple[str, tuple[int, nn.Module]]]:
    """Modules inside of the blocks by name, each with its block."""
    try:
        names = {id(module): name for name, module in model.named_modules()}
        stacked = list(blocks(model))
    except (AttributeError, ValueError) as error:
        kind = type(unwrapped(model)).__name__
        raise NoRoutersError(f"{kind}: has no blocks that are known; name its routers") from error
    for layer, block in enumerate(stacked):
        for name, module in block.named_modules(prefix=names[id(block)]):
            if module is not block:
                yield name, (layer, module)


def _look(
    name: str, layer: int, seen: dict[str, Router], *, named: bool, top_k: int | None
) -> Callable[..., None]:
    """A hook that notes how a module's output is read, if it is a router's."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name in seen:
            return
        if named and isinstance(output, Tensor):
            if top_k is None or not 1 <= top_k <= output.shape[-1]:
                raise InputError(
                    f"{name}: gives {output.shape[-1]} logits and no choice; say with top_k how many of the "
                    "experts are chosen"
                )
            seen[name] = Router(
                name=name, layer=layer, experts=output.shape[-1], top_k=top_k, logits=0, aspect="softmax",
                weights=None, ids=None,
            )  # fmt: skip
            return
        places = _places(output)
        if places is None:
            if named:
                raise InputError(f"{name}: gives neither logits nor experts with their weights")
            return
        weights, ids, wide = places
        experts = _experts(module, output, wide)
        if experts is None:  # it chooses something else, such as the positions that attention reads
            if named:
                raise InputError(f"{name}: does not tell how many experts there are")
            return
        with _Watched() as watched:
            module.forward(*args, **kwargs)
        shares = [share for share in watched.shares if share.shape[-1] == experts]
        logits, aspect = _weighed(output, wide, shares)
        router = Router(
            name=name, layer=layer, experts=experts, top_k=output[ids].shape[-1], logits=logits,
            aspect=aspect, weights=weights, ids=ids,
        )  # fmt: skip
        seen[name] = _unscaled(module, router, output)

    return hook


def _places(output: Any) -> tuple[int, int, list[int]] | None:
    """Where in a router's output the weights, the ids and what tells of all experts are; None of others."""
    if not isinstance(output, tuple | list):
        return None
    tensors = {place: part for place, part in enumerate(output) if isinstance(part, Tensor)}
    whole = [place for place, part in tensors.items() if part.dtype in (torch.int64, torch.int32)]
    if len(whole) != 1 or output[whole[0]].ndim < 2:
        return None
    ids, shape = whole[0], output[whole[0]].shape
    real = [place for place, part in tensors.items() if part.is_floating_point()]
    # The last, for where all experts are chosen the logits before it are of the same shape.
    weights = [place for place in real if output[place].shape == shape]
    if not weights:
        return None
    wide = [
        place for place in real if place != weights[-1] and output[place].shape[:-1] == shape[:-1]
        and output[place].shape[-1] >= shape[-1]
    ]  # fmt: skip
    return weights[-1], ids, wide


def _experts(module: nn.Module, output: Any, wide: list[int]) -> int | None:
    """How many experts a router chooses among; None where neither its output nor its weight tells."""
    if wide:
        return max(output[place].shape[-1] for place in wide)
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None


class _Watched(TorchDispatchMode):
    """Keeps what is computed inside as a softmax or a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in WEIGHING:
            self.shares.append(output.float())
        return output


def _weighed(output: Any, wide: list[int], shares: list[Tensor]) -> tuple[int | None, str]:
    """Which part of the output gives, and how, what the router computed as the weights of all experts."""
    for share in shares:
        for place in wide:
            part = output[place].float()
            for aspect, function in ASPECTS.items():
                if part.numel() == share.numel() and _near(function(part).reshape(share.shape), share):
                    return place, aspect
    return None, "softmax"


def _near(one: Tensor, other: Tensor, rough: bool = False) -> bool:
    return torch.allclose(one, other, rtol=CLOSE_HALF if rough else CLOSE, atol=1e-6)


def _unscaled(module: nn.Module, router: Router, output: Any) -> Router:
    """The router with the factor that its weights carry, for what they should be tells whether they do."""
    assert router.weights is not None
    assert router.ids is not None
    weights, ids = output[router.weights], output[router.ids].long()
    rough = weights.dtype not in (torch.float32, torch.float64)
    weights = weights.float()
    ones = torch.ones_like(weights[..., 0])
    full = None if router.logits is None else router.full(output[router.logits])
    scales = [
        float(value)
        for name, value in vars(module).items()
        if "scal" in name and isinstance(value, int | float) and not isinstance(value, bool) and value
    ]
    for scale in (1.0, *scales):
        plain = weights / scale
        chosen = full is not None and _near(plain, full.gather(-1, ids), rough)
        if chosen or _near(plain.sum(dim=-1), ones, rough):
            return replace(router, scale=scale)
    return router


def _alike(kind: str, routers: Sequence[Router]) -> None:
    """Whether routes of all layers fit into one array."""
    for one, other in pairwise(routers):
        if one.layer == other.layer:
            raise InputError(f"{kind}: {one.name} and {other.name} are in one block; name those to be read")
        if (one.experts, one.top_k) != (other.experts, other.top_k):
            raise InputError(
                f"{kind}: {one.name} chooses {one.top_k} of {one.experts} experts and {other.name} "
                f"{other.top_k} of {other.experts}; name those to be read, with as many"
            )


@contextmanager
def reading(
    model: nn.Module, routers: Sequence[Router], see: Callable[[int, Tensor | None, Tensor], None]
) -> Iterator[None]:
    """Call `see(place, full, top)` whenever one of the routers has run; the model is as before afterwards."""

    def hook(place: int) -> Callable[..., None]:
        return lambda module, args, output: see(place, *routers[place].read(output))

    with ExitStack() as stack:
        for place, router in enumerate(routers):
            module = model.get_submodule(router.name)
            stack.callback(module.register_forward_hook(hook(place)).remove)
        yield
