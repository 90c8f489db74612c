"""Rounding is not tuning: copies in another dtype did not change, steps below its resolution did."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.checkpoints.rounding import changed, settled

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
dtypes = st.sampled_from(DTYPES)


def gaussian(seed: int, size: int = 4000) -> torch.Tensor:
    return 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 2**32), dtypes, dtypes)
def test_two_copies_of_the_same_weights_differ_by_rounding_alone(seed, first, second):
    weights = gaussian(seed)
    assert not changed(weights.to(first), weights.to(second)).any()


@given(st.integers(0, 2**32), dtypes, dtypes)
def test_entries_that_move_far_are_those_that_changed(seed, first, second):
    weights = gaussian(seed)
    where = torch.rand(len(weights), generator=torch.Generator().manual_seed(seed)) < 0.05
    tuned = weights + where * 0.5  # 25 standard deviations of the weights
    assert torch.equal(changed(weights.to(first), tuned.to(second)), where)


@given(st.integers(0, 2**32), dtypes)
def test_in_one_dtype_every_difference_counts(seed, dtype):
    weights = gaussian(seed).to(dtype)
    tuned = torch.nextafter(weights.float(), torch.tensor(torch.inf)).to(dtype)
    assert torch.equal(changed(weights, tuned), weights != tuned)


@pytest.mark.parametrize("step", [1e-7, 1e-6, 1e-5])
def test_steps_that_the_base_cannot_hold_are_changes(step):
    # The spacing of bfloat16 near 0.02 is 1.2e-4: none of these steps would survive a cast back to it.
    base = gaussian(0).bfloat16()
    tuned = base.float() + step * torch.randn(len(base), generator=torch.Generator().manual_seed(1))
    assert changed(base, tuned).float().mean() > 0.98


def test_an_adapter_merged_in_float32_was_not_rounded():
    base = gaussian(0).bfloat16()
    merged = gaussian(0).float()  # whatever the delta is, it is not that of a cast
    assert changed(base, merged, dtypes=(torch.bfloat16, torch.bfloat16)).float().mean() > 0.98
    assert settled(base, merged, dtypes=(torch.bfloat16, torch.bfloat16)) is merged


def test_settled_weights_are_base_where_only_the_dtype_rounded():
    base = gaussian(0).float()
    tuned = base.clone()
    tuned[:10] += 1
    assert torch.equal(settled(base, tuned.bfloat16())[10:], base[10:])
    assert torch.equal(settled(base, tuned.bfloat16())[:10], tuned.bfloat16().float()[:10])


def test_equal_norms_of_few_entries_did_not_change():
    assert not changed(torch.ones(4).bfloat16(), torch.ones(4)).any()
    assert not changed(torch.zeros(0).bfloat16(), torch.zeros(0)).any()
