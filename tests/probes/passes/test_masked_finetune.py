"""Masked fine-tuning: what is held stays zero, and one seed is one order of rows."""

import pytest
import torch

from diagnostics.evaluation.row_losses import EncodedTask
from probes.passes.masked_finetune import masked_finetune, row_batches
from probes.passes.objective import Objective
from probes.text.rows import task_of
from tests.probes.runnable import assert_same, make, rows_of, state_of

STEPS = 6


def objective_of(rows=10, seed=0):
    lengths = [4 + row % 5 for row in range(rows)]
    return Objective(
        EncodedTask(
            task=task_of(["a"] * rows), examples=rows_of(*lengths, seed=seed), classes=(), mask_id=None,
            batch_tokens=100, notes=(),
        )
    )  # fmt: skip


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def half_of(model, seed=1):
    """Masks of about half the entries of the matrices of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        weight: torch.rand(weight.shape, generator=generator) < 0.5
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and ".h." in name
    }


def recorded(objective):
    """The rows of each step, filled when it is used."""
    seen, descend = [], objective.backward

    def backward(model, rows, **how):
        seen.append(rows)
        return descend(model, rows, **how)

    objective.backward = backward
    return seen


def test_what_is_held_is_exactly_zero_after_every_step_and_all_else_is_trained():
    model = make("gpt2")
    held, before = half_of(model), weights_of(model)
    assert held
    seen = []

    def progress(done, of, what):
        seen.append((done, of, what))
        for weight, zero in held.items():
            assert not weight[zero].any()
            assert weight[~zero].all()

    masked_finetune(model, objective_of(), held, steps=STEPS, lr=1e-3, batch_rows=3, progress=progress)
    assert seen == [(step, STEPS, "tuned") for step in range(1, STEPS + 1)]
    after = weights_of(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # The head is tied to the embeddings, whose rows of other tokens get gradients through it alone.
    assert (before["transformer.wte.weight"] != after["transformer.wte.weight"]).any(dim=1).all()


def test_without_a_mask_it_is_adamw_whose_rate_falls_to_zero():
    objective, rows = objective_of(), row_batches(range(10), 4, 3)
    model, other = make("gpt2"), make("gpt2").requires_grad_(True)
    losses = masked_finetune(
        model, objective, {}, steps=STEPS, lr=1e-2, batch_rows=4, weight_decay=0.1, seed=3
    )
    # Rates 1, 5/6, … 1/6 of the first.
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (STEPS - step) / STEPS
        optimizer.zero_grad()
        assert objective.backward(other, next(rows)) == losses[step]
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert losses[-1] < losses[0]


def test_the_order_of_rows_is_the_seeds_alone_and_every_row_is_used_before_one_is_used_again():
    seen = {}
    for name, seed, masked in (("dense", 0, False), ("masked", 0, True), ("other", 1, True)):
        model, objective = make("gpt2"), objective_of()
        seen[name] = recorded(objective)
        held = half_of(model) if masked else {}
        masked_finetune(model, objective, held, steps=5, batch_rows=4, seed=seed)
    assert seen["dense"] == seen["masked"] != seen["other"]
    for rows in seen.values():
        flat = [row for step in rows for row in step]
        assert [len(step) for step in rows] == [4] * 5
        assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
        assert flat[:10] != flat[10:]


def test_one_seed_gives_the_same_weights_twice_whatever_was_drawn_before():
    weights = []
    for draws in (0, 5):
        torch.rand(draws)
        model = make("gpt2")
        masked_finetune(model, objective_of(), half_of(model), steps=3, lr=1e-3, seed=7)
        weights.append(weights_of(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_no_step_leaves_the_weights_but_for_what_is_held():
    model = make("gpt2")
    before, held = weights_of(model), half_of(model)
    assert masked_finetune(model, objective_of(), held, steps=0) == []
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name].masked_fill(held.get(weight, torch.tensor(False)), 0))


@pytest.mark.parametrize("fails", [False, True])
def test_modes_switches_and_gradients_are_as_they_were_also_after_an_exception(fails):
    model = make("gpt2").train()
    model.lm_head.eval()
    for index, weight in enumerate(model.parameters()):
        weight.requires_grad_(index % 2 == 0)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)

    def progress(done, of, what):
        if fails:
            raise KeyError("stopped")

    before = state_of(model)
    try:
        masked_finetune(model, objective_of(), {}, steps=2, lr=0.0, progress=progress)
    except KeyError:
        assert fails
    assert_same(before, state_of(model))
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(weight.grad is None for weight in list(model.parameters())[1:])


def test_bad_input_is_told():
    model, objective = make("gpt2"), objective_of()
    weight = model.transformer.wpe.weight
    with pytest.raises(
        ValueError, match=r"a mask is \(3,\) and its weight \(32, 16\); give one for each entry"
    ):
        masked_finetune(model, objective, {weight: torch.zeros(3, dtype=torch.bool)}, steps=1)
    for how in ({"steps": -1}, {"steps": 1, "batch_rows": 0}):
        with pytest.raises(ValueError, match="give 0 steps or more, of 1 row or more"):
            masked_finetune(model, objective, {}, **how)
    empty = EncodedTask(
        task=task_of(["a"]), examples=rows_of(1), classes=(), mask_id=None, batch_tokens=100, notes=()
    )
    with pytest.raises(ValueError, match="no row with anything to score; there is nothing to train on"):
        masked_finetune(model, Objective(empty), {}, steps=1)
