"""The routers of a mixture of experts: recognised by their output, read by watching them compute.

A router is a module inside a block that returns, for every token, the indices of the experts it chose and as
many weights. Watching one forward pass tells whether it weighs all experts (by a softmax, or each by a
sigmoid) or only the chosen ones. So no table of architectures is needed.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from probes.errors import InputError, UnknownNameError
from probes.files.layout import Matrix
from probes.models.body import blocks, run, unwrapped
from probes.naming.families import BLOCK
from probes.text.batches import Batch

# Functions from a router's output to the weights of all experts.
ASPECTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda values: values,
    "softmax": lambda values: values.softmax(dim=-1),
    "sigmoid": lambda values: values.sigmoid(),
}
WEIGHING = {torch.ops.aten._softmax.default, torch.ops.aten.sigmoid.default}
# Two ways to the same number: relative round-off of float32, and of weights in half precision.
CLOSE, CLOSE_HALF = 1e-4, 2e-2


class NoRoutersError(InputError):
    """The model has no experts to choose among, or its routers do not return their choice."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """One router, and how its output is read.

    Attributes:
        name: of its module.
        layer: index of its block, from 0.
        top_k: experts chosen for a token.
        logits: the part of its output with a value for each expert; None if there is none.
        aspect: key of `ASPECTS`: from that part to the weights of all experts.
        weights, ids: the parts with the weights and the indices of the chosen experts; None where the
            `top_k` largest of all are chosen and normalised to sum to 1.
        scale: factor in the weights that is common to all experts.
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

    def full(self, values: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
        """The weights of all experts, in float32, from the part with a value for each."""
        return ASPECTS[self.aspect](values.float())

    def top(
        self, weights: Float[Tensor, "*tokens chosen"], ids: Shaped[Tensor, "*tokens chosen"]
    ) -> Float[Tensor, "*tokens experts"]:
        """The weights of the chosen experts at their indices, 0 for the others, in float32."""
        spread = weights.new_zeros((*weights.shape[:-1], self.experts), dtype=torch.float32)
        return spread.scatter_(-1, ids.long(), weights.float() / self.scale)

    def read(self, output: Any) -> tuple[Tensor | None, Tensor]:
        """From a router's output, the weights of all experts, and of the chosen ones at their indices."""
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
        names: modules that are routers, in order; then the model may be any torch module that takes token
            ids. A single tensor is taken for logits, with a softmax over all experts.
        top_k: experts chosen where `names` return logits alone; their weights then sum to 1.

    Raises:
        UnknownNameError, NoRoutersError: the model lacks a name, or has no routers.
        InputError: several in one block, unequal numbers of experts or choices, a module without routes.
    """
    kind = type(unwrapped(model)).__name__
    if names is None:
        candidates = _in_blocks(model)
    else:
        modules = dict(model.named_modules())
        missing = [name for name in names if name not in modules]
        if missing:
            what = f"has no module {missing[0]}; routers are named as in named_modules()"
            raise UnknownNameError(f"{kind}: {what}")
        blocks_of = zip(names, _numbers(names), strict=True)
        candidates = {name: (layer, modules[name]) for name, layer in blocks_of}
    routers: dict[str, Router] = {}
    with ExitStack() as stack:
        for name, (layer, module) in candidates.items():
            look = _look(name, layer, routers, named=names is not None, top_k=top_k)
            stack.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        forward(model, batch)
    # A module that only returns the output of a router inside it is no router.
    wrappers = {name for name in routers if any(other.startswith(f"{name}.") for other in routers)}
    outermost = [router for name, router in routers.items() if name not in wrappers]
    outermost.sort(key=lambda router: router.layer)
    if not outermost:
        raise NoRoutersError(
            f"{kind}: has no routers that can be read: no module in its blocks returns the indices of the "
            "chosen experts and their weights"
        )
    require_one_a_block(kind, outermost)
    for router, other in pairwise(outermost):
        if (router.experts, router.top_k) != (other.experts, other.top_k):
            raise InputError(
                f"{kind}: {router.name} chooses {router.top_k} of {router.experts} experts and {other.name} "
                f"{other.top_k} of {other.experts}; name those to be read, with as many"
            )
    return outermost


def _numbers(names: Sequence[str]) -> Sequence[int]:
    """The blocks of modules, as their names tell; else 0, 1, 2 …."""
    blocks = [re.search(BLOCK, f"{name}.") for name in names]
    numbers = [int(block[1].rpartition(".")[2]) for block in blocks if block]
    return numbers if len(numbers) == len(names) else range(len(names))


def forward(model: nn.Module, batch: Batch) -> None:
    """Run a model on a batch for its hooks; without logits where the model allows."""
    inner = unwrapped(model)
    with torch.no_grad():
        if hasattr(inner, "get_input_embeddings") and hasattr(inner, "config"):
            run(model, batch)
        else:
            masked = "attention_mask" in inspect.signature(model.forward).parameters
            model(batch.ids, **({"attention_mask": batch.attention_mask} if masked else {}))


def _in_blocks(model: nn.Module) -> dict[str, tuple[int, nn.Module]]:
    """Modules inside of the blocks by name, with their block."""
    try:
        names = {id(module): name for name, module in model.named_modules()}
        stacked = list(blocks(model))
    except (AttributeError, ValueError) as error:
        kind = type(unwrapped(model)).__name__
        raise NoRoutersError(f"{kind}: its blocks are not recognised; name its routers") from error
    return {
        name: (layer, module)
        for layer, block in enumerate(stacked)
        for name, module in block.named_modules(prefix=names[id(block)])
        if module is not block
    }


def _look(
    name: str, layer: int, routers: dict[str, Router], *, named: bool, top_k: int | None
) -> Callable[..., None]:
    """A hook that records how a module's output is read, if the module is a router."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name in routers:
            return
        if named and isinstance(output, Tensor):
            experts = output.shape[-1]
            if top_k is None or not 1 <= top_k <= experts:
                raise InputError(
                    f"{name}: gives {experts} logits and no choice; say with top_k how many of the experts "
                    "are chosen"
                )
            routers[name] = Router(
                name=name, layer=layer, experts=experts, top_k=top_k, logits=0, aspect="softmax",
                weights=None, ids=None,
            )  # fmt: skip
            return
        parts = _parts(output)
        count = None if parts is None else _experts(module, output, parts[2])
        if parts is None or count is None:  # or it chooses others, such as the positions that attention reads
            if named:
                reason = "gives neither logits nor experts with their weights"
                raise InputError(f"{name}: {'does not tell how many experts there are' if parts else reason}")
            return
        weights, ids, wide = parts
        with _Watched() as watched:
            module.forward(*args, **kwargs)
        shares = [share for share in watched.shares if share.shape[-1] == count]
        logits, aspect = _weighed(output, wide, shares)
        router = Router(
            name=name, layer=layer, experts=count, top_k=output[ids].shape[-1], logits=logits, aspect=aspect,
            weights=weights, ids=ids,
        )  # fmt: skip
        routers[name] = _unscaled(module, router, output)

    return hook


def _parts(output: Any) -> tuple[int, int, list[int]] | None:
    """Indices in a router's output of the weights, the ids and the parts over all experts; else None."""
    if not isinstance(output, tuple | list):
        return None
    tensors = {index: part for index, part in enumerate(output) if isinstance(part, Tensor)}
    integers = [index for index, part in tensors.items() if part.dtype in (torch.int64, torch.int32)]
    if len(integers) != 1 or output[integers[0]].ndim < 2:
        return None
    ids, shape = integers[0], output[integers[0]].shape
    real = [index for index, part in tensors.items() if part.is_floating_point()]
    # The last: where all experts are chosen, the logits before it have the same shape.
    weights = [index for index in real if output[index].shape == shape]
    if not weights:
        return None
    wide = [
        index for index in real if index != weights[-1] and output[index].shape[:-1] == shape[:-1]
        and output[index].shape[-1] >= shape[-1]
    ]  # fmt: skip
    return weights[-1], ids, wide


def _experts(module: nn.Module, output: Any, wide: list[int]) -> int | None:
    """Number of experts that a router chooses among; None if neither output nor weight tells."""
    if wide:
        return max(output[index].shape[-1] for index in wide)
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None


class _Watched(TorchDispatchMode):
    """Keeps the softmaxes and sigmoids that are computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in WEIGHING:
            self.shares.append(output.float())
        return output


def _weighed(output: Any, wide: list[int], shares: list[Tensor]) -> tuple[int | None, str]:
    """The part of the output, and the aspect, that give the weights of all experts."""
    for share in shares:
        for index in wide:
            part = output[index].float()
            for aspect, function in ASPECTS.items():
                if part.numel() == share.numel() and _near(function(part).reshape(share.shape), share):
                    return index, aspect
    return None, "softmax"


def _near(first: Tensor, second: Tensor, rough: bool = False) -> bool:
    return torch.allclose(first, second, rtol=CLOSE_HALF if rough else CLOSE, atol=1e-6)


def _unscaled(module: nn.Module, router: Router, output: Any) -> Router:
    """The router with the scale of its weights, found by comparing them with what they should be."""
    assert router.weights is not None
    assert router.ids is not None
    weights, ids = output[router.weights].float(), output[router.ids].long()
    rough = output[router.weights].dtype not in (torch.float32, torch.float64)
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


def require_one_a_block(where: str, routers: Sequence[Router | Matrix]) -> None:
    """Refuse two routers in one block."""
    for router, other in pairwise(routers):
        if router.layer == other.layer:
            raise InputError(
                f"{where}: {router.name} and {other.name} are in one block; name those to be read"
            )
