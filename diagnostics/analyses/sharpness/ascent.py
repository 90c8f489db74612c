"""Sharpness: the worst and the mean rise of a loss within a radius of some weights.

All is computed in u, with weights w + c ⊙ u and c = |w| (adaptive) or 1 (plain): projection is then exact.
The gradient in u is c ⊙ ∇L. Source of the measures: Andriushchenko et al. 2023, arXiv:2302.07011; ascent in u
and starts are ours (its code steps along |w| ∇L, starts at zero, and leaves the radius where a weight is 0).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.numerics.estimates import Estimate
from probes.errors import InputError

Norm: TypeAlias = Literal["l2", "linf"]
Point: TypeAlias = Float[Tensor, " weights"]
# From u to the loss and its gradient.
LossGradient: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]

# Size of the initial noise as a share of the radius: it frees an ascent from a stationary point.
NOISE = 0.01
# First step in radii and momentum, as in the published code. A step that lowers the loss is halved, another
# one doubled up to the first (ours).
FIRST, MOMENTUM, GROWTH = 2.0, 0.75, 2.0


class PerturbedLoss(NamedTuple):
    """A perturbation with its loss and gradient."""

    u: Tensor
    loss: float
    gradient: Tensor


@dataclass(frozen=True)
class Worst:
    """The largest rise in nats found within a radius; a lower bound of the true one.

    Attributes:
        single: rise of a single gradient step; at least 0, at most `rise`.
        spread: relative shortfall of the poorest start against the best; 0 with one start.
    """

    rise: float
    single: float
    spread: float
    best: PerturbedLoss


def projected(u: Point, rho: float, norm: Norm) -> Point:
    """The nearest point within the radius."""
    if norm == "linf":
        return u.clamp(-rho, rho)
    size = float(torch.linalg.vector_norm(u, dtype=torch.float64))
    return u * (rho / size) if size > rho else u


def steepest(gradient: Point, norm: Norm) -> Point:
    """The direction of steepest ascent, of length 1 in its norm; zero without a gradient."""
    if norm == "linf":
        return gradient.sign()
    size = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return gradient / size if size > 0 and math.isfinite(size) else torch.zeros_like(gradient)


def worst(
    loss_gradient: LossGradient, zero: PerturbedLoss, rho: float, *, norm: Norm = "l2", steps: int = 20,
    starts: int = 1, generator: torch.Generator, warm: Sequence[PerturbedLoss] = (),
) -> Worst:  # fmt: skip
    """Gradient ascent from no perturbation to the worst one within a radius.

    Args:
        loss_gradient: called at most `steps` times a start.
        zero: no perturbation.
        starts: the first is zero with a little noise, the others are random within the radius.
        generator: on the CPU, whatever the device.
        warm: perturbations within the radius; the result is at least as bad as each of them.
    """
    if not 0 < rho < math.inf:
        raise InputError(f"rho is {rho}; a radius is above 0")
    noise = _random(zero.u, NOISE * rho, norm, generator)
    single = _at(loss_gradient, projected(rho * steepest(zero.gradient, norm), rho, norm))
    finals = [_ascend(loss_gradient, [zero, single, *warm], rho, norm, steps - 1, noise)]
    for _ in range(starts - 1):
        start = _at(loss_gradient, projected(_random(zero.u, rho, norm, generator), rho, norm))
        finals.append(_ascend(loss_gradient, [start], rho, norm, steps - 1, torch.zeros_like(noise)))
    loss_rises = [final.loss - zero.loss for final in finals]
    best = max(zero, *finals, key=lambda final: final.loss)
    rise = best.loss - zero.loss
    spread = (rise - min(loss_rises)) / rise if rise > 0 else 0.0
    return Worst(rise, max(0.0, single.loss - zero.loss), spread, best)


def _ascend(
    loss_gradient: LossGradient, starts: Sequence[PerturbedLoss], rho: float, norm: Norm, steps: int,
    noise: Tensor,
) -> PerturbedLoss:  # fmt: skip
    """Projected ascent with momentum from the best start; a step that lowers the loss is taken back."""
    current = max(starts, key=lambda start: start.loss)
    if not bool(steepest(current.gradient, norm).any()) and steps:  # a stationary point
        current, steps = _at(loss_gradient, projected(current.u + noise, rho, norm)), steps - 1
    step, momentum = FIRST * rho, noise
    for _ in range(steps):
        u = projected(current.u + step * steepest(current.gradient, norm) + momentum, rho, norm)
        trial = _at(loss_gradient, u)
        if trial.loss > current.loss:
            momentum, current = MOMENTUM * (trial.u - current.u), trial
            step = min(GROWTH * step, FIRST * rho)
        else:
            step, momentum = step / 2, torch.zeros_like(momentum)
    return max(current, *starts, key=lambda point: point.loss)


def _at(loss_gradient: LossGradient, u: Tensor) -> PerturbedLoss:
    loss, gradient = loss_gradient(u)
    if not math.isfinite(loss):  # no point to ascend from
        return PerturbedLoss(u, -math.inf, torch.zeros_like(u))
    return PerturbedLoss(u, loss, gradient)


def _random(template: Tensor, size: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """Normal scaled to a length (l2), or uniform up to it (linf)."""
    noise = _noise(template, norm, generator)
    if norm == "linf":
        return noise.to(template) * size
    return (noise * (size / float(torch.linalg.vector_norm(noise)))).to(template)


def _noise(template: Tensor, norm: Norm, generator: torch.Generator) -> Tensor:
    if norm == "linf":
        return 2 * torch.rand(template.shape, generator=generator) - 1
    return torch.randn(template.shape, generator=generator)


def average(
    loss: Callable[[Tensor], float], zero: float, template: Point, rho: float, *, norm: Norm = "l2",
    pairs: int = 10, generator: torch.Generator,
) -> Estimate:  # fmt: skip
    """Mean rise of a loss over random perturbations and their mirrors, which cancel its linear part.

    u is N(0, ρ² I) for l2, or uniform within ±ρ for linf. Draws depend on the generator only, so that losses
    at several points are compared under the same perturbations.

    Args:
        zero: the loss without a perturbation.
        template: a vector with the shape, dtype and device of a perturbation.
    """
    if not 0 < rho < math.inf:
        raise InputError(f"rho is {rho}; a radius is above 0")
    loss_rises = []
    for _ in range(pairs):
        u = _noise(template, norm, generator).to(template) * rho
        loss_rises.append((loss(u) + loss(-u)) / 2 - zero)
    values = torch.tensor(loss_rises, dtype=torch.float64)
    error = float(values.std() / math.sqrt(pairs)) if pairs > 1 else math.nan
    return Estimate.normal(float(values.mean()), error)


def normalised(logits: Float[Tensor, "*places classes"]) -> Float[Tensor, "*places classes"]:
    """Logits minus their mean, over their length (at least 1e-10): shift and scale do not count."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True).clamp_min(1e-10)
