"""Factors of a matrix W that apply an inverse of `W Wᵀ`, with the residual of each application.

The bounds of `cosine_bounds` allow an inexact inverse: for the vector b that approximates `(W Wᵀ)⁻¹ q` they
need the norm of `q − W Wᵀ b`, which is measured. Single precision suffices where that norm is small.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.execution.lockstep import Steps, Values
from diagnostics.numerics import linalg
from diagnostics.store.factor_cache import NO_RECALL, Recall

Applied = tuple[Float[Tensor, "size count"], Float[Tensor, "3 count"]]
# Of a Gram matrix's rounding error: a random matrix with entries in proportion to the lengths of two rows.
ROUNDING = 4
# Allowed rounding relative to the smallest inverted eigenvalue, without and with one step of refinement.
NEGLIGIBLE, REFINED = 0.01, 0.1


@dataclass(frozen=True)
class Shifted:
    """Cholesky factor of `W Wᵀ + shift` of a W that is not tall.

    Lanczos with its inverse resolves eigenvalues best near the shift, and lumps those far below it.
    """

    W: Float[Tensor, "out in"]
    L: Float[Tensor, "out out"]  # in W's precision where one step of refinement makes up for it, else float64
    shift: float
    gram: Float[Tensor, "out out"] | None  # `W Wᵀ + shift` if L has a higher precision than W
    rounding: float  # bound on the norm of the error of the factored `W Wᵀ + shift`
    norm: Float[Tensor, ""]  # `‖W‖_F`

    @classmethod
    def of(
        cls, W: Float[Tensor, "out in"], shift: float, recall: Recall = NO_RECALL
    ) -> "Steps[Shifted | None]":
        """Factor W in the lowest sufficient precision, with a higher shift if needed; None if that fails."""
        lengths = W.square().sum(dim=1)
        norm = _gram_norm((yield [lengths.sum(), lengths.max()]), len(lengths))
        native = _rounding(norm, W.dtype) <= REFINED * shift
        dtype = W.dtype if native else torch.float64
        rounding = _rounding(norm, dtype)
        shift = shift if native else max(shift, rounding / NEGLIGIBLE)
        gram = recall("Gram matrix", (dtype,), lambda: {"gram": linalg.gram(W, dtype)})["gram"]
        gram.diagonal().add_(shift)
        L, failed = torch.linalg.cholesky_ex(gram)
        (failed,) = yield [failed]
        if failed:
            return None
        symmetric = None if native else gram.tril() + gram.tril(-1).mT
        return cls(W, L, shift, symmetric, rounding, lengths.sum().sqrt())

    def apply_inverse(self, block: Tensor) -> Applied:
        """b for every unit column q, and the norm of `q − (W Wᵀ + shift) b`, to be divided by x."""
        b = self._solve(block)
        if self.rounding > NEGLIGIBLE * self.shift:
            b = b + self._solve(self._left(block, b)[0])
        b = b.to(self.L.dtype).double()
        left, rounding = self._left(block, b)
        return b, errors(b, 1, torch.linalg.vector_norm(left, dim=0) + rounding)

    def _solve(self, block: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.L, block.to(self.L.dtype), upper=False)
        return torch.linalg.solve_triangular(self.L.mT, half, upper=True).double()

    def _left(self, block: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The residual of b, and a bound on its rounding error; b has the precision of L."""
        if self.gram is None:
            product, rounding = linalg.double_product(self.W, self.norm, b)
            return block - product - self.shift * b, rounding
        # As rows: CPU BLAS is several times slower on a few columns.
        product = (b.mT.contiguous() @ self.gram).mT
        return block - product, self.rounding * torch.linalg.vector_norm(b, dim=0)


@dataclass(frozen=True)
class Tall:
    """`W = Q Lᵀ` with orthonormal Q, from the Cholesky factor of `Wᵀ W = L Lᵀ`.

    The part of a vector outside the column space of a tall matrix lies at eigenvalue 0, which no power of
    `W Wᵀ` tells from the smallest ones. In the coordinates `L⁻¹ Wᵀ x` of the column space `W Wᵀ` is `Lᵀ L`.
    """

    W: Float[Tensor, "out in"]
    L: Float[Tensor, "in in"]
    smallest: float = 0.0  # a lower bound on the smallest eigenvalue of `Wᵀ W`
    coordinate_error: float = 0.0  # of the coordinates of a unit vector, and relatively of `Lᵀ L`

    @classmethod
    def of(
        cls, W: Float[Tensor, "out in"], generator: torch.Generator, recall: Recall = NO_RECALL
    ) -> "Steps[Tall | None]":
        """Factor W in the lowest sufficient precision; None if none suffices."""
        parts = (generator.get_state(),)
        saved = recall.lookup("tall factor", parts)
        if saved is None:
            factor = yield from cls._factor(W, generator)
            bounds = (factor.smallest, factor.coordinate_error) if factor else ()
            saved = {
                "L": factor.L if factor else W.new_empty(0, 0),
                "bounds": torch.tensor(bounds, dtype=torch.float64),
                "generator": generator.get_state(),
            }
            recall.keep("tall factor", parts, saved)
        generator.set_state(saved["generator"].cpu())
        limits = saved["bounds"].tolist()
        return cls(W, saved["L"], *limits) if limits else None

    @classmethod
    def _factor(cls, W: Float[Tensor, "out in"], generator: torch.Generator) -> "Steps[Tall | None]":
        lengths = W.square().sum(dim=0)
        for dtype in (torch.float32, torch.float64):
            L, failed = torch.linalg.cholesky_ex(linalg.gram(W, dtype))
            (failed,) = yield [failed]
            if failed:
                continue
            factor = cls(W, L)
            block = torch.randn(len(L), 16, generator=generator, dtype=dtype, device=L.device)
            # Power iterations with a block: the norm of the inverse, almost surely within a factor of 2.
            for _ in range(3):
                block = factor._inverse(torch.linalg.qr(block).Q)
            *sizes, largest = yield [lengths.sum(), lengths.max(), torch.linalg.matrix_norm(block, ord=2)]
            inverse_norm = 2 * float(largest)
            relative = _rounding(_gram_norm(sizes, len(lengths)), dtype) * inverse_norm
            if relative <= NEGLIGIBLE:
                return cls(W, L, 1 / inverse_norm, relative)
        return None

    def coordinates(self, block: Tensor) -> Tensor:
        """Coordinates of columns in R^out in the column space of W."""
        # In parts: a float64 copy of W would dominate the memory.
        inner = torch.cat([part.double() @ block for part in self.W.mT.split(1024)])
        return torch.linalg.solve_triangular(self.L.double(), inner, upper=False)

    def apply(self, block: Tensor) -> Applied:
        """`W Wᵀ` on unit columns of coordinates."""
        inner = block.mT.to(self.L.dtype).contiguous() @ self.L.mT
        size = torch.linalg.vector_norm(inner, dim=1)
        rounding = linalg.rounding(torch.linalg.matrix_norm(self.L), size, self.L.dtype).double()
        return (inner @ self.L).mT.double(), errors(
            block, 0, self.coordinate_error * self.smallest + rounding
        )

    def apply_inverse(self, block: Tensor) -> Applied:
        """The inverse of `W Wᵀ` on unit columns of coordinates."""
        inverse = self._inverse(block.to(self.L.dtype)).double()
        return inverse, errors(block, 0, self.coordinate_error / self.smallest)

    def _inverse(self, block: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.L.mT, block, upper=True)
        return torch.linalg.solve_triangular(self.L, half, upper=False)


def errors(block: Tensor, row: int, size: Tensor | float) -> Float[Tensor, "3 count"]:
    """The error bounds of the columns of a block, as `Recurrence.residual` names them: all 0 but one."""
    bounds = torch.zeros(3, block.shape[1], dtype=block.dtype, device=block.device)
    bounds[row] = size
    return bounds


def _gram_norm(diagonal: Values, side: int) -> float:
    """Bound on the spectral norm of a Gram matrix, from the sum and the maximum of its diagonal."""
    total, largest = map(float, diagonal)
    return min(total, largest * side**0.5)


def _rounding(norm: float, dtype: torch.dtype) -> float:
    """Bound on the norm of a Gram matrix's rounding error."""
    return ROUNDING * torch.finfo(dtype).eps * norm
