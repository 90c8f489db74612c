"""Work in step reads what all ask for at once, and a group of matrices is waited for no more than one is."""

from typing import ClassVar

import pytest
import torch

from diagnostics.analyses.intruders import cosine_bounds
from diagnostics.analyses.intruders.decide import decide_all
from diagnostics.analyses.intruders.delta_shape import update_of
from diagnostics.execution import lockstep
from diagnostics.execution.lockstep import read_values
from tests.diagnostics.spectra import orthonormal, values, with_values

# Ways of a tensor to be looked at; each waits for the device that it is on.
LOOKS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__",
)  # fmt: skip


class DeviceTensor(torch.Tensor):
    """As if on another device: what is made with it is so too, until it is copied from there."""

    looks: ClassVar[list[str]] = []


def watched(name):
    method = getattr(torch.Tensor, name)

    def looked(self, *given):
        DeviceTensor.looks.append(name)
        return method(self.as_subclass(torch.Tensor), *given)

    return looked


for name in LOOKS:
    setattr(DeviceTensor, name, watched(name))


@pytest.fixture
def looks(monkeypatch):
    """How often a tensor on another device was looked at, by what."""
    # On a GPU a step does not ask whether its space is exhausted.
    monkeypatch.setattr(cosine_bounds, "_on_cpu", lambda tensor: False)
    DeviceTensor.looks.clear()
    return DeviceTensor.looks


def summing(*rounds):
    """A job that asks round by round, and returns all that it was told."""
    answers = []
    for tensors in rounds:
        values = yield tensors
        answers.append([value.tolist() for value in values])
    return answers


def test_jobs_are_told_what_they_ask_for_whatever_others_ask():
    matrix, flag, number = torch.tensor([[1.0, 2.0]]), torch.tensor(True), torch.tensor(7)
    empty = torch.empty(0, 3)
    jobs = [summing([matrix], [flag, matrix], [empty]), summing(), summing([number, empty, matrix])]
    assert lockstep.run_in_lockstep(jobs) == [
        [[[[1.0, 2.0]]], [1.0, [[1.0, 2.0]]], [[]]],
        [],
        [[7.0, [], [[1.0, 2.0]]]],
    ]
    assert lockstep.run_in_lockstep([]) == []


def test_what_was_read_does_not_change_with_the_tensor():
    tensor = torch.ones(3, dtype=torch.float64)
    (array,) = read_values([tensor])
    tensor += 1
    assert array.tolist() == [1, 1, 1]


def test_an_error_ends_the_others():
    ended = []

    def waiting():
        try:
            yield [torch.ones(1)]
            yield [torch.ones(1)]
        finally:
            ended.append(True)

    def failing():
        yield [torch.ones(1)]
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        lockstep.run_in_lockstep([waiting(), failing(), waiting()])
    assert ended == [True, True]


def pairs(kind, rows, columns, spikes, count):
    """`count` times the same base and tuned, with a new direction among the leading ones."""
    generator = torch.Generator().manual_seed(5)
    base, _, _ = with_values(values(kind, min(rows, columns)), rows, columns, generator)
    left, right = orthonormal(rows, len(spikes), generator), orthonormal(columns, len(spikes), generator)
    tuned = base + left @ torch.diag(torch.tensor(spikes).double()) @ right.mT
    return tuple(W.float().expand(count, -1, -1).as_subclass(DeviceTensor) for W in (base, tuned))


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "tiers"),
    [
        ("outliers", 650, 800, {"subspace", "direct"}),
        ("small", 650, 800, {"subspace", "factor"}),
        ("power", 800, 650, {"subspace", "factor"}),
    ],
)
def test_a_group_of_matrices_is_waited_for_as_often_as_one(looks, kind, rows, columns, tiers):
    waits, decided = [], []
    for count in (1, 3):
        base, tuned = pairs(kind, rows, columns, (4.0, 2.0), count)
        generators = [torch.Generator().manual_seed(0) for _ in range(count)]
        looks.clear()
        decided.append(decide_all(base, tuned, 10, 0.5, generators, pictured=True))
        waits.append(list(looks))
    assert waits[0] == waits[1]
    assert set(waits[0]) == {"cpu"}
    assert len(waits[0]) < 25
    [alone], grouped = decided
    assert {tier for decision in grouped for tier in decision.tier} == set(alone.tier) == tiers
    for decision in grouped:
        assert ((decision.high < 0.5) == (alone.high < 0.5)).all()
        assert decision.singular_values == pytest.approx(alone.singular_values, rel=1e-5)


def test_the_updates_of_a_group_are_measured_with_one_look(looks):
    base, tuned = pairs("power", 650, 800, (4.0, 2.0), 3)
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    jobs = [update_of(W0, W1, None, g) for W0, W1, g in zip(base, tuned, generators, strict=True)]
    looks.clear()
    measured = lockstep.run_in_lockstep(jobs)
    assert looks == ["cpu"]
    assert (
        measured[0]
        == lockstep.run_in_lockstep([update_of(base[0], tuned[0], None, torch.Generator().manual_seed(0))])[0]
    )
