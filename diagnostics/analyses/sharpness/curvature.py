"""Curvature of a loss: both ends of the spectrum of its Hessian in some weights, and the trace.

A cross-check of sharpness: near a stationary point the worst rise within a small radius ρ is ρ² λ_max / 2,
the mean rise ρ² tr / 2. Hessian-vector products come from differentiating twice. Lanczos iteration gives both
ends at once, so that a saddle is seen as one.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from probes.models.body import evaluating, full_pass, run
from probes.models.perturb import PerturbedWeights
from probes.passes.backward import log_likelihoods, widened
from probes.passes.objective import EncodedRows, batch_of, scoring_units

# Torch's messages about operations without a second derivative.
NO_DERIVATIVE = re.compile(
    r"derivative for .* is not implemented|differentiate twice|double backward|does not require grad"
)
Product = Callable[[Tensor], Tensor]


class Spectrum(NamedTuple):
    """Of M = diag(c) H diag(c), in nats.

    Attributes:
        top, bottom: the largest and the smallest eigenvalue; below 0 the loss falls at second order.
        trace, trace_error: Hutchinson's estimate with its standard error.
    """

    top: float
    bottom: float
    trace: float
    trace_error: float


def spectrum(
    product: Product, template: Tensor, *, steps: int = 20, probes: int = 10, generator: torch.Generator
) -> Spectrum:
    """Ends of the spectrum and trace of a symmetric operator.

    Args:
        product: from v to M v.
        template: a vector of the operator's size, dtype and device.
        steps: of the Lanczos iteration; both ends lie within the true ones and approach them with more steps.
        probes: random sign vectors for the trace.

    >>> vector = torch.zeros(2)
    >>> ends = spectrum(lambda v: torch.tensor([3.0, -1.0]) * v, vector, generator=torch.Generator())
    >>> round(ends.top, 4), round(ends.bottom, 4), round(ends.trace, 4)
    (3.0, -1.0, 2.0)
    """
    traces = []
    for _ in range(probes):
        signs = (2 * torch.randint(0, 2, template.shape, generator=generator) - 1).to(template)
        traces.append(float(signs.double() @ product(signs).double()))
    values = lanczos(product, torch.randn(template.shape, generator=generator).to(template), steps)
    error = float(np.std(traces, ddof=1) / math.sqrt(probes)) if probes > 1 else math.nan
    return Spectrum(float(values[-1]), float(values[0]), float(np.mean(traces)), error)


def lanczos(product: Product, start: Tensor, steps: int) -> np.ndarray:
    """Eigenvalues of a symmetric operator in the Krylov space of a vector, ascending.

    Three vectors are held. Without reorthogonalisation copies of an end appear, which do not move it. scipy's
    `eigsh` agrees to 3e-7 (float32 round-off) and takes one product more, but holds 20 vectors in two_sided
    memory: 16 GB for a block of 200 M weights.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    v, previous = start / start.norm(), torch.zeros_like(start)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(steps, start.numel())):
        new = product(v) - (off_diagonal[-1] if off_diagonal else 0.0) * previous
        diagonal.append(float(new.double() @ v.double()))
        new = new - diagonal[-1] * v
        size = float(torch.linalg.vector_norm(new, dtype=torch.float64))
        if size <= 1e-6 * max(map(abs, [*diagonal, *off_diagonal])):  # the space is exhausted
            break
        off_diagonal.append(size)
        previous, v = v, new / size
    return np.asarray(eigvalsh_tridiagonal(diagonal, off_diagonal[: len(diagonal) - 1]))


class HessianProduct:
    """Hessian-vector products of a batch's loss. Keeps the gradient's graph: weights must not change."""

    def __init__(
        self, model: nn.Module, encoded: EncodedRows, rows: tuple[int, ...], weights: PerturbedWeights
    ):
        self._model, self._encoded, self._rows, self._weights = model, encoded, rows, weights
        self._gradients: tuple[Tensor | None, ...] | None = None

    def product(self, v: Tensor) -> Tensor:
        """c ⊙ H (c ⊙ v), by one pass back through the graph of the gradient."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        parameters = self._weights.parameters
        parts = self._weights.divided(v)
        # Fused attention has no second derivative.
        with evaluating(self._model), sdpa_kernel(SDPBackend.MATH), self._weights.sloping():
            if self._gradients is None:
                loss = graph(self._model, self._encoded, self._rows)
                self._gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            products = [
                (gradient * part).sum()
                for gradient, part in zip(self._gradients, parts, strict=True)
                if gradient is not None
            ]
            directional = torch.stack(products).sum()
            if not directional.requires_grad:  # linear in these weights
                return torch.zeros_like(v)
            second = torch.autograd.grad(directional, parameters, allow_unused=True, retain_graph=True)
        return self._weights.scaled([None if part is None else part.detach() for part in second])


def refuses_second_derivative(error: RuntimeError) -> bool:
    """Whether torch reports an operation without a second derivative, and not another failure."""
    return bool(NO_DERIVATIVE.search(str(error)))


def graph(model: nn.Module, encoded: EncodedRows, rows: tuple[int, ...]) -> Tensor:
    """Mean loss of rows in nats, with its graph, as one batch."""
    part = [unit for unit in scoring_units(encoded) if unit.row in rows]
    batch, targets = batch_of(encoded, part)
    if encoded.task.shape == "label":
        logits = widened(full_pass(model, batch).logits)
        classes = torch.tensor([encoded.classes[unit.row] for unit in part], device=logits.device)
        return torch.nn.functional.cross_entropy(logits, classes)
    scored = batch.scored.nonzero()
    positions = scored[:, 0] * batch.ids.shape[1] + scored[:, 1] - int(encoded.mask_id is None)
    logs = log_likelihoods(run(model, batch, differentiable=True).logits(positions), targets)
    if encoded.task.shape != "choices":
        return -logs.mean()
    sums: list[list[Tensor]] = [[] for _ in part]
    owners = [
        (number, encoded.examples[index].choice or 0)
        for number, unit in enumerate(part)
        for index, _ in unit.sequences
    ]
    by_choice: dict[tuple[int, int], list[int]] = {}
    for token, sequence in enumerate(scored[:, 0].tolist()):
        by_choice.setdefault(owners[sequence], []).append(token)
    for (number, _), tokens in sorted(by_choice.items()):
        sums[number].append(logs[tokens].sum())
    answers = [encoded.task.rows[unit.row].answer or 0 for unit in part]
    nats = [-torch.stack(row).log_softmax(0)[answer] for row, answer in zip(sums, answers, strict=True)]
    return torch.stack(nats).mean()
