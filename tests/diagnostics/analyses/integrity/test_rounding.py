"""Entries that changed: as `probes.checkpoints.rounding.changed` tells them, and by bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.integrity.rounding import changed_entries, grid, ulp
from probes.checkpoints.rounding import changed

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("tuned", DTYPES)
@given(
    seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.01, 0.5, 1.0]), size=st.sampled_from([1, 1e-5])
)
def test_entries_are_counted_as_the_pair_tells_them(base, tuned, seed, share, size):
    generator = torch.Generator().manual_seed(seed)
    weights = (size * torch.randn(600, generator=generator)).to(base)
    moved = torch.rand(600, generator=generator) < share
    steps = 10 ** (-4 * torch.rand(600, generator=generator))
    after = torch.where(moved, weights.double() * (1 + steps), weights.double()).to(tuned)
    expected = int(changed(weights, after).sum())
    detours = [weights.to(dtype).to(base) for dtype in (torch.float16, torch.bfloat16)]
    if base == tuned and any(torch.equal(after, detour) for detour in detours):
        expected = 0
    assert changed_entries(weights, after) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_half_way_may_round_either_way(dtype):
    # 1 + 2⁻⁹ + 2⁻⁸·k lies between two neighbours of bfloat16 at 1, whose spacing is 2⁻⁷.
    half_way = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    if dtype is not torch.bfloat16:
        return
    below, above = half_way - 2**-8, half_way + 2**-8
    for neighbour in (below, above):
        assert changed_entries(half_way, neighbour.to(dtype)) == 0
    assert changed_entries(half_way, (above + 2**-7).to(dtype)) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_equals_itself_and_zero_its_negative(dtype):
    base = torch.tensor([float("nan"), 0.0, -0.0, 1.0, float("inf"), float("nan")], dtype=dtype)
    tuned = torch.tensor([float("nan"), -0.0, 0.0, 1.0, float("inf"), 1.0], dtype=dtype)
    tuned[0] = -tuned[0]  # another NaN
    assert changed_entries(base, tuned) == 1


def test_integers_are_compared_as_they_are():
    assert changed_entries(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])) == 1


def test_the_unit_in_the_last_place_is_the_distance_to_the_next_number():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.tensor([1.0, 1.5, 3.0, 0.1, 1e-3], dtype=dtype)
        above = torch.nextafter(values, torch.full_like(values, float("inf")))
        assert torch.equal(ulp(values.double(), dtype), above.double() - values.double())


def test_the_grid_is_the_coarsest_dtype_that_holds_all():
    weights = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert grid(weights) is torch.float32
    assert grid(weights.bfloat16().float()) is torch.bfloat16
    assert grid(weights.half().double()) is torch.float16
    one_fine = weights.bfloat16().float()
    one_fine[-1, -1] = 0.1
    assert grid(one_fine) is torch.float32
