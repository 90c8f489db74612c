"""Patterns of an adapter's configuration: PEFT's meaning, for any number of them, in bounded time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.adapters.config_patterns import Patterns

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in range(80)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip


@given(
    st.text("ab1._", min_size=1, max_size=6) | st.sampled_from(["a+", "(a|b)", r"a\.b", ".*", "[ab]1"]),
    st.text("ab1._", min_size=1, max_size=8),
)
def test_a_pattern_fits_as_pefts_expression_does(pattern, key):
    meant = re.match(rf"(.*\.)?({pattern})$", key) is not None
    assert Patterns("here").fits(pattern, key) == meant


@pytest.mark.parametrize("written", [str, re.escape], ids=["plain", "escaped"])
def test_an_adapter_may_name_the_rank_of_every_module(written):
    ranks = {written(name): rank for rank, name in enumerate(MODULES)}
    patterns = Patterns("here")
    for rank, name in enumerate(MODULES):
        assert patterns.value(ranks, f"base_model.model.{name}", None) == rank


@pytest.mark.parametrize(
    ("pattern", "count"), [("(?:(?:[a-z]{1,30}){1,30}){1,30}[A-Z]", 1), ("(?:[a-z]{1,9}){1,9}[A-Z]", 10**6)]
)
def test_expressions_that_take_for_ever_are_given_up_alone_and_together(pattern, count):
    patterns, began = Patterns("here"), time.process_time()
    with pytest.raises(ValueError, match=r"here: the regular expression .* takes too long"):
        any(patterns.fits(pattern, "a" * 30) for _ in range(count))
    assert time.process_time() - began < 10  # minutes, if nothing gave it up
