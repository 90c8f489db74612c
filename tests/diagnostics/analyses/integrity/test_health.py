"""Health of tensors, against torch's own predicates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.integrity.health import Health, health, overflowing

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ODD = [0.0, -0.0, 1.0, -2.5, float("nan"), float("inf"), -float("inf"), 1e-45, 1e-40, 6e-8, 3e-5, 7e4, 1e38]


@pytest.mark.parametrize("dtype", FLOATS)
@given(values=st.lists(st.sampled_from(ODD), min_size=1, max_size=40))
def test_counts_are_those_of_torchs_own_predicates(dtype, values):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    finite = tensor[tensor.isfinite()].double().abs()
    tiny = torch.finfo(dtype).tiny
    assert health(tensor) == Health(
        entries=len(values),
        nan=int(tensor.isnan().sum()),
        infinite=int(tensor.isinf().sum()),
        subnormal=int(((finite > 0) & (finite < tiny)).sum()),
        zero=int((finite == 0).sum()),
        largest=float(finite.max()) if finite.numel() else 0.0,
    )


def test_an_empty_chunk_has_no_entries():
    assert health(torch.empty(0)) == Health()


def test_the_health_of_parts_adds_up():
    tensor = torch.tensor([1.0, 0.0, float("nan"), 3.0])
    assert health(tensor[:2]) + health(tensor[2:]) == health(tensor)


def test_only_finite_entries_overflow():
    tensor = torch.tensor([65504.0, 65519.0, 65520.0, float("inf")])  # the last that rounds down is 65519
    assert overflowing(tensor, 65520.0, torch.float16) == 1
    assert overflowing(tensor, 65520.0, torch.bfloat16) == 0
