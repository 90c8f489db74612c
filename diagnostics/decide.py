"""Which leading singular vectors of a tuned matrix come near one of the base, without two decompositions.

Each vector is settled by the first tier that can: `subspace` (a leading base vector is near enough, residuals
allowed for), `direct` and `factor` (the bound of `christoffel` shows that none is), `exact` (the full
decomposition in float64).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from diagnostics import christoffel, linalg
from diagnostics.christoffel import Extra, Lanczos

# Below this smaller side the full decomposition costs no more than deciding without it.
SMALL = 640
# A tuned vector is accepted for a decision when it is known to this sine.
ACCEPTED = 0.02
BASE_STEPS, TUNED_STEPS, MORE_STEPS, ROUNDS = 6, 4, 2, 6
DIRECT_STEPS, FACTOR_STEPS = (16, 24, 32, 48), (12, 24, 36)
# Blocks narrower than this take CPU BLAS longer than 16 columns do.
BLOCK = 16


@dataclass(frozen=True)
class Decision:
    """What is known of the k leading vectors of one matrix.

    Attributes:
        singular_values: of the tuned matrix.
        low, high: interval that holds each cosine; equal where the tier is exact; NaN for a missing vector.
        tier: which tier settled each vector.
        base_values, tuned_values: leading singular values, NaN where not known to 1 %.
        overlap: |cosine| of leading tuned (rows) and base (columns) vectors, NaN where not known to 0.01.
        critical: size that a random rank-one spike needs to enter the k leading values.
    """

    singular_values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    tier: list[str]
    base_values: NDArray[np.float64]
    tuned_values: NDArray[np.float64]
    overlap: NDArray[np.float64]
    critical: float


def decide_exactly(
    base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], k: int, shown: int = 50
) -> Decision:
    """All k cosines by full decompositions in float64, both guards applied."""
    exact = linalg.exact_cosines(base, tuned, k)
    cosines = exact.cosines.cpu().numpy()
    return Decision(
        singular_values=exact.tuned_values[:k].cpu().numpy(),
        low=cosines,
        high=cosines,
        tier=["exact"] * k,
        base_values=exact.base_values[:shown].cpu().numpy(),
        tuned_values=exact.tuned_values[:shown].cpu().numpy(),
        overlap=exact.overlap.cpu().numpy(),
        critical=linalg.critical_spike(exact.base_values, k, *base.shape),
    )


def decide(
    base: Float[Tensor, "out in"],
    tuned: Float[Tensor, "out in"],
    k: int,
    epsilon: float,
    generator: torch.Generator,
) -> Decision:
    """Decide the k leading vectors, by the cheapest tier that certifies each.

    The intervals are bounds, rounding included.  That the vectors examined are the k leading ones rests on a
    random start: a leading direction is missed only where the start is all but orthogonal to it.

    Args:
        base, tuned: float32 or float64, finite.
        k: leading vectors, fewer than the smaller side.
        epsilon: cosine under which a vector is an intruder.
        generator: for the starting blocks, on the matrices' device.
    """
    if min(base.shape) < max(SMALL, 4 * (k + BLOCK)):
        return decide_exactly(base, tuned, k)
    search = _Search(base, tuned, k, epsilon, generator)
    if search.leading() and search.certify():
        return search.decision()
    return decide_exactly(base, tuned, k)


class _Search:
    """One matrix on its way through the tiers."""

    def __init__(
        self, base: Tensor, tuned: Tensor, k: int, epsilon: float, generator: torch.Generator
    ) -> None:
        self.base, self.tuned, self.k, self.epsilon = base, tuned, k, epsilon
        self.generator = generator
        self.width = 2 * BLOCK * (1 + (k + BLOCK - 1) // (2 * BLOCK))
        self.low = np.zeros(k)
        self.high = np.ones(k)
        self.tier = [""] * k

    def random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(
            1, rows, columns, generator=self.generator, dtype=self.base.dtype, device=self.base.device
        )

    def leading(self) -> bool:
        """Tier a: leading subspaces of both, until every vector is known and each near base vector found."""
        base = linalg.BlockKrylov(self.base[None], self.random(self.base.shape[0], self.width))
        base.extend(BASE_STEPS)
        count = 3 * self.width
        self.ritz0 = base.ritz(count)
        tuned = linalg.BlockKrylov(self.tuned[None], self._start())
        tuned.extend(TUNED_STEPS)
        for _ in range(ROUNDS):
            self.ritz1 = tuned.ritz(self.k + BLOCK)
            self.error = self.ritz1.errors()[0, : self.k].cpu().numpy()
            self._subspace()
            known = bool((self.error <= ACCEPTED).all())
            near = bool((self.low >= self.epsilon).all())
            found = bool((self.ritz0.errors()[0, : self.k] <= ACCEPTED).all())
            if known and (near or found):
                return True
            if not known:
                tuned.extend(MORE_STEPS)
            if not near and not found:
                base.extend(MORE_STEPS)
                self.ritz0 = base.ritz(count)
        return bool((self.error <= 0.1).all())

    def _start(self) -> Tensor:
        # Half from the base's leading vectors, a quarter from what the delta writes to, a quarter at random.
        quarter = self.width // 4
        probe = self.random(self.base.shape[1], quarter)
        written = self.tuned @ probe - self.base @ probe
        near = self.ritz0.vectors[..., : 2 * quarter].to(self.base.dtype)
        written = written / torch.linalg.matrix_norm(written).clamp(min=torch.finfo(written.dtype).tiny)
        return torch.cat([near, written, self.random(self.base.shape[0], quarter)], dim=-1)

    def _subspace(self) -> None:
        """Bounds from the base's converged leading vectors."""
        self.vectors = self.ritz1.vectors[0, :, : self.k]
        sine = self.ritz0.errors()[0].cpu().numpy()
        cosines = (self.ritz0.vectors[0].mT @ self.vectors).abs().clamp(max=1).cpu().numpy()
        angle = np.arccos(cosines)
        slack = np.arcsin(np.minimum(sine, 1))[:, None] + np.arcsin(np.minimum(self.error, 1))
        nearest = np.cos(np.minimum(angle + slack, np.pi / 2))
        at = nearest.argmax(axis=0)
        self.low = nearest.max(axis=0)
        own = np.cos(np.maximum(angle - slack, 0))[at, np.arange(self.k)]
        # The squares of all cosines add up to at most 1.
        self.high = np.maximum(own, np.sqrt(np.maximum(1 - self.low**2, 0)))
        self.tier = ["subspace" if cosine >= self.epsilon else "" for cosine in self.low]
        self.cosines, self.sine = cosines, sine

    def certify(self) -> bool:
        """Tier b: show of the rest that no base vector is near enough."""
        open_ = [j for j in range(self.k) if self.tier[j] == ""]
        if not open_:
            return True
        kept = np.flatnonzero(self.sine <= ACCEPTED)
        deflated = self.ritz0.vectors[0][:, kept]
        start = self.vectors[:, open_]
        start = start - deflated @ (deflated.mT @ start)
        # No eigenvalue lies above the sum of all, whatever the Ritz values have missed.
        largest = float(torch.linalg.vector_norm(self.base, dtype=torch.float64)) ** 2
        extra = Extra(
            values=self.ritz0.values[0, kept].cpu().numpy(),
            residuals=self.ritz0.residuals[0, kept].cpu().numpy(),
            cosines=self.cosines[kept][:, open_].T,
            # chord of the angle between the examined vector and the true one
            error=2 * np.sin(np.arcsin(self.error[open_]) / 2),
        )
        span = (0.0, largest)
        tall = self.base.shape[0] > self.base.shape[1]
        direct = Lanczos(self._apply, start)
        # What a vector has outside the column space of a tall matrix lies at eigenvalue 0, which no power of
        # W Wᵀ tells from the smallest ones: that takes coordinates inside it.
        if not tall and not self._run([direct], DIRECT_STEPS, "direct", open_, extra, span):
            return True
        factor = Factor.of(self.base, self.random(min(self.base.shape), BLOCK)[0].double())
        if factor is None:
            return False
        inside = factor.coordinates(start)
        inverse = Lanczos(factor.apply_inverse, inside)
        if tall:
            direct = Lanczos(factor.apply, inside)
        extra = Extra(extra.values, extra.residuals, extra.cosines, extra.error + factor.coordinate_error)
        span = (factor.smallest, largest)
        return not self._run([direct, inverse], FACTOR_STEPS, "factor", open_, extra, span)

    def _apply(self, block: Tensor) -> tuple[Tensor, Tensor]:
        columns = block.shape[1]
        width = max(columns, BLOCK) if columns > 1 else 1
        padded = torch.zeros(block.shape[0], width, dtype=self.base.dtype, device=block.device)
        padded[:, :columns] = block
        inner = self.base.mT @ padded
        size = torch.linalg.vector_norm(inner[:, :columns], dim=0)
        product = (self.base @ inner)[:, :columns].double()
        return product, linalg.rounding(self.base[None], size[None])[0]

    def _run(
        self,
        runs: list[Lanczos],
        steps: tuple[int, ...],
        tier: str,
        open_: list[int],
        extra: Extra,
        span: tuple[float, float],
    ) -> list[int]:
        """Take steps until every open vector is certified; the vectors that are left."""
        left = [row for row, j in enumerate(open_) if self.tier[j] == ""]
        for most in steps:
            for run in runs:
                run.extend(most - len(run.alpha))
            recurrences = [run.recurrence(left, inverse=i > 0) for i, run in enumerate(runs)]
            rows = Extra(extra.values, extra.residuals, extra.cosines[left], extra.error[left])
            target = np.full(len(left), self.epsilon)
            bound = christoffel.largest_cosines(recurrences, rows, span, target)
            for row, cosine in zip(left, bound, strict=True):
                if cosine < self.epsilon:
                    self.high[open_[row]] = max(cosine, self.low[open_[row]])
                    self.tier[open_[row]] = tier
            left = [row for row in left if self.tier[open_[row]] == ""]
            if not left:
                break
        return left

    def decision(self) -> Decision:
        """The outcome once every vector is settled."""
        shown = 30
        known0 = self.sine[:shown] <= ACCEPTED
        known1 = self.ritz1.errors()[0, :shown].cpu().numpy() <= ACCEPTED
        base = np.sqrt(self.ritz0.values[0, : len(known0)].cpu().numpy())
        tuned = np.sqrt(self.ritz1.values[0, : len(known1)].cpu().numpy())
        overlap = (self.ritz1.vectors[0, :, :shown].mT @ self.ritz0.vectors[0, :, :shown]).abs().cpu().numpy()
        overlap[~known1] = np.nan
        overlap[:, ~known0] = np.nan
        return Decision(
            singular_values=tuned[: self.k],
            low=self.low,
            high=np.minimum(self.high, 1),
            tier=self.tier,
            base_values=np.where(known0, base, np.nan),
            tuned_values=np.where(known1, tuned, np.nan),
            overlap=overlap,
            critical=self._critical(),
        )

    def _critical(self) -> float:
        rows, columns = self.base.shape
        values = self.ritz0.values[0]
        z = values[self.k - 1].sqrt()
        f = z / (values[self.k - 1] - values)
        f[: self.k] = 0
        total, _ = linalg.spectral_sum(f, self.ritz0.weights[0], rows)
        rank = min(rows, columns)
        # Eigenvalues 0 of a tall matrix's W Wᵀ are counted in the trace but are no singular values.
        total -= (rows - rank) / float(z)
        return linalg.critical_from_sum(total, float(z), rank - self.k, rows, columns)


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of the smaller Gram matrix: coordinates in the column space, and the inverse there.

    With `G = L Lᵀ` of a wide matrix the coordinates are those of R^out and the operator is G⁻¹.  A tall one
    is `W = Q Lᵀ` with orthonormal Q: the coordinates are `L⁻¹ Wᵀ x`, and `W Wᵀ` acts on them as `Lᵀ L`.

    Attributes:
        smallest: a lower bound on the smallest eigenvalue of G.
        rounding: bound on the norm of the error of `solve` on a unit vector.
        coordinate_error: bound on the error of the coordinates of a unit vector.
    """

    W: Tensor
    L: Tensor
    smallest: float
    rounding: float
    coordinate_error: float

    @classmethod
    def of(cls, W: Float[Tensor, "out in"], probe: Float[Tensor, "side probes"]) -> "Factor | None":
        """Factor W, or None where it is too near to deficient for the answer to mean anything."""
        L, failed = torch.linalg.cholesky_ex(linalg.gram(W))
        if failed.item():
            return None
        factor = cls(W, L, 0.0, 0.0, 0.0)
        for _ in range(3):  # power iterations with a block: the norm of the inverse, almost surely within 2
            probe = factor.solve(torch.linalg.qr(probe).Q)
        inverse_norm = 2 * float(torch.linalg.matrix_norm(probe, ord=2))
        largest = float(L.square().sum(dim=1).max()) * len(L) ** 0.5
        error = 8 * torch.finfo(L.dtype).eps * len(L) ** 0.5 * largest  # backward error of G = L Lᵀ
        relative = error * inverse_norm
        if relative > 0.01:
            return None
        return cls(W, L, 1 / inverse_norm, relative * inverse_norm, relative)

    def coordinates(self, block: Tensor) -> Tensor:
        """Of columns in R^out, in the column space of W."""
        if self.W.shape[0] <= self.W.shape[1]:
            return block
        return torch.linalg.solve_triangular(self.L, _times(self.W.mT, block), upper=False)

    def apply_inverse(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `W Wᵀ` on unit columns of coordinates, and the bound on its error for each."""
        return self.solve(block), torch.full_like(block[0], self.rounding)

    def apply(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """`W Wᵀ` on unit columns of coordinates of a tall W, and the bound on its error for each."""
        # As rows: CPU BLAS takes five times as long on a few columns.
        rows = (block.mT.contiguous() @ self.L.mT) @ self.L
        return rows.mT, torch.full_like(block[0], self.rounding * self.smallest**2)

    def solve(self, block: Tensor) -> Tensor:
        """The inverse of `W Wᵀ` on columns of coordinates."""
        first, second = (self.L, self.L.mT) if self.W.shape[0] <= self.W.shape[1] else (self.L.mT, self.L)
        half = torch.linalg.solve_triangular(first, block, upper=first is not self.L)
        return torch.linalg.solve_triangular(second, half, upper=second is not self.L)


def _times(W: Tensor, block: Tensor) -> Tensor:
    """`W @ block` in float64 without a float64 copy of W."""
    return torch.cat([part.double() @ block for part in W.split(1024)])
