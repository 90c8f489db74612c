"""Singular vectors: exact ones in float64, leading ones from block Krylov spaces with their residuals.

All functions are about the left singular vectors of an (out, in) matrix `W`, the eigenvectors of `W Wᵀ`; pass
the transpose for right vectors. Shapes may carry a leading batch of matrices of one shape.
"""

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Squaring the condition number costs half the digits: below this ratio of the smallest to the largest
# singular value a float64 Gram matrix no longer separates the small vectors.
GRAM_CONDITION = 1e-6
# Base singular values closer than this share of themselves have no vectors of their own.
DEGENERATE = 1e-6
# Smaller side from which a second BLAS thread pays, and BLAS outside of torch as well.
TWO_THREADS = 1024


@contextmanager
def threads_for(side: int) -> Iterator[None]:
    """One BLAS thread for matrices with a small side: on a busy machine several are many times slower."""
    before = torch.get_num_threads()
    if side < TWO_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_floor(rows: int) -> float:
    """Approximate largest |cosine| of a random unit vector in R^rows with an orthonormal basis."""
    return math.sqrt(2 * math.log(rows) / rows) if rows > 1 else 1.0


def gram(W: Float[Tensor, "out in"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "side side"]:
    """The lower triangle of the smaller of `W Wᵀ` and `Wᵀ W`; the upper one is arbitrary.

    It is accumulated in parts, so that W is never copied whole in that dtype.
    """
    wide = W if W.shape[0] <= W.shape[1] else W.mT
    total = torch.zeros(wide.shape[0], wide.shape[0], dtype=dtype, device=W.device)
    for part in wide.split(2048, dim=1):
        part = part.to(dtype)
        if W.is_cuda or len(total) < TWO_THREADS:
            total.addmm_(part, part.mT)
        else:
            _add_symmetric(total, part)
    return total


def _add_symmetric(total: Float[Tensor, "side side"], part: Float[Tensor, "side some"]) -> None:
    """Add `part partᵀ` to the lower triangle by BLAS's syrk, which torch lacks and which is half the work."""
    from scipy.linalg.blas import dsyrk, ssyrk

    syrk = dsyrk if total.dtype == torch.float64 else ssyrk
    # scipy's BLAS has its own thread count, on which the order of sums depends.
    with _blas().limit(limits=torch.get_num_threads(), user_api="blas"):
        # BLAS counts by columns: a row-major array is its transpose, and a lower triangle the upper one.
        if part.is_contiguous():
            syrk(1.0, part.numpy().T, 1.0, total.numpy().T, trans=1, overwrite_c=1)
        else:
            syrk(1.0, part.mT.contiguous().numpy().T, 1.0, total.numpy().T, trans=0, overwrite_c=1)


@functools.cache
def _blas() -> Any:
    """The BLAS libraries of this process, torch's excepted."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def left_singular(
    W: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]]:
    """All left singular vectors and values, descending, in float64: by the Gram matrix if it is accurate."""
    values, Q = torch.linalg.eigh(gram(W))
    values, Q = values.flip(0).clamp(min=0), Q.flip(1)
    S = values.sqrt()
    if S[-1] <= GRAM_CONDITION * S[0]:
        del Q  # the SVD takes several times as much
        if W.shape[0] >= W.shape[1]:
            U, S, _ = torch.linalg.svd(W.double(), full_matrices=False)
            return U, S
        # LAPACK is about 2.6 times faster on the tall orientation.
        _, S, Vh = torch.linalg.svd(W.mT.double(), full_matrices=False)
        return Vh.mT, S
    if W.shape[0] <= W.shape[1]:
        return Q, S
    return (W.double() @ Q) / S, S


def grouped_cosines(
    U: Float[Tensor, "out rank"], S: Float[Tensor, " rank"], vectors: Float[Tensor, "out count"],
    columns: int,
) -> Float[Tensor, " count"]:  # fmt: skip
    """For each vector the largest |cosine| with the base's left singular vectors, with two guards.

    Rank guard: vectors with `s <= max(out, in) · eps · s_1` span an arbitrary null space and are dropped.
    Degeneracy guard: around each base value s the vectors within 1e-6 s count as one subspace, since inside
    it the basis is arbitrary. (Within 1e-6 s_1, everything that small would be one subspace, and a float32
    matrix of low rank would own every direction.)

    Args:
        U, S: the base's left singular vectors and values, descending, float64.
        vectors: unit vectors, float64.
        columns: in_features of the base.
    """
    info = torch.finfo(S.dtype)
    kept = (S / S[0].clamp(min=info.tiny)) > max(U.shape[0], columns) * info.eps
    if not kept.any():  # a base of zeros has no directions
        return torch.zeros(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    U, S = U[:, kept], S[kept]
    mass = torch.zeros(len(S) + 1, vectors.shape[1], dtype=U.dtype, device=U.device)
    torch.cumsum((U.mT @ vectors).square(), dim=0, out=mass[1:])
    rising = S.flip(0).contiguous()
    first = len(S) - torch.searchsorted(rising, S * (1 + DEGENERATE), right=True)
    last = len(S) - torch.searchsorted(rising, S * (1 - DEGENERATE))
    # A difference of running sums loses digits far below 1: single vectors take their cosine itself.
    alone = (last - first == 1).unsqueeze(1)
    single = (U.mT @ vectors).square()
    best = torch.where(alone, single, mass[last] - mass[first]).amax(dim=0)
    return best.clamp(0, 1).sqrt()


@dataclass(frozen=True)
class Exact:
    """The decomposition of a pair in float64.

    Attributes:
        cosines: of each of the k leading tuned vectors, NaN where the tuned matrix has no such direction.
        overlap: |cosine| of the leading tuned (rows) with the leading base vectors (columns).
    """

    cosines: Float[Tensor, " k"]
    base_values: Float[Tensor, " rank"]
    tuned_values: Float[Tensor, " rank"]
    overlap: Float[Tensor, "shown shown"]
    vectors: Float[Tensor, "out k"]


def exact_cosines(
    base: Float[Tensor, "out in"],
    tuned: Float[Tensor, "out in"],
    k: int,
    shown: int = 30,
    of_base: tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]] | None = None,
) -> Exact:
    """c_j of the k leading tuned left singular vectors against every base left singular vector, in float64.

    Source: arXiv:2410.21228 v3, Algorithm 1, with the rank and degeneracy guards of `grouped_cosines`.
    `of_base` is `left_singular` of the base, if already computed.
    """
    U0, S0 = of_base or left_singular(base)
    U1, S1 = left_singular(tuned)
    cosines = grouped_cosines(U0, S0, U1[:, :k], base.shape[1])
    absent = S1[:k] <= max(tuned.shape) * torch.finfo(torch.float64).eps * S1[0]
    overlap = (U1[:, :shown].mT @ U0[:, :shown]).abs()
    return Exact(cosines.masked_fill(absent, torch.nan), S0, S1, overlap, U1[:, :k])


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs of `W Wᵀ`, largest first, in float64.

    Attributes:
        values: all Ritz values of the space, in units of a squared singular value.
        weights: squared share of every Ritz vector in each column of the starting block.
        residuals: `‖W Wᵀ v − θ v‖` of the leading unit Ritz vectors, rounding allowed for.
    """

    values: Float[Tensor, "batch space"]
    weights: Float[Tensor, "batch start space"]
    vectors: Float[Tensor, "batch out count"]
    residuals: Float[Tensor, "batch count"]

    def single(self, index: int) -> "Ritz":
        """The pairs of one matrix of the batch."""
        at = slice(index, index + 1)
        return Ritz(self.values[at], self.weights[at], self.vectors[at], self.residuals[at])

    def errors(self) -> Float[Tensor, "batch count"]:
        """Bound on the sine of the angle of each leading Ritz vector to its eigenvector; 1 without a bound.

        Davis & Kahan: residual over the distance to every other eigenvalue, itself known to a residual. The
        random start is what keeps a leading eigenvalue from being missed: equal ones are all found, at one
        pace, if the start is much wider than their number.
        """
        count = self.residuals.shape[-1]
        values = self.values[..., :count]
        apart = (values.unsqueeze(-1) - values.unsqueeze(-2)).abs() - self.residuals.unsqueeze(-2)
        apart.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        gap = apart.amin(dim=-1)
        errors = torch.where(gap > self.residuals, self.residuals / gap.clamp(min=1e-300), 1.0)
        errors[..., -1] = 1.0  # the next eigenvalue is unknown
        return errors

    def singular_values(self, count: int) -> Float[Tensor, "batch count"]:
        """The leading singular values of W, NaN where the residual leaves more than 1 % open."""
        values = self.values[..., : min(count, self.residuals.shape[-1])]
        converged = self.residuals[..., : values.shape[-1]] <= 0.02 * values
        return torch.where(converged, values.sqrt(), torch.nan)


def rounding(
    norm: Float[Tensor, "*batch"], size: Float[Tensor, "*batch count"], dtype: torch.dtype
) -> Float[Tensor, "*batch count"]:
    """Bound on the rounding error of `W (Wᵀ q)` for a unit q, in the norm.

    The errors of both products are proportional to `u ‖W‖_F ‖Wᵀ q‖`; the probabilistic model of Higham and
    Mary (SIAM J. Sci. Comput. 2019) makes the constant about 1; a test holds their sum below 4 eps. `norm` is
    `‖W‖_F`, and `size` `‖Wᵀ q‖`, at most σ_1.
    """
    return 4 * torch.finfo(dtype).eps * norm.double().unsqueeze(-1) * size.double()


def double_product(
    W: Float[Tensor, "out in"], norm: Float[Tensor, ""], block: Float[Tensor, "out count"]
) -> tuple[Float[Tensor, "out count"], Float[Tensor, " count"]]:
    """`W (Wᵀ block)` in W's precision, given in float64, and the bound on its rounding error.

    `norm` is `‖W‖_F`. The block is float64, of values that W's precision holds, or else of norms about 1.
    """
    count = block.shape[1]
    # Blocks narrower than this take CPU BLAS longer.
    padded = torch.zeros(len(block), max(count, 16) if count > 1 else 1, dtype=W.dtype, device=W.device)
    padded[:, :count] = block
    inner = W.mT @ padded
    size = torch.linalg.vector_norm(inner[:, :count], dim=0)
    return (W @ inner)[:, :count].double(), rounding(norm, size, W.dtype)


class BlockKrylov:
    """A growing orthonormal basis of span{X, (W Wᵀ) X, (W Wᵀ)² X, …} and its products with W Wᵀ."""

    def __init__(self, W: Float[Tensor, "batch out in"], start: Float[Tensor, "batch out start"]) -> None:
        self.W = W
        self.norm = torch.linalg.matrix_norm(W)
        self.start = start.shape[-1]
        self.basis = torch.empty(*W.shape[:2], 0, dtype=W.dtype, device=W.device)
        self.products = self.basis
        self._append(start)

    def state(self) -> dict[str, Tensor]:
        """All that `resumed` needs besides the matrix."""
        return {"basis": self.basis, "products": self.products, "norm": self.norm}

    @classmethod
    def resumed(
        cls, W: Float[Tensor, "batch out in"], start: int, state: Mapping[str, Tensor]
    ) -> "BlockKrylov":
        """The space of W in a saved state, begun with `start` columns."""
        space = cls.__new__(cls)
        space.W, space.start = W, start
        space.basis, space.products, space.norm = state["basis"], state["products"], state["norm"]
        return space

    def single(self, index: int) -> "BlockKrylov":
        """The space of one matrix of the batch, to be extended alone."""
        space = copy.copy(self)
        for name in ("W", "norm", "basis", "products"):
            setattr(space, name, getattr(self, name)[index : index + 1])
        return space

    @property
    def full(self) -> bool:
        """Whether no further block fits into the space."""
        return self.basis.shape[-1] + self.start > self.basis.shape[-2]

    def _append(self, block: Tensor) -> None:
        # Twice, then on normalised columns: what is left of a block near the basis's span is mostly rounding.
        for _ in range(2):
            block = block - self.basis @ (self.basis.mT @ block)
            block = torch.linalg.qr(block).Q
        self.basis = torch.cat([self.basis, block], dim=-1)
        self.products = torch.cat([self.products, self.W @ (self.W.mT @ block)], dim=-1)

    def extend(self, steps: int) -> None:
        """Add `steps` blocks, or as many as fit."""
        for _ in range(steps):
            if self.full:
                return
            self._append(self.products[..., -self.start :])

    def projected(self) -> Float[Tensor, "batch space space"]:
        """`W Wᵀ` in the basis, symmetrised, float64: its eigenvalues are the Ritz values."""
        T = self.basis.double().mT @ self.products.double()
        return (T + T.mT) / 2

    def ritz(self, count: int) -> Ritz:
        """The `count` leading Ritz pairs, small arithmetic in float64."""
        values, S = descending(self.projected())
        Q, P = self.basis.double(), self.products.double()
        leading = S[..., :count]
        vectors = Q @ leading
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
        residuals = torch.linalg.vector_norm(P @ leading - vectors * values[..., None, :count], dim=-2)
        residuals = residuals + rounding(self.norm, values[..., :1].sqrt(), self.W.dtype)
        return Ritz(values, S[..., : self.start, :].square(), vectors, residuals)


def descending(
    T: Float[Tensor, "*batch space space"],
) -> tuple[Float[Tensor, "*batch space"], Float[Tensor, "*batch space space"]]:
    """Eigenvalues, clamped at 0, and eigenvectors of a symmetric matrix, in descending order."""
    values, S = torch.linalg.eigh(T)
    return values.flip(-1).clamp(min=0), S.flip(-1)


def spectral_sum(
    f: Float[Tensor, " space"], weights: Float[Tensor, "start space"], size: int
) -> tuple[float, float]:
    """Estimate of `tr f(W Wᵀ)` and its standard error, from a Krylov space with a random start.

    Stochastic Lanczos quadrature (Ubaru, Chen & Saad, SIAM J. Matrix Anal. 2017) with the starting block's
    columns as the probes. `f` is the function at the Ritz values, `size` the order of W Wᵀ.
    """
    samples = size * (weights @ f)
    return samples.mean().item(), samples.std().item() / math.sqrt(len(samples))


def effective_rank(S: Float[Tensor, " rank"]) -> float:
    """`exp(−Σ p ln p)` with `p = s / Σ s` (Roy & Vetterli 2007); 0 for a matrix of zeros."""
    S = S[S > 0].double()
    if not len(S):
        return 0.0
    p = S / S.sum()
    return math.exp(-(p * p.log()).sum().item())


def product_core(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"]) -> Float[Tensor, "left right"]:
    """A small float64 matrix with the singular values of `B A`, without forming the product."""
    return torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().mT).R.mT


def critical_spike(S: Float[Tensor, " rank"], k: int, rows: int, columns: int) -> float:
    """Size that an added random rank-one spike needs to enter the k leading singular values.

    θ̄_k = D(s_k)^(−1/2) with the D-transform of the spectrum below rank k (Benaych-Georges & Nadakuditi 2012,
    J. Multivariate Anal.), the rule of arXiv:2607.23711 in our form: trust it within a factor of 2.
    """
    z, rest = S[k - 1].double(), S[k:].double()
    if z <= 0:
        return 0.0
    total = (z / (z.square() - rest.square())).sum().item()
    return critical_from_sum(total, float(z), len(rest), rows, columns)


def critical_from_sum(total: float, z: float, rest: int, rows: int, columns: int) -> float:
    """θ̄ from `Σ z/(z² − s_i²)` over the `rest` values below rank k; NaN where z is not above them."""
    product = (total + (rows - rest) / z) / rows * ((total + (columns - rest) / z) / columns)
    return product**-0.5 if 0 < product < math.inf else math.nan
