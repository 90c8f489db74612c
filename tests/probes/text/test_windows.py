import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.text.batches import Example, windows


def example(size, *, head=0, scored=None):
    ids = list(range(100, 100 + size))
    return Example(ids=ids, scored=scored or [False, *[True] * (size - 1)], row=3, choice=1, head=head)


@given(st.data(), st.integers(1, 60), st.integers(2, 20), st.integers(0, 2))
def test_each_token_is_scored_once_and_behind_as_many_as_any_window_has_before_it(data, size, longest, head):
    head = min(head, size, longest - 1)
    flags = [False, *data.draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))]
    flags[:head] = [False] * head
    whole = example(size, head=head, scored=flags)
    made = windows(whole, longest)
    assert all(len(window.ids) <= longest and window.scored[:1] == [False] for window in made)
    assert all((window.row, window.choice, window.ids[:head]) == (3, 1, whole.ids[:head]) for window in made)
    found = [
        (token, place)
        for window in made
        for place, (token, counts) in enumerate(zip(window.ids, window.scored, strict=True))
        if counts
    ]
    assert [token for token, _ in found] == [
        token for token, counts in zip(whole.ids, flags, strict=True) if counts
    ]
    for token, place in found:
        assert place == max(window.ids.index(token) for window in made if token in window.ids)


def test_windows_begin_half_of_their_length_apart_behind_the_special_tokens():
    made = windows(example(12, head=1), 6)
    # 11 tokens behind the BOS, 5 to a window, which begin 3 apart: 101–105, 104–108, 107–111.
    assert [window.ids for window in made] == [
        [100, *range(101, 106)], [100, *range(104, 109)], [100, *range(107, 112)],
    ]  # fmt: skip
    assert [window.scored for window in made] == [
        [False, *[True] * 5], [*[False] * 3, *[True] * 3], [*[False] * 3, *[True] * 3],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 6])
def test_a_sequence_that_is_short_enough_stays_as_it_is(size):
    whole = Example(ids=[1] * size, scored=[False] * size, row=0)
    assert windows(whole, 6) == [whole]


@pytest.mark.parametrize(("longest", "head"), [(1, 0), (1, 1), (3, 3)])
def test_windows_that_special_tokens_fill_are_refused(longest, head):
    with pytest.raises(ValueError, match=f"windows of {longest} tokens leave no room for a scored token"):
        windows(example(9, head=head), longest)
