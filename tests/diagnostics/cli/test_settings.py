from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.cli.settings import convert_text, parse_settings


@pytest.fixture
def registered(register):
    def measure(
        pair, *, k: int = 10, epsilon: float = 0.5, side: Literal["left", "right"] = "left",
        sweep: bool = False, parts: tuple[str, ...] = ("block",), ranks: Sequence[int] = (1,),
        top: int | None = None, guess: "NotImported" = 1, untyped=0.5, device="cpu", progress=None,  # noqa: F821
    ):  # fmt: skip
        raise AssertionError("not run")

    register("made", measure)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=20", 20),
        ("epsilon=0.25", 0.25),
        ("epsilon=1", 1.0),
        ("side=right", "right"),
        ("sweep=yes", True),
        ("sweep=False", False),
        ("parts=block,head", ("block", "head")),
        ("parts=", ()),
        ("ranks=1, 2", (1, 2)),
        ("top=none", None),
        ("top=3", 3),
        ("guess=7", 7),
        ("untyped=2", 2.0),
    ],
)
def test_a_value_becomes_what_the_annotation_asks_for(registered, text, value):
    name = text.partition("=")[0]
    settings = parse_settings([f"made.{text}"])
    assert settings == {"made": {name: value}}
    assert type(settings["made"][name]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("made.k=ten", "--set made.k=ten: not a whole number"),
        ("made.k=1.5", "not a whole number"),
        ("made.epsilon=x", "not a number"),
        ("made.side=up", "not one of left, right"),
        ("made.sweep=maybe", "not true or false"),
        ("made.top=x", "not a whole number or none"),
        ("made.ranks=1,x", "'x' is not a whole number; write several with commas between, a,b,c"),
        ("made.ranks=[1,2]", r"'\[1' is not a whole number; write several with commas between"),
        ("k=1", "write ANALYSIS.PARAM=VALUE, as in --set intruders.k=20"),
        ("made.k", "write ANALYSIS.PARAM=VALUE"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(registered, text, message):
    with pytest.raises(ValueError, match=message):
        parse_settings([text])


def test_unknown_names_are_refused_with_the_known_ones(registered):
    with pytest.raises(LookupError, match="made has no parameter 'kk'; it has: k, epsilon, side"):
        parse_settings(["made.kk=1"])
    with pytest.raises(LookupError, match="has no parameter 'device'"):  # --device is the way to say that
        parse_settings(["made.device=cuda"])
    with pytest.raises(LookupError, match="unknown analysis 'mad'; known: made"):
        parse_settings(["mad.k=1"])


def test_of_a_setting_given_twice_the_last_counts(registered):
    assert parse_settings(["made.k=1", "made.epsilon=.1", "made.k=2"]) == {"made": {"k": 2, "epsilon": 0.1}}


@given(st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none())
def test_a_value_written_out_is_read_back(value):
    kind = type(value)
    assert convert_text(str(value), kind if value is not None else int | None) == value
