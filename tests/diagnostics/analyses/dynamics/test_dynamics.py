"""A run of tiny models: each number against what a naive computation gives, and what must not move one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.dynamics.analysis import training_dynamics
from diagnostics.analyses.dynamics.measures import alignment
from diagnostics.analyses.dynamics.tables import cosine, labels_of, linearity_gap
from diagnostics.numerics.kernel_alignment import alignment as kernel_alignment
from diagnostics.numerics.kernel_alignment import cka
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.series import CheckpointSeries, RecordedSeries, TooShortError
from probes.passes.label_logits import row_outputs
from probes.passes.tangent_kernel import projection
from probes.text.rows import task_of
from tests.diagnostics.chains import constant, save_chain, save_llama, save_tokenizer
from tests.probes.passes.test_label_logits import Given
from tests.probes.runnable import make

LETTERS = "abcdef"
TASK = ["abcab", "fedcba", "acbd", "badef", "aabbcc", "cafe", "deaf", "bead"]
TRAIN = ["abcabc", "fed", "cab", "face"]
QUICK = {"probes": 6, "vertices": 8, "outputs": 4, "batch": 3}


def model_at(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return [save_llama(root / f"step{5 * i}", seed=1, characters=LETTERS, shift=0.02 * i) for i in range(3)]


@pytest.fixture(scope="module")
def result(places):
    return training_dynamics(places, TASK, TRAIN, **QUICK)


def examples_of(texts):
    """The token ids of texts: 0 begins each, letters follow from 1."""
    return [[0, *(LETTERS.index(letter) + 1 for letter in text)] for text in texts]


def test_logit_scale_and_margin_are_means_over_all_label_positions(result, places):
    steps = result.tables["steps"]
    assert list(steps["step"]) == [0, 5, 10]
    for checkpoint, row in zip(places, steps.to_dict("records"), strict=True):
        model = model_at(checkpoint)
        for role, texts in (("task", TASK), ("train", TRAIN)):
            scales, margins, losses = [], [], []
            for ids in examples_of(texts):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
                for z, label in zip(logits, ids[1:], strict=False):
                    scales.append(math.sqrt(np.mean((z - z.mean()) ** 2)))
                    margins.append(z[label] - np.delete(z, label).max())
                    losses.append(math.log(np.exp(z - z[label]).sum()))
            assert row[f"logit_scale_{role}"] == pytest.approx(np.mean(scales), rel=1e-5)
            assert row[f"margin_{role}"] == pytest.approx(np.mean(margins), abs=1e-5)
            assert row[f"loss_{role}"] == pytest.approx(np.mean(losses), abs=1e-5)
            assert row[f"collapsed_{role}"] == 0


def test_the_cosine_is_that_of_minus_the_gradient_with_each_matrix(result, places):
    tensors = result.tables["tensors"].set_index(["step", "tensor"])
    # The batch is 3 of the 4 train rows, drawn at random: whichever 3 give the unembedding's cosine.
    model = model_at(places[2]).double()
    candidates = {}
    for left_out in range(4):
        model.zero_grad()
        rows = [ids for index, ids in enumerate(examples_of(TRAIN)) if index != left_out]
        total = 0.0
        for ids in rows:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        (total / sum(len(ids) - 1 for ids in rows)).backward()
        candidates[left_out] = {
            name: (p.detach(), -p.grad) for name, p in model.named_parameters() if p.ndim > 1
        }
        candidates[left_out] = {
            name: float((W * G).sum() / W.norm() / G.norm()) for name, (W, G) in candidates[left_out].items()
        }
    measured = tensors.loc[10]["nlm_cosine"]
    nearest = min(
        candidates.values(), key=lambda cosines: abs(cosines["lm_head.weight"] - measured["lm_head.weight"])
    )
    assert set(measured.index) == set(nearest)
    for name, value in nearest.items():
        assert measured[name] == pytest.approx(value, abs=1e-5), name
    assert result.metrics["nlm_unembedding"] == pytest.approx(nearest["lm_head.weight"], abs=1e-5)
    heads = result.tables["tensors"].query("unembedding")
    assert set(heads["tensor"]) == {"lm_head.weight"}


def test_movement_is_the_distance_from_the_first_over_its_length(result, places):
    tensors = result.tables["tensors"].set_index(["step", "tensor"])
    states = [
        {name: p.detach().double() for name, p in model_at(checkpoint).named_parameters()}
        for checkpoint in places
    ]
    for index, step in ((1, 5), (2, 10)):
        for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
            moved = (states[index][name] - states[0][name]).norm() / states[0][name].norm()
            assert tensors.loc[(step, name), "movement"] == pytest.approx(float(moved), rel=1e-5)
    flat = [torch.cat([p.flatten() for p in state.values()]) for state in states]
    assert result.metrics["movement"] == pytest.approx(
        float((flat[2] - flat[0]).norm() / flat[0].norm()), rel=1e-5
    )


def outputs_and_gradients(checkpoint, texts, directions):
    """Outputs of every row, and all gradients of the first of them, in float64."""
    model = model_at(checkpoint).double()
    encoded = encoded_of(texts)
    values, J = [], []
    for row in range(len(texts)):
        outputs = row_outputs(model, encoded, row, directions, differentiable=True)
        values.append(outputs.detach())
        grads = torch.autograd.grad(outputs[0], list(model.parameters()))
        J.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(values), torch.stack(J)


def encoded_of(texts):
    from probes.text.batches import Example

    rows = examples_of(texts)
    return Given(
        task_of(texts),
        [Example(ids=ids, scored=[False] + [True] * (len(ids) - 1), row=at) for at, ids in enumerate(rows)],
    )


def test_kernel_and_linearity_gap_are_those_of_all_gradients(places):
    result = training_dynamics([places[0], places[2]], TASK, **QUICK | {"probes": 8, "outputs": 1})
    directions = projection(1, len(LETTERS) + 1, 0)
    (f0, J0), (f, J) = (
        outputs_and_gradients(checkpoint, TASK, directions) for checkpoint in (places[0], places[2])
    )
    K0, K = ((jacobian @ jacobian.T).numpy() for jacobian in (J0, J))
    assert result.metrics["kernel_cka"] == pytest.approx(cka(K, K0), abs=1e-4)
    theta0, theta = (
        torch.cat([p.detach().double().flatten() for p in model_at(checkpoint).parameters()])
        for checkpoint in (places[0], places[2])
    )
    rest = (f - f0)[:, 0] - J0 @ (theta - theta0)
    assert result.metrics["linearity_gap"] == pytest.approx(float(rest.norm() / (f - f0).norm()), rel=1e-3)


def test_a_run_whose_head_alone_moves_is_linear_in_its_weights(places, tmp_path):
    model = model_at(places[0])
    with torch.no_grad():
        model.lm_head.weight.add_(
            torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    model.save_pretrained(tmp_path / "moved")
    save_tokenizer(tmp_path / "moved", LETTERS)
    result = training_dynamics(
        CheckpointSeries([places[0], tmp_path / "moved"], steps=[0, 1]), TASK, kernel=False, **QUICK
    )
    assert result.metrics["linearity_gap"] == pytest.approx(0, abs=1e-4)
    tensors = result.tables["tensors"].query("step == 1").set_index("tensor")["movement"]
    assert (tensors.drop("lm_head.weight") == 0).all()
    assert tensors["lm_head.weight"] > 0
    assert "kernel_cka" not in result.metrics


def test_a_checkpoint_against_itself_has_not_moved_and_no_gap_is_made_up(places):
    result = training_dynamics(CheckpointSeries([places[0]] * 2, steps=[0, 1]), TASK, **QUICK)
    m = result.metrics
    assert m["movement"] == 0
    assert (m["kernel_cka"], m["kernel_cka_debiased"]) == (pytest.approx(1), pytest.approx(1))
    assert m["logit_scale_ratio"] == m["local_complexity_ratio"] == 1
    assert "linearity_gap" not in m


@given(st.floats(-3, 3), st.floats(0.1, 5))
def test_the_gap_is_the_share_that_the_expansion_misses(error, size):
    f0, change = np.zeros((2, 1)), np.array([[size], [0.0]])
    last = {"outputs.values": f0 + change}
    gap = linearity_gap(last, {"outputs.values": f0}, {"expansion.values": change * (1 + error)})
    assert gap == pytest.approx(abs(error), abs=1e-9)


# --- naive loss minimisation ---


def test_where_all_is_right_the_gradient_of_a_linear_head_runs_along_it_and_scaling_it_lowers_the_loss():
    model = make("llama")
    model.requires_grad_(True)
    ids = torch.tensor([[5, 9, 3, 7]])
    # A head that points at what follows each hidden state: all is right.
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0, :-1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[0, 1:]] = 5 * hidden / hidden.norm(dim=1, keepdim=True)
    logits = model(input_ids=ids).logits[0, :-1]
    assert (logits.argmax(dim=1) == ids[0, 1:]).all()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    loss.backward()
    alignments = alignment(model)
    at = list(alignments["name"]).index("lm_head.weight")
    # −∇L · W is minus the derivative of the loss by the scale of W at 1.
    assert alignments["product"][at] > 0
    scaled = torch.nn.functional.cross_entropy(1.001 * logits, ids[0, 1:])
    assert scaled < loss
    assert (loss - scaled).item() / 0.001 == pytest.approx(alignments["product"][at], rel=0.05)


def test_a_tied_head_is_one_matrix_and_is_the_unembedding():
    model = make("llama", tie_word_embeddings=True)
    model.requires_grad_(True)
    model(input_ids=torch.tensor([[5, 9, 3]])).logits.square().sum().backward()
    alignments = alignment(model)
    assert list(alignments["name"][alignments["unembedding"]]) == ["model.embed_tokens.weight"]


def test_no_gradient_has_no_direction():
    assert math.isnan(cosine(0.0, 0.0, 4.0))
    assert cosine(-3.0, 4.0, 9.0) == -0.5  # −3 / (2 · 3)


def test_a_run_that_only_scales_logits_is_told_and_collapses(tmp_path):
    # Whatever comes before, a follows: 0.9, then with logits of twice and eleven times the size.
    chain = np.array(constant(0.9, 0.05, 0.05))
    places = [
        save_chain(tmp_path / f"step{i}", (chain**power).tolist()) for i, power in enumerate((1, 2, 11))
    ]
    result = training_dynamics(places, ["aaaa"] * 4, ["aaa", "aaaaa"] * 2, **QUICK)
    steps = result.tables["steps"]
    # (0.05 / 0.9)¹¹ = 1.6e-14 is below float32's 6e-8; (0.05 / 0.9)² = 0.003 is not.
    assert list(steps["collapsed_train"]) == [0, 0, 1]
    assert list(steps["collapsed_right_train"]) == [0, 0, 1]
    assert result.metrics["stalled"] == 1
    assert result.metrics["collapse_step"] == 2
    assert [finding.metric for finding in result.findings()] == ["stalled"]
    assert any(
        "The softmax first collapses at step 2 (at most 100% of labels" in note for note in result.notes
    )
    assert "100% of labels have a collapsed softmax" in result.summary()
    in_double = training_dynamics(places, ["aaaa"] * 4, ["aaa"] * 2, loss_dtype="float64", **QUICK)
    assert in_double.metrics["collapsed"] == 0


# --- what holds when ---


def test_conditions_are_said_and_what_they_exclude_is_left_out(places):
    result = training_dynamics(
        places[:2], TASK, loss_dtype="bfloat16", linearity=False, kernel=False, **QUICK
    )
    notes = " ".join(result.notes)
    assert "2 checkpoints show differences but no trend" in notes
    assert "In bfloat16 a softmax collapses far earlier" in notes
    assert "it needs a gradient on train rows (--train F)" in notes
    assert "(0.05 of their mean length" in notes
    assert not {"nlm_unembedding", "nlm_cosine", "logit_scaling", "kernel_cka", "linearity_gap"} & set(
        result.metrics
    )
    assert "radius" in result.metrics


def test_experts_are_measured_but_for_their_local_complexity(tmp_path):
    places = []
    for seed in (0, 1):
        model = make("olmoe", seed, vocab_size=len(LETTERS) + 1)
        model.save_pretrained(tmp_path / str(seed))
        save_tokenizer(tmp_path / str(seed), LETTERS)
        places.append(tmp_path / str(seed))
    result = training_dynamics(CheckpointSeries(places, steps=[0, 1]), TASK, TRAIN, **QUICK)
    assert {"nlm_unembedding", "kernel_cka", "linearity_gap", "movement"} <= set(result.metrics)
    assert "local_complexity" not in result.metrics
    assert any("OlmoeForCausalLM: has no dense MLP with units to watch" in note for note in result.notes)


def test_a_classifier_and_choices_are_measured_too(places, tmp_path):
    model = make("llama_classes", 0, vocab_size=len(LETTERS) + 1, pad_token_id=0)
    for index in range(2):
        model.save_pretrained(tmp_path / str(index))
        save_tokenizer(tmp_path / str(index), LETTERS)
        with torch.no_grad():
            model.score.weight.mul_(1.5)
    rows = [{"text": text, "label": index % 2} for index, text in enumerate(TASK)]
    result = training_dynamics(
        CheckpointSeries([tmp_path / "0", tmp_path / "1"], steps=[0, 1]), rows, rows, **QUICK
    )
    assert result.metrics["logit_scale_ratio"] == pytest.approx(1.5, rel=1e-5)
    assert result.metrics["linearity_gap"] == pytest.approx(0, abs=1e-4)
    assert -1 <= result.metrics["kernel_alignment"] <= 1
    assert set(result.tables["tensors"].query("unembedding")["tensor"]) == {"score.weight"}
    choices = [{"prompt": "ab", "choices": ["c", "d"], "answer": index % 2} for index in range(6)]
    result = training_dynamics(places[:2], choices, choices, **QUICK)
    assert {"logit_scale", "nlm_unembedding", "kernel_alignment", "linearity_gap"} <= set(result.metrics)


def test_labels_are_classes_or_answers_that_rows_share():
    labelled = task_of([{"text": "x", "label": index % 2} for index in range(4)])
    assert labels_of(labelled, [0, 1, 2, 3]) == [0, 1, 0, 1]
    assert labels_of(labelled, [0, 2]) == []  # one class
    sums = task_of([{"prompt": "x", "completion": name} for name in "aabb"])
    assert labels_of(sums, [0, 1, 2, 3]) == ["a", "a", "b", "b"]
    assert labels_of(task_of([{"prompt": "x", "completion": name} for name in "abcd"]), [0, 1, 2, 3]) == []
    assert labels_of(task_of(["a", "b"]), [0, 1]) == []
    assert math.isnan(kernel_alignment(np.eye(2), ["a", "a"]))


def test_measurements_outlive_a_killed_run_and_hold_all_that_a_live_one_needs(places, result, tmp_path):
    series = CheckpointSeries(places, cache=tmp_path / "cache")
    first = training_dynamics(series, TASK, TRAIN, **QUICK)
    again = CheckpointSeries(places, cache=tmp_path / "cache")
    again.measured = broken_after(again.measured)
    second = training_dynamics(again, TASK, TRAIN, **QUICK)
    assert dict(first.metrics) == dict(second.metrics) == pytest.approx(dict(result.metrics))
    for other in ({"batch": 2}, {"probes": 5}, {"rows": 2}, {"seed": 1}, {"radius": 0.1}):
        with pytest.raises(AssertionError, match="dynamics is measured again"):
            training_dynamics(again, TASK, TRAIN, **QUICK | other)


def broken_after(measured):
    """`measured` of a series all of whose measurements are kept: measuring again is a mistake."""

    def kept(name, parameters, measure, progress=None, **rest):
        def refuse(checkpoint):
            raise AssertionError(f"{name} is measured again")

        return measured(name, parameters, refuse, progress, **rest)

    return kept


def test_while_a_run_goes_on_all_but_movement_and_gap_are_recorded(places, result, tmp_path):
    for count in (1, 2, 3):
        model = model_at(places[count - 1])
        model.train()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        now = open_checkpoint(model)
        now.directory = places[0]  # where its tokenizer lies
        live = RecordedSeries((0, 5, 10)[:count], tmp_path / "cache", now)
        if count == 1:
            with pytest.raises(TooShortError, match="a trend needs at least 2"):
                training_dynamics(live, TASK, TRAIN, **QUICK)
        else:
            recorded = training_dynamics(live, TASK, TRAIN, **QUICK)
        assert model.training
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name])
            assert parameter.grad is None
            assert parameter.requires_grad
    gone = {"movement", "linearity_gap"}
    assert dict(recorded.metrics) == pytest.approx({k: v for k, v in result.metrics.items() if k not in gone})
    assert any("Movement and the linearity gap are not measured" in note for note in recorded.notes)


def test_checkpoints_without_a_common_tensor_are_said_to_have_none(places, tmp_path):
    wider = save_llama(tmp_path / "wider", seed=1, characters=LETTERS, width=32)
    result = training_dynamics([places[0], wider], TASK, **QUICK, kernel=False)
    (note,) = (note for note in result.notes if note.startswith("Movement is not measured: "))
    assert "no tensor is in all 2 checkpoints" in note
    assert not any("gone" in note for note in result.notes)
    assert result.tables["steps"]["movement"].isna().all()
    assert any("its weights differ in shape from those of" in note for note in result.notes)


@pytest.mark.parametrize("broken", ["tangent_kernel", "first_order"])
def test_a_failure_of_a_library_is_no_missing_measure(places, monkeypatch, broken):
    def fail(*_, **__):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(f"diagnostics.analyses.dynamics.measures.{broken}", fail)
    with pytest.raises(ValueError, match="could not be broadcast"):
        training_dynamics(places[:2], TASK, **QUICK)


def test_a_failure_while_weights_are_compared_is_not_said_to_be_missing_weights(places, monkeypatch):
    def fail(*_):
        raise ValueError("cannot reshape array")

    monkeypatch.setattr("diagnostics.numerics.weight_distances.shared", fail)
    with pytest.raises(ValueError, match="cannot reshape array"):
        training_dynamics(places[:2], TASK, **QUICK)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"radius": -0.1}, "radius is -0.1; it is a share of an embedding's norm"),
        ({"probes": 1}, "probes is 1; it is at least 2"),
        ({"batch": 0}, "batch is 0; it is at least 1"),
        ({"loss_dtype": "int8"}, "loss_dtype is 'int8'; it is one of float32, float64, bfloat16, float16"),
    ],
)
def test_settings_out_of_range_are_refused(places, setting, message):
    with pytest.raises(ValueError, match=message):
        training_dynamics(places, TASK, **setting)


def test_every_picture_is_titled_and_shows_what_the_tables_hold(result):
    figures = result.figures()
    assert list(figures) == ["strip", "scores", "complexity", "nlm", "movement"]
    assert all(figure.layout.title.text for figure in figures.values())
    curves = {trace.name: list(trace.y) for trace in figures["strip"].data}
    steps = result.tables["steps"]
    assert curves["units switched a token: local complexity"] == steps["local_complexity"].tolist()
    layers = result.tables["layers"].pivot_table(index="layer", columns="step", values="share")
    assert figures["complexity"].data[0].z == pytest.approx(layers.to_numpy())
    assert list(figures["nlm"].data[0].y) == ["0", "1", "embed", "lm_head"]


def test_checkpoints_that_read_other_tokens_are_not_compared_output_by_output(tmp_path):
    run = []
    for index in range(3):
        run.append(
            save_llama(tmp_path / f"step{index}", seed=1, characters=LETTERS, shift=0.02 * index, rows=8)
        )
        save_tokenizer(run[-1], LETTERS, words=["ab"], merged=index < 2)
    result = training_dynamics(run, TASK, **QUICK)
    steps = result.tables["steps"].set_index("step")
    for column in ("kernel_cka", "linearity_gap"):
        assert not math.isnan(steps[column][1])
        assert math.isnan(steps[column][2])
    assert any("splits rows into other tokens than the first checkpoint" in note for note in result.notes)
    assert any("in nats per byte" in note for note in result.notes)
