"""Norms and spectrum of the delta of one matrix."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.analyses.intruders.decide import SMALL
from diagnostics.execution.lockstep import Steps
from diagnostics.numerics import linalg
from diagnostics.numerics.estimates import Z95
from probes.adapters.parts import LowRank

# Columns of the random block from which the spectrum of a large delta is estimated.
PROBES = 16


@dataclass(frozen=True)
class DeltaShape:
    """Norms and spectrum of the delta of one matrix."""

    norm: float  # Frobenius
    base_norm: float
    alignment: float  # cosine of base and tuned as vectors of entries; near 0 for unrelated matrices
    spectral_norm: float
    effective_rank: float  # exp of the entropy of the singular values, with a 95 % interval where estimated
    effective_rank_low: float
    effective_rank_high: float


def update_of(
    base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], low: LowRank | None,
    generator: torch.Generator,
) -> Steps[DeltaShape]:  # fmt: skip
    """Measure the delta: exactly from an adapter's factors or a small matrix, else by Lanczos quadrature."""
    delta = tuned - base
    norms = [torch.linalg.vector_norm(W, dtype=torch.float64) for W in (base, tuned, delta)]
    factored, small = low is not None and low.rank < min(base.shape), min(base.shape) < SMALL
    if low is not None and factored:
        spectral = linalg.product_core(low.B.to(base.device), low.A.to(base.device)) * abs(low.scaling)
    elif small:
        spectral = torch.linalg.eigvalsh(linalg.gram(delta))
    else:
        spectral = _krylov(delta, generator).projected()[0]
    del delta
    *norms, on_cpu = yield [*norms, spectral]
    base_norm, tuned_norm, norm = map(float, norms)
    product = base_norm * tuned_norm
    # From the three norms, which saves another pass over both matrices.
    alignment = (base_norm**2 + tuned_norm**2 - norm**2) / (2 * product) if product else math.nan
    spectral = torch.from_numpy(on_cpu)
    if not (factored or small):
        return DeltaShape(norm, base_norm, alignment, *_estimated(spectral, norm, min(base.shape)))
    S = torch.linalg.svdvals(spectral) if factored else spectral.clamp(min=0).sqrt().flip(0)
    rank = linalg.effective_rank(S)
    return DeltaShape(norm, base_norm, alignment, float(S[0]) if len(S) else 0.0, rank, rank, rank)


def _krylov(delta: Float[Tensor, "out in"], generator: torch.Generator) -> linalg.BlockKrylov:
    """A block Krylov space of the delta with a random start."""
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.mT
    start = torch.randn(1, wide.shape[0], PROBES, generator=generator, dtype=wide.dtype, device=wide.device)
    krylov = linalg.BlockKrylov(wide[None], start)
    krylov.extend(7)
    return krylov


def _estimated(
    projected: Float[Tensor, "space space"], norm: float, side: int
) -> tuple[float, float, float, float]:
    """Spectral norm, effective rank and its 95 % interval, from a Krylov space of a delta of this norm."""
    values, vectors = linalg.descending(projected)
    weights, S = vectors[:PROBES].square(), values.sqrt()
    if values.sum() >= (1 - 1e-6) * norm**2:  # the space holds the whole delta: nothing to estimate
        rank = linalg.effective_rank(S)
        return float(S[0]), rank, rank, rank
    entropies = torch.special.entr(S)
    size, _ = linalg.spectral_sum(S, weights, side)
    entropy, _ = linalg.spectral_sum(entropies, weights, side)
    # ln Σs − Σ s ln s / Σs, and its error from the same probes by linearising.
    rank = math.exp(math.log(size) + entropy / size)
    _, error = linalg.spectral_sum(S * (1 - entropy / size) / size + entropies / size, weights, side)
    return float(S[0]), rank, rank * math.exp(-Z95 * error), rank * math.exp(Z95 * error)
