"""One running model for every graft, control and set; rows are searched, chosen on and reported apart."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.analyses.skills.evaluator import (
    MIN_ROWS,
    SPLITS,
    GraftEvaluator,
    eligible_tensors,
    layer_lookup,
    select_rows,
    split_rows,
)
from diagnostics.evaluation.row_losses import encoded
from probes.checkpoints.pair import CheckpointPair
from probes.models.two_sided import TwoSidedModel
from probes.text.rows import task_of
from tests.diagnostics import planted
from tests.probes.runnable import assert_same, make, state_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

SHARES = (0.4, 0.2, 0.4)


@given(st.lists(st.integers(0, 60), min_size=120, max_size=160), st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_no_row_is_in_two_splits_and_neither_is_what_it_says(numbers, seed):
    task = task_of([{"text": f"row {number}"} for number in [*numbers, *range(60)]])
    rows = split_rows(task, SHARES, seed)
    assert sorted(row for split in rows.values() for row in split) == list(range(len(task.rows)))
    texts = [{task.rows[row].text for row in rows[name]} for name in SPLITS]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert split_rows(task, SHARES, seed) == rows
    assert split_rows(task, SHARES, seed + 1) != rows


def test_splits_have_their_shares():
    rows = split_rows(task_of([{"text": str(i)} for i in range(200)]), (0.5, 0.2, 0.3), 0)
    assert [len(rows[name]) for name in SPLITS] == [100, 40, 60]


def test_too_few_rows_say_how_many_are_needed():
    # The smallest split is a fifth: 8 of 40.
    split_rows(task_of([{"text": str(i)} for i in range(40)]), SHARES, 0)
    with pytest.raises(ValueError, match=r"tiny: has 39 rows; at least 40 .* \(shares 0.4, 0.2, 0.4\)"):
        split_rows(task_of([{"text": str(i)} for i in range(39)], ref="tiny"), SHARES, 0)
    with pytest.raises(ValueError, match=r"has 80 rows, 2 of them different; at least 40"):
        split_rows(task_of([{"text": str(i % 2)} for i in range(80)]), SHARES, 0)
    assert MIN_ROWS == 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pair with a planted skill, in files."""
    entries = planted.draw(0, "small", 8, 1)
    return planted.save_pair(tmp_path_factory.mktemp("planted"), {"small": entries}, steps=3)


@pytest.fixture
def evaluator(saved):
    with TwoSidedModel(CheckpointPair(*saved)) as two_sided:
        task = planted.rows("small", 40)
        encoded_task = encoded(
            two_sided.editable, task, max_length=None, chat_template=False, batch_tokens=300
        )
        yield GraftEvaluator(two_sided, {("small", "report"): encoded_task}, "blocks")


def weights(two_sided):
    return {name: tensor.clone() for name, tensor in two_sided.model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_part_of_a_task_is_measured_as_in_the_whole(evaluator):
    full = evaluator.sets["small", "report"]
    rows = [3, 4, 11, 30]
    some = select_rows(full, rows)
    assert [some.task.where(i) for i in range(4)] == [full.task.where(row) for row in rows]
    np.testing.assert_allclose(
        some.measure(evaluator.two_sided.model).nats,
        full.measure(evaluator.two_sided.model).nats[rows],
        atol=1e-5,
    )


def answers_of(evaluator, side):
    evaluator.two_sided.become(side)
    return evaluator.answers([KEY])[KEY].logs


KEY = ("small", "report")


def test_no_entry_is_base_every_entry_is_tuned_and_the_rest_is_the_complement(evaluator):
    two_sided = evaluator.two_sided
    base, tuned = answers_of(evaluator, "base"), answers_of(evaluator, "tuned")
    assert not np.array_equal(base, tuned)
    every = {name: torch.arange(count) for name, count in evaluator.movement.entries.items()}
    assert np.array_equal(evaluator.graft({}, [KEY])[KEY].logs, base)
    # Nothing outside the blocks was changed, so that all of them are all there is.
    assert evaluator.outside == []
    assert np.array_equal(evaluator.graft(every, [KEY])[KEY].logs, tuned)
    assert np.array_equal(evaluator.full_graft([KEY])[KEY].logs, tuned)
    assert np.array_equal(evaluator.complement(every, [KEY])[KEY].logs, base)
    some = evaluator.movement.largest(300)
    rest = {name: torch.tensor(sorted(set(range(count)) - set(some.get(name, torch.empty(0)).tolist())))
            for name, count in evaluator.movement.entries.items()}  # fmt: skip
    assert np.array_equal(evaluator.graft(some, [KEY])[KEY].logs, evaluator.complement(rest, [KEY])[KEY].logs)
    assert two_sided.side == "base"


def test_interpolation_is_base_at_0_and_tuned_at_1_and_leaves_nothing_behind(evaluator):
    base, tuned = answers_of(evaluator, "base"), answers_of(evaluator, "tuned")
    evaluator.two_sided.become("base")
    before = state_of(evaluator.two_sided.model)
    assert np.array_equal(evaluator.interpolated(0.0, [KEY])[KEY].logs, base)
    assert np.array_equal(evaluator.interpolated(1.0, [KEY])[KEY].logs, tuned)
    half = evaluator.interpolated(0.5, [KEY])[KEY].logs
    assert not np.array_equal(half, base)
    assert_same(before, state_of(evaluator.two_sided.model))


def test_whatever_fails_the_model_is_tuned_again_in_the_end(saved, monkeypatch):
    with TwoSidedModel(CheckpointPair(*saved)) as two_sided:
        before = weights(two_sided)
        evaluator = GraftEvaluator(two_sided, {}, "blocks")
        monkeypatch.setattr(GraftEvaluator, "answers", lambda self, keys: 1 / 0)
        some = evaluator.movement.largest(50)
        for run in (
            lambda: evaluator.graft(some, []),
            lambda: evaluator.complement(some, []),
            lambda: evaluator.interpolated(0.5, []),
            lambda: evaluator.full_graft([]),
        ):
            with pytest.raises(ZeroDivisionError):
                run()
            two_sided.become("tuned")
            assert same(before, weights(two_sided))
            two_sided.become("base")
    assert same(before, weights(two_sided))


def test_what_is_tuned_outside_the_blocks_stays_base_in_a_graft(saved, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(saved[1])
    with torch.no_grad():
        model.lm_head.weight[2:5] += 1.0
    model.save_pretrained(tmp_path)
    with TwoSidedModel(CheckpointPair(saved[0], tmp_path)) as two_sided:
        evaluator = GraftEvaluator(two_sided, {}, "blocks")
        assert evaluator.outside == ["lm_head.weight"]
        head = {side: two_sided.read("lm_head.weight", side) for side in ("base", "tuned")}
        seen = []
        evaluator.answers = lambda keys: seen.append(weights(two_sided)) or {}
        evaluator.full_graft([])
        assert torch.equal(seen[0]["lm_head.weight"], head["base"])
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(seen[0][name], two_sided.read(name, "tuned"))
        assert "lm_head.weight" in GraftEvaluator(two_sided, {}, "everything").shapes


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_classes", "mixtral", "gpt_oss", "olmoe"])
def test_eligible_are_weights_biases_and_norms_of_the_blocks(family, tmp_path):
    for seed in (0, 1):
        make(family, seed).save_pretrained(tmp_path / str(seed))
    with TwoSidedModel(CheckpointPair(tmp_path / "0", tmp_path / "1")) as two_sided:
        blocks = eligible_tensors(two_sided, "blocks")
        matrices = eligible_tensors(two_sided, "matrices")
        everything = eligible_tensors(two_sided, "everything")
        assert set(matrices) < set(blocks) < set(everything)
        assert set(everything) == {name for name in two_sided.in_both if "inv_freq" not in name}
        inside = {name for name in two_sided.in_both if ".0." in name or ".1." in name}
        assert set(blocks) == inside
        assert not any("norm" in name.lower() or name.endswith("bias") for name in matrices)
        layer = layer_lookup(blocks)
        assert {layer(name) for name in blocks} == {0, 1}
        assert layer("lm_head.weight") is None


def test_blocks_in_stages_are_counted_through():
    names = [f"encoder.stages.{s}.blocks.{b}.fc.weight" for s in range(2) for b in range(2)]
    layer = layer_lookup(names)
    assert [layer(name) for name in names] == [0, 1, 2, 3]


def test_an_adapter_is_its_merged_weights(saved, tmp_path):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(saved[0]), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    with TwoSidedModel(CheckpointPair(saved[0], tmp_path)) as two_sided:
        evaluator = GraftEvaluator(two_sided, {}, "blocks")
        assert set(evaluator.movement.entries) == {
            f"model.layers.{layer}.{name}.weight"
            for layer in range(2)
            for name in ("self_attn.q_proj", "mlp.down_proj")
        }
