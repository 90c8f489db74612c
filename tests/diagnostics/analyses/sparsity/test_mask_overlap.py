"""Masks of base and tuned are alike beyond chance, or they are not; and what a mask keeps."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.sparsity.mask_overlap import Mass, Overlap, Overlaps, kept_mass, squared_change

seeds = st.integers(0, 2**31)


def lowest(weights, share):
    """Prunes the share of smallest magnitude."""
    order = weights.abs().flatten().argsort()
    pruned = torch.zeros(weights.numel(), dtype=torch.bool)
    pruned[order[: round(share * weights.numel())]] = True
    return pruned.view(weights.shape)


def kept_by(weights, n_keep, m):
    """Prunes all but the n_keep largest of each m consecutive inputs."""
    groups = weights.abs().unflatten(1, (-1, m))
    order = groups.argsort(dim=-1, descending=True).argsort(dim=-1)
    return (order >= n_keep).flatten(1)


def counted(*pairs):
    """The overlaps of tensors, given as (base, tuned, the masks of each side, from sparse to dense)."""
    overlaps = Overlaps(len(pairs[0][2]))
    for base, tuned, low, lower in pairs:
        kept = ((~torch.stack(masks)).sum(0).flatten().numpy() for masks in (low, lower))
        overlaps.add(*kept, squared_change(base, tuned))
    return list(overlaps)


def overlap(base, tuned):
    """The overlap of two masks alone."""
    nothing = torch.zeros(base.shape)
    return counted((nothing, nothing, [base], [tuned]))[0]


def test_every_measure_by_hand():
    # Ten entries; base prunes 0 to 3, tuned 2 to 5: both prune 2 and 3, both keep 6 to 9.
    places = torch.arange(10)
    result = overlap(places < 4, (places >= 2) & (places < 6))
    assert (result.entries, result.base, result.tuned, result.both) == (10, 4, 4, 2)
    assert result.cosine == pytest.approx(4 / 6)  # 4 kept by both, 6 by each
    assert result.cosine_chance == pytest.approx(0.6)  # 1 - s
    assert result.kappa == pytest.approx((4 / 6 - 0.6) / 0.4)
    assert result.iou == pytest.approx(2 / 6)
    assert result.iou_chance == pytest.approx(0.4 / 1.6)  # s / (2 - s)
    assert result.revived == pytest.approx(2 / 4)


@given(seeds, st.floats(0.1, 0.9))
def test_a_mask_is_wholly_like_itself_and_likeness_is_symmetric(seed, share):
    generator = torch.Generator().manual_seed(seed)
    first, second = (lowest(torch.randn(12, 10, generator=generator), share) for _ in range(2))
    same = overlap(first, first)
    assert (same.kappa, same.iou, same.revived) == (pytest.approx(1), 1, 0)
    there, back = overlap(first, second), overlap(second, first)
    assert (there.cosine, there.kappa, there.iou) == (back.cosine, back.kappa, back.iou)


@given(seeds, st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_independent_masks_are_alike_by_chance_alone(seed, share):
    # kappa of independent masks has a standard deviation of 1 / √N.
    generator = torch.Generator().manual_seed(seed)
    first, second = (lowest(torch.rand(100, 100, generator=generator), share) for _ in range(2))
    result = overlap(first, second)
    assert abs(result.kappa) < 5 / math.sqrt(10_000)
    assert result.cosine == pytest.approx(1 - share, abs=0.05)
    assert result.iou == pytest.approx(share / (2 - share), abs=0.05)
    assert result.revived == pytest.approx(1 - share, abs=0.1)


def test_cosine_and_kappa_may_move_in_opposite_directions():
    # At 10 % and at 90 %, of 1 000 entries: cosines 0.965 and 0.93, kappas 0.65 and 0.922.
    few = Overlap(entries=1000, base=100, tuned=100, both=100 - 31)
    many = Overlap(entries=1000, base=900, tuned=900, both=900 - 7)
    assert few.cosine > many.cosine
    assert few.kappa < many.kappa


@given(seeds)
def test_overlaps_at_several_sparsities_are_those_of_each_ones_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    shares, tensors = (0.1, 0.4, 0.4, 0.9), []
    for rows in (6, 3):
        sides = [torch.randn(rows, 5, generator=generator) for _ in range(2)]
        tensors.append((*sides, *([lowest(side, share) for share in shares] for side in sides)))
    for index, result in enumerate(counted(*tensors)):
        base, tuned = (torch.cat([entry[side][index].flatten() for entry in tensors]) for side in (2, 3))
        squares = torch.cat([(tuned - base).flatten() for base, tuned, *_ in tensors]).square()
        assert (result.entries, result.base, result.tuned) == (45, base.sum(), tuned.sum())
        assert result.both == (base & tuned).sum()
        assert result.moved == pytest.approx(float(squares.sum()))
        assert result.moved_low == pytest.approx(float(squares[base].sum()))


def test_where_nothing_is_pruned_or_changed_there_is_nothing_to_say():
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    result = overlap(nothing, nothing)
    assert result.cosine == 1
    assert all(math.isnan(v) for v in (result.kappa, result.iou, result.iou_chance, result.revived))
    assert math.isnan(result.delta_low)
    assert math.isnan(overlap(~nothing, ~nothing).cosine)


# --- where the change lies ---


def change_in(base, tuned, pruned):
    return counted((base, tuned, [pruned], [pruned]))[0]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_change_independent_of_magnitude_lies_in_the_lowest_share_by_that_share(share):
    generator = torch.Generator().manual_seed(3)
    base, delta = (torch.randn(300, 300, generator=generator) for _ in range(2))
    # The share of a sum of 90 000 squares has a standard deviation below 0.003.
    assert change_in(base, base + 0.01 * delta, lowest(base, share)).delta_low == pytest.approx(
        share, abs=0.01
    )


def test_a_change_of_small_weights_alone_lies_wholly_in_them():
    base = torch.arange(1.0, 11).view(2, 5)
    low = lowest(base, 0.3)
    assert change_in(base, base + low, low).delta_low == 1
    assert change_in(base, base + ~low, low).delta_low == 0
    # One of three equal changes is among the lowest.
    assert change_in(base, base + torch.eye(5)[:2] + (base == 10), low).delta_low == pytest.approx(1 / 3)


def test_the_change_of_half_precision_is_taken_in_single():
    base = torch.tensor([[256.0]]).bfloat16()
    assert squared_change(base, base + 2).dtype == torch.float32
    assert squared_change(base, base + 2).item() == 4


# --- what is kept ---


@given(seeds)
def test_the_freer_the_pattern_the_more_magnitude_it_keeps(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(8, 16, generator=generator) for scale in (0.5, 1.0, 2.0)]
    everything = torch.cat(tensors)
    by_pattern = [
        kept_mass(everything, lowest(everything, 0.5)),
        sum((kept_mass(tensor, lowest(tensor, 0.5)) for tensor in tensors), Mass()),
        *(
            sum((kept_mass(tensor, kept_by(tensor, m // 2, m)) for tensor in tensors), Mass())
            for m in (8, 4, 2)
        ),
    ]
    for freer, stricter in itertools.pairwise(by_pattern):
        assert freer.kept_l1 >= stricter.kept_l1 - 1e-9
        assert freer.kept_l2 >= stricter.kept_l2 - 1e-9


def test_shares_of_magnitude_by_hand():
    weights = torch.tensor([[3.0, -1.0], [0.0, -4.0]])
    mass = kept_mass(weights, torch.tensor([[False, True], [True, False]]))
    assert mass.kept_l1 == pytest.approx(7 / 8)
    assert mass.kept_l2 == pytest.approx(25 / 26)
    assert math.isnan(kept_mass(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)).kept_l1)
