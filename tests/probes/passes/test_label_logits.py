"""Logits at labels, against a whole forward pass of every row by itself."""

import pytest
import torch

from probes.passes.batched import NonFiniteError
from probes.passes.label_logits import label_logits, label_units, row_outputs
from probes.text.batches import Example
from probes.text.rows import task_of
from tests.probes.runnable import VOCABULARY, make, model_of, rows_of


class Given:
    """A task with its examples, as the analyses encode it."""

    def __init__(self, task, examples, classes=(), mask_id=None):
        self.task, self.examples, self.classes, self.mask_id = task, examples, classes, mask_id


TEXTS = task_of(["a", "b", "c"])


def sorted_labels(model, encoded, **how):
    """All labels of every row, in order: their logits and targets."""
    parts = list(label_logits(model, encoded, **how))
    rows, logits, targets = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "logits", "targets")
    )
    order = rows.argsort(stable=True)
    return rows[order].tolist(), logits[order], targets[order].tolist()


def forward(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("tokens", [8, 1000])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmoe"])
def test_of_texts_they_are_those_before_each_scored_token(family, tokens):
    model, examples = model_of(family), rows_of(5, 7, 4)
    rows, logits, targets = sorted_labels(model, Given(TEXTS, examples), tokens=tokens)
    assert rows == [0] * 4 + [1] * 6 + [2] * 3
    assert targets == [token for example in examples for token in example.ids[1:]]
    expected = torch.cat([forward(model, example.ids)[:-1] for example in examples])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_of_choices_they_are_those_of_the_right_one():
    task = task_of(
        [
            {"prompt": "p", "choices": ["x", "y"], "answer": 1},
            {"prompt": "p", "choices": ["x", "y"], "answer": 0},
        ]
    )
    model, plain = model_of("llama"), rows_of(5, 6, 4, 7, skip=3)
    examples = [
        Example(ids=example.ids, scored=example.scored, row=index // 2, choice=index % 2)
        for index, example in enumerate(plain)
    ]
    rows, logits, targets = sorted_labels(model, Given(task, examples))
    # The second sequence has 3 scored tokens, the third 1.
    assert rows == [0, 0, 0, 1]
    assert targets == plain[1].ids[3:] + plain[2].ids[3:]
    expected = torch.cat([forward(model, plain[1].ids)[2:-1], forward(model, plain[2].ids)[2:-1]])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_of_a_masked_model_each_place_is_asked_for_by_itself():
    model, examples = model_of("bert"), rows_of(4, 5)
    _, logits, targets = sorted_labels(model, Given(task_of(["a", "b"]), examples, mask_id=3))
    meant = []
    for example in examples:
        for position in range(1, len(example.ids)):
            hidden = [3 if at == position else token for at, token in enumerate(example.ids)]
            meant.append(forward(model, hidden)[position])
    assert targets == [token for example in examples for token in example.ids[1:]]
    torch.testing.assert_close(logits, torch.stack(meant), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert_classes", "llama_classes", "gpt2_classes"])
def test_of_a_classifier_they_are_those_of_the_classes(family):
    task = task_of([{"text": name, "label": label} for name, label in (("a", 2), ("b", 0), ("c", 1))])
    examples = rows_of(5, 7, 4)
    rows, logits, targets = sorted_labels(make(family), Given(task, examples, classes=(2, 0, 1)))
    assert (rows, targets) == ([0, 1, 2], [2, 0, 1])
    alone = [
        sorted_labels(make(family), Given(task, examples, classes=(2, 0, 1)), rows=[row])[1]
        for row in range(3)
    ]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_rows_output_is_the_mean_of_its_projected_logits():
    model, examples = model_of("llama"), rows_of(5, 7, 4)
    encoded = Given(TEXTS, examples)
    directions = torch.randn(3, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    meant = (directions @ forward(model, examples[1].ids)[:-1].double().T).mean(dim=1)
    torch.testing.assert_close(row_outputs(model, encoded, 1, directions), meant, atol=1e-5, rtol=1e-5)


def test_rows_that_have_nothing_to_score_have_no_label():
    examples = [*rows_of(5), Example(ids=[1, 2], scored=[False, False], row=1)]
    assert [unit.row for unit in label_units(Given(task_of(["a", "b"]), examples))] == [0]


def test_logits_that_are_not_finite_name_the_row():
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(NonFiniteError):
        list(label_logits(model, Given(TEXTS, rows_of(5, 7, 4))))
