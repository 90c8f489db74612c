"""Matrices with a chosen spectrum, shared by the tests of the spectral arithmetic."""

import torch
from torch import Tensor


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_values(
    S: Tensor, rows: int, columns: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A (rows, columns) matrix with the singular values S and random vectors: W, U, V."""
    U, V = orthonormal(rows, len(S), generator), orthonormal(columns, len(S), generator)
    return (U * S.double()) @ V.mT, U, V


def values(kind: str, count: int) -> Tensor:
    """Singular values as they occur, and as they trouble an algorithm."""
    i = torch.arange(count, dtype=torch.float64)
    if kind == "power":  # as in trained transformers
        return (1 + i) ** -0.5
    if kind == "outliers":
        return torch.cat([torch.linspace(10, 3, 6, dtype=torch.float64), 1 - 0.98 * i[: count - 6] / count])
    if kind == "geometric":
        return 0.97**i
    if kind == "flat":
        return 1 - 0.3 * i / count
    if kind == "clustered":  # pairs that differ by 1e-9
        return 1 / (1 + i // 2) + 1e-9 * (i % 2)
    if kind == "repeated":
        return torch.where(i < count // 2, 1.0, 0.5).double()
    if kind == "deficient":
        return torch.where(i < count // 2, 1 / (1 + i), 0.0)
    assert kind == "small"  # ill-conditioned beyond a Gram matrix
    return torch.logspace(0, -9, count, dtype=torch.float64)


KINDS = ("power", "outliers", "geometric", "flat", "clustered", "repeated", "deficient", "small")
SHAPES = ((48, 48), (40, 96), (96, 40))
