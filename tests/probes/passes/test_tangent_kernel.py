"""The tangent kernel against all gradients in float64, and first-order change against reverse gradients."""

from contextlib import suppress

import pytest
import torch

from probes.passes.label_logits import row_outputs
from probes.passes.tangent_kernel import (
    first_order,
    projection,
    replaced_parameters,
    tangent_kernel,
    trainable,
    weight_groups,
)
from probes.text.rows import task_of
from tests.probes.passes.test_label_logits import TEXTS, Given
from tests.probes.runnable import VOCABULARY, assert_same, make, model_of, rows_of, state_of

LABELS = task_of([{"text": name, "label": 0} for name in "abc"])


def given(family):
    """Three rows for a family, and how many outputs it has."""
    if family.endswith("classes"):
        return Given(LABELS, rows_of(5, 7, 4), classes=(0, 1, 2)), 3
    return Given(TEXTS, rows_of(5, 7, 4), mask_id=3 if family == "bert" else None), VOCABULARY


def jacobian(model, encoded, directions):
    """Gradients of every row's every output in all weights, one after the other."""
    rows = []
    with trainable(model) as weights, torch.enable_grad():
        for row in range(3):
            for output in row_outputs(model, encoded, row, directions, differentiable=True):
                gradients = torch.autograd.grad(output, weights, allow_unused=True, retain_graph=True)
                rows.append(
                    [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
                )
    return [name for name, _ in model.named_parameters()], rows


FAMILIES = ["llama", "gpt2", "olmoe", "qwen2_moe", "bert", "bert_classes", "llama_classes"]


@pytest.mark.parametrize("family", ["llama", "olmoe", "bert", "llama_classes"])
def test_the_kernel_is_that_of_all_gradients_however_they_are_grouped(family):
    model = model_of(family)
    encoded, classes = given(family)
    directions = projection(1, classes, seed=0)
    _, rows = jacobian(model, encoded, directions)
    J = torch.stack([torch.cat([gradient.double().flatten() for gradient in row]) for row in rows])
    for held in (6000, 2**28):
        kernel = tangent_kernel(model, encoded, range(3), directions[0], held=held)
        torch.testing.assert_close(kernel, J @ J.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_order_change_is_the_gradients_times_the_change_of_weights(family):
    model = model_of(family)
    encoded, classes = given(family)
    directions = projection(4, classes, seed=1)
    generator = torch.Generator().manual_seed(0)
    names, rows = jacobian(model, encoded, directions)
    weights = dict(model.named_parameters())
    delta = {name: torch.randn(weights[name].shape, generator=generator) for name in names}
    meant = [
        sum(float((g.double() * delta[name].double()).sum()) for name, g in zip(names, row, strict=True))
        for row in rows
    ]
    change = first_order(model, encoded, range(3), directions, delta)
    torch.testing.assert_close(
        change.flatten(), torch.tensor(meant, dtype=torch.float64), rtol=2e-4, atol=1e-4
    )


def test_what_does_not_move_changes_nothing():
    model = model_of("llama")
    encoded, classes = given("llama")
    change = first_order(model, encoded, range(3), projection(2, classes, 0), {})
    assert not change.any()


def test_weights_of_which_outputs_are_linear_change_them_exactly_so():
    model, (encoded, _), directions = make("llama"), given("llama"), projection(3, VOCABULARY, 0)
    move = 0.5 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(2))
    before = torch.stack([row_outputs(model, encoded, row, directions).detach() for row in range(3)])
    foretold = first_order(model, encoded, range(3), directions, {"lm_head.weight": move})
    with torch.no_grad():
        model.lm_head.weight.add_(move)
    after = torch.stack([row_outputs(model, encoded, row, directions).detach() for row in range(3)])
    torch.testing.assert_close(after - before, foretold, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "olmoe", "bert_classes"])
def test_a_model_is_left_bit_for_bit_as_it_was(family):
    model = make(family)
    encoded, classes = given(family)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)
    before = state_of(model)
    directions = projection(2, classes, 0)
    tangent_kernel(model, encoded, range(2), directions[0])
    delta = {name: weight.detach() for name, weight in model.named_parameters()}
    first_order(model, encoded, range(2), directions, delta)
    assert_same(before, state_of(model))
    assert model.get_input_embeddings().weight.grad.all()
    assert [name for name, _ in model.named_parameters()] == list(before[0])[: len(list(model.parameters()))]


def test_a_model_is_left_as_it_was_after_an_exception_too():
    model = make("llama")
    before = state_of(model)
    weight = model.lm_head.weight
    with suppress(KeyError), replaced_parameters(model, {id(weight): torch.zeros(1)}):
        assert not isinstance(model.lm_head.weight, torch.nn.Parameter)
        raise KeyError
    assert model.lm_head.weight is weight
    assert_same(before, state_of(model))


def test_a_model_with_functions_that_have_no_forward_derivative_is_named():
    model, (encoded, classes) = model_of("bloom"), given("bloom")
    delta = {name: weight.detach() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"BloomForCausalLM cannot be differentiated forward \("):
        first_order(model, encoded, [0], projection(1, classes, 0), delta)


def test_groups_hold_each_weight_once_and_no_more_than_fits():
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4, 10, 1, 1)]
    # 3 + 4 fill 8, 10 stands alone, 1 + 1 follow.
    sizes = [[weight.numel() for weight in group] for group in weight_groups(weights, 8)]
    assert sizes == [[3, 4], [10], [1, 1]]
