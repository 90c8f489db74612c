"""What a mask is in the running model, in every layout that a family stores its weights in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.sparsity.evaluator import MaskEvaluator, Masks, parse_pattern
from probes import CheckpointPair
from probes.checkpoints.opening import open_checkpoint
from probes.models.two_sided import TwoSidedModel
from tests.probes.runnable import make

FAMILIES = ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss"]


def evaluator_of(pair, **settings):
    two_sided = TwoSidedModel(pair)
    about = {"scope": "global", "parts": ("block",), "random": True, "seed": 0, **settings}
    return MaskEvaluator(Masks(two_sided, [0.0, 0.3, 0.6], **about), {}, total=0)


@pytest.fixture(scope="module", params=FAMILIES)
def evaluator(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "tuned")):
        make(request.param, seed).save_pretrained(root / name)
    return evaluator_of(CheckpointPair(root / "base", root / "tuned"))


@pytest.mark.parametrize("pattern", ["magnitude", "random", "1:2"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_what_is_held_is_what_is_zero_in_the_running_model(evaluator, side, pattern):
    sparsity = 0.5 if pattern == "1:2" else 0.3
    evaluator.prune(side, pattern, sparsity)
    held = evaluator.pruned_parameters(side, pattern, sparsity)
    seen = open_checkpoint(evaluator.two_sided.model)
    count = 0
    for name in evaluator.masks.names:
        pruned = evaluator.masks.pruned(side, pattern, sparsity, name)
        stored = evaluator.two_sided.read(name, side)
        assert torch.equal(seen.tensor(name), stored.masked_fill(pruned, 0))
        count += int(pruned.sum())
    # No weight of these families is 0 by itself.
    assert all(torch.equal(zero, parameter == 0) for parameter, zero in held.items())
    assert sum(int(zero.sum()) for zero in held.values()) == count
    assert count == round(evaluator.masks.realised(side, pattern, sparsity) * evaluator.masks.entries)
    others = [p for p in evaluator.two_sided.model.parameters() if p not in held]
    assert not any((p == 0).any() for p in others)


def test_falling_sparsities_and_other_sides_start_from_the_checkpoint(evaluator):
    steps = [("base", 0.6), ("base", 0.3), ("tuned", 0.3), ("tuned", 0.6), ("base", 0.0)]
    for side, sparsity in steps:
        evaluator.prune(side, "magnitude", sparsity)
        alone = open_checkpoint(evaluator.two_sided.model)
        for name in evaluator.masks.names:
            pruned = evaluator.masks.pruned(side, "magnitude", sparsity, name)
            assert torch.equal(
                alone.tensor(name), evaluator.two_sided.read(name, side).masked_fill(pruned, 0)
            )
    evaluator.prune("tuned", "magnitude", 0.0)


def test_random_masks_are_the_same_for_both_sides_and_nest(evaluator):
    for name in evaluator.masks.names:
        low, high = (evaluator.masks.pruned("base", "random", s, name) for s in (0.3, 0.6))
        assert torch.equal(low, evaluator.masks.pruned("tuned", "random", 0.3, name))
        assert not (low & ~high).any()


def test_a_sparsity_that_was_not_asked_for_at_first_is_cut_the_same(evaluator):
    for sparsity in (0.1, 0.45):
        (alone,) = evaluator.masks.order("tuned", "magnitude").cuts([sparsity])
        assert evaluator.masks.cut("tuned", sparsity).pruned_entries == alone.pruned_entries
    assert evaluator.masks.cut("tuned", 0.1 + 1e-12) is evaluator.masks.cut("tuned", 0.1)


def test_layers_add_up_to_the_whole_cut(evaluator):
    table = evaluator.masks.layers("tuned", 0.6)
    assert (table["sparsity"] * table["entries"]).sum() == pytest.approx(round(0.6 * evaluator.masks.entries))
    assert table["entries"].sum() == evaluator.masks.entries
    assert not table["matrix"].duplicated().any()
    none = evaluator.masks.layers("tuned", 0.0)
    assert (none["sparsity"] == 0).all()
    assert none["gaussian"].isna().all()


@given(st.sampled_from([0.1, 0.3, 0.6]))
def test_a_scale_common_to_all_weights_changes_no_mask(sparsity):
    model, scaled = make("llama", 0), make("llama", 0)
    with torch.no_grad():
        for weight in scaled.parameters():
            weight.mul_(-4.0)
    masks = evaluator_of(CheckpointPair(model, scaled), random=False).masks
    for name in masks.names:
        base, tuned = (masks.pruned(side, "magnitude", sparsity, name) for side in ("base", "tuned"))
        assert torch.equal(base, tuned)
    assert masks.overlaps([sparsity])["kappa"].iloc[0] == pytest.approx(1)


@pytest.mark.parametrize("pattern", ["2", "2:", "a:b", "0:4", "4:4", "2:4:8", "-1:2"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="write N:M, at most N of M weights kept"):
        parse_pattern(pattern)
