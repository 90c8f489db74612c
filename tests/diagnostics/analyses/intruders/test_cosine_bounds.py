"""The bound that decides is never below the truth, and is near it where that matters."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diagnostics.analyses.intruders import cosine_bounds, inverse_factors
from diagnostics.analyses.intruders.cosine_bounds import (
    Extra,
    Lanczos,
    Recurrence,
    largest_cosines,
    recurrence,
)
from diagnostics.analyses.intruders.inverse_factors import Shifted, Tall
from diagnostics.execution.lockstep import read_values, run_in_lockstep
from diagnostics.numerics import linalg
from tests.diagnostics.spectra import KINDS, SHAPES, orthonormal, values, with_values

NEVER = 2.0  # a target that no cosine reaches


def factor_of(W, generator, shift=0.01):
    """A factor with the shift at that share of the largest eigenvalue, or that of a tall matrix."""
    if W.shape[0] > W.shape[1]:
        return run_in_lockstep([Tall.of(W, generator)])[0]
    return run_in_lockstep([Shifted.of(W, shift * float(torch.linalg.matrix_norm(W, 2)) ** 2)])[0]


def exactly(W):
    def apply(block):
        return W @ (W.mT @ block), torch.zeros(3, block.shape[1], dtype=block.dtype)

    return apply


def bounds(W, vectors, steps, *, deflated=None, target=NEVER, factor=None):
    """Bounds on each column's cosine with every base vector, by the direct run or with the factor's."""
    W = W.double()
    U, S = linalg.left_singular(W)
    largest = float(S[0] ** 2) * (1 + 1e-9)
    V = torch.zeros(W.shape[0], 0, dtype=W.dtype) if deflated is None else U[:, :deflated]
    start = vectors - V @ (V.mT @ vectors)
    extra = Extra(
        values=S[: V.shape[1]].square().numpy(),
        residuals=np.full(V.shape[1], 1e-12),
        cosines=(V.mT @ vectors).abs().mT.numpy(),
        error=np.zeros(vectors.shape[1]),
    )
    rows = list(range(vectors.shape[1]))
    if factor is None:
        runs, low = [Lanczos(exactly(W), start)], 0.0
    else:
        tall = isinstance(factor, Tall)
        inside, low = (factor.coordinates(start), factor.smallest) if tall else (start, 0.0)
        direct = factor.apply if tall else exactly(W)
        runs = [Lanczos(direct, inside), Lanczos(factor.apply_inverse, inside)]
        shift = 0.0 if tall else factor.shift
    for run in runs:
        run.extend(steps)
    recurrences = [recurrence(read_values(runs[0].coefficients()), rows)]
    if factor is not None:
        recurrences.append(recurrence(read_values(runs[1].coefficients()), rows, inverse=True, shift=shift))
    cosines, _ = largest_cosines(recurrences, extra, (low, largest), np.full(len(rows), target))
    return cosines, linalg.grouped_cosines(U, S, vectors, W.shape[1]).numpy()


def mixture(W, generator, count=6):
    """Unit vectors at random, along one base vector, between two, and mostly in the small end."""
    U, _ = linalg.left_singular(W)
    vectors = torch.randn(W.shape[0], count, generator=generator, dtype=torch.float64)
    vectors /= vectors.norm(dim=0)
    vectors[:, 1] += 0.5 * U[:, 0]
    vectors[:, 2] = U[:, 1] + U[:, 2] + 0.1 * vectors[:, 2]
    vectors[:, 3] += 3 * U[:, -1]
    vectors[:, 4] += 0.4 * U[:, U.shape[1] // 2]
    return vectors / vectors.norm(dim=0)


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    steps=st.integers(1, 24),
    deflated=st.sampled_from([None, 3]),
)
@settings(max_examples=200)
def test_the_direct_bound_is_never_below_the_cosine(seed, kind, shape, steps, deflated):
    generator = torch.Generator().manual_seed(seed)
    W, _, _ = with_values(values(kind, min(shape)), *shape, generator)
    bound, cosine = bounds(W, mixture(W, generator), steps, deflated=deflated)
    assert (bound >= cosine - 1e-9).all()


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    steps=st.integers(1, 16),
    shift=st.floats(1e-16, 0.5),
)
@settings(max_examples=200)
def test_the_bound_of_both_runs_is_never_below_the_cosine(seed, kind, shape, steps, shift):
    generator = torch.Generator().manual_seed(seed)
    W, _, _ = with_values(values(kind, min(shape)), *shape, generator)
    factor = factor_of(W, generator, shift)
    assume(factor is not None)
    bound, cosine = bounds(W, mixture(W, generator), steps, factor=factor)
    assert (bound >= cosine - 1e-9).all()


@pytest.mark.parametrize("kind", ["deficient", "small"])
def test_a_tall_matrix_too_near_to_deficient_is_not_factored(kind):
    generator = torch.Generator().manual_seed(0)
    W = with_values(values(kind, 40), 96, 40, generator)[0]
    assert run_in_lockstep([Tall.of(W, generator)]) == [None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["power", "geometric", "small"])
def test_what_an_inverse_says_that_it_leaves_over_is_what_it_leaves(kind, shape):
    generator = torch.Generator().manual_seed(5)
    S = values(kind, min(shape))
    W, U, _ = with_values(S if shape[0] <= shape[1] else S.clamp(min=1e-4), *shape, generator)
    factor = factor_of(W, generator)
    block = orthonormal(min(shape), 5, generator)
    b, (absolute, over, over_root) = factor.apply_inverse(block)
    if isinstance(factor, Tall):
        U = factor.coordinates(U)
    x = linalg.left_singular(W)[1].square()[:, None]
    if not isinstance(factor, Tall):
        x = x + factor.shift
    U = U[:, : len(x)]
    left = (U.mT @ block / x - U.mT @ b).abs()
    assert (left <= absolute + over / x + over_root / x.sqrt() + 1e-12 / x).all()


def test_without_residual_the_value_is_the_sum_of_squared_polynomials():
    alpha, beta = np.array([0.5, 0.4, 0.6]), np.array([0.3, 0.2, 0.25])
    x = np.linspace(0, 1, 7)
    p = [np.ones_like(x), (x - alpha[0]) / beta[0]]
    for j in (1, 2):
        p.append(((x - alpha[j]) * p[j] - beta[j - 1] * p[j - 1]) / beta[j])
    expected = sum(polynomial**2 for polynomial in p)
    value = cosine_bounds._value(alpha[:, None].repeat(7, 1), beta[:, None].repeat(7, 1), x, np.full(7, 1e-6))
    assert value == pytest.approx(expected, rel=1e-3)


def test_the_peak_at_a_converged_ritz_value_is_not_missed():
    # An atom of mass 0.36 far from the rest: after 12 steps its peak is narrower than any plain grid.
    generator = torch.Generator().manual_seed(3)
    S = torch.cat([torch.tensor([2.0137]), torch.linspace(1, 0.3, 59)]).double()
    W, U, _ = with_values(S, 60, 60, generator)
    rest = orthonormal(60, 1, generator)
    rest = rest - U[:, :1] * (U[:, :1].mT @ rest)
    vector = 0.6 * U[:, :1] + 0.8 * rest / rest.norm()
    lanczos = Lanczos(exactly(W), vector)
    lanczos.extend(12)
    steps = recurrence(read_values(lanczos.coefficients()), [0])
    grid = np.linspace(0.01, float(S[0] ** 2) * 1.001, 400)
    plain = Recurrence(steps.alpha, steps.beta, np.array([[1e-9, 0, 0]]), steps.norm)
    assert plain.bound(np.zeros(400, int), grid, grid).max() < 0.55
    bound, _ = bounds(W, vector, 12)
    assert bound[0] >= 0.6


def test_an_exhausted_space_leaves_the_masses_themselves():
    # A vector in the span of two base vectors has two atoms, 0.8² and 0.6²: known after two steps.
    generator = torch.Generator().manual_seed(1)
    W, U, _ = with_values(values("geometric", 40), 40, 40, generator)
    vector = 0.8 * U[:, 3:4] + 0.6 * U[:, 9:10]
    bound, cosine = bounds(W, vector, 8)
    assert cosine[0] == pytest.approx(0.8)
    assert 0.8 <= bound[0] < 0.85


def test_a_random_vector_is_certified_in_few_steps():
    generator = torch.Generator().manual_seed(2)
    W, _, _ = with_values(values("flat", 400), 400, 600, generator)
    vectors = orthonormal(400, 8, generator)
    bound, cosine = bounds(W, vectors, 16, target=0.5)
    assert (cosine < 0.25).all()
    assert (bound < 0.5).all()


def test_the_small_end_takes_both_runs():
    # Nine tenths of the values lie in the last thousandth of the spectrum: the direct run lumps them.
    generator = torch.Generator().manual_seed(2)
    S = torch.cat([torch.linspace(1, 0.5, 20), torch.linspace(0.02, 0.004, 180)]).double()
    W, _, _ = with_values(S, 200, 300, generator)
    vectors = orthonormal(200, 4, generator)
    direct, _ = bounds(W, vectors, 24, target=0.5)
    factor = factor_of(W, generator, shift=1e-4)
    both, cosine = bounds(W, vectors, 24, target=0.5, factor=factor)
    assert np.isinf(direct).all()
    assert (both < 0.5).all()
    assert (both >= cosine).all()


def test_of_a_tall_matrix_the_null_space_is_left_out():
    generator = torch.Generator().manual_seed(4)
    W, _, _ = with_values(values("flat", 100), 300, 100, generator)
    vectors = orthonormal(300, 4, generator)
    direct, _ = bounds(W, vectors, 24, target=0.5)
    factor = factor_of(W, generator)
    both, cosine = bounds(W, vectors, 24, target=0.5, factor=factor)
    assert np.isinf(direct).all()  # two thirds of each vector lie at eigenvalue 0
    assert (both < 0.5).all()
    assert (both >= cosine).all()


def test_deflated_directions_add_only_what_their_residuals_allow():
    extra = Extra(np.array([4.0]), np.array([0.1]), np.array([[0.3]]), np.array([0.01]))
    at = extra.at(np.zeros(3, int), np.array([3.95, 3.0, 0.0]), np.array([4.0, 3.0, 1.0]))
    # within the residual: all of 0.3; at distance 1: a tenth; at distance 3 or more: 0.1/3
    assert at == pytest.approx([0.31, 0.04, 0.02])


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_gram_matrix_in_single_precision_errs_by_half_its_bound_at_most(decay):
    generator = torch.Generator().manual_seed(7)
    W = torch.randn(600, 2000, generator=generator) * torch.logspace(0, -decay, 2000)
    W[:, :3] *= 20
    lower = (linalg.gram(W).float() - linalg.gram(W, torch.float32)).tril()
    error = lower + lower.tril(-1).mT
    lengths = W.square().sum(1)
    norm = inverse_factors._gram_norm(read_values([lengths.sum(), lengths.max()]), len(lengths))
    assert torch.linalg.matrix_norm(error, 2) < inverse_factors._rounding(norm, torch.float32) / 2
