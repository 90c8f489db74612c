"""Movement is exact: the order is total, sizes are those asked for, ties follow the rule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.movement import Movement, delta, kth_largest


def moved(tensors, *, base=0.0, dtype=torch.float32):
    """The movement of tensors of these deltas, from a base that is the same everywhere."""
    sides = {
        name: (torch.full_like(D, base, dtype=dtype), (D.to(dtype) + base)) for name, D in tensors.items()
    }
    return Movement({name: tuple(D.shape) for name, D in tensors.items()}, sides.__getitem__)


def expected(tensors):
    """All entries in the order of the rule, by sorting them all at once."""
    entries = [
        (-abs(float(value)), name, index)
        for name, D in tensors.items()
        if D.count_nonzero()
        for index, value in enumerate(D.flatten())
    ]
    return [(name, index) for _, name, index in sorted(entries)]


def listed(indices):
    return [(name, int(entry)) for name, index in indices.items() for entry in index]


# Few values, so that most entries are tied, and zeros among them.
VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.0, 1.0, 3.0])
TENSORS = st.dictionaries(
    st.sampled_from(["b.10", "b.9", "a", "c.bias", "ln"]),
    st.lists(VALUES, min_size=1, max_size=12),
    min_size=1,
).map(lambda lists: {name: torch.tensor(values) for name, values in lists.items()})


@given(TENSORS, st.data())
@settings(deadline=None)
def test_the_first_s_are_those_of_a_total_order_whatever_s_is(tensors, data):
    movement, ordered = moved(tensors), expected(tensors)
    assert movement.total == len(ordered)
    count = data.draw(st.integers(0, movement.total))
    largest = movement.largest(count)
    assert region.size(largest) == count
    assert listed(largest) == sorted(ordered[:count])


@given(TENSORS, st.data())
@settings(deadline=None)
def test_smaller_regions_lie_in_larger_ones_and_nothing_outside_moved_further(tensors, data):
    movement = moved(tensors)
    small, large = sorted(data.draw(st.tuples(*[st.integers(0, movement.total)] * 2)))
    inner, outer = movement.largest(small), movement.largest(large)
    assert (region.size(inner), region.size(outer)) == (small, large)
    assert region.size(region.intersection(inner, outer)) == small
    rest = {
        name: set(index.tolist()) - set(outer[name].tolist() if name in outer else ())
        for name, index in movement.largest(movement.total).items()
    }
    inside, outside = (
        [abs(float(tensors[name].flatten()[i])) for name, index in part.items() for i in index]
        for part in (outer, rest)
    )
    assert min(inside, default=9) >= max(outside, default=0)


@given(TENSORS, st.sampled_from([0.25, 2.0, 1024.0]), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_neither_the_scale_of_the_update_nor_the_order_of_the_file_changes_a_mask(tensors, scale, random):
    names = list(tensors)
    random.shuffle(names)
    other = moved({name: tensors[name] * scale for name in names})
    assert other.total == moved(tensors).total
    for count in (0, other.total // 2, other.total):
        assert listed(other.largest(count)) == listed(moved(tensors).largest(count))


def test_ten_thousand_entries_of_equal_movement_are_cut_to_exactly_the_size_asked_for():
    movement = moved({"b": torch.ones(100, 50), "a": -torch.ones(5000)})
    for count in (0, 1, 4999, 5000, 5001, 10_000):
        # By name, then by place: all of a before any of b.
        largest = {name: index.tolist() for name, index in movement.largest(count).items()}
        assert largest == {
            name: list(range(size))
            for name, size in (("a", min(count, 5000)), ("b", max(0, count - 5000)))
            if size
        }


def test_entries_that_did_not_move_are_taken_only_when_nothing_else_is_left():
    movement = moved({"a": torch.tensor([0.0, 0.0, 5.0]), "b": torch.tensor([1.0, 0.0])})
    assert (movement.total, movement.total_moved) == (5, 2)
    assert movement.moved == {"a": 1, "b": 1}
    assert listed(movement.largest(2)) == [("a", 2), ("b", 0)]
    assert listed(movement.largest(3)) == [("a", 0), ("a", 2), ("b", 0)]
    assert listed(movement.largest(4)) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]


def test_tensors_that_are_equal_in_both_are_out_of_the_count():
    movement = moved({"a": torch.zeros(7), "b": torch.tensor([1.0, 0.0])})
    assert movement.frozen == ["a"]
    assert movement.entries == {"b": 2}
    assert movement.squares == 1


def test_more_entries_than_there_are_cannot_be_asked_for():
    with pytest.raises(ValueError, match="3 entries are asked for; there are 2"):
        moved({"b": torch.tensor([1.0, 0.0])}).largest(3)


def test_half_precision_is_subtracted_in_single():
    # 1 and 1 + 2^-8 in bfloat16 are 1 and 1.0078125 apart by its own rounding; their difference is exact.
    base, tuned = torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([1.0078125, -1.0]).bfloat16()
    assert delta(base, tuned).tolist() == [0.0078125, -257.0]  # -257 has no bfloat16: it would round to -256
    assert delta(base.double(), tuned.double()).dtype == torch.float64


def test_tensors_in_single_and_double_precision_are_ranked_exactly():
    # In single precision both would have moved by 1.
    near = 1 + 2.0**-40
    sides = {
        "a": (torch.zeros(1), torch.ones(1)),
        "b": (torch.zeros(1).double(), torch.tensor([near], dtype=torch.float64)),
    }
    movement = Movement(dict.fromkeys(sides, (1,)), sides.__getitem__)
    assert list(movement.largest(1)) == ["b"]


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="b: holds NaN or infinite weights"):
        moved({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})


@given(st.lists(VALUES, min_size=1, max_size=30), st.data())
def test_the_kth_largest_value_is_found_without_sorting(values, data):
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(torch.tensor(values), k) == sorted(values)[-k]


def test_movement_of_a_region_is_summed_squared():
    movement = moved({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.0, -2.0])})
    assert movement.squares == 9 + 1 + 4
    assert movement.square(movement.largest(2)) == 9 + 4
    assert movement.square({}) == 0


def test_a_random_region_has_the_sizes_of_its_pattern_and_only_entries_that_moved():
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(400, generator=generator) for name in ("a", "b", "c")}
    for D in tensors.values():
        D[::2] = 0
    movement = moved(tensors)
    pattern = movement.largest(90)
    drawn = movement.random(pattern, seed=1)
    assert {name: len(index) for name, index in drawn.items()} == {
        name: len(index) for name, index in pattern.items()
    }
    assert all((tensors[name][index] != 0).all() for name, index in drawn.items())
    assert all((index.diff() > 0).all() for index in drawn.values())
    again, other = movement.random(pattern, seed=1), movement.random(pattern, seed=2)
    assert region.jaccard(drawn, again) == 1
    assert region.jaccard(drawn, other) < 0.3
    # 30 of 200 moved entries in each: a random region overlaps by 30 / 200 = 0.15 of itself on average.
    shares = [region.overlap(movement.random(pattern, seed=s), pattern) for s in range(60)]
    assert np.mean(shares) == pytest.approx(0.15, abs=0.02)
    # The same in a file of another order.
    reordered = moved({name: tensors[name] for name in ("c", "a", "b")})
    assert region.jaccard(drawn, reordered.random(pattern, seed=1)) == 1


def test_a_random_region_larger_than_what_moved_is_filled_up():
    movement = moved({"a": torch.tensor([0.0, 1.0, 0.0, 2.0])})
    drawn = movement.random({"a": torch.tensor([0, 1, 3])}, seed=0)["a"].tolist()
    assert len(drawn) == 3
    assert {1, 3} <= set(drawn)


def test_others_are_drawn_from_what_moved_and_was_not_chosen():
    movement = moved({"a": torch.cat([torch.ones(1000), torch.zeros(1000)])})
    drawn = movement.sample_others({"a": torch.arange(500)}, 0.2, seed=0)["a"]
    # 500 are free and moved; a fifth of them is 100, give or take three standard deviations of 9.
    assert 70 < len(drawn) < 130
    assert drawn.min() >= 500
    assert drawn.max() < 1000
