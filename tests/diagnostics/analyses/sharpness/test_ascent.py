"""Worst and average rises of quadratic and linear losses are known in closed form, per block too."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from diagnostics.analyses.sharpness.ascent import PerturbedLoss, average, normalised, projected, worst

seeds = st.integers(0, 10_000)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Quadratic:
    """g·(c ⊙ u) + (c ⊙ u)ᵀ H (c ⊙ u) / 2 as a function of u."""

    def __init__(self, g, H, c=None):
        g, H = (torch.as_tensor(array, dtype=torch.float64) for array in (g, H))
        c = torch.ones(len(g), dtype=torch.float64) if c is None else torch.as_tensor(c, dtype=torch.float64)
        self.g, self.M, self.calls = c * g, c[:, None] * H * c, 0

    def slope(self, u):
        self.calls += 1
        Mu = self.M @ u
        return float(self.g @ u + u @ Mu / 2), self.g + Mu

    def loss(self, u):
        return self.slope(u)[0]

    @property
    def zero(self):
        return PerturbedLoss(torch.zeros(len(self.g), dtype=torch.float64), 0.0, self.g)

    def worst(self, rho, *, steps=300, seed=0, **settings):
        return worst(self.slope, self.zero, rho, steps=steps, generator=generator(seed), **settings)

    def exact(self, rho):
        """Of the trust-region problem, by the secular equation in the eigenbasis."""
        lam, Q = np.linalg.eigh(self.M.numpy())
        b = Q.T @ self.g.numpy()
        if not np.abs(b).max() > 1e-12:
            return max(0.0, rho**2 * lam[-1] / 2)
        low = max(lam[-1], 0.0) + 1e-12
        high = low + np.linalg.norm(b) / rho + 1
        for _ in range(200):
            middle = (low + high) / 2
            if np.linalg.norm(b / (middle - lam)) > rho:
                low = middle
            else:
                high = middle
        u = b / (high - lam)
        return float(b @ u + (lam * u * u).sum() / 2)


def drawn(n, seed, *, slope=1.0, positive=False):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, n))
    H = A @ A.T / n if positive else (A + A.T) / 2
    return slope * rng.standard_normal(n), H, rng.uniform(0.2, 2, n)


@pytest.mark.parametrize("rho", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_worst_rise_of_a_quadratic_is_the_closed_form(rho, slope, adaptive, seed):
    g, H, c = drawn(8, seed, slope=slope)
    loss = Quadratic(g, H, c if adaptive else None)
    ascent = loss.worst(rho)
    assert ascent.rise == pytest.approx(loss.exact(rho), rel=1e-4)
    if slope == 0:
        assert ascent.rise == pytest.approx(rho**2 * np.linalg.eigvalsh(loss.M)[-1] / 2, rel=1e-4)
        assert ascent.single == 0  # there is no slope to follow


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_closed_form_holds_of_each_block_and_the_whole_is_at_least_as_sharp(block):
    g, H, c = drawn(12, 5, slope=0.0)
    part = slice(4 * block, 4 * block + 4)
    of_block = Quadratic(g[part], H[part, part], c[part])
    # a principal minor: the Hessian of the block with all others fixed
    expected = np.linalg.eigvalsh(np.diag(c[part]) @ H[part, part] @ np.diag(c[part]))[-1] * 0.25 / 2
    assert of_block.worst(0.5).rise == pytest.approx(expected, rel=1e-4)
    assert Quadratic(g, H, c).worst(0.5).rise >= of_block.worst(0.5).rise


def test_the_default_budget_comes_near_on_a_quadratic_with_a_gap():
    # eigenvalues 4, 1, 1, … : 20 steps
    n = 30
    v = np.ones(n) / math.sqrt(n)
    loss = Quadratic(np.zeros(n), np.eye(n) + 3 * np.outer(v, v))
    ascent = loss.worst(1.0, steps=20)
    assert ascent.rise == pytest.approx(2.0, rel=1e-4)
    assert loss.calls <= 20


@given(seeds, st.floats(0.01, 5))
def test_a_linear_loss_rises_by_the_norm_of_its_slope(seed, rho):
    g, _, c = drawn(9, seed)
    loss = Quadratic(g, np.zeros((9, 9)), c)
    assert loss.worst(rho, steps=20).rise == pytest.approx(rho * np.linalg.norm(c * g), rel=1e-6)
    flat = loss.worst(rho, steps=20, norm="linf")
    assert flat.rise == pytest.approx(rho * np.abs(c * g).sum(), rel=1e-6)


@given(seeds, st.sampled_from(["l2", "linf"]), st.floats(0.01, 3), st.integers(2, 20))
def test_rises_are_never_negative_and_no_less_than_those_of_a_single_step(seed, norm, rho, steps):
    g, H, c = drawn(6, seed, slope=0.2)
    ascent = Quadratic(g, H, c).worst(rho, norm=norm, steps=steps, seed=seed)
    assert ascent.rise >= ascent.single >= 0
    size = ascent.best.u.abs().max() if norm == "linf" else ascent.best.u.norm()
    assert float(size) <= rho * (1 + 1e-6)


@given(seeds, st.sampled_from(["l2", "linf"]))
def test_a_warm_start_makes_rises_grow_with_the_radius(seed, norm):
    g, H, c = drawn(6, seed, slope=0.2)
    loss, before, warm = Quadratic(g, H, c), 0.0, []
    for rho in (0.05, 0.1, 0.2, 0.4, 0.8):
        ascent = loss.worst(rho, norm=norm, steps=3, seed=seed, warm=warm)
        assert ascent.rise >= before
        before, warm = ascent.rise, [ascent.best]


def test_every_point_of_the_ascent_is_within_the_radius_in_float32_too():
    g, H, _ = drawn(200, 3)
    loss = Quadratic(g, H)
    seen = []

    def slope(u):
        seen.append(float(u.double().norm()))
        value, gradient = loss.slope(u.double())
        return value, gradient.float()

    worst(slope, PerturbedLoss(torch.zeros(200), 0.0, loss.g.float()), 0.3, generator=generator(), starts=3)
    assert max(seen) <= 0.3 * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_sign_search_is_below_brute_force_and_with_twenty_starts_near_it(seed, adaptive):
    n, rho = 10, 0.5
    g, H, c = drawn(n, seed, slope=0.1)
    np.fill_diagonal(H, np.abs(np.diag(H)))  # convex along each axis: the worst is at a corner
    loss = Quadratic(g, H, c if adaptive else None)
    corners = torch.cartesian_prod(*[torch.tensor([-rho, rho], dtype=torch.float64)] * n)
    values = corners @ loss.g + ((corners @ loss.M) * corners).sum(1) / 2
    ascent = loss.worst(rho, norm="linf", steps=20, starts=20)
    assert 0.9 * float(values.max()) <= ascent.rise <= float(values.max()) * (1 + 1e-9)
    assert 0 <= ascent.spread <= 1


def test_the_worst_of_a_hessian_without_negative_entries_is_its_sum():
    H = np.abs(drawn(7, 1, positive=True)[1])
    # all u = rho: rho² sum(M) / 2
    assert Quadratic(np.zeros(7), H).worst(0.3, norm="linf", steps=20, starts=5).rise == pytest.approx(
        0.09 * H.sum() / 2, rel=1e-9
    )


@given(seeds, st.sampled_from([0.125, 0.25, 4.0, 8.0]))  # powers of 2: the rescaling is exact
@hypothesis_settings(max_examples=20)
def test_the_adaptive_form_is_blind_to_a_rescaling_that_the_function_does_not_see(seed, k):
    rng = np.random.default_rng(seed)
    x = torch.as_tensor(rng.standard_normal((12, 3)))
    y = torch.as_tensor(rng.standard_normal(12))
    w = torch.as_tensor(rng.standard_normal(3 * 4 + 4))
    scale = torch.cat([torch.full((12,), float(k)), torch.full((4,), 1 / float(k))]).double()

    def rise(weights, adaptive):
        c = weights.abs() if adaptive else torch.ones_like(weights)

        def slope(u):
            u = u.detach().requires_grad_()
            moved = weights + c * u
            hidden = torch.relu(x @ moved[:12].view(3, 4))  # a ReLU unit in times k, out over k
            loss = ((hidden @ moved[12:] - y) ** 2).mean()
            loss.backward()
            return loss.item(), u.grad

        zero = PerturbedLoss(torch.zeros_like(weights), *slope(torch.zeros_like(weights)))
        return worst(slope, zero, 0.3, steps=6, generator=generator()).rise

    assert rise(w * scale, True) == pytest.approx(rise(w, True), rel=1e-6)
    assert rise(w * scale, False) != pytest.approx(rise(w, False), rel=1e-3)


def test_a_weight_that_is_zero_is_never_moved_and_gives_no_nan():
    g, H, c = drawn(6, 2)
    c[[0, 3]] = 0
    loss = Quadratic(g, H, c)
    for norm in ("l2", "linf"):
        ascent = loss.worst(0.4, norm=norm, steps=20)
        assert math.isfinite(ascent.rise)
    assert loss.worst(0.4).rise == pytest.approx(loss.exact(0.4), rel=1e-4)
    nothing = Quadratic(np.zeros(3), np.zeros((3, 3))).worst(1.0, steps=5)
    assert (nothing.rise, nothing.single, nothing.spread) == (0, 0, 0)


def test_from_an_exactly_stationary_point_the_kick_finds_the_curvature():
    # started at zero alone an ascent never moves here
    loss = Quadratic(np.zeros(4), np.diag([-3.0, 0, 1, 2]))
    assert loss.worst(1.0, steps=20).rise == pytest.approx(1.0, rel=1e-3)  # 2 / 2


def test_a_place_where_the_loss_is_not_finite_is_not_climbed_from():
    def slope(u):
        value = float(u[0])
        return (math.nan if value > 0.5 else value), torch.tensor([1.0, 0.0], dtype=torch.float64)

    zero = PerturbedLoss(
        torch.zeros(2, dtype=torch.float64), 0.0, torch.tensor([1.0, 0.0], dtype=torch.float64)
    )
    ascent = worst(slope, zero, 1.0, steps=20, generator=generator())
    assert 0.25 <= ascent.rise <= 0.5


@pytest.mark.parametrize(("norm", "divisor"), [("l2", 2), ("linf", 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_average_rise_is_the_trace_within_four_standard_errors(norm, divisor, seed):
    g, H, c = drawn(8, seed)
    loss = Quadratic(g, H, c)
    estimate = average(loss.loss, 0.0, loss.zero.u, 0.3, norm=norm, pairs=400, generator=generator(seed))
    assert abs(estimate.value - 0.09 * float(loss.M.trace()) / divisor) < 4 * estimate.error
    # What is linear cancels in a pair.
    line = Quadratic(g, np.zeros((8, 8)), c)
    assert average(line.loss, 0.0, line.zero.u, 0.3, norm=norm, generator=generator()).value == pytest.approx(
        0, abs=1e-12
    )


def test_the_same_draws_are_met_wherever_the_loss_is_taken():
    g, H, c = drawn(5, 0)
    plain, doubled = (Quadratic(g, scale * H, c) for scale in (1, 2))
    first, second = (
        average(quadratic.loss, 0.0, quadratic.zero.u, 0.2, generator=generator(3)).value
        for quadratic in (plain, doubled)
    )
    assert second == pytest.approx(2 * first)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_that_is_none_is_refused(rho):
    loss = Quadratic(*drawn(3, 0)[:2])
    with pytest.raises(ValueError, match="a radius is above 0"):
        loss.worst(rho)
    with pytest.raises(ValueError, match="a radius is above 0"):
        average(loss.loss, 0.0, loss.zero.u, rho, generator=generator())


def test_a_step_out_of_the_radius_comes_back_to_its_nearest_point():
    u = torch.tensor([3.0, 4.0])
    assert projected(u, 1.0, "l2").tolist() == pytest.approx([0.6, 0.8])
    assert projected(u, 3.5, "linf").tolist() == [3, 3.5]
    assert torch.equal(projected(u, 5.0, "l2"), u)


@given(seeds, st.floats(0.1, 100), st.floats(-50, 50))
def test_normalised_logits_know_neither_scale_nor_shift(seed, scale, shift):
    logits = torch.randn(3, 5, generator=generator(seed), dtype=torch.float64)
    unit_logits = normalised(logits)
    assert torch.allclose(unit_logits, normalised(scale * logits + shift), atol=1e-9)
    naive = logits.numpy() - logits.numpy().mean(1, keepdims=True)
    naive /= np.linalg.norm(naive, axis=1, keepdims=True)
    assert unit_logits.numpy() == pytest.approx(naive)
    assert normalised(torch.full((2, 4), 7.0)).abs().max() == 0
