"""A run of chains whose scores are known to the letter: a trough that is still being climbed out of."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diagnostics.analyses.trajectory.analysis import training_trajectory
from diagnostics.analyses.trajectory.troughs import rank_correlation
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.series import CheckpointSeries, RecordedSeries, TooShortError
from probes.errors import InputError
from tests.diagnostics.chains import constant, save_chain, save_llama, save_tokenizer
from tests.probes.runnable import make

# Chance of the letter a at each checkpoint; b and c share the rest. Keep rows hold no a.
CHANCES = (0.3, 0.5, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.78, 0.76, 0.74, 0.7)
STEPS = tuple(10 * index for index in range(len(CHANCES)))
TASK = ["aaab", "aaaac", "abaaaa", "aaa"]
KEEP = ["bcbc", "bbcb", "cc", "bcccb"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return [
        saved(root / f"checkpoint-{step}", constant(a, (1 - a) / 2, (1 - a) / 2))
        for step, a in zip(STEPS, CHANCES, strict=True)
    ]


def saved(directory, chain):
    """A chain whose layer, which adds nothing, is the same in all."""
    torch.manual_seed(0)
    return save_chain(directory, chain)


@pytest.fixture(scope="module")
def result(places):
    return training_trajectory(places, TASK, KEEP)


def keep_loss(a):
    return -math.log((1 - a) / 2)


def task_loss(a):
    letters = "".join(TASK)
    return float(np.mean([-math.log(a if letter == "a" else (1 - a) / 2) for letter in letters]))


def test_steps_are_read_from_the_names_and_losses_are_those_of_the_chains(result):
    steps = result.tables["steps"]
    for role, loss in (("task", task_loss), ("keep", keep_loss)):
        part = steps[steps["role"] == role]
        assert list(part["step"]) == list(STEPS)
        assert part["loss"].to_numpy() == pytest.approx([loss(a) for a in CHANCES], abs=1e-5)
    # a is the likeliest from the second checkpoint on: 15 of the 18 letters of the task, and none of keep.
    task = steps[steps["role"] == "task"]["metric"].to_numpy()
    assert task[1:] == pytest.approx(15 / 18 + 0 * task[1:])
    assert not steps[steps["role"] == "keep"]["metric"].to_numpy()[1:].any()


def test_a_trough_that_is_still_climbed_out_of_is_found_with_its_depth_and_times(result):
    m = result.metrics
    depth = keep_loss(0.9) - keep_loss(0.3)
    assert m["depth_keep_nats"] == pytest.approx(depth, abs=1e-5)
    back = (keep_loss(0.9) - keep_loss(0.7)) / depth  # 0.56, less than 0.8
    assert m["recovery_keep_nats"] == pytest.approx(back, abs=1e-5)
    assert m["steps_to_trough_keep"] == 20
    assert "steps_to_recover_keep" not in m
    assert (m["shipped_low"], m["unrecovered"]) == (1, 0)
    assert "still in a trough, and rising" in result.summary()
    assert any("train longer or mix in rows" in note for note in result.notes)
    assert [(finding.severity, finding.metric) for finding in result.findings()][:1] == [
        ("warn", "shipped_low")
    ]


def test_the_late_slope_is_that_of_the_last_four_of_twelve_checkpoints(result):
    lows = result.tables["troughs"].set_index(["role", "measure"])
    slopes = [
        (keep_loss(CHANCES[i]) - keep_loss(CHANCES[j])) / (STEPS[j] - STEPS[i])
        for i in range(8, 12)
        for j in range(i + 1, 12)
    ]
    row = lows.loc["keep", "loss"]
    assert row["slope"] == pytest.approx(np.median(slopes), rel=1e-3)
    assert (row["slope_low"], row["slope_high"]) == (
        pytest.approx(min(slopes), rel=1e-3),
        pytest.approx(max(slopes), rel=1e-3),
    )


def test_decoupling_is_the_rank_correlation_overall_and_by_thirds(result):
    steps = result.tables["steps"]
    task = steps[steps["role"] == "task"]
    loss, metric = task["loss"].to_numpy(), task["metric"].to_numpy()
    assert result.metrics["decoupling"] == pytest.approx(rank_correlation(-loss, metric))
    parts = result.tables["decoupling"].set_index("part")
    assert list(parts.index) == ["whole", "first third", "second third", "last third"]
    assert list(parts["checkpoints"]) == [12, 4, 4, 4]
    assert parts.loc["first third", "spearman"] == pytest.approx(rank_correlation(-loss[:4], metric[:4]))
    # The metric stands still there, so that there is no order to correlate.
    assert math.isnan(parts.loc["last third", "spearman"])


def test_the_way_is_as_long_as_the_weights_say(result, places):
    # Only the head moves: its rows are log-probabilities over √4.
    heads = [open_checkpoint(checkpoint).tensor("lm_head.weight").double().numpy() for checkpoint in places]
    lengths = [np.linalg.norm(b - a) for a, b in pairwise(heads)]
    distance = np.linalg.norm(heads[-1] - heads[0])
    assert result.metrics["inefficiency"] == pytest.approx(sum(lengths) / distance)
    path = result.tables["path"]
    assert path["length"].to_numpy()[1:] == pytest.approx(lengths)
    assert result.metrics["distance"] == pytest.approx(distance)
    # The way out and the way back.
    assert path["angle"].iloc[1] < 90 < path["angle"].iloc[3]


def test_relabelled_steps_rescale_times_and_slopes_alone(result, places):
    other = training_trajectory(CheckpointSeries(places, steps=[3 * step + 5 for step in STEPS]), TASK, KEEP)
    times = {"steps_to_trough_keep"}
    for name, value in result.metrics.items():
        assert other.metrics[name] == pytest.approx(3 * value if name in times else value), name
    for table in ("troughs", "path"):
        first, second = result.tables[table], other.tables[table]
        same = [
            name for name in first.columns if "step" not in name and not name.startswith(("slope", "label"))
        ]
        assert first[same].equals(second[same])
    assert other.tables["troughs"]["slope"].to_numpy() * 3 == pytest.approx(
        result.tables["troughs"]["slope"].to_numpy()
    )


def test_a_constant_series_has_depth_0_and_says_that_there_is_no_recovery_and_no_way(places):
    result = training_trajectory(CheckpointSeries([places[0]] * 4, steps=range(4)), TASK, KEEP)
    m = result.metrics
    assert (
        m["depth_keep"] == m["depth_keep_nats"] == m["shipped_low"] == m["unrecovered"] == m["distance"] == 0
    )
    assert not {"recovery_keep", "recovery_keep_nats", "inefficiency", "decoupling"} & set(m)
    assert any("inefficiency is undefined" in note for note in result.notes)
    assert any("needs 6 checkpoints, and there are 4" in note for note in result.notes)
    assert any("slopes have no interval" in note for note in result.notes)
    assert result.summary() == "no keep score ever fell"
    assert "angles" not in result.figures()


def test_what_fell_and_did_not_come_back_fails(places):
    result = training_trajectory(
        CheckpointSeries([places[0], places[1], places[2], places[2]], steps=range(4)), TASK, KEEP
    )
    assert result.metrics["recovery_keep_nats"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["unrecovered"] == 1
    assert [finding.severity for finding in result.findings()] == ["fail"]
    assert "did not recover" in result.summary()


def test_rows_with_answers_are_judged_by_whether_they_are_right(places):
    rows = [{"prompt": "a", "choices": ["b", "a"], "answer": index % 2} for index in range(10)]
    result = training_trajectory(places[:2] + places[-2:], rows, rows[::2] * 3)
    lows = result.tables["troughs"].set_index(["role", "measure"])
    assert list(lows.loc["keep"]["judged"]) == [True, False]
    # b is the likelier of both at a chance of a of 0.3 (0.35 each), and never again: from all right to none.
    assert result.metrics["depth_keep"] == 1
    assert result.metrics["unrecovered"] == 1


def test_a_trough_within_its_noise_is_called_that(places, tmp_path):
    # One letter gains what another loses, so that a fall of the mean is what the rows happen to hold.
    ends = [
        save_chain(tmp_path / str(i), constant(0.4, p, 0.6 - p)) for i, p in enumerate((0.3, 0.35, 0.3, 0.3))
    ]
    result = training_trajectory(ends, ["a" * 4] * 3, ["b", "c", "b", "c", "cc", "bb", "bc"])
    assert result.metrics["depth_keep_nats"] > 0
    assert result.metrics["unrecovered"] == 0
    assert any("is within noise" in note for note in result.notes)


def test_held_out_rows_learnt_after_the_train_rows_are_delayed_generalisation(tmp_path):
    # Train rows ask for b after a, known from step 2 on. What follows b, c and the beginning of a text, asked
    # for by one, two and three held-out rows, is learnt at steps 4, 6 and 8.
    learnt, vague = [0.05, 0.9, 0.05], [0.4, 0.3, 0.3]
    run = [[vague] * 4, [vague, learnt, vague, vague]]
    run += [[vague, learnt, learnt, vague], [vague, learnt, learnt, learnt], [learnt] * 4]
    places = [save_chain(tmp_path / f"step{2 * index}", chain) for index, chain in enumerate(run)]
    train = [{"prompt": "a", "completion": "b"}] * 3
    held = [{"prompt": prompt, "completion": "b"} for prompt in ("b", "c", "c", "", "", "")]
    result = training_trajectory(places, held, train=train)
    task = result.tables["steps"].query("role == 'task'")["metric"]
    assert task.to_numpy() == pytest.approx([0, 0, 1 / 6, 3 / 6, 1])
    assert result.metrics["settled_step"] == 2
    assert result.metrics["rise_after_settling"] == 1
    # All pairs of the four late points rise.
    assert result.metrics["delayed_generalisation"] == 1
    assert "still rises after step 2" in result.summary()
    # Learnt with the train rows, nothing is delayed.
    together = training_trajectory([places[0], *places[2:]], held[:1], train=train)
    assert "delayed_generalisation" not in together.metrics
    assert any("3 of 4 checkpoints left" in note for note in together.notes)


def test_three_checkpoints_are_too_few_and_it_is_said_after_measuring(places, tmp_path):
    series = CheckpointSeries(places[:3], cache=tmp_path / "cache")
    with pytest.raises(TooShortError, match="a series of 3 checkpoints: a trajectory needs at least 4"):
        training_trajectory(series, TASK)
    assert len(list((tmp_path / "cache").glob("scores.*.npz"))) == 3


def test_while_a_run_goes_on_scores_are_recorded_and_the_way_is_left_out(places, result, tmp_path):
    from transformers import AutoModelForCausalLM

    for index in range(4):
        model = AutoModelForCausalLM.from_pretrained(places[index])
        model.train()
        now = open_checkpoint(model)
        now.directory = places[index]  # where its tokenizer lies
        live = RecordedSeries(STEPS[: index + 1], tmp_path / "cache", now)
        if index < 3:
            with pytest.raises(TooShortError):
                training_trajectory(live, TASK, KEEP)
        assert model.training
    recorded = training_trajectory(live, TASK, KEEP)
    steps = recorded.tables["steps"]
    meant = result.tables["steps"]
    for role in ("task", "keep"):
        losses, all_losses = (table[table["role"] == role]["loss"].tolist() for table in (steps, meant))
        assert losses == all_losses[:4]
    assert "path" not in recorded.tables
    assert any("does not keep the weights of earlier steps" in note for note in recorded.notes)


def test_a_checkpoint_without_a_finite_loss_is_passed_over_and_named(places, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(places[2])
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_bytes((places[2] / name).read_bytes())
    series = CheckpointSeries([*places[:2], tmp_path / "broken", *places[3:6]], steps=range(6))
    result = training_trajectory(series, TASK, KEEP)
    assert result.tables["steps"].query("step == 2")["loss"].isna().all()
    # The lowest of those that are left: a at 0.88.
    assert result.metrics["depth_keep_nats"] == pytest.approx(keep_loss(0.88) - keep_loss(0.3), abs=1e-5)
    assert any("keep rows have no finite loss at 2" in note for note in result.notes)
    assert any("lm_head.weight holds 16 NaN or infinite values" in note for note in result.notes)
    assert "path" not in result.tables


def test_of_many_rows_as_many_are_scored_as_asked_for_and_other_rows_anew(places, tmp_path):
    for count in (7, 6):
        series = CheckpointSeries(places[:4], cache=tmp_path / "cache")
        result = training_trajectory(series, TASK * 5, rows=count)
        assert set(result.tables["steps"]["rows"]) == {count}
    assert len(list((tmp_path / "cache").glob("scores.*.npz"))) == 8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"recovered": 0.0}, "recovered is 0.0 and settled 0.01; both are shares, recovered above 0"),
        ({"settled": 1.0}, "settled 1.0; both are shares, recovered above 0 and settled below 1"),
        ({"rows": 0}, "rows is 0; it is at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(places, setting, message):
    with pytest.raises(ValueError, match=message):
        training_trajectory(places, TASK, **setting)


def test_every_picture_is_titled_and_shows_what_the_tables_hold(result):
    figures = result.figures()
    assert list(figures) == ["metric", "loss", "parting", "angles", "distances"]
    assert "trough: 1.95 nats deep, 56% won back" in figures["loss"].layout.annotations[0].text
    keep = next(trace for trace in figures["loss"].data if trace.name == "keep")
    assert list(keep.y) == pytest.approx([keep_loss(a) for a in CHANCES], abs=1e-5)
    shade = figures["loss"].layout.shapes[0]
    assert (shade.x0, shade.x1) == (0, 110)  # never recovered: shaded to the end
    assert list(figures["angles"].data[0].x) == list(STEPS[1:])


# --- checkpoints that read the same rows in another way ---


def test_checkpoints_with_other_tokenizers_each_read_with_their_own_in_nats_per_byte(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows, losses, run = ["abab", "çab", "ba", "bbb"], [], []
    for step in range(4):
        directory = save_llama(tmp_path / f"checkpoint-{step}", seed=1, characters="abç", shift=0.1, rows=5)
        save_tokenizer(directory, "abç", words=["ab"], merged=step < 2)
        model, tokenizer = (auto.from_pretrained(directory) for auto in (AutoModelForCausalLM, AutoTokenizer))
        nats = 0.0
        for row in rows:
            ids = tokenizer(row, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log = model(ids).logits[0, :-1].double().log_softmax(dim=-1)
            nats -= float(log.gather(1, ids[0, 1:, None]).sum())
        losses.append(nats / (4 + 4 + 2 + 3))  # ç is two bytes
        run.append(directory)
    result = training_trajectory(run, rows)
    assert result.tables["steps"]["loss"].tolist() == pytest.approx(losses, abs=1e-5)
    assert set(result.tables["steps"]["unit"]) == {"byte"}
    assert sum("each reads with its own tokenizer" in note for note in result.notes) == 1
    alike = training_trajectory(run, ["bb", "ba", "aa"])
    assert set(alike.tables["steps"]["unit"]) == {"token"}


def test_every_checkpoint_finds_the_name_of_a_class_in_its_own_order(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = ["contradiction", "neutral", "entailment"]
    run, texts = [], ["ab", "ba", "aab", "abb", "bba", "b", "a", "aaab"]
    for step in range(4):
        model = make("bert_classes")
        model.config.id2label = dict(enumerate(names if step == 0 else names[::-1]))
        model.config.label2id = {name: index for index, name in model.config.id2label.items()}
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.copy_(parameter if step == 0 else parameter.flip(0))
        run.append(tmp_path / f"checkpoint-{step}")
        model.save_pretrained(run[-1])
        save_tokenizer(run[-1], "ab")
    model = AutoModelForSequenceClassification.from_pretrained(run[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(run[0])
    with torch.no_grad():
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    named = [{"text": text, "label": names[i]} for text, i in zip(texts, answers, strict=True)]
    assert training_trajectory(run, named).tables["steps"]["metric"].tolist() == [1, 1, 1, 1]
    numbered = [{"text": text, "label": i} for text, i in zip(texts, answers, strict=True)]
    with pytest.raises(InputError, match="number their classes differently"):
        training_trajectory(run, numbered)
