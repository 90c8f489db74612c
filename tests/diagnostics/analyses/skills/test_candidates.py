"""A mask inside a running model: written by selection, differentiated exactly, and gone afterwards."""

import pytest
import torch

from diagnostics.analyses.skills.candidates import Candidates, GraftedModel
from diagnostics.analyses.skills.movement import Movement, delta
from diagnostics.evaluation.row_losses import EncodedTask
from probes.checkpoints.pair import CheckpointPair
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective
from probes.text.rows import task_of
from tests.probes.runnable import LAYERS, assert_same, make, rows_of, state_of

# The last two are kept by transformers in another form than in the file.
FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss"]


def pair_of(family, root, dtype=None):
    for seed, name in enumerate(("base", "tuned")):
        model = make(family, seed)
        if name == "tuned":
            start = make(family, 0)
            with torch.no_grad():  # near the base, so that the loss is smooth between them
                for parameter, before in zip(model.parameters(), start.parameters(), strict=True):
                    parameter.mul_(0.1).add_(before)
        model.to(dtype or torch.float32).save_pretrained(root / name)
    return CheckpointPair(root / "base", root / "tuned")


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    return pair_of(request.param, tmp_path)


def objective_of(tokens=10_000):
    """Texts of random tokens."""
    task = task_of([{"text": "a"}] * 5)
    encoded = EncodedTask(
        task=task, examples=rows_of(9, 4, 7, 7, 3), classes=(), mask_id=None, batch_tokens=tokens, notes=()
    )
    return Objective(encoded, tokens=tokens)


def reader(two_sided):
    return lambda name: (two_sided.read(name, "base"), two_sided.read(name, "tuned"))


def candidates_of(two_sided, share=0.3):
    """The entries of the blocks that moved furthest."""
    names = {name for name in two_sided.in_both if ".layers." in name or ".h." in name}
    movement = Movement({name: two_sided.headers[name].shape for name in names}, reader(two_sided))
    return Candidates.of(movement.largest(int(share * movement.total)), reader(two_sided))


def half(candidates):
    """A hard mask of every other candidate."""
    return torch.arange(len(candidates)) % 2 == 1


def dense(two_sided, candidates, objective):
    """Gradients of all weights at once, taken at the candidates, times how far each moved."""
    two_sided.model.requires_grad_(True)
    objective.backward(two_sided.model)
    gradients = torch.zeros(len(candidates))
    for name, span in candidates.spans:
        for slot in two_sided.editable.slots(name, candidates.index[name].long()):
            gradients[span][slot.which] = slot.tensor.grad.view(-1)[slot.indices]
        gradients[span] *= delta(candidates.base[name], candidates.tuned[name])
    for parameter in two_sided.model.parameters():
        parameter.grad = None
    two_sided.model.requires_grad_(False)
    return gradients


@pytest.mark.parametrize("tokens", [10_000, 10])
def test_the_gradient_is_the_dense_one_bit_for_bit_also_over_several_micro_batches(pair, tokens):
    objective = objective_of(tokens)
    with TwoSidedModel(pair) as two_sided:
        two_sided.become("base")
        candidates = candidates_of(two_sided)
        with GraftedModel(two_sided, candidates) as graft:
            sparse = graft.gradient(half(candidates), objective)
            assert torch.equal(sparse, dense(two_sided, candidates, objective))
            assert sparse.count_nonzero() > 0.5 * len(sparse)
            again = graft.gradient(half(candidates), objective)
            assert torch.equal(sparse, again)  # nothing is left of the first


def test_a_hard_mask_is_written_by_selection_and_is_gone_afterwards(pair):
    with TwoSidedModel(pair) as two_sided:
        two_sided.become("base")
        candidates = candidates_of(two_sided)
        before = state_of(two_sided.model)
        with GraftedModel(two_sided, candidates) as graft:
            for mask in (half(candidates), ~half(candidates), torch.full((len(candidates),), 0.5)):
                graft.write_mask(mask)
            graft.write_mask(half(candidates))
            chosen = candidates.region(half(candidates))
            written = {name: tensor.clone() for name, tensor in two_sided.model.state_dict().items()}
            graft.gradient(~half(candidates), objective_of())
        assert_same(before, state_of(two_sided.model))
        with two_sided.selecting(chosen, "tuned") as model:
            selected = model.state_dict()
            assert all(torch.equal(written[name], selected[name]) for name in written)


def test_an_objective_that_fails_leaves_no_gradient_and_no_hook(pair, monkeypatch):
    def failing(self, model, rows=None):
        backward(self, model)
        raise RuntimeError("out of luck")

    backward = Objective.backward
    monkeypatch.setattr(Objective, "backward", failing)
    with TwoSidedModel(pair) as two_sided:
        two_sided.become("base")
        candidates = candidates_of(two_sided)
        before = state_of(two_sided.model)
        with pytest.raises(RuntimeError, match="out of luck"), GraftedModel(two_sided, candidates) as graft:
            graft.gradient(half(candidates), objective_of())
        assert_same(before, state_of(two_sided.model))
        assert all(parameter.grad is None for parameter in two_sided.model.parameters())
        assert not any(parameter.requires_grad for parameter in two_sided.model.parameters())


def test_the_gradient_of_a_soft_mask_is_that_of_finite_differences(tmp_path):
    objective = objective_of()
    # Not a Llama: its norms compute in float32, whatever it is given.
    with TwoSidedModel(pair_of("gpt2", tmp_path, torch.float64), dtype="float64") as two_sided:
        two_sided.become("base")
        candidates = candidates_of(two_sided)
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(len(candidates), generator=generator, dtype=torch.float64)
        with GraftedModel(two_sided, candidates) as graft:
            gradient = graft.gradient(mask, objective)

            def loss(values):
                graft.write_mask(values)
                return objective.backward(two_sided.model)

            step = 1e-4
            for entry in gradient.abs().topk(20).indices.tolist():
                moved = mask.clone()
                ends = []
                for sign in (1, -1):
                    moved[entry] = mask[entry] + sign * step
                    ends.append(loss(moved))
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(gradient[entry]) == pytest.approx(slope, rel=1e-5)
            # By arithmetic and by selection it is the same loss.
            hard = half(candidates)
            assert loss(hard.double()) == pytest.approx(loss(hard), abs=1e-9)


def test_entries_elsewhere_have_the_gradient_that_they_would_have_as_candidates(pair):
    objective = objective_of()
    with TwoSidedModel(pair) as two_sided:
        two_sided.become("base")
        every = candidates_of(two_sided, share=1.0)
        few = candidates_of(two_sided, share=0.2)
        chosen = few.region(torch.ones(len(few), dtype=torch.bool))
        names = {name: two_sided.headers[name].shape for name in every.index}
        movement = Movement(names, reader(two_sided))
        others = movement.sample_others(chosen, 0.3, seed=0)
        with GraftedModel(two_sided, few) as graft:
            gradients = graft.gradient_at(others, reader(two_sided), torch.zeros(len(few)), objective)
        with GraftedModel(two_sided, every) as graft:
            all_gradients = graft.gradient(torch.zeros(len(every)), objective)
    wanted = []
    for name, span in every.spans:
        position = {int(entry): i for i, entry in enumerate(every.index[name])}
        wanted += [all_gradients[span][position[int(entry)]] for entry in others.get(name, ())]
    assert torch.equal(gradients, torch.stack(wanted))


def test_candidates_know_how_far_each_moved(pair):
    with TwoSidedModel(pair) as two_sided:
        candidates = candidates_of(two_sided)
        moved = candidates.movement()
        assert moved.min() > 0
        for name, span in candidates.spans:
            base, tuned = (
                side.reshape(-1)[candidates.index[name].long()] for side in reader(two_sided)(name)
            )
            assert torch.equal(moved[span], (tuned - base).abs())
        some = torch.arange(5, len(candidates), 7)
        assert torch.equal(candidates.movement(some), moved[some])
        assert {index.dtype for index in candidates.index.values()} == {torch.int32}
        assert sum(1 for _ in candidates.spans) > 2 * LAYERS


def test_gradients_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    def infinite(self, model, rows=None):
        for parameter in model.parameters():
            if parameter.requires_grad:
                (parameter.sum() * torch.inf).backward()

    monkeypatch.setattr(Objective, "backward", infinite)
    with TwoSidedModel(pair_of("llama", tmp_path)) as two_sided:
        two_sided.become("base")
        candidates = candidates_of(two_sided)
        with (
            GraftedModel(two_sided, candidates) as graft,
            pytest.raises(ValueError, match=r"tuned: gradients are NaN or infinite; .*--dtype float32"),
        ):
            graft.gradient(half(candidates), objective_of())
