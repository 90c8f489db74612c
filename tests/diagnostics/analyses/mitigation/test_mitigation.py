"""A mode of `mitigate` is recommended where it beats scaling the whole update, and nowhere else."""

import json
import math
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.mitigation import control
from diagnostics.analyses.mitigation.analysis import SCALES, DampingPlan, judged_mitigation
from diagnostics.audit.run import audit
from diagnostics.core.policy import default_policy
from diagnostics.core.registry import find
from diagnostics.edits.mitigate import mitigate
from diagnostics.evaluation.row_losses import encoded
from diagnostics.numerics import row_bootstrap
from diagnostics.store.audit_store import load
from probes import CheckpointPair
from probes.checkpoints.opening import open_checkpoint
from probes.models.editable import Editable
from probes.text.rows import task_of
from tests.diagnostics.chains import save_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

BUNDLED = Path(__file__).parents[4] / "diagnostics" / "bundled"
LETTERS, WIDTH = "abcdef", 64
# In matrices of 64 rows chance alone comes near to 0.5.
SEARCH = {"k": 4, "epsilon": 0.7}
TASK_CHANCES = (0.5, 0.25, 0.1, 0.05, 0.05, 0.05)
EVEN = (1 / 6,) * 6


def texts(chances, count, seed):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(LETTERS), size=12, p=chances)) for _ in range(count)]


# Rows of the task hold no e and no f, rows to be kept no a and no b.
TASK, KEEP = texts((0.5, 0.25, 0.15, 0.1, 0, 0), 40, 0), texts((0, 0, 0.25, 0.25, 0.25, 0.25), 40, 1)


def letters(chances, *, first=EVEN):
    """A Llama that writes letters by these chances, and by `first` behind the letter a.

    Embeddings are far apart along the axes, so that its one layer moves them little: what a row of the head
    says along an axis is the log-chance behind that letter.
    """
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    logs = torch.tensor([chances] * 7).log()
    logs[1] = torch.tensor(first).log()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:  # separated, so that intruders are well defined
                U, S, Vh = torch.linalg.svd(parameter)
                parameter.copy_(U * 0.9 ** torch.arange(len(S)) @ Vh)
        model.model.embed_tokens.weight.copy_(100 * torch.eye(7, WIDTH))
        model.lm_head.weight.fill_(0)
        model.lm_head.weight[0, :7] = -30 / 8
        model.lm_head.weight[1:, :7] = logs.T / math.sqrt(WIDTH)
    return model


def spike(model, size, axis, read=LETTERS):
    """Write along one axis of the residual stream behind these letters: an intruder of rank one.

    It writes `size` times the share of these letters in what attention reads, its inputs being 8 long.
    """
    layer = model.model.layers[0]
    wanted = torch.tensor([0.0, *(float(letter in read) for letter in LETTERS)])
    with torch.no_grad():
        reader = torch.linalg.lstsq(layer.self_attn.v_proj.weight[:, :7].T, wanted).solution
        layer.self_attn.o_proj.weight[axis] += size / 8 * reader


def save(directory, model):
    model.save_pretrained(directory)
    save_tokenizer(directory, LETTERS)
    return directory


@pytest.fixture(scope="module")
def harmful(tmp_path_factory):
    """Tuning taught the head the task, and beside that wrote a direction that spoils texts with e and f."""
    root = tmp_path_factory.mktemp("harmful")
    base, tuned = letters(EVEN), letters(EVEN, first=TASK_CHANCES)
    for model in (base, tuned):
        model.lm_head.weight.data[1:, 20] = torch.tensor([-1.0, 1, 1, -1, 1, -1]) / 2
    spike(tuned, 60.0, 20, "ef")
    return CheckpointPair(save(root / "base", base), save(root / "tuned", tuned))


@pytest.fixture(scope="module")
def intruder_only(tmp_path_factory):
    """The update is the intruder: it moves every letter towards a, behind which the task's chances hold."""
    root = tmp_path_factory.mktemp("intruder_only")
    base, tuned = (letters(EVEN, first=TASK_CHANCES) for _ in range(2))
    spike(tuned, 60.0, 1)
    return CheckpointPair(save(root / "base", base), save(root / "tuned", tuned))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Tuning changed the head alone: no matrix of a block has an intruder."""
    root = tmp_path_factory.mktemp("plain")
    places = [save(root / name, letters(c)) for name, c in (("base", EVEN), ("tuned", TASK_CHANCES))]
    return CheckpointPair(*places)


def judge(pair, **settings):
    given = {"scales": (0.0, 0.3, 0.5, 0.7, 1.0), "draws": 400, **SEARCH, **settings}
    return judged_mitigation(pair, TASK, KEEP, **given)


def at(result, mode, scale):
    curve = result.tables["curve"]
    return curve[(curve["mode"] == mode) & (curve["scale"] == scale)].iloc[0]


# --- what is recommended ---


def test_a_mode_that_beats_the_control_is_recommended(harmful):
    result = judge(harmful)
    assert result.metrics["recommended"] == 2  # top and all: the one intruder
    # The intruder is silent on the task, so that removing it costs nothing there, and it is all that spoils
    # the keep rows; the update scaled to the same task loss keeps most of it.
    removed = at(result, "top", 0.0)
    assert result.metrics["task_gain_nats"] > 0.1
    assert abs(removed["task_cost_nats"]) < 1e-3
    assert removed["retention"] == pytest.approx(1, abs=0.01)
    assert removed["over_control_low_nats"] > 0.1
    recommendations = [note for note in result.notes if "is recommended" in note]
    assert len(recommendations) == 2
    assert f"--mode top --scale {result.tables['modes']['scale'][0]:g}`" in recommendations[0]
    assert "recommended" in {finding.metric for finding in result.findings()}
    assert "keeps more than scaling the whole update" in result.summary()
    # Neighbours are no repair: never recommended, whatever they keep.
    curve = result.tables["curve"]
    assert not curve.loc[curve["mode"].isin(["neighbour", "update"]), "recommended"].any()


def test_a_mode_that_the_control_matches_is_not_recommended(intruder_only):
    result = judge(intruder_only)
    assert result.metrics["edited"] == 1
    assert result.metrics["forgotten_low_nats"] > 0.05
    # Damping does take off what was forgotten …
    assert at(result, "top", 0.3)["retained_nats"] > 0.05
    # … but the update is the intruder, and scaling either is nearly the same.
    assert result.metrics["recommended"] == 0
    assert abs(result.metrics["over_control_nats"]) < 0.01
    assert "recommended" not in {finding.metric for finding in result.findings()}
    assert any(
        "Mode top is not recommended: the control matches it at every strength" in n for n in result.notes
    )
    assert "no mode significantly beats scaling the whole update" in result.summary()


def test_where_no_control_is_as_good_on_the_task_it_is_said_by_how_much_it_falls_short(tmp_path):
    # Tuning taught the head the task, and spoils every text by more than that: base is the best control.
    base, tuned = letters(EVEN), letters(TASK_CHANCES)
    for model in (base, tuned):
        model.lm_head.weight.data[1:, 20] = torch.tensor([-1.0, 1, 1, -1, 1, -1]) / 2
    spike(tuned, 120.0, 20)
    result = judge(CheckpointPair(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)))
    removed = at(result, "top", 0.0)
    short = result.metrics["task_loss_base"] - removed["task_loss"]
    assert removed["control_scale"] == 0
    assert removed["control_short_nats"] == pytest.approx(short)
    assert short > 0.1
    assert result.metrics["recommended"] == 0  # base forgets nothing, which the repaired head does
    reason = next(note for note in result.notes if note.startswith("Mode top is not recommended"))
    assert "the control keeps as much at every strength" in reason
    assert (
        f"the whole update scaled by 0, which is best on the task but {short:.3g} nats short of it" in reason
    )


def test_the_margin_is_what_a_mode_must_surely_exceed(harmful):
    low = judge(harmful).metrics["over_control_low_nats"]
    assert judge(harmful, margin=low - 1e-6).metrics["recommended"] == 2
    assert judge(harmful, margin=low + 1e-6).metrics["recommended"] == 0


def test_without_an_intruder_only_the_control_is_drawn_and_it_is_said_why(plain):
    result = judge(plain)
    assert set(result.tables["curve"]["mode"]) == {"update"}
    assert result.metrics["edited"] == 0
    assert "over_control_nats" not in result.metrics
    assert any("Only the control is measured" in note for note in result.notes)
    assert list(result.figures()) == ["retention"]
    assert "no intruder to damp" in result.summary()
    assert not [f for f in result.findings() if f.metric == "recommended"]


def test_a_stranger_has_no_intruders_to_damp(plain, tmp_path):
    torch.manual_seed(5)
    other = letters(EVEN)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape) / 8)
    result = judge(CheckpointPair(plain.base.ref, save(tmp_path / "other", other)))
    assert result.metrics["edited"] == 0
    assert any("not a descendant" in note for note in result.notes)


# --- the identities ---


def loss_of(ref, rows):
    editable = Editable(open_checkpoint(ref))
    losses = encoded(editable, task_of(rows), max_length=None, chat_template=False, batch_tokens=500).measure(
        editable.model
    )
    return losses.nats.sum() / losses.units.sum()


def test_strength_one_is_tuned_and_the_control_at_zero_is_base(harmful):
    result = judge(harmful)
    for scale, side in ((0.0, "base"), (1.0, "tuned")):
        row = at(result, "update", scale)
        for role, rows in (("task", TASK), ("keep", KEEP)):
            loss = loss_of(getattr(harmful, side).ref, rows)
            assert row[f"{role}_loss"] == result.metrics[f"{role}_loss_{side}"]
            assert row[f"{role}_loss"] == pytest.approx(loss, abs=1e-6)  # other batches, float32
    ones = result.tables["curve"].query("scale == 1")
    assert len(ones) == 4
    assert ones["keep_loss"].nunique() == ones["task_loss"].nunique() == 1
    assert (at(result, "update", 0.0)["retention"], at(result, "update", 1.0)["retention"]) == (1, 0)
    assert (at(result, "update", 0.0)["task_kept"], at(result, "update", 1.0)["task_kept"]) == (0, 1)


def test_a_longer_vocabulary_stays_at_every_strength_and_is_said_to(plain, tmp_path):
    model = letters(TASK_CHANCES)
    model.resize_token_embeddings(9, mean_resizing=False)
    model.lm_head.weight.data[7:] = 0.0
    longer = CheckpointPair(plain.base, save(tmp_path / "longer", model))
    result = judge(longer, scales=(0.5,))
    # Base gives its six letters chances that sum to 1; two more logits of 0 add e^0 each: log(1 + 2) nats.
    expected = loss_of(plain.base.ref, KEEP) + math.log(3)
    assert at(result, "update", 0.0)["keep_loss"] == pytest.approx(expected, abs=0.05)
    notes = "\n".join(result.notes)
    assert re.search(r"2 tensors .*vocabulary resized from 7 to 9 rows.*strength 0 .* is base except", notes)
    assert "strength 0" not in "\n".join(judge(plain, scales=(0.5,)).notes)


@pytest.mark.parametrize("mode", ["top", "all", "neighbour", "update"])
@pytest.mark.parametrize("name", ["harmful", "adapter"])
def test_the_weights_are_those_that_mitigate_writes(name, mode, request, tmp_path):
    pair = (
        CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8")
        if name == "adapter"
        else request.getfixturevalue(name)
    )
    search = SEARCH if name == "harmful" else {"k": 10, "epsilon": 0.5}
    mitigate(pair.base, pair.tuned, tmp_path / "out", scale=0.3, mode=mode, full=True, **search)
    plan = DampingPlan.of(pair, parts=("block",), device="cpu", progress=None, **search)
    editable = Editable(pair.tuned)
    before = {name: tensor.clone() for name, tensor in editable.model.state_dict().items()}
    written = Editable(open_checkpoint(tmp_path / "out")).model.state_dict()
    with editable.holding(*plan.changes(mode, 0.3)) as model:
        moved = 0
        for key, held in model.state_dict().items():
            # Both are rounded once to float32; in float64 a product of other width may differ in the last
            # digit, which is a unit of float32 where it falls on a tie.
            torch.testing.assert_close(held, written[key], rtol=2**-23, atol=1e-12)
            moved += not torch.equal(held, before[key])
    changed = plan.ranks[mode] if mode != "update" else None
    assert moved == (len(changed) if changed is not None else moved) > 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in editable.model.state_dict().items())


def test_every_matrix_is_decomposed_once_for_all_modes_and_strengths(harmful, monkeypatch):
    from diagnostics.analyses.intruders import damping
    from diagnostics.analyses.mitigation import analysis as mitigation

    seen = []
    taken = damping.triples
    monkeypatch.setattr(mitigation, "triples", lambda W, ranks: seen.append(ranks) or taken(W, ranks))
    result = judge(harmful)
    assert len(seen) == result.metrics["edited"] == 1


def test_the_same_arguments_give_the_same_result_and_batches_change_nothing(harmful):
    first, second, small = judge(harmful), judge(harmful), judge(harmful, batch_tokens=40)
    pd.testing.assert_frame_equal(first.tables["curve"], second.tables["curve"])
    for column in ("keep_loss", "task_loss"):
        same = {m: t.tables["curve"].query("scale == 0.5").set_index("mode")[column] for m, t in
                (("first", first), ("small", small))}  # fmt: skip
        np.testing.assert_allclose(same["first"], same["small"], atol=1e-5)


# --- the comparison ---


def control_of(strengths, task, keep):
    losses = np.array(strengths, float), np.array([task], float), np.array([keep], float)
    return partial(control.control_at_task, *losses)


def test_the_control_is_asked_for_its_best_keep_loss_at_a_task_loss_no_worse():
    # Both are straight lines in the strength.
    best_control = control_of([0, 0.5, 1], task=[3, 2, 1], keep=[0, 1, 2])
    keep, strength, beyond = best_control(np.array([[2.0, 1.0, 2.5, 9.0]]))
    # Task 2 is had at 0.5, 1 at 1, 2.5 at 0.25, and 9 is worse than base's.
    assert strength[0] == pytest.approx([0.5, 1, 0.25, 0], abs=1e-9)
    assert keep[0] == pytest.approx([1, 2, 0.5, 0], abs=1e-9)
    assert beyond[0] == pytest.approx([0, 0, 0, 3 - 9], abs=1e-9)


def test_where_no_control_is_as_good_the_best_on_the_task_stands_for_it():
    best_control = control_of([0, 0.5, 1], task=[3, 1, 2], keep=[0, 1, 2])
    keep, strength, beyond = best_control(np.array([[0.5]]))
    assert (keep.item(), strength.item(), beyond.item()) == (1, 0.5, 0.5)


def test_tuned_itself_can_always_be_had():
    # Amplified it is better on the task, and worse on the keep rows than tuned.
    best_control = control_of([0, 1, 2], task=[3, 2, 1], keep=[0, 1, 5])
    assert best_control(np.array([[1.0]]))[0].item() == 1


@given(seed=st.integers(0, 30))
def test_the_control_has_no_advantage_over_itself(seed):
    generator = np.random.default_rng(seed)
    strengths = np.array([0, 0.25, 0.5, 1, 2])
    task, keep = generator.normal(size=(2, 6, 5))
    best_keep = control.control_at_task(strengths, task, keep, task)[0]
    assert (best_keep <= keep + 1e-12).all()


def test_a_point_keeps_more_by_what_is_taken_off_its_loss():
    generator = np.random.default_rng(0)
    noise = generator.normal(scale=0.01, size=(501, 1))
    noise[0] = 0
    strengths = np.array([0, 0.5, 1, np.nan, np.nan])
    task = np.array([3, 2, 1, 2, 2]) + noise
    keep = np.array([0, 1, 2, 1 - 0.2, 1]) + noise
    searched = np.array([False, False, False, True, True])
    advantage = control.advantage(task, keep, strengths, searched)
    # The same noise everywhere is paired away, but for what is within a step of the interpolation, 1 / 400.
    assert [gain.value for gain in advantage.gains[3:]] == pytest.approx([0.2, 0.0], abs=0.01)
    assert advantage.gains[3].low > 0.15
    assert advantage.gains[4].low <= 0 <= advantage.gains[4].high


def test_intervals_of_rows_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        nats = 1 + generator.normal(size=(1, 60))
        drawn = row_bootstrap.RowLosses(nats=nats, units=np.ones(60)).drawn(200, generator)[:, 0]
        low, high = np.quantile(drawn, [0.025, 0.975])
        hits += low <= 1 <= high
    assert hits / 200 == pytest.approx(0.95, abs=0.05)  # 3 standard errors of a share of 200


def test_long_rows_count_for_their_tokens_and_sets_count_alike():
    first = row_bootstrap.RowLosses(nats=np.array([[1.0, 9.0]]), units=np.array([1.0, 3.0]))
    second = row_bootstrap.RowLosses(nats=np.array([[4.5]]), units=np.array([1.0]))
    # (1 + 9) / (1 + 3) = 2.5, and (2.5 + 4.5) / 2 = 3.5
    assert row_bootstrap.mean_loss([first]) == pytest.approx([2.5])
    assert row_bootstrap.mean_loss([first, second]) == pytest.approx([3.5])


# --- rows of every shape ---


def test_choices_are_judged_by_the_right_one_among_them(plain):
    rows = [{"prompt": "", "choices": list("abf"), "answer": 0}] * 2
    result = judged_mitigation(plain, rows, KEEP, scales=(0.5,), draws=100, **SEARCH)
    # tuned: 0.5 / (0.5 + 0.25 + 0.05); base: a third each
    assert result.metrics["task_loss_tuned"] == pytest.approx(-math.log(0.5 / 0.8), abs=0.02)
    assert result.metrics["task_loss_base"] == pytest.approx(math.log(3), abs=0.02)
    assert result.metrics["task_accuracy_tuned"] == 1
    assert set(result.tables["sets"].query("role == 'task'")["unit"]) == {"row"}


def test_a_classifier_is_judged_by_its_labels(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=3, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    base = save(tmp_path / "base", model)
    with torch.no_grad():
        model.score.weight.add_(0.1 * torch.randn(model.score.weight.shape))
    pair = CheckpointPair(base, save(tmp_path / "tuned", model))
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TASK)]
    result = judged_mitigation(pair, rows, rows, scales=(0.5,), draws=100, **SEARCH)
    editable = Editable(pair.tuned)
    losses, right = [], []
    for row in rows:
        ids = torch.tensor([editable.tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            logits = editable.model(ids).logits[0]
        losses.append(-float(logits.log_softmax(0)[row["label"]]))
        right.append(int(logits.argmax()) == row["label"])
    assert result.metrics["keep_loss_tuned"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.metrics["task_accuracy_tuned"] == pytest.approx(np.mean(right))
    with pytest.raises(ValueError, match=r'rows: holds rows of text, and a classifier model scores \{"text"'):
        judged_mitigation(pair, rows, task_of(TASK), scales=(0.5,), **SEARCH)


def test_rows_with_nothing_to_score_are_left_out_and_counted(plain):
    result = judged_mitigation(plain, [*TASK, ""], KEEP, scales=(0.5,), draws=100, **SEARCH)
    assert (result.metrics["rows_task"], result.metrics["unscored"]) == (40, 1)
    assert any("without a token to score" in note for note in result.notes)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": (-0.1, 0.5)}, r"scales holds -0\.1; 0 removes"),
        ({"scales": (1.0, 2.0)}, r"scales holds no strength below 1"),
        ({"margin": -1.0}, r"margin is -1\.0; it is in nats, at least 0"),
        ({"draws": 10}, r"draws is 10; at least 100"),
    ],
)
def test_a_parameter_out_of_range_is_refused(plain, settings, message):
    with pytest.raises(ValueError, match=message):
        judge(plain, **settings)


def test_a_single_row_is_refused(plain):
    with pytest.raises(ValueError, match="keep: has 1 row, and judging a mitigation needs at least 2"):
        judged_mitigation(plain, TASK, KEEP[:1])


# --- audit, report, figures ---


def test_it_is_registered_with_both_grids_of_the_page_and_a_sourced_policy():
    record = find("mitigation")
    assert record.inputs == ("pair", "task", "keep")
    # Tables: 0.1, 0.3, 0.5, 0.7, 0.9; curves: 0, 0.25, 0.5, 0.75, 1, 1.5, 2.
    assert set(SCALES) == {0.1, 0.3, 0.5, 0.7, 0.9} | {0, 0.25, 0.5, 0.75, 1, 1.5, 2}
    rules = default_policy().rules["mitigation"]
    assert set(rules) <= set(record.metrics)
    assert all(rule.source for rule in rules.values())


def test_keep_rows_without_task_rows_skip_it_with_the_option_named(plain, tmp_path):
    (tmp_path / "keep.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in KEEP))
    done = audit(
        plain.base.ref, plain.tuned.ref, out=tmp_path / "audit", keep=[tmp_path / "keep.jsonl"], device="cpu"
    )
    outcome = done.analyses["mitigation"]
    assert (outcome.status, outcome.reason) == ("skipped", "needs --task F")


def test_the_audit_of_the_bundled_adapter_writes_the_section_from_the_shell(tmp_path, monkeypatch, capsys):
    from diagnostics.cli.main import main

    monkeypatch.chdir(BUNDLED)
    arguments = "audit base lora-r8 --task task.jsonl --keep keep.jsonl --only mitigation --device cpu"
    arguments += (
        f" --limit 24 --set mitigation.scales=0.5,1 --set mitigation.draws=200 --out {tmp_path / 'audit'}"
    )
    monkeypatch.setattr(sys, "argv", ["tunescope", *arguments.split()])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (None, 0)
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(r"mitigation [\d.]+ s tuning cost", output)
    state = json.loads((tmp_path / "audit" / "audit.json").read_text())["analyses"]["mitigation"]
    assert state["status"] == "ok"
    assert state["parameters"]["scales"] == [0.5, 1.0]
    assert state["metrics"]["edited"] == 15  # as the README's example counts
    saved = load(tmp_path / "audit").analyses["mitigation"].result
    assert set(saved.tables["curve"]["mode"]) == {"update", "top", "all", "neighbour"}
    assert set(saved.figures()) == {"retention", "over_control"}
    report = (tmp_path / "audit" / "report.html").read_text()
    assert 'id="analysis-mitigation"' in report
    assert re.search(r"Mode top is (not )?recommended", report)


def test_the_control_is_drawn_behind_every_mode_and_the_figures_follow_the_tables(harmful):
    result = judge(harmful)
    figures = result.figures()
    names = [trace.name for trace in figures["retention"].data]
    assert names == ["whole update (control)", "neighbour (control)", "top", "all"]
    assert figures["retention"].layout.title.text.startswith("A mode keeps more than scaling")
    curve = result.tables["curve"].query("mode == 'update'")
    drawn = figures["retention"].data[0]
    np.testing.assert_allclose(drawn.y, curve["retained_nats"])
    np.testing.assert_allclose(drawn.x, curve["task_loss"].iloc[0] - curve["task_loss"])
