"""Perturbing a layer of a running model in place, with the blocks before it run once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.models.body import blocks, replaced_forward, unwrapped


class PerturbedWeights:
    """Some weights of a model as w + c ⊙ u; a context manager that restores them and their gradients.

    Args:
        adaptive: c is |w|, so that a zero weight never moves; else 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, adaptive: bool = True):
        self.parameters = tuple(parameters)
        self._adaptive = adaptive
        self.size = sum(parameter.numel() for parameter in self.parameters)

    def __enter__(self) -> "PerturbedWeights":
        self._stored = [parameter.detach().clone() for parameter in self.parameters]
        self._state = [(parameter.requires_grad, parameter.grad) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return self

    def __exit__(self, *error: object) -> None:
        for parameter, stored, state in zip(self.parameters, self._stored, self._state, strict=True):
            required, parameter.grad = state
            parameter.detach().copy_(stored)
            parameter.requires_grad_(required)
        self._stored, self._state = [], []

    @property
    def zero(self) -> Float[Tensor, " size"]:
        """u = 0: no perturbation."""
        return torch.zeros(self.size, dtype=self._stored[0].dtype, device=self._stored[0].device)

    def put(self, u: Float[Tensor, " size"]) -> None:
        """Set the weights to w + c ⊙ u."""
        for parameter, stored, move in zip(self.parameters, self._stored, self.divided(u), strict=True):
            parameter.detach().copy_(stored + move)

    @contextmanager
    def sloping(self) -> Iterator[None]:
        """Inside, these weights require gradients."""
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def slope(self) -> Float[Tensor, " size"]:
        """The gradient in u: c ⊙ the gradients of the weights, 0 for weights without one."""
        return self.scaled([parameter.grad for parameter in self.parameters])

    def scaled(self, gradients: Sequence[Tensor | None]) -> Float[Tensor, " size"]:
        """c ⊙ gradients of the weights, in their order, as one vector."""
        parts = []
        for stored, gradient in zip(self._stored, gradients, strict=True):
            part = torch.zeros_like(stored) if gradient is None else gradient
            parts.append((part * stored.abs() if self._adaptive else part).reshape(-1))
        return torch.cat(parts)

    def divided(self, u: Float[Tensor, " size"]) -> Iterator[Tensor]:
        """c ⊙ u by weight: the perturbation of each."""
        parts = u.split([stored.numel() for stored in self._stored])
        for stored, part in zip(self._stored, parts, strict=True):
            yield part.view(stored.shape) * (stored.abs() if self._adaptive else 1)


class Prefix:
    """Cache of the residual stream that enters a block, by batch, while earlier weights stay unchanged.

    It holds one block at a time and moves forward to later ones: take layers in order.

    Args:
        room: most bytes that are kept; batches beyond run in full every time.

    Raises:
        InputError: no list of blocks is found.
    """

    def __init__(self, model: nn.Module, *, room: int = 2**31):
        self._inner = unwrapped(model)
        self._room = room
        self._blocks = list(blocks(model))
        self._kept: dict[Any, tuple[int, Tensor]] = {}
        self._forms: dict[int, Callable[[Tensor], Any]] = {}

    def clear(self) -> None:
        """Empty the cache, after a change of the weights."""
        self._kept.clear()

    @contextmanager
    def entering(self, layer: int) -> Iterator[None]:
        """Inside, blocks before this one do not run again for a batch in the cache.

        Args:
            layer: index of a block; at most 0 runs all blocks, the number of blocks none.
        """
        if layer <= 0:
            yield
            return
        key: list[Any] = [None]

        def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            key[0] = tuple(
                (name, tuple(value.shape), value.cpu().numpy().tobytes())
                for name in ("input_ids", "attention_mask")
                if isinstance(value := kwargs.get(name), Tensor)
            )
            if key[0] in self._kept and self._kept[key[0]][0] > layer:
                del self._kept[key[0]]

        def stand_in(index: int) -> Callable[..., Any]:
            block_forward = self._blocks[index].forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                depth, hidden = self._kept.get(key[0], (0, None))
                if index < depth:
                    assert hidden is not None
                    return self._forms[index](hidden)
                with torch.no_grad():
                    output = block_forward(*args, **kwargs)
                self._forms[index] = _form(output)
                if index == layer - 1:
                    self._keep(key[0], layer, _hidden(output))
                return output

            return forward

        with ExitStack() as stack:
            stack.callback(self._inner.register_forward_pre_hook(see, with_kwargs=True).remove)
            for index in range(min(layer, len(self._blocks))):
                stack.enter_context(replaced_forward(self._blocks[index], stand_in(index)))
            yield

    def _keep(self, key: Any, layer: int, hidden: Tensor) -> None:
        held = sum(kept.nbytes for other, (_, kept) in self._kept.items() if other != key)
        if held + hidden.nbytes <= self._room:
            self._kept[key] = layer, hidden
        else:
            self._kept.pop(key, None)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _form(output: Any) -> Callable[[Tensor], Any]:
    """How a block wraps the residual stream; its other tensors, such as patterns, are dropped."""
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    rest = [None if isinstance(value, Tensor) else value for value in output[1:]]
    return lambda hidden: type(output)([hidden, *rest])


@contextmanager
def logits_through(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a model returns changed logits."""

    def see(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    handle = unwrapped(model).register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()
