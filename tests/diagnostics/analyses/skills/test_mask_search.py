"""Both searches on models small enough to be worked out: what is planted is found, and sizes are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from diagnostics.analyses.skills.mask_search import (
    BIAS,
    budget_search,
    faithful_search,
    integrated_gradients,
    mask_logits,
    score_gradient,
    soft_mask,
    top_mask,
)

WEIGHTS, PLANTED = 2000, 20


class Planted:
    """A logistic regression whose base is zero, with 20 weights that tuning moved to where they belong.

    `harm`: tuning also moved 1,000 others half as far again, at random.
    """

    def __init__(self, seed, *, harm=False, rows=1500):
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(WEIGHTS, generator=generator)
        self.true = places[:PLANTED]
        self.X = torch.randn(rows, WEIGHTS, generator=generator)
        weights = torch.zeros(WEIGHTS)
        weights[self.true] = torch.randn(PLANTED, generator=generator).sign()
        self.y = (torch.rand(rows, generator=generator) < torch.sigmoid(self.X @ weights)).float()
        self.D = 1e-6 * torch.randn(WEIGHTS, generator=generator)
        self.D[self.true] = weights[self.true]
        if harm:
            self.D[places[PLANTED : PLANTED + 1000]] = 1.5 * torch.randn(1000, generator=generator).sign()

    def loss(self, mask):
        return binary_cross_entropy_with_logits(
            self.X.to(mask.dtype) @ (mask * self.D), self.y.to(mask.dtype)
        )

    def moved(self, places):
        return self.D.abs()[places]

    def oracle(self, mask):
        weights = mask.to(self.D.dtype).requires_grad_()
        return torch.autograd.grad(self.loss(weights), weights)[0]

    def recovered(self, scores, size=PLANTED):
        """How many planted weights are among the largest scores."""
        return int(top_mask(scores, size, self.moved)[self.true].sum())


NOTHING = torch.zeros(WEIGHTS, dtype=torch.bool)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_a_planted_skill_is_found(seed):
    toy = Planted(seed)
    assert toy.recovered(toy.D.abs()) == 20  # nothing else moved
    start = integrated_gradients(toy.oracle, WEIGHTS)
    assert toy.recovered(budget_search(toy.oracle, start, [PLANTED] * 100, toy.moved)) >= 16
    assert toy.recovered(faithful_search(toy.oracle, PLANTED, NOTHING).scores) >= 16


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_a_planted_skill_is_found_under_harm_that_moved_further(seed):
    toy = Planted(seed, harm=True)
    assert toy.recovered(toy.D.abs()) == 0  # the 20 largest are all among the 1,000
    start = integrated_gradients(toy.oracle, WEIGHTS)
    learned = budget_search(toy.oracle, start, [PLANTED] * 100, toy.moved)
    assert toy.recovered(learned) >= 17
    grown = faithful_search(toy.oracle, PLANTED, NOTHING)
    assert grown.reached
    assert toy.recovered(grown.scores) >= 14
    # A start at the movement is led astray further than one at the gradients.
    assert toy.recovered(budget_search(toy.oracle, toy.D.abs(), [PLANTED] * 100, toy.moved)) < toy.recovered(
        learned
    )
    # Grafting what was learned takes loss off both the base and the whole update.
    losses = [toy.loss(m.float()) for m in (top_mask(learned, PLANTED), NOTHING, ~NOTHING)]
    assert losses[0] < 0.7 * min(losses[1:])


def test_every_mask_on_the_way_has_exactly_the_size_asked_for():
    toy, sizes = Planted(0, harm=True, rows=100), []

    def watched(mask):
        assert mask.dtype == torch.bool
        sizes.append(int(mask.sum()))
        return toy.oracle(mask)

    for size in (0, 1, 7, WEIGHTS):
        budget_search(watched, toy.D.abs(), [size] * 5, toy.moved)
    assert sizes == [0] * 5 + [1] * 5 + [7] * 5 + [WEIGHTS] * 5
    sizes.clear()
    budget_search(watched, toy.D.abs(), [3, 50, 9], toy.moved)
    assert sizes == [3, 50, 9]


def test_one_search_over_changing_sizes_serves_them_all():
    toy = Planted(0, harm=True)
    start = integrated_gradients(toy.oracle, WEIGHTS)
    scores = budget_search(toy.oracle, start, [5, 40, 10, 20] * 25, toy.moved)
    assert toy.recovered(scores, 5) == 5
    assert toy.recovered(scores, 10) >= 9
    assert toy.recovered(scores, 20) >= 16


def test_a_search_repeats_itself():
    toy = Planted(1, rows=100)
    twice = [budget_search(toy.oracle, toy.D.abs(), [9] * 9, toy.moved) for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(*(faithful_search(toy.oracle, 9, NOTHING, steps=9).scores for _ in range(2)))


def test_only_proportions_of_the_start_count():
    toy = Planted(1, rows=100)
    masks = [budget_search(toy.oracle, scale * toy.D.abs(), [9] * 9, toy.moved) for scale in (1, 4096)]
    assert torch.equal(*masks)


@given(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=20), st.data())
@settings(deadline=None)
def test_masks_have_their_size_nest_and_break_ties_by_movement_then_place(values, data):
    scores, count = torch.tensor(values), len(values)
    moved = torch.tensor(data.draw(st.lists(st.sampled_from([1.0, 2.0]), min_size=count, max_size=count)))
    order = sorted(range(count), key=lambda i: (-values[i], -float(moved[i]), i))
    size = data.draw(st.integers(0, count))
    mask = top_mask(scores, size, lambda places: moved[places])
    assert mask.nonzero()[:, 0].tolist() == sorted(order[:size])
    by_place = sorted(range(count), key=lambda i: (-values[i], i))
    assert top_mask(scores, size).nonzero()[:, 0].tolist() == sorted(by_place[:size])


def test_integrated_gradients_of_a_quadratic_are_exact():
    # L(m) = (m·d - 1)² along m = a: dL/dm_i = 2 (a Σd - 1) d_i, whose mean over a is (Σd - 2) d_i.
    d = torch.tensor([1.0, 2.0, -0.5])
    attribution = integrated_gradients(lambda m: 2 * (m @ d - 1) * d, 3)
    torch.testing.assert_close(attribution, -(d.sum() - 2) * d)
    # What all of them take off the loss together: L(0) - L(1) = 1 - (2.5 - 1)² = -1.25.
    assert float(attribution.sum()) == pytest.approx(-1.25)


MIXED = torch.arange(6) % 2 == 0


def test_the_relaxed_mask_is_the_base_mask_at_one_end_and_its_complement_at_the_other():
    for end, meant in ((-torch.inf, MIXED), (torch.inf, ~MIXED)):
        assert torch.equal(soft_mask(torch.full((6,), end), MIXED), meant.float())
    # At a score of 0: σ(-10) = 4.54e-5 of every entry is flipped.
    assert soft_mask(torch.zeros(6), MIXED)[1].item() == pytest.approx(4.54e-5, rel=1e-3)
    assert soft_mask(torch.zeros(6), MIXED)[0].item() == pytest.approx(1 - 4.54e-5, rel=1e-3)


@given(st.lists(st.floats(0, 20, width=32).filter(lambda s: abs(s - BIAS) > 1e-3), min_size=6, max_size=6))
def test_rounding_the_relaxed_mask_is_a_threshold_at_one_half(values):
    scores = torch.tensor(values)
    flipped = scores > BIAS
    assert torch.equal(soft_mask(scores, MIXED) > 0.5, MIXED ^ flipped)
    assert torch.equal(mask_logits(scores, MIXED) > 0, MIXED ^ flipped)


def test_the_gradient_of_the_scores_is_that_of_finite_differences():
    toy = Planted(2, harm=True, rows=200)
    toy.D = toy.D.double()
    generator = torch.Generator().manual_seed(0)
    scores = BIAS + torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)
    grown_from = torch.rand(WEIGHTS, generator=generator) < 0.3
    gradient = score_gradient(toy.oracle(soft_mask(scores, grown_from)), scores, grown_from)
    step = 1e-5
    for entry in toy.true.tolist():  # 20 entries
        ends = []
        for sign in (1, -1):
            moved = scores.clone()
            moved[entry] += sign * step
            ends.append(toy.loss(soft_mask(moved, grown_from)))
        assert float(gradient[entry]) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_the_steepest_scores_move_by_a_tenth_of_a_logit_at_the_first_step():
    slopes = torch.tensor([-5.0, -4.0, -3.0, 2.0, 0.0])
    grown = faithful_search(lambda mask: slopes, 2, torch.zeros(5, dtype=torch.bool), steps=1)
    # The second steepest moves by 0.1; the others in proportion, away from harm; none by its bias.
    torch.testing.assert_close(grown.scores + BIAS, torch.tensor([0.125, 0.1, 0.075, -0.05, 0.0]))
    assert not grown.reached


def test_growth_ends_as_soon_as_the_rounded_mask_has_its_size():
    slopes = torch.tensor([-1.0] * 4 + [-0.5] * 4)
    grown = faithful_search(lambda mask: slopes, 4, torch.zeros(8, dtype=torch.bool), steps=100)
    assert grown.reached
    assert int((grown.scores > 0).sum()) == 4
    # Ṡ = 0.1 e^S from 0 reaches 10 at t = 10 (1 - e^-10); Euler's steps lag behind by a few.
    assert 10 <= grown.steps <= 16


def test_a_mask_can_also_shrink_from_its_base_mask():
    # Six entries in the base mask; of these the last three do harm.
    slopes = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    grown = faithful_search(lambda mask: slopes, 3, torch.ones(6, dtype=torch.bool))
    assert grown.reached
    assert top_mask(grown.scores, 3).tolist() == [True] * 3 + [False] * 3


def test_without_any_gradient_a_search_ends_with_the_order_of_movement():
    def moved(places):
        return torch.tensor([1.0, 3.0, 2.0])[places]

    still = budget_search(lambda mask: torch.zeros(3), torch.zeros(3), [1] * 3, moved)
    assert top_mask(still, 1, moved).tolist() == [False, True, False]
    grown = faithful_search(lambda mask: torch.zeros(3), 1, torch.zeros(3, dtype=torch.bool))
    assert (grown.steps, grown.reached) == (1, False)
    assert top_mask(grown.scores, 2, moved).tolist() == [False, True, True]
