"""Layers are moved and put back bit for bit, and what lies before them is run once without a difference."""

from contextlib import suppress

import pytest
import torch

from diagnostics.evaluation.row_losses import EncodedTask
from probes.models.body import blocks
from probes.models.interpolated import layers_of
from probes.models.perturb import PerturbedWeights, Prefix, logits_through
from probes.passes.objective import Objective
from probes.text.rows import task_of
from tests.probes.runnable import LAYERS, assert_same, make, model_of, rows_of, state_of

FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "cohere",
    "granite",
    "opt",
    "bloom",
    "mixtral",
    "olmoe",
    "gpt_oss",
]


class Stop(Exception):  # noqa: N818
    """An error in the midst of it."""


def stopping():
    return suppress(Stop)


def objective_of(*lengths, tokens=16384):
    examples = rows_of(*lengths)
    task = task_of(["text"] * len(examples))
    return Objective(
        EncodedTask(task=task, examples=examples, classes=(), mask_id=None, batch_tokens=tokens, notes=()),
        tokens=tokens,
    )


def test_weights_are_moved_by_c_times_u_and_come_back_with_everything_else():
    model = make("llama").requires_grad_(False)
    layer = layers_of(model)[1]
    layer.parameters[0].requires_grad_(True)
    layer.parameters[0].grad = torch.ones_like(layer.parameters[0])
    before = state_of(model)
    original = [parameter.detach().clone() for parameter in layer.parameters]
    with stopping(), PerturbedWeights(layer.parameters) as moved:
        u = torch.randn(moved.size, generator=torch.Generator().manual_seed(0))
        moved.put(u)
        flat = torch.cat([weight.flatten() for weight in original])
        perturbed = torch.cat([parameter.detach().flatten() for parameter in layer.parameters])
        assert torch.allclose(perturbed, flat + flat.abs() * u)
        assert torch.equal(torch.cat([part.flatten() for part in moved.divided(u)]), flat.abs() * u)
        with moved.sloping():
            objective_of(5, 7).backward(model)
            assert moved.slope().abs().max() > 0
        raise Stop
    assert_same(before, state_of(model))
    assert torch.equal(layer.parameters[0].grad, torch.ones_like(layer.parameters[0]))


def test_a_plain_move_is_u_itself_and_a_zero_weight_stays_only_in_the_adaptive_form():
    weight = torch.nn.Parameter(torch.tensor([0.0, 2.0, -3.0]))
    u = torch.tensor([1.0, 1.0, 1.0])
    for adaptive, expected in ((True, [0, 4, 0]), (False, [1, 3, -2])):
        with PerturbedWeights([weight], adaptive=adaptive) as moved:
            moved.put(u)
            assert weight.tolist() == expected
    assert weight.tolist() == [0, 2, -3]


def test_a_slope_is_the_gradient_in_u():
    model = make("llama").requires_grad_(False)
    objective = objective_of(6, 9)
    layer = layers_of(model)[2]
    with PerturbedWeights(layer.parameters) as moved:
        with moved.sloping():
            objective.backward(model)
            slope = moved.slope()
        u = torch.randn(moved.size, generator=torch.Generator().manual_seed(1))
        losses = []
        for step in (1e-3, -1e-3):
            moved.put(step * u)
            losses.append(objective.backward(model))
        # float32 losses of about 5 nats differ by 1e-6; the quotient of differences is good to 1e-3
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float(slope @ u), rel=0.02, abs=2e-3)
        moved.put(moved.zero)
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_slopes_behind_a_prefix_are_those_of_full_passes_bit_for_bit(family):
    model = make(family).requires_grad_(False)
    before = state_of(model)
    objective = objective_of(9, 4, 7, 3, tokens=18)
    layers = layers_of(model)
    prefix = Prefix(model)
    for layer in [*layers, *reversed(layers)]:  # carried forward, then begun again
        generator = torch.Generator().manual_seed(layer.index + 1)
        with PerturbedWeights(layer.parameters) as moved:
            u = 0.1 * torch.randn(moved.size, generator=generator)
            results = []
            for entered in (-1, layer.index, layer.index):
                moved.put(u)
                with prefix.entering(entered), moved.sloping():
                    results.append((objective.backward(model), moved.slope()))
            for loss, slope in results[1:]:
                assert loss == results[0][0]
                assert torch.equal(slope, results[0][1])
    assert_same(before, state_of(model))


def test_blocks_before_the_layer_run_once_a_batch_and_never_again():
    model = make("llama").requires_grad_(False)
    counts = [0] * LAYERS

    def count(index):
        def forward(module, args, output):
            counts[index] += 1

        return forward

    objective = objective_of(5, 5)
    prefix = Prefix(model)
    handles = [block.mlp.register_forward_hook(count(index)) for index, block in enumerate(blocks(model))]
    with prefix.entering(1):
        for _ in range(4):
            objective.backward(model)
    assert counts == [1, 4]
    with prefix.entering(2):  # carried forward: block 1 runs once more, block 0 not
        for _ in range(3):
            objective.backward(model)
    assert counts == [1, 5]
    prefix.clear()
    with prefix.entering(2):
        objective.backward(model)
    assert counts == [2, 6]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("room", [0, 5 * 16 * 4])  # none, and one batch of 5 tokens of width 16 in float32
def test_batches_beyond_the_room_are_run_whole_and_give_the_same(room):
    model = make("llama").requires_grad_(False)
    objective = objective_of(5, 3, tokens=5)
    expected = objective.backward(model)
    runs = []
    handle = blocks(model)[0].mlp.register_forward_hook(lambda *given: runs.append(1))
    prefix = Prefix(model, room=room)
    with prefix.entering(1):
        assert [objective.backward(model) for _ in range(3)] == [expected] * 3
    handle.remove()
    assert len(runs) == (6 if room == 0 else 4)


def test_a_prefix_is_taken_away_after_an_error():
    model = make("gpt2").requires_grad_(False)
    before = state_of(model)
    with stopping(), Prefix(model).entering(1):
        objective_of(4).backward(model)
        raise Stop
    assert_same(before, state_of(model))


def test_logits_are_changed_inside_and_only_there():
    model = model_of("llama")
    ids = torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        plain = model(ids).logits
        with logits_through(model, lambda logits: 2 * logits):
            assert torch.equal(model(ids).logits, 2 * plain)
        assert torch.equal(model(ids).logits, plain)
