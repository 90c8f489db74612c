"""Curvature of a loss in some weights: the ends of its Hessian's spectrum, and its trace.

A cross-check of sharpness: near a stationary point the worst rise within a small radius ρ is ρ² λ_max / 2,
and the average one ρ² tr / 2. Only products of the Hessian with vectors are taken, by differentiating twice;
Lanczos iteration finds both ends of the spectrum at once, so that a saddle is seen as one.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from probes.models.body import evaluating, inputs, padding_known, run, unwrapped
from probes.models.perturb import PerturbedWeights
from probes.passes.backward import log_likelihoods, widened
from probes.passes.objective import EncodedRows, batch_of, wholes

# What torch says of an operation whose gradient has no derivative.
NO_DERIVATIVE = re.compile(
    r"derivative for .* is not implemented|differentiate twice|double backward|does not require grad"
)
Product = Callable[[Tensor], Tensor]


class Spectrum(NamedTuple):
    """Of M = diag(c) H diag(c), in nats.

    Attributes:
        top, bottom: the largest and the smallest eigenvalue; below 0 the loss falls at second order.
        trace: by Hutchinson's estimate, with its standard error.
    """

    top: float
    bottom: float
    trace: float
    trace_error: float


def spectrum(
    product: Product, like: Tensor, *, steps: int = 20, probes: int = 10, generator: torch.Generator
) -> Spectrum:
    """Ends of the spectrum and trace of a symmetric operator.

    Args:
        product: from v to M v.
        like: a vector, for its size, dtype and device.
        steps: of the Lanczos iteration; both ends lie within the true ones, and reach them with more steps.
        probes: random signs for the trace.
    """
    traces = []
    for _ in range(probes):
        signs = (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like)
        traces.append(float(signs.double() @ product(signs).double()))
    values = lanczos(product, torch.randn(like.shape, generator=generator).to(like), steps)
    return Spectrum(
        top=float(values[-1]),
        bottom=float(values[0]),
        trace=float(np.mean(traces)),
        trace_error=float(np.std(traces, ddof=1) / math.sqrt(probes)) if probes > 1 else math.nan,
    )


def lanczos(product: Product, start: Tensor, steps: int) -> np.ndarray:
    """Eigenvalues of a symmetric operator in the Krylov space of a vector, rising.

    Three vectors are held: copies of an end that this lets in do not move it.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    v, before = start / start.norm(), torch.zeros_like(start)
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, start.numel())):
        new = product(v) - (beside[-1] if beside else 0.0) * before
        diagonal.append(float(new.double() @ v.double()))
        new = new - diagonal[-1] * v
        size = float(torch.linalg.vector_norm(new, dtype=torch.float64))
        if size <= 1e-6 * max(map(abs, [*diagonal, *beside])):  # the space is exhausted
            break
        beside.append(size)
        before, v = v, new / size
    return np.asarray(eigvalsh_tridiagonal(diagonal, beside[: len(diagonal) - 1]))


class HessianProduct:
    """The gradient of a batch's loss as a graph, kept as long as this is, and M v of some weights from it.

    The weights must stay as they are meanwhile.
    """

    def __init__(
        self, model: nn.Module, encoded: EncodedRows, rows: tuple[int, ...], moved: PerturbedWeights
    ):
        self._model, self._encoded, self._rows, self._moved = model, encoded, rows, moved
        self._slopes: tuple[Tensor | None, ...] | None = None

    def product(self, v: Tensor) -> Tensor:
        """c ⊙ H (c ⊙ v), by one pass back through the graph of the gradient."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        weights = self._moved.parameters
        parts = self._moved.divided(v)
        # Fused attention has no second derivative.
        with evaluating(self._model), sdpa_kernel(SDPBackend.MATH), self._moved.sloping():
            if self._slopes is None:
                loss = graph(self._model, self._encoded, self._rows)
                self._slopes = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            used = [
                (slope, part) for slope, part in zip(self._slopes, parts, strict=True) if slope is not None
            ]
            along = torch.stack([(slope * part).sum() for slope, part in used]).sum()
            if not along.requires_grad:  # linear in these weights
                return torch.zeros_like(v)
            second = torch.autograd.grad(along, weights, allow_unused=True, retain_graph=True)
        return self._moved.scaled([None if each is None else each.detach() for each in second])


def refuses_second_derivative(error: RuntimeError) -> bool:
    """Whether torch says that an operation has no second derivative, and not that memory ran out."""
    return bool(NO_DERIVATIVE.search(str(error)))


def graph(model: nn.Module, encoded: EncodedRows, rows: tuple[int, ...]) -> Tensor:
    """Mean loss of rows in nats, with its graph: one batch, whole."""
    part = [whole for whole in wholes(encoded) if whole.row in rows]
    batch, targets = batch_of(encoded, part)
    inner: Any = unwrapped(model)
    if encoded.task.shape == "label":
        given = inputs(inner, batch)
        with padding_known(inner, given):
            logits = widened(inner(**given).logits)
        classes = torch.tensor([encoded.classes[whole.row] for whole in part], device=logits.device)
        return torch.nn.functional.cross_entropy(logits, classes)
    places = batch.scored.nonzero()
    seen = places[:, 0] * batch.ids.shape[1] + places[:, 1] - int(encoded.mask_id is None)
    logs = log_likelihoods(run(model, batch, differentiable=True).logits(seen), targets)
    if encoded.task.shape != "choices":
        return -logs.mean()
    sums: list[list[Tensor]] = [[] for _ in part]
    owner = [place for place, whole in enumerate(part) for _ in whole.sequences]
    choice = [encoded.examples[index].choice or 0 for whole in part for index, _ in whole.sequences]
    rows_of = places[:, 0].tolist()
    by_choice: dict[tuple[int, int], list[int]] = {}
    for token, row in enumerate(rows_of):
        by_choice.setdefault((owner[row], choice[row]), []).append(token)
    for (place, _), tokens in sorted(by_choice.items()):
        sums[place].append(logs[tokens].sum())
    answers = [encoded.task.rows[whole.row].answer or 0 for whole in part]
    nats = [-torch.stack(each).log_softmax(0)[answer] for each, answer in zip(sums, answers, strict=True)]
    return torch.stack(nats).mean()
