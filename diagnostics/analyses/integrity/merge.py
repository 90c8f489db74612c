"""Merge check: is a tuned matrix the base's with an adapter's delta D added, and how often was it added?

The factor c in T = round(B + c·D) is estimated by least squares, ĉ = ⟨D, T − B⟩ / ⟨D, D⟩. Rounding to a
coarse dtype swallows the small entries of D, so that ĉ of a faultless merge is below 1. Hence the same is
estimated of simulated merges, h(c) of round(B + c·D), and the factor is where h(c) = ĉ (indirect inference;
Gouriéroux et al. 1993). Its interval reaches five standard errors to either side; these are those of the
residuals, and so cover rounding and whatever else differs. Source: ours; the merge is PEFT's
`merge_and_unload`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.analyses.integrity.quantised import scheme
from diagnostics.analyses.integrity.rounding import grid, ulp

Verdict = Literal[
    "merged", "unmerged", "doubled", "scaled", "subtracted", "lost", "more", "other", "no delta"
]

NAMED: dict[float, Verdict] = {
    1.0: "merged",
    0.0: "unmerged",
    2.0: "doubled",
    0.5: "scaled",
    -1.0: "subtracted",
}

CHUNK = 2**18  # entries that are widened to float64 together
DEVIATIONS = 5.0  # standard errors on either side: two-sided 6e-7 for each of hundreds of matrices
FLOOR = 2e-4  # half of the narrowest interval: other kernels take products and sums in another order
STEPS = 5  # of the secant method; the first is exact where nothing is rounded away
FLATTEST = 0.05  # slope of h that is trusted
# Share of entries that rounding may leave unexplained, and their number in a small matrix.
OUTSIDE, FEW = 0.01, 3
LOST = 0.5  # less than this share of the delta survived the rounding of a faultless merge


@dataclass(frozen=True, kw_only=True)
class MergeFit:
    """How one matrix was merged.

    Attributes:
        factor, low, high: how often the delta was added, with its interval; NaN without a delta.
        residual: root mean square of what base and delta leave unexplained, as a share of base's.
        outside: share of entries that are off by more than rounding.
        kept: share of the delta that the dtype's rounding leaves of a faultless merge.
        scheme: of the 4- or 8-bit base that it was merged into; empty for a plain one.
    """

    verdict: Verdict
    factor: float = math.nan
    low: float = math.nan
    high: float = math.nan
    residual: float = 0.0
    outside: float = 0.0
    kept: float = math.nan
    scheme: str = ""


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Sums over the entries of a matrix at a given factor."""

    dd: float  # D²
    dt: float  # D (T − B)
    ds: float  # D (round(B + c D) − B)
    dede: float  # D² (T − B − c D)²
    dvdv: float  # D² times the variance of rounding
    ee: float
    bb: float
    outside: int
    exact: float  # share
    entries: int

    @property
    def explained(self) -> bool:
        """Whether rounding explains what base and delta leave."""
        return self.outside <= max(FEW, OUTSIDE * self.entries)


def fit_merge(
    base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], delta: Float[Tensor, "out in"]
) -> MergeFit:
    """Estimate how often `delta` was added to `base` to get `tuned`.

    >>> base = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> delta = 0.01 * base.flip(0)
    >>> fit = fit_merge(base, base + 2 * delta, delta)
    >>> fit.verdict, round(fit.factor, 4)
    ('doubled', 2.0)
    """
    dtype = grid(tuned)
    fit, exact = _fit(base, tuned, delta, dtype)
    if fit.verdict in ("merged", "no delta") or torch.equal(base, base.to(dtype).to(base.dtype)):
        return fit
    # A base of more digits may have been loaded in the dtype of tuned, then merged.
    loaded, more_exact = _fit(base.to(dtype), tuned, delta, dtype)
    return loaded if more_exact > exact else fit


def _fit(base: Tensor, tuned: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[MergeFit, float]:
    """The fit for a base as it is, and the share of entries that a simulated merge gives exactly."""
    at_one = _sums(base, tuned, delta, 1.0, dtype)
    if at_one.dd == 0:
        return MergeFit(verdict="no delta"), 1.0
    kept = at_one.ds / at_one.dd
    if kept < LOST:
        at_none = _sums(base, tuned, delta, 0.0, dtype)
        if at_one.explained and at_none.explained:
            return MergeFit(verdict="lost", kept=kept, residual=_residual(at_one)), at_one.exact
    factor, sums, slope = _solved(base, tuned, delta, at_one, dtype)
    # Of a few entries the residuals may all be small by chance: what rounding leaves counts in any case.
    error = math.sqrt(max(sums.dede, sums.dvdv)) / sums.dd / slope
    room = DEVIATIONS * error + FLOOR * max(1.0, abs(factor))
    low, high = factor - room, factor + room
    named = next((times for times in NAMED if low <= times <= high), None)
    verdict = "scaled" if named is None else NAMED[named]
    if named is not None:  # judged at the factor that is meant, not at its estimate
        sums = _sums(base, tuned, delta, named, dtype, off=room)
    facts: dict[str, Any] = {
        "factor": factor, "low": low, "high": high, "kept": kept,
        "residual": _residual(sums), "outside": sums.outside / sums.entries,
    }  # fmt: skip
    if not sums.explained:
        for times, verdict in NAMED.items():
            if name := scheme(tuned, times * delta):
                return MergeFit(verdict=verdict, scheme=name, **facts), sums.exact
        verdict = "more" if low <= 1 <= high and not low <= 0 <= high else "other"
    return MergeFit(verdict=verdict, **facts), sums.exact


def _residual(sums: _Sums) -> float:
    return math.sqrt(sums.ee / sums.bb) if sums.bb else math.nan


def _solved(
    base: Tensor, tuned: Tensor, delta: Tensor, at_one: _Sums, dtype: torch.dtype
) -> tuple[float, _Sums, float]:
    """The factor at which a simulated merge has tuned's estimate, the sums there, and the slope of h."""
    factor, sums, slope = 1.0, at_one, max(at_one.ds / at_one.dd, FLATTEST)
    for _ in range(STEPS):
        step = (sums.dt - sums.ds) / sums.dd / slope
        if abs(step) < FLOOR / 2:
            break
        before = sums.ds
        factor += step
        sums = _sums(base, tuned, delta, factor, dtype)
        slope = min(2.0, max(FLATTEST, (sums.ds - before) / sums.dd / step))
    return factor, sums, slope


def _sums(
    base: Tensor, tuned: Tensor, delta: Tensor, factor: float, dtype: torch.dtype, off: float = 0.0
) -> _Sums:
    """Sums at a factor that may be off by so much, in float64, a few rows at a time."""
    rows = max(1, CHUNK // max(1, base[0].numel() if base.ndim else 1))
    # Factors in half precision round their product too.
    product = 4 * torch.finfo(dtype).eps
    total = torch.zeros(9, dtype=torch.float64)
    scale = float(delta.double().square().mean().sqrt())
    for B, T, D in zip(base.split(rows), tuned.split(rows), delta.split(rows), strict=True):
        B, T, D = B.double(), T.double(), D.double()
        aim = B + factor * D
        merged = aim.to(dtype).double()
        residual = T - aim
        # One unit, not half: a merge in half precision, saved in another, rounds twice.
        unit = ulp(torch.maximum(T.abs(), aim.abs()), dtype)
        slack = unit + abs(factor) * product * (D.abs() + scale)
        slack += off * D.abs()
        squares = D.square()
        total += torch.stack(
            [
                squares.sum(),
                (D * (T - B)).sum(),
                (D * (merged - B)).sum(),
                (squares * residual.square()).sum(),
                (squares * (unit.square() + (product * factor * D).square()) / 12).sum(),
                residual.square().sum(),
                B.square().sum(),
                (residual.abs() > slack).sum().double(),
                (merged == T).sum().double(),
            ]
        )
    dd, dt, ds, dede, dvdv, ee, bb, outside, exact = total.tolist()
    return _Sums(
        dd=dd, dt=dt, ds=ds, dede=dede, dvdv=dvdv, ee=ee, bb=bb, outside=int(outside), entries=base.numel(),
        exact=exact / base.numel(),
    )  # fmt: skip


def pooled_factor(fits: Sequence[MergeFit]) -> tuple[float, float, float] | None:
    """The factor over several matrices with its interval; None without any.

    A factor of 1.02 hides in the rounding of one small matrix, and not in that of all. Each is weighted by
    the inverse square of its interval's width.

    >>> one = MergeFit(verdict="merged", factor=1.02, low=0.99, high=1.05)
    >>> [round(value, 3) for value in pooled_factor([one] * 9)]
    [1.02, 1.01, 1.03]
    """
    measured = [fit for fit in fits if not math.isnan(fit.factor)]
    if not measured:
        return None
    weights = [((fit.high - fit.low) / 2) ** -2 for fit in measured]
    factor = sum(weight * fit.factor for weight, fit in zip(weights, measured, strict=True)) / sum(weights)
    room = max(FLOOR, sum(weights) ** -0.5)
    return factor, factor - room, factor + room
