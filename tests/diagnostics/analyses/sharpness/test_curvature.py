"""Both ends of a Hessian's spectrum and its trace, of known matrices and of a model against autograd."""

import numpy as np
import pytest
import torch
from torch.func import functional_call

from diagnostics.analyses.sharpness.curvature import (
    HessianProduct,
    graph,
    refuses_second_derivative,
    spectrum,
)
from diagnostics.evaluation.row_losses import EncodedTask
from probes.models.perturb import PerturbedWeights
from probes.passes.objective import Objective
from probes.text.rows import task_of
from tests.probes.runnable import make, rows_of


def test_both_ends_and_the_trace_of_a_known_matrix():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    values = np.linspace(-5, 2, 30)
    M = torch.tensor(Q @ np.diag(values) @ Q.T)
    estimate = spectrum(
        lambda v: M @ v, torch.zeros(30, dtype=torch.float64), probes=200, steps=30,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert (estimate.top, estimate.bottom) == (pytest.approx(2, rel=1e-3), pytest.approx(-5, rel=1e-3))
    assert abs(estimate.trace - values.sum()) < 4 * estimate.trace_error
    small = spectrum(
        lambda v: torch.tensor([3.0, -1.0]) * v, torch.zeros(2), generator=torch.Generator().manual_seed(0)
    )
    assert (small.top, small.bottom, small.trace) == (pytest.approx(3), pytest.approx(-1), pytest.approx(2))


def test_the_ends_lie_within_the_true_ones_and_nothing_has_none():
    rng = np.random.default_rng(1)
    A = rng.standard_normal((60, 60))
    M = torch.tensor(A + A.T)
    low, high = np.linalg.eigvalsh(M)[[0, -1]]
    estimate = spectrum(
        lambda v: M @ v, torch.zeros(60, dtype=torch.float64), generator=torch.Generator().manual_seed(0)
    )
    assert low <= estimate.bottom <= 0.95 * low
    assert 0.95 * high <= estimate.top <= high
    none = spectrum(torch.zeros_like, torch.zeros(5), generator=torch.Generator().manual_seed(0))
    assert none == (0, 0, 0, 0)


def test_products_are_those_of_the_whole_hessian():
    model = make("llama").double().requires_grad_(False)
    examples = rows_of(5, 7)
    task = EncodedTask(
        task=task_of(["one", "two"]), examples=examples, classes=(), mask_id=None, batch_tokens=99, notes=()
    )
    weight = model.model.layers[1].input_layernorm.weight
    name = "model.layers.1.input_layernorm.weight"
    assert float(graph(model, task, (0, 1))) == pytest.approx(Objective(task).backward(model), rel=1e-6)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self):
            return graph(self.inner, task, (0, 1))

    def loss(value):
        return functional_call(Wrapped(), {f"inner.{name}": value}, ())

    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        H = torch.autograd.functional.hessian(loss, weight.detach().clone())
    c = weight.detach().abs()
    with PerturbedWeights([weight]) as moved:
        v = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        twice = HessianProduct(model, task, (0, 1), moved)
        products = [twice.product(vector) for vector in (v, 2 * v, v)]
    assert torch.allclose(products[0], c * (H @ (c * v)), rtol=1e-4, atol=1e-7)
    # The graph is kept, and each product is of its own vector.
    assert torch.equal(products[0], products[2])
    assert torch.allclose(products[1], 2 * products[0])
    assert weight.grad is None
    assert not weight.requires_grad


def test_operations_without_a_second_derivative_are_told_from_other_failures_of_torch():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        (slope,) = torch.autograd.grad(attended.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError) as fused:
        torch.autograd.grad(slope.sum(), q)
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**60)
    assert refuses_second_derivative(fused.value)
    assert not refuses_second_derivative(full.value)
    assert not refuses_second_derivative(torch.OutOfMemoryError("CUDA out of memory."))
