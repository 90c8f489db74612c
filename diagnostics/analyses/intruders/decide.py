"""Decide which leading singular vectors of a tuned matrix come near one of the base, in certified tiers.

The first tier that can settles a vector: `subspace` (a leading base vector is near enough, residuals
included), `direct` and `factor` (the bound of `cosine_bounds` shows that none is), `exact` (the full
decomposition in float64).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from diagnostics.analyses.intruders import cosine_bounds
from diagnostics.analyses.intruders.cosine_bounds import Extra, Lanczos, Recurrence, recurrence
from diagnostics.analyses.intruders.inverse_factors import Applied, Shifted, Tall, errors
from diagnostics.execution.lockstep import Steps, Values, read_values, run_in_lockstep
from diagnostics.numerics import linalg
from diagnostics.numerics.linalg import BlockKrylov, Ritz
from diagnostics.store.factor_cache import NO_RECALL, Recall

# Below this smaller side the full decomposition costs no more than the tiers.
SMALL = 640
# A vector must be known to this sine for a decision; after the last round the second suffices.
ACCEPTED, USABLE = 0.02, 0.1
BASE_STEPS, TUNED_STEPS, MORE_STEPS, ROUNDS = 6, 4, 2, 6
DIRECT_STEPS, FACTOR_STEPS = (12, 16, 20, 24, 32, 48), (8, 12, 16, 24, 36)
# Number of shifted inverses, and the ratio of an open eigenvalue to the next shift.
SHIFTS, BELOW = 3, 2
# After this many direct steps the bound at eigenvalue 0, which falls as a power of their number, is
# extrapolated to the last step: it must fall below this share of epsilon, for other bounds are larger.
FORESEEN, SHARE_AT_ZERO = 20, 0.75
# Blocks narrower than this take CPU BLAS longer than 16 columns do.
BLOCK = 16


@dataclass(frozen=True)
class Decision:
    """The outcome for the k leading vectors of one matrix."""

    singular_values: NDArray[np.float64]  # of tuned
    # Interval that holds each cosine; equal where the tier is exact; NaN for a missing vector.
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    tier: list[str]  # which tier settled each vector
    base_values: NDArray[np.float64]  # leading singular values, NaN where not known to 1 %
    tuned_values: NDArray[np.float64]
    overlap: NDArray[np.float64]  # |cosine| of tuned (rows) and base (columns); NaN: not known to 0.01
    critical: float  # size that a random rank-one spike needs to enter the k leading values


def decide_exactly(
    base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], k: int, shown: int = 50,
    recall: Recall = NO_RECALL,
) -> Decision:  # fmt: skip
    """All k cosines by full decompositions in float64, both guards applied."""

    def decomposed() -> dict[str, Tensor]:
        return dict(zip("US", linalg.left_singular(base), strict=True))

    of_base = recall("left singular vectors", (), decomposed)
    exact = linalg.exact_cosines(base, tuned, k, of_base=(of_base["U"], of_base["S"]))
    cosines, tuned_values, base_values, overlap = read_values(
        [exact.cosines, exact.tuned_values, exact.base_values, exact.overlap]
    )
    return Decision(
        singular_values=tuned_values[:k], low=cosines, high=cosines, tier=["exact"] * k, overlap=overlap,
        base_values=base_values[:shown], tuned_values=tuned_values[:shown],
        critical=linalg.critical_spike(torch.from_numpy(base_values), k, *base.shape),
    )  # fmt: skip


def decide_all(
    base: Float[Tensor, "batch out in"], tuned: Float[Tensor, "batch out in"], k: int, epsilon: float,
    generators: list[torch.Generator], pictured: bool = False, recalls: Sequence[Recall] | None = None,
) -> list[Decision]:  # fmt: skip
    """Decide the k leading vectors of matrices of one shape, each by the cheapest tier that certifies it.

    The intervals are bounds, rounding included. That the examined vectors are the k leading ones relies on a
    random start: a leading direction is missed only if the start is almost orthogonal to it.

    Args:
        base, tuned: float32 or float64, finite; k is less than the smaller side.
        generators: for the starting blocks, on the matrices' device.
        pictured: with an intruder, also find the k leading base vectors.
        recalls: of each base, the cache of its intermediate results.
    """
    pairs = list(zip(base, tuned, recalls or [NO_RECALL] * len(base), strict=True))
    if min(base.shape[1:]) < max(SMALL, 4 * (k + BLOCK)):
        return [decide_exactly(W0, W1, k, recall=recall) for W0, W1, recall in pairs]
    searches = [
        _Search(W0, W1, k, epsilon, generator, recall)
        for (W0, W1, recall), generator in zip(pairs, generators, strict=True)
    ]
    _lead(searches, base, tuned)
    return run_in_lockstep([search.outcome(pictured) for search in searches])


def _lead(
    searches: list["_Search"], base: Float[Tensor, "batch out in"], tuned: Float[Tensor, "batch out in"]
) -> None:
    """Tier a: leading subspaces of both, until every tuned vector has converged."""
    space0 = _of_base(base, torch.cat([search.random(base.shape[1]) for search in searches]), searches)
    ritz0 = space0.ritz(3 * space0.start)
    starts = [search.start(ritz0.single(i)) for i, search in enumerate(searches)]
    space1 = BlockKrylov(tuned, torch.cat(starts))
    space1.extend(TUNED_STEPS)
    for _ in range(ROUNDS):
        ritz1 = space1.ritz(searches[0].k + BLOCK)
        (errors,) = read_values([ritz1.errors()[:, : searches[0].k]])
        if (errors <= ACCEPTED).all():
            break
        space1.extend(MORE_STEPS)
    for i, search in enumerate(searches):
        search.begin(space0.single(i), ritz0.single(i), ritz1.single(i))


def _of_base(base: Tensor, start: Tensor, searches: list["_Search"]) -> BlockKrylov:
    """The leading subspaces of the bases."""

    def extended() -> dict[str, Tensor]:
        space = BlockKrylov(base, start)
        space.extend(BASE_STEPS)
        return space.state()

    # Batched products round differently, and depend on the other matrices of the batch: not cached.
    single = len(searches) == 1
    state = searches[0].recall("Krylov space", (start,), extended) if single else extended()
    return BlockKrylov.resumed(base, start.shape[-1], state)


class _Search:
    """The tiers for one matrix."""

    def __init__(
        self, base: Tensor, tuned: Tensor, k: int, epsilon: float, generator: torch.Generator, recall: Recall
    ) -> None:
        self.base, self.tuned, self.k, self.epsilon = base, tuned, k, epsilon
        self.generator, self.recall = generator, recall
        self.width = 2 * BLOCK * (1 + (k + BLOCK - 1) // (2 * BLOCK))
        self.low, self.high, self.tier = np.zeros(k), np.ones(k), [""] * k

    def random(self, rows: int, columns: int | None = None) -> Tensor:
        """A random block; by default as wide as the starting block."""
        size = (1, rows, self.width if columns is None else columns)
        return torch.randn(size, generator=self.generator, dtype=self.base.dtype, device=self.base.device)

    def start(self, ritz0: Ritz) -> Tensor:
        """The starting block of tuned: half near the base's vectors, a quarter in the delta's columns."""
        quarter = self.width // 4
        probe = self.random(self.base.shape[1], quarter)
        written = self.tuned @ probe - self.base @ probe
        near = ritz0.vectors[..., : 2 * quarter].to(self.base.dtype)
        written = written / torch.linalg.matrix_norm(written).clamp(min=torch.finfo(written.dtype).tiny)
        return torch.cat([near, written, self.random(self.base.shape[0], quarter)], dim=-1)

    def begin(self, space0: BlockKrylov, ritz0: Ritz, ritz1: Ritz) -> None:
        """Start from the subspaces of tier a."""
        self.space0, self.ritz0, self.ritz1, self.rounds = space0, ritz0, ritz1, 0
        self.vectors = ritz1.vectors[0, :, : self.k]

    def outcome(self, pictured: bool) -> Steps[Decision]:
        """The decision by the cheapest tiers."""
        self.error, self.norm = yield [self.ritz1.errors()[0, : self.k], self.space0.norm[0]]
        yield from self._subspace()
        if (self.error > USABLE).any() or not (yield from self.certify()):
            del self.space0, self.ritz0, self.ritz1, self.vectors  # the decomposition needs their memory
            return decide_exactly(self.base, self.tuned, self.k, recall=self.recall)
        if pictured and (self.high < self.epsilon).any():
            while not self._converged():  # the k leading base vectors
                yield from self._further()
        return (yield from self.decision())

    def _converged(self) -> bool:
        """Whether the leading base vectors have converged, or all rounds were taken."""
        return self.rounds >= ROUNDS or bool((self.sine[: self.k] <= ACCEPTED).all())

    def _further(self) -> Steps[None]:
        """One more round of the base's leading subspace."""
        self.rounds += 1
        self.space0.extend(MORE_STEPS)
        self.ritz0 = self.space0.ritz(3 * self.width)
        yield from self._subspace()

    def _open(self) -> list[int]:
        return [j for j in range(self.k) if self.tier[j] == ""]

    def _subspace(self) -> Steps[None]:
        """Bounds from the base's leading vectors, for all vectors that no other tier has settled."""
        ritz0 = self.ritz0
        cosines = (ritz0.vectors[0].mT @ self.vectors).abs().clamp(max=1)
        self.sine, self.cosines, self.values, self.residuals = yield [
            ritz0.errors()[0], cosines, ritz0.values[0], ritz0.residuals[0]
        ]  # fmt: skip
        angle = np.arccos(self.cosines)
        slack = np.arcsin(np.minimum(self.sine, 1))[:, None] + np.arcsin(np.minimum(self.error, 1))
        nearest = np.cos(np.minimum(angle + slack, np.pi / 2))
        low = nearest.max(axis=0)
        of_nearest = np.cos(np.maximum(angle - slack, 0))[nearest.argmax(axis=0), np.arange(self.k)]
        # The squares of all cosines add up to at most 1.
        high = np.maximum(of_nearest, np.sqrt(np.maximum(1 - low**2, 0)))
        for j, tier in enumerate(self.tier):
            if tier in ("", "subspace"):
                self.low[j], self.high[j] = low[j], high[j]
                self.tier[j] = "subspace" if low[j] >= self.epsilon else ""

    def certify(self) -> Steps[bool]:
        """Tier b: show for the open vectors that no base vector is near enough."""
        self.tested = self._open()
        if not self.tested:
            return True
        kept = np.flatnonzero(self.sine <= ACCEPTED)
        deflated = self.ritz0.vectors[0][:, kept]
        start = self.vectors[:, self.tested]
        start = start - deflated @ (deflated.mT @ start)
        # The trace bounds every eigenvalue, also those that the Ritz values have missed.
        largest = 1.001 * float(self.norm) ** 2
        extra = Extra(
            values=self.values[kept],
            residuals=self.residuals[kept],
            cosines=self.cosines[kept][:, self.tested].T,
            # chord of the angle between the examined vector and the true one
            error=2 * np.sin(np.arcsin(self.error[self.tested]) / 2),
        )
        span = (0.0, largest)
        # The direct run does not see the left null space of a tall matrix.
        if self.base.shape[0] > self.base.shape[1]:
            return (yield from self._tall(start, extra, span))
        direct = Lanczos(self._apply, start)
        if (yield from self._direct(direct, extra, span)):
            return True
        return (yield from self._shifted(direct, start, extra, span))

    def _direct(self, run: Lanczos, extra: Extra, span: tuple[float, float]) -> Steps[bool]:
        """Steps of the direct run until all is settled, or until more steps cannot settle it."""
        first = np.ones(len(self.tested))
        for most in DIRECT_STEPS:
            run.extend(most - len(run.alpha))
            coefficients = yield run.coefficients()
            if (yield from self._settle([recurrence(coefficients, self._rows())], "direct", extra, span)):
                return True
            rows = self._rows()
            zero = np.zeros(len(rows))
            at_zero = recurrence(coefficients, rows).bound(np.arange(len(rows)), zero, zero)
            if most == DIRECT_STEPS[0]:
                first[rows] = at_zero
            if most == FORESEEN:
                least = np.finfo(np.float64).tiny
                power = np.log(np.maximum(at_zero, least) / np.maximum(first[rows], least))
                power /= np.log(most / DIRECT_STEPS[0])
                last = at_zero * (DIRECT_STEPS[-1] / most) ** power
                if last.max() > SHARE_AT_ZERO * self.epsilon:
                    return False
        return False

    def _shifted(
        self, direct: Lanczos, start: Tensor, extra: Extra, span: tuple[float, float]
    ) -> Steps[bool]:
        """Inverses with a shift where the direct run cannot resolve, with smaller shifts while that helps."""
        inverses: list[tuple[Lanczos, float]] = []
        for _ in range(SHIFTS):
            before = self.failing
            factor = yield from Shifted.of(self.base, before / BELOW, self.recall)
            if factor is None:
                return False
            run = Lanczos(factor.apply_inverse, start)
            inverses.append((run, factor.shift))
            for most in FACTOR_STEPS:
                run.extend(most - len(run.alpha))
                rows = self._rows()
                of_direct, *of_inverses = yield from _coefficients([direct, *(run for run, _ in inverses)])
                runs = [recurrence(of_direct, rows)] + [
                    recurrence(of_inverse, rows, inverse=True, shift=shift)
                    for (_, shift), of_inverse in zip(inverses, of_inverses, strict=True)
                ]
                if (yield from self._settle(runs, "factor", extra, span)):
                    return True
            if self.failing > before / BELOW:
                return False
            del run.apply  # its memory: no further step is taken
        return False

    def _tall(self, start: Tensor, extra: Extra, span: tuple[float, float]) -> Steps[bool]:
        """Both runs inside the column space."""
        factor = yield from Tall.of(self.base, self.generator, self.recall)
        if factor is None:
            return False
        inside = factor.coordinates(start)
        direct, inverse = Lanczos(factor.apply, inside), Lanczos(factor.apply_inverse, inside)
        extra = Extra(extra.values, extra.residuals, extra.cosines, extra.error + factor.coordinate_error)
        for most in FACTOR_STEPS:
            for run in (direct, inverse):
                run.extend(most - len(run.alpha))
            rows = self._rows()
            of_direct, of_inverse = yield from _coefficients([direct, inverse])
            runs = [recurrence(of_direct, rows), recurrence(of_inverse, rows, inverse=True)]
            if (yield from self._settle(runs, "factor", extra, (factor.smallest, span[1]))):
                return True
        return False

    def _rows(self) -> list[int]:
        """Rows of the vectors of tier b that are still open."""
        return [row for row, j in enumerate(self.tested) if self.tier[j] == ""]

    def _settle(
        self, runs: list[Recurrence], tier: str, extra: Extra, span: tuple[float, float]
    ) -> Steps[bool]:
        """Certify open vectors by their recurrences; returns whether all are settled."""
        rows = self._rows()
        of_rows = Extra(extra.values, extra.residuals, extra.cosines[rows], extra.error[rows])
        bound, self.failing = cosine_bounds.largest_cosines(
            runs, of_rows, span, np.full(len(rows), self.epsilon)
        )
        for row, cosine in zip(rows, bound, strict=True):
            if cosine < self.epsilon:
                j = self.tested[row]
                self.high[j] = max(cosine, self.low[j])
                self.tier[j] = tier
        # The failing eigenvalue may be that of a near, leading base vector that has not converged yet.
        if self.failing > self.values[self.k] / 2 and not self._converged():
            yield from self._further()
        return not self._open()

    def _apply(self, block: Tensor) -> Applied:
        product, rounding = linalg.double_product(self.base, self.space0.norm[0], block)
        return product, errors(product, 0, rounding)

    def decision(self) -> Steps[Decision]:
        """The decision once every vector is settled."""
        shown, ritz0, ritz1 = 30, self.ritz0, self.ritz1
        cosines = (ritz1.vectors[0, :, :shown].mT @ ritz0.vectors[0, :, :shown]).abs()
        base, tuned, sines, overlap, leading, weights = yield [
            ritz0.singular_values(shown)[0], ritz1.singular_values(shown)[0], ritz1.errors()[0, :shown],
            cosines, ritz1.values[0, : self.k].sqrt(), ritz0.weights[0],
        ]  # fmt: skip
        overlap[sines > ACCEPTED] = np.nan
        overlap[:, self.sine[:shown] > ACCEPTED] = np.nan
        return Decision(
            singular_values=leading, low=self.low, high=np.minimum(self.high, 1), tier=self.tier,
            base_values=base, tuned_values=tuned, overlap=overlap,
            critical=self._critical(torch.from_numpy(weights)),
        )  # fmt: skip

    def _critical(self, weights: Float[Tensor, "start space"]) -> float:
        rows, columns = self.base.shape
        values = torch.from_numpy(self.values)
        z = values[self.k - 1].sqrt()
        f = z / (values[self.k - 1] - values)
        f[: self.k] = 0
        total, _ = linalg.spectral_sum(f, weights, rows)
        rank = min(rows, columns)
        # The trace counts the zero eigenvalues of a tall matrix's W Wᵀ, which are no singular values.
        total -= (rows - rank) / float(z)
        return linalg.critical_from_sum(total, float(z), rank - self.k, rows, columns)


def _coefficients(runs: list[Lanczos]) -> Steps[list[Values]]:
    """The coefficients of several runs of one matrix."""
    by_run = [run.coefficients() for run in runs]
    values = yield [tensor for tensors in by_run for tensor in tensors]
    return [values[i : i + len(by_run[0])] for i in range(0, len(values), len(by_run[0]))]
