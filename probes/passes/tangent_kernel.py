"""The tangent kernel of a model on a few rows, and the prediction of its first-order expansion.

A row's output is its logits, projected at random and averaged over its labels (`row_outputs`). The kernel is
K = J Jᵀ; row i of J is the gradient of the first projected output of row i in all weights.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from probes.errors import InputError
from probes.models.body import evaluating, trainable
from probes.passes.label_logits import row_outputs
from probes.passes.objective import EncodedRows

# Entries of gradients held at once: 1 GB in float32.
HELD = 2**28


def projection(outputs: int, classes: int, seed: int) -> Float[Tensor, "outputs classes"]:
    """Random directions of logits, the same for every checkpoint: N(0, 1 / classes), in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, classes, generator=generator, dtype=torch.float64) / classes**0.5


def tangent_kernel(
    model: nn.Module,
    encoded: EncodedRows,
    rows: Sequence[int],
    direction: Float[Tensor, " classes"],
    *,
    held: int = HELD,
) -> Float[Tensor, "rows rows"]:
    """K = J Jᵀ in float64, over all weights, tied ones once.

    It takes a backward pass a row for each group of weights; at most `held` entries of gradients are held.
    """
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    with evaluating(model), trainable(model) as weights, torch.enable_grad():
        for group in weight_groups(weights, held // max(1, len(rows))):
            jacobian = [_gradient(model, encoded, row, direction, group) for row in rows]
            for index in range(len(group)):
                part = torch.stack([gradient[index] for gradient in jacobian])
                for chunk in part.split(2**20, dim=1):
                    wide = chunk.double()
                    kernel += (wide @ wide.T).cpu()
    return kernel


def weight_groups(weights: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Weights in groups of at most `most` entries; a larger weight is a group of its own."""
    groups: list[list[nn.Parameter]] = []
    room = 0
    for weight in weights:
        if not groups or weight.numel() > room:
            groups.append([])
            room = most
        groups[-1].append(weight)
        room -= weight.numel()
    return groups


def _gradient(
    model: nn.Module, encoded: EncodedRows, row: int, direction: Tensor, group: Sequence[nn.Parameter]
) -> list[Tensor]:
    projected = direction[None].to(group[0])
    (output,) = row_outputs(model, encoded, row, projected, differentiable=True)
    gradients = torch.autograd.grad(output, group, allow_unused=True)
    pairs = zip(group, gradients, strict=True)
    return [(torch.zeros_like(weight) if part is None else part).flatten() for weight, part in pairs]


def first_order(
    model: nn.Module,
    encoded: EncodedRows,
    rows: Sequence[int],
    directions: Float[Tensor, "outputs classes"],
    delta: Mapping[str, Tensor],
) -> Float[Tensor, "rows outputs"]:
    """J Δθ for every row and projected output, by forward differentiation, in the model's dtype.

    Args:
        delta: of parameters by name; the others do not move.

    Raises:
        InputError: an operation of this model has no forward derivative.
    """
    parameters = dict(model.named_parameters())
    products, wanted = [], directions.to(next(model.parameters()))
    with evaluating(model), without_fused_kernels(model), forward_ad.dual_level():
        with warnings.catch_warnings():
            # torch warns of its own scripted functions.
            warnings.simplefilter("ignore", DeprecationWarning)
            moving = {}
            for name, moved in delta.items():
                weight = parameters[name]
                moving[id(weight)] = forward_ad.make_dual(weight.detach(), moved.to(weight))
        with replaced_parameters(model, moving):
            for row in rows:
                try:
                    outputs = row_outputs(model, encoded, row, wanted, differentiable=True)
                    moved = forward_ad.unpack_dual(outputs).tangent
                except (NotImplementedError, RuntimeError) as error:
                    reason = str(error).strip().partition("\n")[0]
                    kind = type(model).__name__
                    raise InputError(f"{kind} cannot be differentiated forward ({reason})") from error
                products.append(
                    (torch.zeros_like(outputs) if moved is None else moved).detach().double().cpu()
                )
    return torch.stack(products)


@contextmanager
def replaced_parameters(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, tensors replace parameters, keyed by the parameter's identity."""
    stored = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        for module, parameters in stored:
            for name, parameter in parameters.items():
                if id(parameter) in tensors:
                    delattr(module, name)
                    setattr(module, name, tensors[id(parameter)])
        yield
    finally:
        for module, parameters in stored:
            for name in parameters:
                module.__dict__.pop(name, None)
            # In their own order, which is the order of the model's parameters.
            module._parameters.clear()
            module._parameters.update(parameters)


@contextmanager
def without_fused_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, attention and experts run without fused kernels, which have no forward derivative."""
    config: Any = getattr(model, "config", None)
    kinds = [kind for kind in ("attn", "experts") if hasattr(model, f"set_{kind}_implementation")]
    before = {kind: getattr(config, f"_{kind}_implementation", None) for kind in kinds}
    fused = {kind: name for kind, name in before.items() if name not in (None, "eager")}
    try:
        for kind in fused:
            getattr(model, f"set_{kind}_implementation")("eager")
        yield
    finally:
        for kind, name in fused.items():
            getattr(model, f"set_{kind}_implementation")(name)
