"""Log-likelihoods against transformers' own logits, one row at a time."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from probes.models import body
from probes.passes import scores as forward
from probes.passes.batched import NonFiniteError
from probes.passes.scores import (
    choice_scores,
    class_logits,
    classify_examples,
    masked_token_scores,
    score_examples,
    token_scores,
)
from probes.text.batches import Batch, Example, batches
from probes.text.rows import Row
from tests.probes.runnable import VOCABULARY, assert_same, batch_of, make, model_of, rows_of, state_of

CAUSAL = [
    "llama", "gpt2", "gpt_neox", "qwen2", "gemma", "gemma2", "cohere", "granite", "olmoe", "mixtral", "opt",
    "bloom", "mamba",
]  # fmt: skip


def token_logs(model, batch, **how):
    return token_scores(model, batch, **how).log_likelihoods


def alone(model, example):
    """transformers' logits for one row, without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([example.ids])).logits[0].float()


@pytest.mark.parametrize("family", CAUSAL)
def test_token_log_likelihoods_are_those_of_cross_entropy_on_full_logits(family):
    model, examples = model_of(family), rows_of(9, 5, 7)
    (batch,) = batches(examples, pad_id=0)
    logs = token_logs(model, batch, chunk=4)
    for row, index in enumerate(batch.indices.tolist()):
        ids = torch.tensor(examples[index].ids)
        expected = -cross_entropy(alone(model, examples[index])[:-1], ids[1:], reduction="none")
        torch.testing.assert_close(logs[row, 1 : len(ids)], expected, atol=2e-6, rtol=0)
    assert torch.equal(logs.isnan(), ~batch.scored)


@pytest.mark.parametrize(
    ("family", "field"),
    [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale"), ("granite", "logits_scaling")],
)
def test_a_softcap_or_a_scale_of_the_logits_matters_here(family, field):
    # So that the test above cannot pass by leaving them out.
    model, batch = make(family), batch_of(6)
    other = make(family, **{field: 2 * getattr(model.config, field)})
    moved = token_logs(model, batch) - token_logs(other, batch)
    assert moved.abs().nan_to_num().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])
def test_neither_batching_nor_order_nor_side_nor_padding_nor_chunks_matter(family):
    model, examples = model_of(family), rows_of(4, 9, 2, 7, 9, 3, 6)
    one_by_one = score_examples(model, examples, tokens=1, by_token=True)
    reference = torch.stack(
        [
            torch.log_softmax(alone(model, example).double(), dim=1)[:-1]
            .gather(1, torch.tensor(example.ids[1:])[:, None])
            .sum()
            for example in examples
        ]
    )
    torch.testing.assert_close(one_by_one.log_likelihoods, reference, atol=2e-5, rtol=0)
    for how in (
        {"tokens": 10_000},
        {"side": "left"},
        {"pad_id": 17},
        {"tokens": 20, "side": "left", "pad_id": 5},
    ):
        scores = score_examples(model, examples, by_token=True, **how)
        torch.testing.assert_close(scores.log_likelihoods, reference, atol=2e-5, rtol=0)
        torch.testing.assert_close(scores.top, one_by_one.top, atol=2e-6, rtol=0)
        torch.testing.assert_close(scores.energy, one_by_one.energy, atol=2e-6, rtol=0)
        for mine, theirs in zip(scores.by_token, one_by_one.by_token, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0, equal_nan=True)
    backwards = score_examples(model, examples[::-1])
    torch.testing.assert_close(backwards.log_likelihoods.flip(0), reference, atol=2e-5, rtol=0)
    batch = batch_of(9, 5)
    for chunk in (1, 3, 100):
        torch.testing.assert_close(
            token_logs(model, batch, chunk=chunk),
            token_logs(model, batch), atol=2e-6, rtol=0, equal_nan=True,
        )  # fmt: skip


def test_a_token_changes_nothing_before_it():
    model, batch = model_of("llama"), batch_of(9)
    before = token_logs(model, batch)
    batch.ids[0, 6] = (batch.ids[0, 6] + 1) % VOCABULARY
    after = token_logs(model, batch)
    assert torch.equal(before[0, 1:6], after[0, 1:6])
    assert not torch.equal(before[0, 6:], after[0, 6:])


def test_sums_means_and_losses_count_only_what_is_scored():
    model, examples = model_of("llama"), rows_of(8, 5, skip=3)  # 5 and 2 scored tokens
    examples += rows_of(1)  # nothing before its only token
    scores = score_examples(model, examples, by_token=True)
    assert scores.tokens.tolist() == [5, 2, 0]
    sums = [float(row[3:].double().sum()) for row in scores.by_token[:2]]
    assert scores.log_likelihoods[:2].tolist() == pytest.approx(sums, abs=1e-9)
    assert math.isnan(scores.log_likelihoods[2])
    assert math.isnan(scores.top[2])
    # Every scored token counts once: 7 of them.
    assert scores.mean_loss == pytest.approx(-sum(sums) / 7, abs=1e-9)
    assert scores.log_likelihoods.dtype == torch.float64


def test_confidence_and_energy_are_those_of_the_full_logits():
    model, (example,) = model_of("gemma2"), rows_of(6)
    logits = alone(model, example)[:-1].double()
    scores = score_examples(model, [example])
    assert scores.top.item() == pytest.approx(logits.softmax(1).amax(1).mean().item(), abs=1e-6)
    assert scores.energy.item() == pytest.approx(-logits.logsumexp(1).mean().item(), abs=1e-5)


def test_a_hit_is_a_token_that_no_other_is_likelier_than():
    model, examples = model_of("gemma2"), rows_of(9, 6)
    scores = score_examples(model, examples)
    for index, example in enumerate(examples):
        likeliest = alone(model, example)[:-1].argmax(1)
        right = (likeliest == torch.tensor(example.ids[1:])).double().mean().item()
        assert scores.hit[index].item() == pytest.approx(right, abs=1e-12)
    # what the model says after each prefix is right by construction
    greedy = [3, 4]
    for _ in range(4):
        greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    row = replace(examples[0], ids=greedy, scored=[False, False] + [True] * 4)
    assert score_examples(model, [row]).hit.tolist() == [1.0]


def test_hidden_states_are_pooled_over_tokens_and_not_over_padding():
    model, examples = model_of("llama"), rows_of(8, 3)
    scores = score_examples(model, examples, pooled=True)
    for example, vector in zip(examples, scores.pooled, strict=True):
        with torch.no_grad():
            expected = model.model(input_ids=torch.tensor([example.ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, expected, atol=2e-6, rtol=0)


def test_no_examples_and_empty_ones_give_nothing():
    model = model_of("llama")
    for count in (0, 2):
        scores = score_examples(model, rows_of(*[0] * count), by_token=True)
        assert scores.log_likelihoods.isnan().all()
        assert scores.tokens.tolist() == [0] * count
        assert [len(row) for row in scores.by_token] == [0] * count


def test_only_the_first_tokens_of_a_larger_vocabulary_exist():
    model, example = make("llama"), rows_of(6)[0]
    ids = [token % 30 for token in example.ids]
    batch = Batch(
        ids=torch.tensor([ids]), attention_mask=torch.ones(1, 6, dtype=torch.long),
        position_ids=torch.arange(6)[None], scored=torch.tensor([example.scored]), indices=torch.tensor([0]),
    )  # fmt: skip
    with torch.no_grad():
        logits = model(input_ids=batch.ids).logits[0, :-1, :30]
    expected = -cross_entropy(logits, batch.ids[0, 1:], reduction="none")
    logs = token_logs(model, batch, vocabulary=30)[0, 1:]
    torch.testing.assert_close(logs, expected, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match=r"token \d+ is scored, but the vocabulary is limited to 3"):
        token_logs(model, batch, vocabulary=3)


def test_large_logits_stay_finite_and_exact():
    model, batch = make("llama"), batch_of(6)
    with torch.no_grad():
        # The first hidden unit is 1 at every position; it alone reaches the logits, at 3e4 and -3e4.
        model.lm_head.weight.zero_()
        model.lm_head.weight[:20] = 3e4
        model.lm_head.weight[20:] = -3e4
        hidden = model.model(input_ids=batch.ids).last_hidden_state.double()
    logits = (hidden @ model.lm_head.weight.double().T)[0, :-1]
    expected = torch.log_softmax(logits, dim=1).gather(1, batch.ids[0, 1:, None])[:, 0]
    logs = token_logs(model, batch)[0, 1:].double()
    assert logs.isfinite().all()
    torch.testing.assert_close(logs, expected, rtol=1e-6, atol=1e-4)


def test_a_constant_added_to_all_logits_of_a_position_changes_nothing():
    model, batch = make("llama"), batch_of(9, 5)
    before = token_scores(model, batch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # One vector in every row of the head: its product with the hidden state, another at each position.
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape[1], generator=generator))
    after = token_scores(model, batch)
    assert (after.energy - before.energy).abs().nan_to_num().max() > 0.1
    for name in ("log_likelihoods", "top"):
        torch.testing.assert_close(
            getattr(after, name), getattr(before, name), atol=2e-5, rtol=0, equal_nan=True
        )


def test_in_half_precision_batching_is_noise_of_a_twentieth_of_a_nat_at_most():
    model, examples = make("llama").to(torch.bfloat16), rows_of(4, 9, 2, 7, 9, 3, 6)
    by_itself = score_examples(model, examples, tokens=1)
    noise = (score_examples(model, examples).log_likelihoods - by_itself.log_likelihoods).abs()
    assert (noise <= 0.05 * by_itself.tokens.double().sqrt()).all()


def test_the_head_is_never_given_all_positions():
    model, batch = make("llama"), batch_of(20, 20, 20)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    token_logs(model, batch, chunk=8)
    # One position a row while the body runs; then 3 * 19 targets, 8 at a time.
    assert seen == [3, 8, 8, 8, 8, 8, 8, 8, 1]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model, examples = model_of("llama"), rows_of(5, 5, 5, 5, 4)
    expected = score_examples(model, examples)
    run, sizes = body.run, []

    def cramped(model, batch):
        sizes.append(len(batch.indices))
        if len(batch.indices) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(model, batch)

    monkeypatch.setattr(forward, "run", cramped)
    scores = score_examples(model, examples)
    assert torch.allclose(scores.log_likelihoods, expected.log_likelihoods, atol=2e-5)
    assert sizes[0] == 5
    assert max(sizes[-2:]) <= 2


@pytest.mark.parametrize(("layer", "parameter"), [(0, "mlp.down_proj"), (1, "self_attn.o_proj")])
def test_logits_that_are_not_finite_are_named_by_row_and_layer(layer, parameter):
    model, examples = make("llama"), rows_of(6, 4, 7)
    token = examples[1].ids[2]
    for example in (examples[0], examples[2]):
        example.ids[:] = [value if value != token else (3 if token != 3 else 4) for value in example.ids]
    module = model.model.layers[layer].get_submodule(parameter)

    def overflow(module, args, output):
        # Where the one token stands that only the second row has.
        return output.masked_fill((hidden["ids"] == token)[..., None], torch.inf)

    hidden = {}
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: hidden.update(ids=kwargs["input_ids"]), with_kwargs=True
    )
    module.register_forward_hook(overflow)
    where = "task.jsonl:{}".format
    with pytest.raises(
        NonFiniteError, match=rf"task.jsonl:1: .* NaN or infinite \(first at layer {layer}\)"
    ) as error:
        score_examples(model, examples, where=where)
    assert (error.value.example, error.value.layer) == (1, layer)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_head_that_is_not_finite_is_said_to_be_to_blame():
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"example 0: .*the head is to blame"):
        token_scores(model, batch_of(5))


def test_ids_that_a_model_does_not_have_are_refused_before_it_runs():
    batch = batch_of(5)
    batch.ids[0, 2] = VOCABULARY
    with pytest.raises(ValueError, match="LlamaForCausalLM: has 41 tokens, and none with id 41; is this its"):
        token_scores(model_of("llama"), batch)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert_classes"])
def test_measuring_leaves_a_model_as_it_was_even_in_training_mode_and_after_an_error(family):
    model = make(family).train()
    next(iter(model.children())).eval()  # a mix of modes
    before = state_of(model)
    measure = class_logits if family == "bert_classes" else token_scores
    first, again = measure(model, batch_of(6, 4)), measure(model, batch_of(6, 4))
    if family != "bert_classes":
        first, again = first.log_likelihoods, again.log_likelihoods
    assert torch.equal(first.nan_to_num(), again.nan_to_num())  # no dropout
    assert_same(before, state_of(model))
    batch = batch_of(6, 4)
    batch.position_ids.fill_(10**6)
    batch.ids[0, 0] = -(10**6)
    with pytest.raises((IndexError, RuntimeError)):
        measure(model, batch)
    assert_same(before, state_of(model))


# Masked language models


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_pseudo_likelihoods_are_those_of_each_token_masked_by_itself(family):
    model, examples = model_of(family), rows_of(6, 4)
    mask_id = 2
    for how in ({}, {"tokens": 7}, {"side": "left"}):
        scores = score_examples(model, examples, mask_id=mask_id, by_token=True, **how)
        for example, values in zip(examples, scores.by_token, strict=True):
            for position in range(1, len(example.ids)):
                ids = torch.tensor([example.ids])
                ids[0, position] = mask_id
                with torch.no_grad():
                    logits = model(input_ids=ids).logits[0, position]
                expected = torch.log_softmax(logits, 0)[example.ids[position]]
                torch.testing.assert_close(values[position], expected, atol=2e-6, rtol=0)
    batch = batch_of(6, 4)
    once = masked_token_scores(model, batch, mask_id)
    bit_by_bit = masked_token_scores(model, batch, mask_id, tokens=13)
    torch.testing.assert_close(
        once.log_likelihoods, bit_by_bit.log_likelihoods, atol=2e-6, rtol=0, equal_nan=True
    )


# Choices


def test_choices_are_scored_as_sums_by_token_and_by_byte():
    rows = [
        Row(number=1, prompt="p", choices=("é", "longer"), answer=1),  # 2 and 6 bytes
        Row(number=2, prompt="p", choices=("a", "b", "c"), answer=0),
    ]
    lengths = [[4, 6], [5, 5, 5]]  # 2 tokens of each are the prompt
    examples = []
    for row, several in enumerate(lengths):
        for choice, example in enumerate(rows_of(*several, seed=row, skip=2)):
            examples.append(Example(ids=example.ids, scored=example.scored, row=row, choice=choice))
    scores = score_examples(model_of("llama"), examples)
    choices = choice_scores(scores, examples, rows)
    sums = scores.log_likelihoods
    assert [scored.row for scored in choices] == [0, 1]
    assert choices[0].sum.tolist() == sums[:2].tolist()
    assert choices[0].mean.tolist() == pytest.approx([float(sums[0]) / 2, float(sums[1]) / 4])
    assert choices[0].per_byte.tolist() == pytest.approx([float(sums[0]) / 2, float(sums[1]) / 6])
    assert choices[1].best() == int(sums[2:].argmax())
    assert choices[0].best("per_byte") == int(choices[0].per_byte.argmax())
    # Whatever order the choices are scored in.
    shuffled = [3, 0, 4, 1, 2]
    again = choice_scores(
        score_examples(model_of("llama"), [examples[i] for i in shuffled]),
        [examples[i] for i in shuffled],
        rows,
    )
    for mine, theirs in zip(again, choices, strict=True):
        torch.testing.assert_close(mine.sum, theirs.sum, atol=2e-5, rtol=0)


# Classifiers


@pytest.mark.parametrize("family", ["bert_classes", "roberta_classes", "llama_classes", "gpt2_classes"])
def test_class_logits_are_those_of_each_row_alone(family):
    model, examples = model_of(family), rows_of(7, 3, 5)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([example.ids])).logits for example in examples])
    # Also with a padding id that is not the model's own, and that real tokens have.
    for how in ({}, {"side": "left"}, {"pad_id": examples[0].ids[-1]}, {"tokens": 1}):
        logits = classify_examples(model, examples, **how)
        torch.testing.assert_close(logits, expected, atol=2e-6, rtol=0)


def test_what_is_no_classifier_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM: is no sequence classifier"):
        class_logits(model_of("llama"), batch_of(4))
    with pytest.raises(ValueError, match="has one output, a number and no class"):
        class_logits(make("bert_classes", num_labels=1), batch_of(4))


def test_classes_that_are_not_finite_are_named():
    model = make("llama_classes")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"row index 0: .*first at layer 1"):
        classify_examples(model, rows_of(4, 4))


def test_classes_are_refused_where_the_last_token_cannot_be_told():
    model = make("gpt2_classes")
    every = list(range(VOCABULARY))  # as padding, any of them would be taken for a token
    rows = (every[:31], every[31:])
    examples = [Example(ids=ids, scored=[False] * len(ids), row=row) for row, ids in enumerate(rows)]
    with pytest.raises(
        ValueError, match=r"GPT2ForSequenceClassification: set pad_token_id in its config\.json"
    ):
        classify_examples(model, examples)
    assert model.config.pad_token_id is None
