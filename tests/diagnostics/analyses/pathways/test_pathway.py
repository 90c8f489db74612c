"""Pathways, their distances and their smoothness, each against a plain computation from its definition."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diagnostics.analyses.pathways.pathway import (
    ALPHABETS,
    cosines,
    distances,
    effective_dimension,
    entropies,
    gp_inconsistency,
    lengths,
    longer,
    moves,
    pathways,
    smoothness,
)

# Small cases tell nearly all; a hundred of each take long.
FEW = settings(max_examples=40)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))


@st.composite
def weightings(draw, shapes=sizes, least=2):
    """Weights that are small whole numbers, so that float32 holds them and ties are many; never all 0."""
    samples, layers, experts = draw(shapes)
    samples = max(samples, least)
    counts = draw(arrays(np.int64, (samples, layers, experts), elements=st.integers(0, 12)))
    counts[..., 0] += counts.sum(axis=2) == 0
    return counts.astype(np.float32)


def kept_naively(weights, tau):
    """Expert ids of each sample and layer in rank order, in exact arithmetic."""
    kept = []
    for sample in weights:
        kept.append([])
        for layer in sample:
            exact = [Fraction(int(weight)) for weight in layer]
            total, reached, ids = sum(exact), Fraction(0), []
            for expert in sorted(range(len(exact)), key=lambda e: (-exact[e], e)):
                ids.append(expert)
                reached += exact[expert]
                if reached >= tau * total:
                    break
            kept[-1].append(ids)
    return kept


def edits(first, second):
    """Levenshtein's distance by the textbook recurrence."""
    table = [[row + column for column in range(len(second) + 1)] for row in range(len(first) + 1)]
    for row, a in enumerate(first, start=1):
        for column, b in enumerate(second, start=1):
            table[row][column] = min(
                table[row - 1][column] + 1,
                table[row][column - 1] + 1,
                table[row - 1][column - 1] + (a != b),
            )
    return table[-1][-1]


def symbols_naively(kept, alphabet):
    """A sample's symbols as a list, or the paper's string."""
    if alphabet == "chars":
        return "-".join(",".join(map(str, ids)) for ids in kept)
    return [
        (layer, expert) if alphabet == "tagged" else expert
        for layer, ids in enumerate(kept)
        for expert in ids
    ]


def matrix(weights, alphabet="tagged", tau=0.7):
    return distances(pathways(weights, tau).strings(alphabet))


# --- pathways ---


@FEW
@given(weightings(), st.sampled_from([Fraction(n, 10) for n in range(1, 11)]))
def test_a_pathway_is_the_shortest_prefix_that_reaches_tau_with_equal_experts_by_their_id(weights, tau):
    paths = pathways(weights, float(tau))
    for sample, layers in enumerate(kept_naively(weights, tau)):
        for layer, ids in enumerate(layers):
            count = paths.kept[sample, layer]
            assert paths.order[sample, layer, :count].tolist() == ids


def test_a_pathway_by_hand():
    # Layer 0: 5 of 10 is 0.5, with 3 more 0.8 >= 0.7. Layer 1: 4 equal ones of 1/4: 3 of them, lowest first.
    weights = np.array([[[2, 5, 3, 0], [1, 1, 1, 1]]], dtype=np.float32)
    assert pathways(weights).strings("chars") == ["1,2-0,1,2"]
    assert pathways(weights, 0.8).strings("chars") == ["1,2-0,1,2,3"]
    assert pathways(weights, 0.5).strings("chars") == ["1-0,1"]
    assert [len(word) for word in pathways(weights).strings()] == [5]
    assert pathways(weights).strings("chars", layer=1) == ["0,1,2"]


def test_weights_that_do_not_sum_to_one_are_divided_by_their_sum():
    weights = np.array([[[0.2, 0.5, 0.3]]], dtype=np.float32)
    assert (pathways(weights).kept == pathways(weights * 0.37).kept).all()


def test_float32_means_of_ten_equal_experts_keep_seven_of_them_however_they_were_summed():
    # 7 of 10 are exactly tau: round-off must not add an eighth.
    for share in (0.1, np.float32(0.1), np.float32(1) / 10 + np.float32(1e-9)):
        assert pathways(np.full((1, 1, 10), share, dtype=np.float32)).kept.item() == 7


@FEW
@given(weightings(), st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_larger_tau_never_shortens_a_pathway(weights, first, second):
    small, large = sorted((first, second))
    assert (pathways(weights, small).kept <= pathways(weights, large).kept).all()


@FEW
@given(weightings())
def test_a_tau_near_0_keeps_one_expert_a_layer_so_that_edits_are_layers_that_differ(weights):
    paths = pathways(weights, 1e-3)
    assert (paths.kept == 1).all()
    best = weights.argmax(axis=2)
    hamming = (best[:, None] != best[None]).sum(axis=2)
    assert (distances(paths.strings()) == hamming).all()


@FEW
@given(sizes, st.floats(0.01, 1), st.randoms(use_true_random=False))
def test_one_hot_routing_gives_one_symbol_a_layer_for_any_tau(shape, tau, random):
    samples, layers, experts = shape
    weights = np.zeros(shape, dtype=np.float32)
    for sample in range(samples):
        for layer in range(layers):
            weights[sample, layer, random.randrange(experts)] = 0.3
    assert lengths(pathways(weights, tau).strings()).tolist() == [layers] * samples


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.01, math.nan])
def test_a_tau_out_of_range_is_refused(tau):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        pathways(np.ones((1, 1, 2), dtype=np.float32), tau)


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0])
def test_a_sample_that_no_expert_carries_is_named(bad):
    weights = np.ones((3, 2, 2), dtype=np.float32)
    weights[1, 1] = bad
    with pytest.raises(ValueError, match=r"sample 1: its weights in layer 1 are negative, NaN or all 0"):
        pathways(weights)


def test_symbols_pass_over_what_is_no_character():
    # 200 layers of 200 experts are 40,000 symbols; from the 38,912th on they would be surrogates.
    order = np.tile(np.arange(200), (1, 200, 1))
    from diagnostics.analyses.pathways.pathway import Pathways

    word = Pathways(order=order, kept=np.full((1, 200), 200)).strings()[0]
    assert len(set(word)) == 40_000
    assert not any(0xD800 <= ord(symbol) < 0xE000 for symbol in word)
    assert word.encode()  # every one can be written


# --- distances ---


@FEW
@given(weightings(), st.sampled_from(ALPHABETS), st.sampled_from([0.5, 0.7, 1.0]))
def test_distances_are_those_of_the_textbook_recurrence(weights, alphabet, tau):
    kept = kept_naively(weights, Fraction(str(tau)))
    texts = [symbols_naively(sample, alphabet) for sample in kept]
    expected = [[edits(first, second) for second in texts] for first in texts]
    words = pathways(weights, tau).strings(alphabet)
    assert distances(words).tolist() == expected
    assert moves(words, words[::-1]).tolist() == [row[-1 - index] for index, row in enumerate(expected)]


@FEW
@given(weightings(least=3), st.sampled_from(ALPHABETS))
def test_distances_are_a_metric_bounded_by_the_lengths(weights, alphabet):
    words = pathways(weights).strings(alphabet)
    D, n = distances(words), lengths(words)
    assert (D == D.T).all()
    assert ((D == 0) == (np.array(words)[:, None] == np.array(words))).all()
    assert (D[:, :, None] <= D[:, None, :] + D.T[None, :, :]).all()  # d(i, j) <= d(i, k) + d(k, j)
    assert (longer(n, n) >= D).all()
    assert (np.abs(np.subtract.outer(n, n)) <= D).all()
    share = D / longer(n, n)
    assert ((share >= 0) & (share <= 1)).all()


@FEW
@given(weightings())
def test_shared_symbols_are_at_most_as_far_as_tagged_ones_and_these_as_the_sum_over_layers(weights):
    paths = pathways(weights)
    shared, tagged = distances(paths.strings("shared")), distances(paths.strings("tagged"))
    by_layer = sum(distances(paths.strings("tagged", layer)) for layer in range(weights.shape[1]))
    assert (shared <= tagged).all()
    assert (tagged <= by_layer).all()


@FEW
@given(weightings())
def test_equal_routing_is_at_distance_0(weights):
    same = np.repeat(weights[:1], 4, axis=0)
    assert not matrix(same).any()


def renumbered(weights, routers, permutations):
    """Weights and router rows with the experts of each layer in another order."""
    return (
        np.stack([weights[:, layer, order] for layer, order in enumerate(permutations)], axis=1),
        np.stack([routers[layer, order] for layer, order in enumerate(permutations)]),
    )


@pytest.fixture
def routed():
    """Weights without ties, and routers."""
    generator = np.random.default_rng(3)
    weights = generator.dirichlet(np.ones(12), (6, 4)).astype(np.float32)
    return weights, generator.normal(size=(4, 12, 8)), generator


def test_renumbering_the_experts_of_each_layer_by_itself_changes_no_tagged_distance_and_no_smoothness(routed):
    weights, routers, generator = routed
    orders = [generator.permutation(12) for _ in range(4)]
    other, rows = renumbered(weights, routers, orders)
    assert (matrix(other) == matrix(weights)).all()
    before, after = cosines(weights, routers), cosines(other, rows)
    assert after == pytest.approx(before, abs=1e-12)
    assert gp_inconsistency(after) == pytest.approx(gp_inconsistency(before), abs=1e-9, nan_ok=True)
    for layer in range(4):
        dimensions = [effective_dimension(array[:, layer]) for array in (weights, other)]
        assert dimensions[0] == pytest.approx(dimensions[1], rel=1e-9)
    assert (matrix(other, "shared") != matrix(weights, "shared")).any()


def test_shared_distances_stay_only_when_all_layers_are_renumbered_alike(routed):
    weights, routers, generator = routed
    other, _ = renumbered(weights, routers, [generator.permutation(12)] * 4)
    assert (matrix(other, "shared") == matrix(weights, "shared")).all()


def test_renumbering_changes_the_papers_string(routed):
    weights, routers, _ = routed
    # Turned round, 0 to 11 have other digits in other places, so that characters align otherwise.
    other, _ = renumbered(weights, routers, [np.arange(12)[::-1]] * 4)
    assert (matrix(other, "chars") != matrix(weights, "chars")).any()


def test_several_threads_give_the_same_distances(routed):
    words = pathways(routed[0]).strings()
    assert (distances(words, workers=2) == distances(words)).all()


# --- smoothness ---


def cosine_naively(weights, routers):
    """c of each sample and pair of layers, in plain Python."""
    cosines = []
    for sample in weights.tolist():
        embedded = [
            [math.fsum(np.multiply(layer, axis)) for axis in zip(*rows, strict=True)]
            for layer, rows in zip(sample, routers.tolist(), strict=True)
        ]
        cosines.append([])
        for before, after in pairwise(embedded):
            dot = math.fsum(a * b for a, b in zip(before, after, strict=True))
            cosines[-1].append(dot / (math.hypot(*before) * math.hypot(*after)))
    return cosines


def test_cosines_and_both_consistencies_are_those_of_a_plain_computation(routed):
    weights, routers, _ = routed
    expected = cosine_naively(weights, routers)
    computed = cosines(weights, routers)
    assert computed == pytest.approx(np.array(expected), abs=1e-12)
    assert smoothness(computed) == pytest.approx([math.fsum(c) / 3 for c in expected])
    rough = [1 - sum(c_l / (max(c) + 1e-8) for c_l in c) / 3 if max(c) > 0.05 else math.nan for c in expected]
    assert gp_inconsistency(computed) == pytest.approx(rough, nan_ok=True)


def test_consistency_by_hand():
    # One expert of each layer takes all: embeddings are (1, 0), (1, 1), (0, 1), (1, 1) up to length.
    routers = np.array([[[1, 0], [9, 9]], [[1, 1], [9, 9]], [[0, 2], [9, 9]], [[3, 3], [9, 9]]], dtype=float)
    weights = np.array([[[1, 0]] * 4], dtype=np.float32)
    # Their cosines are 1/√2 each, so that the mean over the largest is 1 and C is 0.
    c = cosines(weights, routers)
    assert c == pytest.approx(np.full((1, 3), 2**-0.5))
    assert smoothness(c) == pytest.approx([2**-0.5])
    assert gp_inconsistency(c) == pytest.approx([0], abs=1e-7)
    # With cosines 0.8, 0.4 and 0 the mean is 0.4 and C = 1 − 0.4 / 0.8 = 0.5.
    assert gp_inconsistency(np.array([[0.8, 0.4, 0.0]])) == pytest.approx([0.5], abs=1e-7)


@FEW
@given(weightings(st.tuples(st.integers(1, 4), st.integers(3, 4), st.integers(2, 5))))
def test_layers_that_share_router_and_routing_are_as_smooth_as_can_be(weights):
    alike = np.repeat(weights[:, :1], weights.shape[1], axis=1)
    routers = np.repeat(
        np.random.default_rng(0).normal(size=(1, alike.shape[2], 7)), alike.shape[1], axis=0
    )  # 7 axes: embeddings of whole weights are never 0
    c = cosines(alike, routers)
    assert c == pytest.approx(np.ones_like(c))
    assert smoothness(c) == pytest.approx(np.ones(len(alike)))
    assert gp_inconsistency(c) == pytest.approx(np.zeros(len(alike)), abs=1e-7)


@FEW
@given(st.floats(1e-3, 1e3), st.integers(0, 99))
def test_the_scale_of_a_router_changes_no_cosine(scale, seed):
    generator = np.random.default_rng(seed)
    weights, routers = generator.random((3, 4, 5)), generator.normal(size=(4, 5, 6))
    assert cosines(weights, routers * scale) == pytest.approx(cosines(weights, routers), abs=1e-9)


def test_even_routing_compares_the_column_means_of_the_routers():
    routers = np.random.default_rng(0).normal(size=(3, 5, 4))
    means = routers.mean(axis=1)
    expected = [
        means[layer] @ means[layer + 1] / np.linalg.norm(means[layer]) / np.linalg.norm(means[layer + 1])
        for layer in range(2)
    ]
    assert cosines(np.full((1, 3, 5), 0.2), routers)[0] == pytest.approx(expected)


def test_the_papers_consistency_is_withheld_where_no_cosine_is_large_enough_to_divide_by():
    rough = gp_inconsistency(np.array([[0.05, -0.3], [-0.2, -0.1], [0.051, 0.0]]))
    assert np.isnan(rough).tolist() == [True, True, False]
    assert rough[2] == pytest.approx(1 - 0.0255 / 0.051, abs=1e-6)


def test_the_papers_consistency_refuses_two_layers_and_smoothness_one():
    with pytest.raises(ValueError, match="needs at least 3 layers with experts; there are 2"):
        gp_inconsistency(np.ones((4, 1)))
    with pytest.raises(ValueError, match="there is only one"):
        smoothness(np.ones((4, 0)))


def test_many_samples_are_embedded_in_parts_with_the_same_cosines(monkeypatch):
    generator = np.random.default_rng(0)
    weights, routers = generator.random((11, 3, 4)), generator.normal(size=(3, 4, 6))
    undivided = cosines(weights, routers)
    monkeypatch.setattr("diagnostics.analyses.pathways.pathway.AT_ONCE", 5 * 3 * 6)  # 5, 5 and 1 samples
    assert cosines(weights, routers) == pytest.approx(undivided, abs=1e-12)


# --- entropy and dimension ---


@FEW
@given(weightings())
def test_entropy_is_that_of_the_definition_and_between_0_and_the_logarithm_of_the_experts(weights):
    computed = entropies(weights)
    for sample, layers in enumerate(weights.tolist()):
        for layer, row in enumerate(layers):
            shares = [value / sum(row) for value in row]
            expected = -math.fsum(p * math.log(p) for p in shares if p)
            assert computed[sample, layer] == pytest.approx(expected, abs=1e-12)
    assert (computed >= 0).all()
    assert (computed <= math.log(weights.shape[2]) + 1e-12).all()


@FEW
@given(weightings(st.tuples(st.integers(1, 5), st.just(1), st.integers(1, 6))), st.floats(1e-3, 10))
def test_the_effective_dimension_is_the_trace_of_its_definition(weights, regularisation):
    G = weights[:, 0].astype(float)
    H = G @ G.T
    expected = np.trace(H @ np.linalg.inv(H + regularisation * np.eye(len(H))))
    dimension = effective_dimension(weights[:, 0], regularisation)
    assert dimension == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert 0 <= dimension <= min(G.shape) + 1e-9
    assert effective_dimension(weights[:, 0], 2 * regularisation) <= dimension
    default = 1e-3 * np.trace(H) / len(H)
    assert effective_dimension(weights[:, 0]) == pytest.approx(effective_dimension(weights[:, 0], default))


def test_identical_samples_have_one_dimension_at_most():
    # H = 1 1ᵀ |g|², whose one squared singular value is n |g|² = 4 · 0.5 = 2: 2 / (2 + λ).
    weights = np.tile(np.array([[0.5, 0.5]]), (4, 1))
    assert effective_dimension(weights, 0.5) == pytest.approx(2 / 2.5)
