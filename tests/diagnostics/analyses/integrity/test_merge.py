"""The factor of a merge: planted factors, dtypes, swallowed deltas, quantised bases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.integrity.merge import MergeFit, fit_merge, pooled_factor
from diagnostics.analyses.integrity.quantised import FP4, NF4, scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def base_and_delta(seed=0, *, size=64, relative=0.05, dtype=torch.float32):
    """A Gaussian matrix in a dtype, and a delta of rank 4 with entries of a relative size."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.05 * torch.randn(size, size, generator=generator)).to(dtype)
    delta = torch.randn(size, 4, generator=generator) @ torch.randn(4, size, generator=generator)
    return base, delta * (relative * 0.05 / delta.std())


def added(base, delta, factor, dtype):
    return (base.double() + factor * delta.double()).to(dtype)


def quantised(weights, codes):
    """Blocks of 64 entries as the nearest code times their largest magnitude."""
    blocks = weights.double().reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(sorted(codes), dtype=torch.float64)
    nearest = ((blocks / largest).unsqueeze(-1) - levels).abs().argmin(dim=-1)
    return (levels[nearest] * largest).reshape(weights.shape).bfloat16()


def rounded_to_int8(weights):
    step = weights.double().abs().amax(dim=1, keepdim=True) / 127
    return ((weights.double() / step).round() * step).half()


QUANTISED = {
    "nf4": lambda W: quantised(W, NF4),
    "fp4": lambda W: quantised(W, FP4),
    "int8": rounded_to_int8,
}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1, "merged"), (0, "unmerged"), (2, "doubled"), (-1, "subtracted"), (0.5, "scaled"), (1.02, "scaled")],
)
def test_a_planted_factor_lies_in_its_interval_and_is_named(factor, verdict, dtype, stored):
    base, delta = base_and_delta(dtype=stored)
    fit = fit_merge(base, added(base, delta, factor, dtype), delta)
    assert (fit.verdict, fit.scheme) == (verdict, "")
    assert fit.low <= factor <= fit.high
    assert fit.high - fit.low < 0.02


@given(factor=st.floats(-3, 3), seed=st.integers(0, 100), dtype=st.sampled_from(DTYPES))
def test_any_factor_lies_in_its_interval(factor, seed, dtype):
    base, delta = base_and_delta(seed, dtype=dtype)
    fit = fit_merge(base, added(base, delta, factor, dtype), delta)
    assert fit.low <= factor <= fit.high
    assert fit.outside < 0.01


def test_a_faultless_merge_whose_delta_bfloat16_swallows_in_part_is_merged():
    base, delta = base_and_delta(relative=0.001, dtype=torch.bfloat16)
    fit = fit_merge(base, added(base, delta, 1, torch.bfloat16), delta)
    assert fit.verdict == "merged"
    assert fit.kept < 0.8  # least squares alone would call it scaled by this
    assert fit.low <= 1 <= fit.high


def test_a_delta_that_the_merge_swallowed_is_lost():
    base, delta = base_and_delta(relative=1e-5, dtype=torch.bfloat16)
    fit = fit_merge(base, added(base, delta, 1, torch.bfloat16), delta)
    assert fit.verdict == "lost"
    assert fit.kept < 0.5


def test_a_base_of_more_digits_may_be_rounded_before_the_merge():
    base, delta = base_and_delta(size=256, relative=0.003)
    loaded = base.bfloat16() + delta.bfloat16()
    assert fit_merge(base, loaded, delta).verdict == "merged"


def test_a_merge_in_bfloat16_that_is_stored_in_float32_is_judged_by_bfloat16():
    base, delta = base_and_delta(dtype=torch.bfloat16)
    fit = fit_merge(base.float(), added(base, delta, 1, torch.bfloat16).float(), delta)
    assert fit.verdict == "merged"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_delta_of_another_adapter_is_none_of_this_one(dtype):
    base, delta = base_and_delta(0, dtype=dtype)
    _, other = base_and_delta(1)
    assert fit_merge(base, added(base, other, 1, dtype), delta).verdict == "other"


def test_two_adapters_are_more_than_one():
    base, delta = base_and_delta(0)
    _, other = base_and_delta(1)
    assert fit_merge(base, base + delta + 0.2 * other, delta).verdict == "more"


def test_an_adapter_of_zeros_has_no_delta():
    base, _ = base_and_delta()
    assert fit_merge(base, base, torch.zeros_like(base)).verdict == "no delta"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("factor", "verdict"), [(1, "merged"), (0, "unmerged")])
@pytest.mark.parametrize("name", list(QUANTISED))
def test_a_merge_into_a_quantised_base_is_recognised(name, factor, verdict, stored, dtype):
    base, delta = base_and_delta(size=128, relative=0.02, dtype=stored)
    fit = fit_merge(base, added(QUANTISED[name](base), delta, factor, dtype), delta)
    assert (fit.verdict, fit.scheme) == (verdict, name)


@given(seed=st.integers(0, 200), dtype=st.sampled_from(DTYPES))
def test_plain_weights_lie_on_no_levels(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(32, 128, generator=generator).to(dtype)
    assert scheme(weights, torch.zeros_like(weights)) == ""


def test_a_factor_that_hides_in_every_matrix_shows_in_all_of_them():
    fits = []
    for seed in range(24):
        base, delta = base_and_delta(seed, relative=0.003, dtype=torch.bfloat16)
        fits.append(fit_merge(base, added(base, delta, 1.02, torch.bfloat16), delta))
    assert any(fit.low <= 1 <= fit.high for fit in fits)
    factor, low, high = pooled_factor(fits)
    assert 1 < low <= factor <= high
    assert low <= 1.02 <= high


def test_without_a_measured_factor_there_is_none_to_pool():
    assert pooled_factor([MergeFit(verdict="no delta")]) is None
