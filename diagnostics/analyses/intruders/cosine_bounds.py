"""Upper bounds on the cosine of a vector with every eigenvector of a matrix, without computing any of them.

Lanczos steps from y give orthonormal polynomials p_j of its spectral measure. For every unit eigenvector u at
eigenvalue x, `⟨u, y⟩² ≤ ‖y‖² / Σ_j p_j(x)²` (Christoffel function; Nevai, J. Approx. Theory 48, 1986). The
recurrence holds up to a residual of norm φ, rounding included: the coordinates z_j = ⟨u, q_j⟩ satisfy
`‖M(x) z‖ ≤ φ`, M being T − x with the next off-diagonal entry appended. For x within h of c, and for groups
of eigenvectors within h, the residual against M(c) is at most φ + h: one evaluation covers a whole cell.
`max z_0²` subject to `‖z‖ ≤ 1` and `‖M z‖ ≤ φ` is bounded by `1 / min(s ‖z‖² + (1 − s) ‖M z‖²/φ²)` over
z_0 = 1, for any s in (0, 1): a linear-quadratic control problem, solved by one backward recursion in square
roots, so that nothing cancels however small φ is. An inexact inverse b ≈ A⁻¹ q is allowed: by
`⟨u, q⟩ = x ⟨u, b⟩ + ⟨u, q − A b⟩` its residual `q − A b` enters φ divided by x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from diagnostics.numerics.linalg import DEGENERATE

# Share of the constraint ‖z‖ ≤ 1 in the combined one: 0.95 costs 2.6 % of the bound when φ vanishes.
SHARE = 0.95
# Residual of a recurrence of some dozen steps in float64, relative to the operator's norm.
LEAST_RESIDUAL = 1e-13
# Work limit: a vector that needs more cells is left undecided, never wrongly decided.
CELLS = 20_000


@dataclass(frozen=True)
class Recurrence:
    """Lanczos coefficients of several starting vectors, one a row.

    Attributes:
        alpha, beta: (vectors, steps); the last beta belongs to the first basis vector not multiplied.
        residual: (vectors, 3) bounds on the norm of the recurrence's residual, rounding included, for an
            eigenvector of A at x: the first as it is, the second divided by x, the third by the root of x.
        norm: (vectors,) length of the starting vector.
        inverse: whether the operator is the inverse of `A + shift`, with eigenvalues `1/(x + shift)`. Only
            then may the second and the third residual differ from 0.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    residual: NDArray[np.float64]
    norm: NDArray[np.float64]
    inverse: bool = False
    shift: float = 0.0

    def bound(self, vector: NDArray[np.intp], low: NDArray, high: NDArray) -> NDArray[np.float64]:
        """Upper bound on |⟨u, y⟩| for eigenvectors of A with eigenvalue in [low, high], by row `vector`."""
        residual = self.residual[vector].T
        if not self.inverse:
            return self._at(vector, low, high, residual[0])
        low, high = low + self.shift, high + self.shift
        row = np.hypot(self.alpha[vector, 0], self.beta[vector, 0]) + residual[0]
        floor = 1e-3 / row  # far below the recurrence's resolution

        def first(x: NDArray) -> NDArray[np.float64]:
            # The first row alone, up to x: z_0 = x (α_0 z_0 + β_0 z_1) + residual.
            return self.norm[vector] * (x * row + residual[1] + np.sqrt(x) * residual[2])

        from_ = np.maximum(low, floor)
        left = residual[0] + residual[1] / from_ + residual[2] / np.sqrt(from_)
        rest = self._at(vector, 1 / np.maximum(high, from_), 1 / from_, left)
        rest = np.where(low < floor, np.maximum(rest, first(floor)), rest)
        return np.minimum(first(high), rest)

    def _at(
        self, vector: NDArray[np.intp], low: NDArray, high: NDArray, residual: NDArray
    ) -> NDArray[np.float64]:
        """`bound` for eigenvalues of the operator in [low, high]."""
        centre, half = (low + high) / 2, (high - low) / 2
        eta = (residual + half) * np.sqrt(SHARE / (1 - SHARE))
        value = _value(self.alpha[vector].T, self.beta[vector].T, centre, eta)
        return self.norm[vector] / np.sqrt(np.maximum(SHARE * value, 1.0))


def _value(alpha: NDArray, beta: NDArray, x: NDArray, eta: NDArray) -> NDArray[np.float64]:
    """`min ‖z‖² + ‖M(x) z‖²/η²` over z with z_0 = 1; `Σ p_j(x)²` for η → 0."""
    # Cost to go, (p z_{j+1} + q z_j)² + (r z_j)², as the triangle of a least-squares problem.
    p, q, r = np.ones_like(x), np.zeros_like(x), np.zeros_like(x)
    for j in reversed(range(len(alpha))):
        move = beta[j] / eta  # weight of z_{j+1} in the recurrence's row
        length = np.hypot(p, move)
        diagonal = (move * q + p * (x - alpha[j]) / eta) / length
        back = p * (beta[j - 1] if j else 0.0) / eta / length
        below = 1 + r * r  # the term of z_j itself, and its cost so far
        p = np.sqrt(diagonal * diagonal + below)
        q, r = -diagonal * back / p, back * np.sqrt(below) / p
    return p * p


def largest_cosines(
    recurrences: list[Recurrence], extra: "Extra", span: tuple[float, float], target: NDArray[np.float64],
    slack: float = 0.02,
) -> tuple[NDArray[np.float64], float]:  # fmt: skip
    """An upper bound on the |cosine| of each vector with every eigenvector; `inf` if above the target.

    Also the largest eigenvalue at which a bound exceeds its target; 0 if none does.

    In each cell of the span of eigenvalues the smallest of the recurrences' bounds holds. Cells are halved
    until each has a bound below the target, the cosine below which a decision is wanted, and none that raises
    the vector's bound lies more than `slack` above its midpoint's.
    """
    low, high = span
    edges = np.unique(np.concatenate([[low], np.geomspace(max(low, 1e-7 * high), high, 65)]))
    count = len(target)
    vector = np.repeat(np.arange(count), len(edges) - 1)
    a, b = np.tile(edges[:-1], count), np.tile(edges[1:], count)
    best = np.zeros(count)
    failing, spent = 0.0, 0
    while len(vector):
        spent += len(vector)
        bound = _least(recurrences, extra, vector, a, b)
        # Only a cell that would raise the vector's bound is worth tightening.
        fine = (bound < target[vector]) & (bound <= best[vector] + slack)
        np.maximum.at(best, vector[fine], bound[fine])
        vector, a, b, bound = vector[~fine], a[~fine], b[~fine], bound[~fine]
        middle = np.where(b > 4 * a, np.maximum(b / 64, np.sqrt(a * b)), (a + b) / 2)
        point = _least(recurrences, extra, vector, middle, middle)
        fine = (bound < target[vector]) & (bound <= point + slack)
        np.maximum.at(best, vector[fine], bound[fine])
        failed = ~fine & ((point >= target[vector]) | (b - a <= 1e-13 * b) | (spent > CELLS * count))
        best[vector[failed]] = np.inf
        failing = max(failing, middle[failed].max(initial=0))
        left = ~fine & np.isfinite(best[vector])
        vector, a, b, middle = vector[left], a[left], b[left], middle[left]
        vector, a, b = np.tile(vector, 2), np.concatenate([a, middle]), np.concatenate([middle, b])
    return best, failing


def _least(
    recurrences: list[Recurrence], extra: "Extra", vector: NDArray[np.intp], low: NDArray, high: NDArray
) -> NDArray[np.float64]:
    # Near-degenerate base vectors count as one direction: let no group be cut by a cell's edge.
    low, high = low * (1 - DEGENERATE) ** 2, high * (1 + DEGENERATE) ** 2
    bounds = [recurrence.bound(vector, low, high) for recurrence in recurrences]
    return np.minimum.reduce(bounds) + extra.at(vector, low, high)


@dataclass(frozen=True)
class Extra:
    """Bound on the contribution of the deflated directions V: `|⟨u, V Vᵀ x⟩|` at an eigenvalue.

    A unit eigenvector u with eigenvalue x has `|⟨u, v_l⟩| ≤ min(1, r_l / |x − θ_l|)` for a Ritz pair
    (θ_l, v_l) of residual r_l, whatever the gaps.
    """

    values: NDArray[np.float64]  # (deflated,) of the Ritz pairs
    residuals: NDArray[np.float64]
    cosines: NDArray[np.float64]  # (vectors, deflated) |⟨x, v_l⟩|
    error: NDArray[np.float64]  # (vectors,) distance of the examined vector from the true one

    def at(self, vector: NDArray[np.intp], low: NDArray, high: NDArray) -> NDArray[np.float64]:
        """Bound on their contribution for eigenvalues in [low, high], elementwise."""
        centre, half = (low + high) / 2, (high - low) / 2
        away = np.abs(centre[:, None] - self.values) - half[:, None]
        with np.errstate(divide="ignore"):
            share = np.where(away > 0, np.minimum(1, self.residuals / np.maximum(away, 1e-300)), 1.0)
        cosines = self.cosines[vector]
        # ‖Vᵀu‖ <= 1 too, so the sum never exceeds the norm of the deflated part.
        total = np.minimum((cosines * share).sum(axis=1), np.linalg.norm(cosines, axis=1))
        return total + self.error[vector]


class Lanczos:
    """Lanczos recurrences of several starting vectors at once, fully reorthogonalised in float64."""

    def __init__(
        self, apply: Callable[[Tensor], tuple[Tensor, Tensor]], start: Float[Tensor, "size count"]
    ) -> None:
        # The symmetric operator on a block of unit columns, with the three error bounds of each column that
        # `Recurrence.residual` names, (3, count); float64 in and out.
        self.apply = apply
        self.norm = torch.linalg.vector_norm(start, dim=0)
        first = start / self.norm.clamp(min=torch.finfo(start.dtype).tiny)
        self.basis = first.mT.unsqueeze(1)  # (count, steps, size): a contiguous row a basis vector
        self.alpha, self.beta = list[Tensor](), list[Tensor]()
        self.leftover, self.rounding = torch.zeros_like(self.norm), torch.zeros_like(self.norm).expand(3, -1)

    def extend(self, steps: int) -> None:
        """Take that many more steps."""
        for _ in range(min(steps, self.basis.shape[2] - self.basis.shape[1])):
            latest = self.basis[:, -1]
            product, error = self.apply(latest.mT.contiguous())
            product = product.mT
            self.rounding = self.rounding + error.square()
            alpha = (product * latest).sum(dim=1)
            rest = product - alpha[:, None] * latest
            if self.beta:
                rest = rest - self.beta[-1][:, None] * self.basis[:, -2]
            for attempt in range(2):
                overlap = self.basis @ rest.unsqueeze(2)
                rest = rest - (overlap * self.basis).sum(dim=1)
                if attempt == 0:
                    self.leftover = self.leftover + overlap.square().sum(dim=(1, 2))
            beta = torch.linalg.vector_norm(rest, dim=1)
            self.alpha.append(alpha)
            self.beta.append(beta)
            exhausted = beta <= error[0] + 1e-14 * torch.linalg.vector_norm(product, dim=1)
            self.leftover = self.leftover + torch.where(exhausted, 2 * beta, 0.0).square()
            self.basis = torch.cat([self.basis, self._direction(rest, exhausted).unsqueeze(1)], dim=1)

    def _direction(self, rest: Tensor, exhausted: Tensor) -> Tensor:
        """Next basis vectors; an exhausted space continues with any orthogonal direction, at β of about 0."""
        # Reading the flag of a GPU would wait for it.
        if not _on_cpu(exhausted) or exhausted.any():
            generator = torch.Generator(rest.device).manual_seed(self.basis.shape[1])
            fresh = torch.randn(rest.shape, generator=generator, dtype=rest.dtype, device=rest.device)
            for _ in range(2):
                fresh = fresh - ((self.basis @ fresh.unsqueeze(2)) * self.basis).sum(dim=1)
            rest = torch.where(exhausted[:, None], fresh, rest)
        return rest / torch.linalg.vector_norm(rest, dim=1, keepdim=True)

    def coefficients(self) -> list[Tensor]:
        """The arguments of `recurrence` after the steps taken so far."""
        alpha, beta = torch.stack(self.alpha, dim=1), torch.stack(self.beta, dim=1)
        return [alpha, beta, self.rounding, self.leftover, self.norm]


def recurrence(
    coefficients: Sequence[NDArray[np.float64]], rows: list[int], inverse: bool = False, shift: float = 0.0
) -> Recurrence:
    """The recurrence of the vectors `rows`, from a run's coefficients."""
    alpha, beta, rounding, leftover, norm = coefficients
    alpha, beta = alpha[rows], beta[rows]
    scale = float((np.abs(alpha) + beta).max())
    residual = np.sqrt(rounding[:, rows]).T
    residual[:, 0] = np.maximum(residual[:, 0] + np.sqrt(leftover[rows]), LEAST_RESIDUAL * scale)
    beta = np.maximum(beta, 1e-300 + 1e-14 * scale)
    return Recurrence(alpha, beta, residual, norm[rows], inverse, shift)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
