"""Singular vectors and their bounds against plain `torch.linalg.svd` in float64."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diagnostics.numerics import linalg
from tests.diagnostics.spectra import KINDS, SHAPES, orthonormal, values, with_values

seeds = st.integers(0, 2**31)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["power", "geometric", "flat", "small"])
def test_left_vectors_are_those_of_the_svd(shape, kind, generator):
    W, U, _ = with_values(values(kind, min(shape)), *shape, generator)
    vectors, S = linalg.left_singular(W)
    assert S.tolist() == pytest.approx(values(kind, min(shape)).tolist(), rel=1e-7)
    assert ((vectors.mT @ U).abs() - torch.eye(min(shape))).abs().max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gram_matrix_is_the_smaller_one(shape, generator):
    W = torch.randn(*shape, generator=generator)
    wide = W.double() if shape[0] <= shape[1] else W.double().mT
    assert torch.allclose(linalg.gram(W).tril(), (wide @ wide.mT).tril(), rtol=1e-12)


def test_a_random_vector_comes_as_near_as_the_floor_says(generator):
    # mean over 200 draws at 768 in the table of the method: 0.121, below the asymptotic 0.1315
    draws = torch.randn(768, 200, generator=generator)
    nearest = (draws / draws.norm(dim=0)).abs().amax(dim=0)
    assert nearest.mean().item() == pytest.approx(0.121, abs=0.004)
    assert nearest.mean() < linalg.random_floor(768) < nearest.quantile(0.99)


def test_inside_a_degenerate_base_every_direction_is_near(generator):
    Q = orthonormal(32, 32, generator)
    S = torch.ones(32, dtype=torch.float64)
    vectors = orthonormal(32, 5, generator)
    assert linalg.grouped_cosines(Q, S, vectors, 32).tolist() == pytest.approx([1.0] * 5, abs=1e-12)


def test_the_null_space_of_a_deficient_base_is_no_direction_of_it(generator):
    W, _, _ = with_values(values("deficient", 40), 40, 64, generator)
    U, S = linalg.left_singular(W)
    null = torch.linalg.svd(W).U[:, -1:]
    assert linalg.grouped_cosines(U, S, null, 64).item() < 1e-12


def test_without_guards_to_apply_the_cosine_is_the_largest_entry(generator):
    W, U, _ = with_values(values("geometric", 40), 40, 64, generator)
    vectors = orthonormal(40, 6, generator)
    plain = (U.mT @ vectors).abs().amax(dim=0)
    cosines = linalg.grouped_cosines(*linalg.left_singular(W), vectors, 64)
    assert torch.allclose(cosines, plain, atol=1e-12)


def test_a_base_of_zeros_has_no_direction():
    zero = torch.zeros(8, 8)
    assert linalg.exact_cosines(zero, torch.eye(8), 3).cosines.tolist() == [0, 0, 0]


def test_a_direction_that_tuned_lacks_is_not_measured(generator):
    W, _, _ = with_values(torch.tensor([3.0, 2.0, 1.0]), 24, 32, generator)
    cosines = linalg.exact_cosines(torch.randn(24, 32, generator=generator), W, 5).cosines
    assert cosines.isnan().tolist() == [False, False, False, True, True]


@given(seed=seeds, kind=st.sampled_from(KINDS), shape=st.sampled_from(SHAPES))
@example(seed=1275, kind="clustered", shape=(40, 96))
@settings(max_examples=60)
def test_ritz_vectors_lie_within_their_stated_error(seed, kind, shape):
    generator = torch.Generator().manual_seed(seed)
    W, _, _ = with_values(values(kind, min(shape)), *shape, generator)
    W = W.float()
    krylov = linalg.BlockKrylov(W[None], torch.randn(1, shape[0], 6, generator=generator))
    krylov.extend(3)
    ritz = krylov.ritz(10)
    exact, S = linalg.left_singular(W)
    cosine = (exact.mT @ ritz.vectors[0]).abs()
    # A narrow start may find one of two equal values late: then nothing is claimed from there on.
    settled = (ritz.values[0, :10] - S.square()[:10]).abs() <= ritz.residuals[0]
    for i, error in enumerate(ritz.errors()[0].tolist()):
        if error < 1 and settled[: i + 2].all():
            assert math.sqrt(max(0, 1 - cosine[i, i].item() ** 2)) <= error + 1e-7
    distance = (ritz.values[0, :10].unsqueeze(1) - S.square()).abs().amin(dim=1)
    outside = torch.tensor(0.0) if shape[0] <= shape[1] else ritz.values[0, :10]
    assert (torch.minimum(distance, outside if shape[0] > shape[1] else distance) <= ritz.residuals[0]).all()


@given(seed=seeds, kind=st.sampled_from(["gauss", "outlier", "decay", "positive"]))
@settings(max_examples=40)
def test_products_round_less_than_the_bound(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(96, 700, generator=generator)
    if kind == "outlier":
        W += torch.outer(torch.randn(96, generator=generator), torch.randn(700, generator=generator))
    elif kind == "decay":
        W *= torch.logspace(0, -3, 700)
    elif kind == "positive":
        W = W.abs()
    q = torch.randn(96, 16, generator=generator, dtype=torch.float64)
    lead = W.double() @ (W.double().mT @ q)
    q = torch.cat([q, lead], dim=1)
    q = q / q.norm(dim=0)
    inner = W.mT @ q.float()
    error = ((W @ inner).double() - W.double() @ (W.double().mT @ q)).norm(dim=0)
    assert (error <= linalg.rounding(torch.linalg.matrix_norm(W), inner.norm(dim=0), W.dtype)).all()


def test_a_trace_is_estimated_within_its_standard_error(generator):
    S = values("power", 300)
    W, _, _ = with_values(S, 300, 400, generator)
    krylov = linalg.BlockKrylov(W[None], torch.randn(1, 300, 16, generator=generator, dtype=torch.float64))
    krylov.extend(6)
    ritz = krylov.ritz(1)
    mean, error = linalg.spectral_sum(ritz.values[0].sqrt(), ritz.weights[0], 300)
    assert error < 0.05 * S.sum()
    assert abs(mean - S.sum()) < 4 * error


def test_effective_rank_counts_equal_values_and_is_at_most_the_rank():
    assert linalg.effective_rank(torch.tensor([2.0] * 5 + [0.0] * 3)) == pytest.approx(5)
    assert linalg.effective_rank(torch.tensor([9.0, 1.0, 0.5])) < 3
    assert linalg.effective_rank(torch.zeros(4)) == 0


def test_the_values_of_a_product_need_no_product(generator):
    B, A = torch.randn(30, 4, generator=generator), torch.randn(4, 50, generator=generator)
    expected = torch.linalg.svdvals((B @ A).double())[:4]
    assert torch.linalg.svdvals(linalg.product_core(B, A)).tolist() == pytest.approx(
        expected.tolist(), rel=1e-5
    )


@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (512, 256)])
@pytest.mark.parametrize("kind", ["gauss", "power"])
def test_a_spike_enters_the_leading_values_near_the_critical_size(shape, kind, generator):
    """Within a factor of 2, as the law is stated."""
    p, k = min(shape), 10
    if kind == "gauss":
        W = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(p)
    else:
        W, _, _ = with_values(values("power", p), *shape, generator)
    S = torch.linalg.svdvals(W)
    critical = linalg.critical_spike(S, k, *shape)
    u, v = (orthonormal(n, 1, generator) for n in shape)
    for size, enters in ((critical / 2, False), (2 * critical, True)):
        U, S1, _ = torch.linalg.svd(W + size * u @ v.mT)
        # The spike has entered when one of the k leading vectors is more the spike than anything random.
        assert ((U[:, :k].mT @ u).abs().max().item() > 0.5) == enters, (size, S1[:k])
