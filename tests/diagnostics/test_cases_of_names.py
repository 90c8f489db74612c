"""Pairs of training runs that came out wrong: old names of norms, pruning masks, copies in another dtype.

The makers lie in `shared/cases` beside the repository, with what is right.
"""

import runpy
import sys
from pathlib import Path

import pytest

from diagnostics import (
    abrupt_sparsification,
    essential_sparsity,
    interpolation_path,
    intruder_dimensions,
    skill_localization,
)
from probes import CheckpointPair
from probes.models.interpolated import InterpolatedModel
from probes.models.two_sided import TwoSidedModel
from probes.text.rows import read_task

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} IS NOT THERE, so no case was tried")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Makes a case by its name, once."""
    directories: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in directories:
            out = directories[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [name, str(out)])
                runpy.run_path(str(CASES / f"{name}.py"))
        return directories[name]

    return make


def test_norms_under_their_old_names_are_not_lacking(case):
    directory = case("old_norm_names")
    pair = CheckpointPair(directory / "base", directory / "tuned")
    assert pair.unmatched == []
    result = interpolation_path(pair, read_task(directory / "task.jsonl"))
    assert result.metrics["base_task_nats"] == pytest.approx(0.831, abs=5e-4)
    assert result.metrics["tuned_task_nats"] == pytest.approx(0.964, abs=5e-4)
    assert not any("lacks" in note for note in result.notes)


def test_masked_weights_are_the_zeros_of_the_model(case):
    directory = case("pruned_reparametrised")
    run = [directory / "run" / f"checkpoint-{step}" for step in (100, 200, 300, 400)]
    zeros = abrupt_sparsification([*map(str, run)]).tables["checkpoints"]["zero"]
    assert zeros.tolist() == pytest.approx([0, 0.3, 0.6, 0.9], abs=1e-3)
    for side in ("partly", "whole"):
        pair = CheckpointPair(directory / "base", directory / side)
        assert pair.unmatched == []
        # 126 came from the masks; the weights that the model uses have one, the last of the ten examined.
        rows = intruder_dimensions(pair).tables["vectors"].query("intruder")
        assert rows["rank"].tolist() == [10]


@pytest.mark.parametrize(("tuned", "matrices"), [("cast", 0), ("tuned", 6)])
@pytest.mark.parametrize("turned", [False, True])
def test_entries_that_the_dtype_rounded_did_not_change(case, tuned, matrices, turned):
    directory = case("rounded")
    sides = [directory / "base", directory / tuned]
    pair = CheckpointPair(*(reversed(sides) if turned else sides))
    task = read_task(directory / "task.jsonl")
    assert intruder_dimensions(pair).metrics["changed"] == matrices
    skills = skill_localization(pair, task, search="movement", budgets=(0.01,), draws=100, seeds=1)
    # 5 % of the 49,152 entries of the MLPs, but for steps that the dtype rounds away.
    expected = pytest.approx(2460, abs=40) if matrices else 0
    assert skills.metrics["moved"] == expected
    assert skills.metrics["entries"] == (49152 if matrices else 0)
    sparsity = essential_sparsity(
        pair, task, grid=(0.0, 0.3, 0.5, 0.7), refine=0.0, patterns=(), random=False, draws=100
    )
    assert ("delta_low_at_0_3" in sparsity.metrics) == bool(matrices)
    with TwoSidedModel(pair) as two_sided:
        interpolated = InterpolatedModel(two_sided)
        moved = {layer.name: interpolated.displacement(layer)[0] for layer in interpolated.layers}
    assert [name for name, norm in moved.items() if norm] == (["block 0", "block 1"] if matrices else [])


def test_the_masks_of_pruning_move_nothing_else(case):
    directory = case("pruned_reparametrised")
    pair = CheckpointPair(directory / "base", directory / "partly")
    zeros = {name: float((pair.read(name)[1] == 0).float().mean()) for name in pair.matrices}
    assert all((share == pytest.approx(0.5, abs=1e-3)) == ("mlp" in name) for name, share in zeros.items())
