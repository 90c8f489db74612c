"""Sharpness of a loss around some weights: by how much it rises within a radius, at worst and on average.

Everything works on u, where weights are w + c ⊙ u with c = |w| (adaptive) or 1 (plain): projection is then
exact, a weight that is zero stays zero, and nothing is divided. Losses are functions of u; slopes are their
gradients in u, which is c ⊙ ∇L. Values are rises in nats: 0 is flat, and no value alone is good or bad.
Source of the measures: Andriushchenko et al. 2023, arXiv:2302.07011; ascent in u, starts and warm starts are
ours (its code steps along |w| ∇L, starts at zero alone, and does not enforce the radius where a weight is 0).
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
# From u to the loss and its slope there.
Slope: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]

# Size of the random kick as a share of the radius: it frees an ascent from a stationary point.
KICK = 0.01
# Of the ascent: the first step in radii and the momentum are the published code's; a step that does not rise
# is halved, one that does is doubled up to the first (ours).
FIRST, MOMENTUM, GROWTH = 2.0, 0.75, 2.0


class PerturbedLoss(NamedTuple):
    """A perturbation with the loss and the slope there."""

    u: Tensor
    loss: float
    slope: Tensor


@dataclass(frozen=True)
class Worst:
    """The worst rise that was found within a radius; the true one may be larger.

    Attributes:
        rise: nats; at least 0.
        single: of one step along the slope alone; at least 0, at most `rise`.
        spread: what the poorest start fell short of the best, as a share of the best; 0 of a single start.
        best: where it is.
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


def ahead(slope: Point, norm: Norm) -> Point:
    """The direction of steepest ascent, of length 1 in its norm; zero where there is no slope."""
    if norm == "linf":
        return slope.sign()
    size = float(torch.linalg.vector_norm(slope, dtype=torch.float64))
    return slope / size if size > 0 and math.isfinite(size) else torch.zeros_like(slope)


def worst(
    slope: Slope,
    zero: PerturbedLoss,
    rho: float,
    *,
    norm: Norm = "l2",
    steps: int = 20,
    starts: int = 1,
    generator: torch.Generator,
    warm: Sequence[PerturbedLoss] = (),
) -> Worst:
    """Climb from no perturbation to the worst one within a radius.

    Args:
        slope: loss and slope of a perturbation; called at most `steps` times a start.
        zero: no perturbation.
        rho: the radius.
        starts: the first is zero with a small random kick, the others are random within the radius.
        generator: on the CPU, whatever the device.
        warm: perturbations within the radius, such as that of a smaller one: their loss is never lost.

    Raises:
        InputError: a radius that is not above 0.
    """
    if not 0 < rho < math.inf:
        raise InputError(f"rho is {rho}; a radius is above 0")
    kick = _random(zero.u, KICK * rho, norm, generator)
    single = _at(slope, projected(rho * ahead(zero.slope, norm), rho, norm))
    finals = [_climb(slope, [zero, single, *warm], rho, norm, steps - 1, kick)]
    for _ in range(starts - 1):
        start = _at(slope, projected(_random(zero.u, rho, norm, generator), rho, norm))
        finals.append(_climb(slope, [start], rho, norm, steps - 1, torch.zeros_like(kick)))
    rises = [here.loss - zero.loss for here in finals]
    best = max(zero, *finals, key=lambda here: here.loss)
    rise = best.loss - zero.loss
    return Worst(
        rise=rise,
        single=max(0.0, single.loss - zero.loss),
        spread=(rise - min(rises)) / rise if rise > 0 else 0.0,
        best=best,
    )


def _climb(
    slope: Slope, known: Sequence[PerturbedLoss], rho: float, norm: Norm, steps: int, kick: Tensor
) -> PerturbedLoss:
    """Steps uphill from the best known point, with momentum; one that does not rise is taken back."""
    here = max(known, key=lambda each: each.loss)
    if not bool(ahead(here.slope, norm).any()) and steps:  # nothing is uphill before the kick
        here, steps = _at(slope, projected(here.u + kick, rho, norm)), steps - 1
    step, push = FIRST * rho, kick
    for _ in range(steps):
        trial = _at(slope, projected(here.u + step * ahead(here.slope, norm) + push, rho, norm))
        if trial.loss > here.loss:
            push, here = MOMENTUM * (trial.u - here.u), trial
            step = min(GROWTH * step, FIRST * rho)
        else:
            step, push = step / 2, torch.zeros_like(push)
    return max(here, *known, key=lambda each: each.loss)


def _at(slope: Slope, u: Tensor) -> PerturbedLoss:
    loss, gradient = slope(u)
    # A place where the loss is not finite is no place to climb from.
    if not math.isfinite(loss):
        return PerturbedLoss(u, -math.inf, torch.zeros_like(u))
    return PerturbedLoss(u, loss, gradient)


def _random(like: Tensor, size: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """Normal and scaled to a length, or uniform up to it."""
    if norm == "linf":
        drawn = 2 * torch.rand(like.shape, generator=generator) - 1
        return drawn.to(like) * size
    drawn = torch.randn(like.shape, generator=generator)
    return (drawn * (size / float(torch.linalg.vector_norm(drawn)))).to(like)


def average(
    loss: Callable[[Tensor], float],
    zero: float,
    like: Point,
    rho: float,
    *,
    norm: Norm = "l2",
    pairs: int = 10,
    generator: torch.Generator,
) -> Estimate:
    """Mean rise of a loss over perturbations and their mirrors, so that what is linear in them is gone.

    u is N(0, ρ² I) of kind l2, or uniform within ±ρ of kind linf; draws depend on the generator alone, so
    that losses at several places are compared under the same ones.

    Args:
        zero: the loss without a perturbation.
        like: a perturbation, for its shape and device.
        pairs: of perturbations, each two evaluations.

    Raises:
        InputError: a radius that is not above 0.
    """
    if not 0 < rho < math.inf:
        raise InputError(f"rho is {rho}; a radius is above 0")
    rises = []
    for _ in range(pairs):
        if norm == "linf":
            drawn = 2 * torch.rand(like.shape, generator=generator) - 1
        else:
            drawn = torch.randn(like.shape, generator=generator)
        u = drawn.to(like) * rho
        rises.append((loss(u) + loss(-u)) / 2 - zero)
    values = torch.tensor(rises, dtype=torch.float64)
    error = float(values.std() / math.sqrt(pairs)) if pairs > 1 else math.nan
    return Estimate.normal(float(values.mean()), error)


def normalised(logits: Float[Tensor, "*places classes"]) -> Float[Tensor, "*places classes"]:
    """Logits less their mean and over their length, of at least 1e-10: no shift or scale of them counts."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True).clamp_min(1e-10)
