"""A softmax that has become 1 exactly, and how large logits are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.dynamics.softmax_collapse import collapsed, margin, scale, summarise

logits = st.lists(st.floats(-20, 20).map(lambda value: round(value, 3)), min_size=2, max_size=8)


def test_thirty_nats_collapse_in_float32_and_not_in_float64():
    # e⁻³⁰ = 9e-14 is below 2⁻²⁴ = 6e-8, half of what float32 tells from 1, and far above float64's 1e-16.
    tower = torch.tensor([[30.0, 0, 0, 0], [15, 0, 0, 0]])
    assert collapsed(tower, torch.float32).tolist() == [True, False]
    assert collapsed(tower, torch.float64).tolist() == [False, False]
    # bfloat16 has 8 bits: e⁻¹⁵ = 3e-7 vanishes too.
    assert collapsed(tower, torch.bfloat16).tolist() == [True, True]


@given(st.integers(2, 50), st.floats(-1e4, 1e4))
def test_equal_logits_never_collapse(classes, value):
    assert not collapsed(torch.full((1, classes), value), torch.float32).any()


@given(logits, st.floats(1, 50))
def test_larger_logits_collapse_wherever_smaller_ones_did(values, factor):
    small = torch.tensor([values], dtype=torch.float64)
    if collapsed(small, torch.float32).all():
        assert collapsed(factor * small, torch.float32).all()


@given(logits, st.floats(0.1, 10), st.floats(-5, 5))
def test_the_scale_knows_no_shift_and_grows_with_a_factor(values, factor, shift):
    row = torch.tensor([values], dtype=torch.float64)
    assert scale(factor * row + shift).item() == pytest.approx(factor * scale(row).item(), abs=1e-9)


def test_scale_and_margin_are_those_worked_out_by_hand():
    both = torch.tensor([[1.0, -1.0, 0.0, 0.0], [5.0, 2.0, 2.0, 2.0]])
    # √((1 + 1) / 4); mean 2.75, √((2.25² + 3 · 0.75²) / 4).
    assert scale(both).tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(6.75 / 4)])
    assert margin(both, torch.tensor([2, 0])).tolist() == [-1.0, 3.0]


def test_a_collapse_onto_another_class_than_the_label_is_told_apart():
    parts = [
        (torch.tensor([[30.0, 0, 0], [30, 0, 0]]), torch.tensor([0, 1])),
        (torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.tensor([0, 0])),
    ]
    summary = summarise(parts, torch.float32)
    assert (summary.labels, summary.collapsed, summary.collapsed_right) == (4, 0.5, 0.25)
    assert summary.margin == pytest.approx((30 - 30 + 1 - 1) / 4)
    assert summarise(parts, torch.float64).collapsed == 0


def test_no_label_at_all_is_said():
    with pytest.raises(ValueError, match="no row has a label"):
        summarise([], torch.float32)
