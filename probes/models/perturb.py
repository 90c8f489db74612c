"""A layer of a running model moved in place and put back bit for bit, the blocks before it run once.

`PerturbedWeights` gives the weights w + c ⊙ u of a layer for any u, and a gradient in u. `Prefix` keeps the
residual stream that enters a block for every batch, so that only this block and those behind it run again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.models.body import blocks, replaced_forward, unwrapped


class PerturbedWeights:
    """Some weights of a model as w + c ⊙ u; a context manager that leaves the model as it was.

    Restored bit for bit, also after an error: weights, gradients, and which weights require one.

    Attributes:
        size: how many entries u has.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, adaptive: bool = True):
        """Take what is to be moved; nothing is changed yet.

        Args:
            adaptive: c is |w|, so that a weight that is zero never moves; else it is 1.
        """
        self._parameters = tuple(parameters)
        self._adaptive = adaptive
        self.size = sum(parameter.numel() for parameter in self._parameters)

    def __enter__(self) -> "PerturbedWeights":
        self._own = [parameter.detach().clone() for parameter in self._parameters]
        self._state = [(parameter.requires_grad, parameter.grad) for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return self

    def __exit__(self, *error: object) -> None:
        for parameter, stored, (required, gradient) in zip(
            self._parameters, self._own, self._state, strict=True
        ):
            parameter.detach().copy_(stored)
            parameter.requires_grad_(required)
            parameter.grad = gradient
        self._own, self._state = [], []

    @property
    def zero(self) -> Float[Tensor, " size"]:
        """No move."""
        return torch.zeros(self.size, dtype=self._own[0].dtype, device=self._own[0].device)

    def put(self, u: Float[Tensor, " size"]) -> None:
        """Give the weights w + c ⊙ u."""
        for parameter, stored, part in self._parts(u):
            move = part * stored.abs() if self._adaptive else part
            parameter.detach().copy_(stored + move)

    @contextmanager
    def sloping(self) -> Iterator[None]:
        """Inside, gradients of these weights are taken."""
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def slope(self) -> Float[Tensor, " size"]:
        """c ⊙ the gradients that the weights have: the gradient in u; 0 of weights that have none."""
        return self.scaled([parameter.grad for parameter in self._parameters])

    def scaled(self, gradients: Sequence[Tensor | None]) -> Float[Tensor, " size"]:
        """c ⊙ some gradients of the weights, in their order, as one vector."""
        parts = []
        for stored, gradient in zip(self._own, gradients, strict=True):
            part = torch.zeros_like(stored) if gradient is None else gradient
            parts.append((part * stored.abs() if self._adaptive else part).reshape(-1))
        return torch.cat(parts)

    def divided(self, u: Float[Tensor, " size"]) -> list[Tensor]:
        """c ⊙ u by weight: what is added to each."""
        return [part * stored.abs() if self._adaptive else part for _, stored, part in self._parts(u)]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weights that are moved."""
        return self._parameters

    def _parts(self, u: Tensor) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, stored, part in zip(self._parameters, self._own, u.split(sizes), strict=True):
            yield parameter, stored, part.view(stored.shape)


class Prefix:
    """The residual stream entering a block, kept by batch: for weights before it that stay as they are.

    It is kept for one block at a time and carried forward when a later one is asked for, so that layers
    are best taken in order. Kept in the model's dtype, on its device.
    """

    def __init__(self, model: nn.Module, *, room: int = 2**31):
        """Keep nothing yet.

        Args:
            room: most bytes that are kept; batches beyond are run whole every time.

        Raises:
            InputError: no list of blocks is found.
        """
        self._inner = unwrapped(model)
        self._room = room
        self._blocks = list(blocks(model))
        self._kept: dict[Any, tuple[int, Tensor]] = {}
        self._forms: dict[int, Callable[[Tensor], Any]] = {}

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._kept.clear()

    @contextmanager
    def entering(self, layer: int) -> Iterator[None]:
        """Inside, blocks before this one are not run again for a batch that they have seen.

        Args:
            layer: index of a block; 0 and less run all, the number of blocks only what is behind them.
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
    """The residual stream in what a block gives."""
    return output[0] if isinstance(output, tuple | list) else output


def _form(output: Any) -> Callable[[Tensor], Any]:
    """How a block wraps the residual stream; what it gives beside it, such as patterns, is not kept."""
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    rest = [None if isinstance(value, Tensor) else value for value in output[1:]]
    return lambda hidden: type(output)([hidden, *rest])


@contextmanager
def logits_through(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a model gives its logits changed."""

    def see(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    handle = unwrapped(model).register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()
