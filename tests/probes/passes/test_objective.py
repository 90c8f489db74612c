"""The gradients of a task's loss against those of transformers' logits, one row at a time, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from diagnostics.evaluation.row_losses import EncodedTask
from probes.passes import backward
from probes.passes.batched import NonFiniteError
from probes.passes.objective import Objective, micro_batches, scoring_units, tokens_of
from probes.text.batches import Example
from probes.text.rows import task_of
from tests.probes.runnable import VOCABULARY, assert_same, make, state_of

MASK = 4
LENGTHS = {"texts": (7, 3, 9, 3, 5), "completions": (8, 4, 9, 5)}
CHOICES = {0: (6, 7), 2: (5, 5, 9), 3: (4, 8)}  # of each row, how long its choices are


def drawn(length, generator):
    return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()


def encoded_of(shape, *, masked=False):
    """Rows of random tokens; row 1 of choices has a choice without a token to score."""
    generator, examples, classes = torch.Generator().manual_seed(1), [], ()
    if shape == "choices":
        rows = [
            {"prompt": "a", "choices": ["b", "c", "d"][: 3 if row == 2 else 2], "answer": 1}
            for row in range(4)
        ]
        lengths = {**CHOICES, 1: (4, 4)}
        for row in range(4):
            prompt = drawn(3, generator)
            for choice, length in enumerate(lengths[row]):
                ids = prompt + drawn(length - 3, generator)
                scored = [position >= 3 and (row, choice) != (1, 1) for position in range(length)]
                examples.append(Example(ids=ids, scored=scored, row=row, choice=choice))
    elif shape == "label":
        rows = [{"text": "a", "label": row % 3} for row in range(5)]
        classes = tuple(row % 3 for row in range(5))
        for row, length in enumerate((4, 0, 7, 2, 4)):
            examples.append(Example(ids=drawn(length, generator), scored=[False] * length, row=row))
    else:
        rows = [
            {"text": "a"} if shape == "texts" else {"prompt": "a", "completion": "b"} for _ in LENGTHS[shape]
        ]
        first = 1 if shape == "texts" else 3
        for row, length in enumerate(LENGTHS[shape]):
            scored = [position >= first for position in range(length)]
            if row == 3:  # nothing to score
                scored = [False] * length
            examples.append(Example(ids=drawn(length, generator), scored=scored, row=row))
    return EncodedTask(
        task=task_of(rows),
        examples=examples,
        classes=classes,
        mask_id=MASK if masked else None,
        batch_tokens=10_000,
        notes=(),
    )


def token_nats(model, example, masked):
    """Of each scored token, from transformers' logits for this one sequence."""
    ids, places = torch.tensor(example.ids), [i for i, scored in enumerate(example.scored) if scored]
    if not masked:
        logits = model(input_ids=ids[None]).logits[0]
        return cross_entropy(logits[[position - 1 for position in places]], ids[places], reduction="none")
    nats = []
    for position in places:
        hidden = ids.clone()
        hidden[position] = MASK
        nats.append(cross_entropy(model(input_ids=hidden[None]).logits[0, position], ids[position]))
    return torch.stack(nats)


def expected_loss(model, encoded, rows):
    """The loss by its definition."""
    masked, shape = encoded.mask_id is not None, encoded.task.shape
    if shape == "label":
        return torch.stack(
            [
                cross_entropy(
                    model(input_ids=torch.tensor([encoded.examples[row].ids])).logits[0],
                    torch.tensor(encoded.classes[row]),
                )
                for row in rows
            ]
        ).mean()
    if shape == "choices":
        nats = []
        for row in rows:
            choices = [e for e in encoded.examples if e.row == row]
            sums = torch.stack([-token_nats(model, choice, masked).sum() for choice in choices])
            nats.append(-sums.log_softmax(0)[encoded.task.rows[row].answer])
        return torch.stack(nats).mean()
    return torch.cat([token_nats(model, encoded.examples[row], masked) for row in rows]).mean()


CASES = {
    "texts": ("gpt2", "texts", False),
    "completions": ("gpt2", "completions", False),
    "choices": ("gpt2", "choices", False),
    "texts, untied": ("gpt_neox", "texts", False),
    "masked texts": ("bert", "texts", True),
    "masked choices": ("bert", "choices", True),
    "labels": ("bert_classes", "label", False),
    "labels at the last token": ("gpt2_classes", "label", False),
}
SCORED = {"texts": (0, 1, 2, 4), "completions": (0, 1, 2), "choices": (0, 2, 3), "label": (0, 2, 3, 4)}


@pytest.fixture(params=CASES)
def case(request):
    """A model in float64, a task, and the rows that have something to score."""
    family, shape, masked = CASES[request.param]
    model = make(family).double()
    model.zero_grad()
    return model, encoded_of(shape, masked=masked), SCORED[shape]


def gradients_of(model):
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }


def descended(model, objective, *args, **how):
    """The loss, and gradients of a model that had none."""
    model.zero_grad()
    loss = objective.backward(model, *args, **how)
    return loss, gradients_of(model)


def assert_close(actual, expected, atol=1e-10):
    assert actual[0] == pytest.approx(float(expected[0]), abs=atol)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=atol, rtol=0, msg=name)


def test_loss_and_gradients_are_those_of_transformers_logits(case):
    model, encoded, rows = case
    loss = expected_loss(model, encoded, rows)
    loss.backward()
    expected = loss.item(), gradients_of(model)
    assert max(float(gradient.abs().max()) for gradient in expected[1].values()) > 0.01
    objective = Objective(encoded)
    assert objective.rows == rows
    assert_close(descended(model, objective), expected)


def test_the_loss_is_the_mean_of_what_rows_are_measured_by(case):
    model, encoded, rows = case
    measured = encoded.measure(model)
    mean = sum(measured.nats[row] for row in rows) / measured.units.sum()
    assert Objective(encoded).backward(model) == pytest.approx(mean, abs=2e-6)
    assert Objective(encoded).units() == measured.units.sum()
    some = [rows[2], rows[0]]
    mean = sum(measured.nats[row] for row in some) / sum(measured.units[row] for row in some)
    assert Objective(encoded).backward(model, some) == pytest.approx(mean, abs=2e-6)


def test_neither_micro_batches_nor_chunks_of_the_head_matter(case, monkeypatch):
    model, encoded, _ = case
    expected = descended(model, Objective(encoded))
    assert_close(descended(model, Objective(encoded, tokens=1)), expected)
    assert_close(descended(model, Objective(encoded, tokens=20)), expected)
    monkeypatch.setattr(backward, "at_once", lambda model: 2)
    assert_close(descended(model, Objective(encoded)), expected)


def test_gradients_accumulate_and_are_scaled_and_a_row_counts_as_often_as_it_is_given(case):
    model, encoded, rows = case
    objective = Objective(encoded)
    once = descended(model, objective)
    objective.backward(model, scale=0.5)
    assert_close((once[0], gradients_of(model)), (once[0], {n: 1.5 * g for n, g in once[1].items()}))
    assert_close(descended(model, objective, [*rows, *rows]), once)


def test_a_weight_that_requires_no_gradient_gets_none_and_the_others_the_same(case):
    model, encoded, _ = case
    objective = Objective(encoded)
    _, full = descended(model, objective)
    weights = dict(model.named_parameters())
    # The first block's, those behind it, or the head's alone.
    for kept in (
        lambda index: index % 3 == 0,
        lambda index: index < len(weights) // 2,
        lambda index: index >= len(weights) - 2,
    ):
        for index, weight in enumerate(weights.values()):
            weight.requires_grad_(kept(index))
        model.zero_grad()
        objective.backward(model)
        for index, (name, weight) in enumerate(weights.items()):
            if kept(index):
                torch.testing.assert_close(weight.grad, full[name], atol=1e-10, rtol=0)
            else:
                assert weight.grad is None


def test_with_nothing_that_requires_a_gradient_it_is_the_loss_alone(case):
    model, encoded, _ = case
    loss = Objective(encoded).backward(model)
    model.zero_grad()
    model.requires_grad_(False)
    assert Objective(encoded).backward(model) == pytest.approx(loss, abs=1e-12)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_model_is_as_it_was_and_dropout_is_off(case):
    model, encoded, _ = case
    quiet = descended(model, Objective(encoded))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    next(model.children()).eval()  # modes are each module's own
    model.zero_grad()
    before = state_of(model)
    with torch.no_grad():
        loss = Objective(encoded).backward(model)
    assert_close((loss, gradients_of(model)), quiet)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError()])
@pytest.mark.parametrize("going", ["forward", "backward"])
def test_a_micro_batch_is_halved_when_memory_runs_out_and_no_gradient_is_added_twice(case, going, error):
    model, encoded, _ = case
    expected = descended(model, Objective(encoded))
    block = getattr(model, model.base_model_prefix)
    block = (getattr(block, "h", None) or getattr(block, "layers", None) or block.encoder.layer)[1]
    failed = []
    # What is not divided fits.
    most = max(2, *(len(unit.sequences) for unit in scoring_units(encoded)))

    def look(module, *tensors):
        hidden = tensors[-1][0]
        if hidden.shape[0] > most and hidden.dim() == 3:
            failed.append(hidden.shape[0])
            raise error

    # Of the second of two blocks: what stands behind it has its gradient when it fails.
    register = block.register_forward_pre_hook if going == "forward" else block.register_full_backward_hook
    handle = register(look)
    try:
        objective = Objective(encoded)
        assert_close(descended(model, objective), expected)
        assert failed
        tries = len(failed)
        assert_close(descended(model, objective), expected)
        assert len(failed) == tries  # what did not fit is not tried again
        assert all(weight.requires_grad for weight in model.parameters())
    finally:
        handle.remove()


def test_a_hook_sees_every_gradient_once_a_micro_batch_and_may_take_it_also_when_memory_runs_out(case):
    model, encoded, _ = case
    _, expected = descended(model, Objective(encoded))
    model.zero_grad()
    sums = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    seen, state = [], {"fails": 1}

    def taker(name):
        def take(weight):
            if name.endswith("1.mlp.c_fc.weight") and state["fails"]:
                state["fails"] -= 1
                raise torch.OutOfMemoryError("no memory")
            sums[name] += weight.grad
            weight.grad = None
            seen.append(name)

        return take

    handles = [
        weight.register_post_accumulate_grad_hook(taker(name)) for name, weight in model.named_parameters()
    ]
    Objective(encoded).backward(model)
    for handle in handles:
        handle.remove()
    for name, total in sums.items():
        torch.testing.assert_close(total, expected[name], atol=1e-10, rtol=0)
    if model.base_model_prefix == "transformer":
        assert not state["fails"]
        assert len(seen) > len({*seen})
    else:
        assert len(seen) == len({*seen})


def test_one_row_that_does_not_fit_into_memory_is_named(case):
    model, encoded, _ = case

    def refuse(module, given):
        raise torch.OutOfMemoryError("no memory")

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=r"rows:3: its \d+ tokens do not fit into memory; lower max_length"):
        Objective(encoded).backward(model)
    handle.remove()


def test_another_error_is_not_taken_for_want_of_memory(case):
    model, encoded, _ = case

    def refuse(module, given):
        raise RuntimeError("broken")

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="broken"):
        Objective(encoded).backward(model)
    handle.remove()


def test_logits_that_are_not_finite_are_an_error_that_names_row_and_layer(case):
    model, encoded, rows = case
    row = rows[1]
    index = next(i for i, example in enumerate(encoded.examples) if example.row == row)
    # A token that no other row has.
    example = encoded.examples[index]
    for other in encoded.examples:
        other.ids[:] = [3 if token == 7 else token for token in other.ids]
    example.ids[0] = 7
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, given, output: output.masked_fill((given[0] == 7)[..., None], torch.nan)
    )
    with pytest.raises(NonFiniteError, match=rf"rows:{row + 1}: its logits are NaN .*first at layer 0"):
        Objective(encoded).backward(model)
    handle.remove()


def test_nothing_to_score_is_an_error(case):
    model, encoded, _ = case
    without = next(row for row in range(5) if row not in Objective(encoded).rows)
    with pytest.raises(ValueError, match="rows: none of the 1 rows asked for has anything to score"):
        Objective(encoded).backward(model, [without])


def test_a_uniform_model_loses_the_logarithm_of_what_it_chooses_from():
    for family, shape, masked, nats in (
        ("gpt2", "texts", False, math.log(VOCABULARY)),
        ("bert", "texts", True, math.log(VOCABULARY)),
        ("bert_classes", "label", False, math.log(3)),
    ):
        model = make(family)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        assert Objective(encoded_of(shape, masked=masked)).backward(model) == pytest.approx(nats, abs=1e-6)
    # Choices of 3 and 4 tokens: the shorter is 1 / (1 + 1/41) likely, and the second is right. Row 2 has
    # choices of 2, 2 and 6 tokens, row 3 of 1 and 5.
    model = make("gpt2")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    V = VOCABULARY
    rows = [
        -math.log(V**-4 / (V**-3 + V**-4)),
        -math.log(V**-2 / (2 * V**-2 + V**-6)),
        -math.log(V**-5 / (V**-1 + V**-5)),
    ]
    assert Objective(encoded_of("choices")).backward(model) == pytest.approx(sum(rows) / 3, abs=1e-5)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=4), min_size=1, max_size=12),
    tokens=st.integers(1, 200),
)
def test_every_row_is_in_one_micro_batch_that_is_no_larger_than_it_may_be(lengths, tokens):
    rows = [{"prompt": "a", "choices": ["b"] * max(2, len(several)), "answer": 0} for several in lengths]
    examples = [
        Example(ids=[5] * length, scored=[False] + [True] * (length - 1), row=row, choice=choice)
        for row, several in enumerate(lengths)
        for choice, length in enumerate(several)
    ]
    encoded = EncodedTask(
        task=task_of(rows), examples=examples, classes=(), mask_id=None, batch_tokens=1, notes=()
    )
    parts = list(micro_batches(scoring_units(encoded), tokens))
    assert sorted(unit.row for part in parts for unit in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or tokens_of(part) <= tokens for part in parts)
    longest = [max(unit.length for unit in part) for part in parts]
    assert longest == sorted(longest, reverse=True)
