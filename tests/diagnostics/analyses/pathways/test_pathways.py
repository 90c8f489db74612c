"""Pathways over a series: plants that reorganise or only drift, and tiny mixtures of experts from files."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from diagnostics.analyses.pathways.analysis import METRICS, check, grokking_pathways, result_of_records
from diagnostics.analyses.pathways.notes import notes
from diagnostics.analyses.pathways.pathway import distances, lengths, longer
from diagnostics.analyses.pathways.record import MOST, draw_rows
from diagnostics.analyses.pathways.statistics import memorised_at
from diagnostics.analyses.pathways.tables import metrics, tables
from diagnostics.audit.callback import AuditCallback
from diagnostics.core.analysis import NotApplicableError
from diagnostics.core.policy import default_policy, not_measured
from diagnostics.core.registry import installed
from probes.checkpoints.series import CheckpointSeries, TooShortError
from probes.text.rows import task_of
from tests.diagnostics.chains import save_tokenizer
from tests.diagnostics.routed import SHARED, STEPS, ask, records_of, run_of, samples_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

NONE = (0.0,) * len(STEPS)


@pytest.fixture(scope="module")
def planted():
    """Samples come to share their group's routes from step 200 on, and the held-out metric follows."""
    return run_of()


@pytest.fixture(scope="module")
def control():
    """As many routes come to be shared, among all samples alike, and the held-out metric stays at chance."""
    return run_of(shared=NONE, common=SHARED, learns=False)


def measure(run):
    frames = tables(run)
    values = metrics(run, frames)
    return frames, values, "\n".join(notes(run, frames, {**values, "unrouted": 0, "truncated": 0}))


# --- plants ---


def test_routes_that_come_to_be_shared_within_groups_are_reorganising(planted):
    frames, values, text = measure(planted)
    assert planted.verdict == "reorganising after memorisation"
    assert (values["reorganising"], values["drift_without_signal"]) == (1, 0)
    assert values["since_step"] == values["memorised_step"] == 100
    # At the end all samples of a group have one pathway, and those of two groups random ones.
    assert frames["steps"]["distance"].iloc[-1] == 0
    assert values["distance_change"] == pytest.approx(-frames["steps"]["distance"].iloc[2])
    assert values["gap_last"] == pytest.approx(frames["steps"]["between"].iloc[-1])
    assert values["gap_change_p"] == pytest.approx(1 / 201)  # none of the 200 shuffles
    assert abs(values["loss_change_nats"]) < 0.01
    assert values["spearman_distance"] <= -0.95
    assert "Reorganising after memorisation: the distance within groups changes by -0.8" in text


def test_routes_that_come_to_be_shared_by_all_drift_though_every_published_number_moves_as_much(
    planted, control
):
    _, values, text = measure(control)
    grown = measure(planted)[1]
    assert control.verdict == "routing drift without a generalisation signal"
    assert (values["reorganising"], values["drift_without_signal"]) == (0, 1)
    assert values["distance_change"] == pytest.approx(grown["distance_change"], abs=0.05)
    assert values["consistency_change"] == pytest.approx(grown["consistency_change"], abs=0.1)
    assert abs(values["gap_change"]) < grown["gap_change"] / 5
    assert "turn_step" not in values
    assert "Correlations are withheld: the held-out metric does not change." in text
    assert "No step at which memorisation turns to generalisation is given" in text


def test_the_turn_is_where_the_gap_has_made_half_of_its_way(planted):
    frames, values, text = measure(planted)
    steps = frames["steps"][frames["steps"]["step"] >= 100]
    half = (steps["gap"].iloc[0] + steps["gap"].iloc[-1]) / 2
    expected = np.interp(half, steps["gap"], steps["step"])
    assert values["turn_step"] == pytest.approx(expected)
    assert values["turn_step_low"] <= 800 < values["turn_step"] < 1000 <= values["turn_step_high"]
    # Held-out accuracy is 0.5 + SHARED / 2: half of its way is made between 600 (0.45) and 800 (0.70).
    assert 600 < values["held_out_turn_step"] < 800
    assert f"turns to generalisation around step {values['turn_step']:.4g}" in text


def test_without_a_better_held_out_metric_no_turn_is_marked():
    run = run_of(learns=False)
    assert run.verdict == "reorganising after memorisation"
    assert run.turn is None
    assert "the held-out metric does not improve significantly" in measure(run)[2]


def test_rows_of_one_group_have_no_verdict():
    run = run_of(samples_of(groups=1, group_size=60))
    frames, values, text = measure(run)
    assert run.verdict == "withheld"
    assert "give rows a group" in text.lower()
    assert "reorganising" not in values
    assert frames["steps"]["gap"].isna().all()
    assert np.isfinite(frames["steps"]["distance"]).all()


def test_routes_that_stay_as_they_are_do_not_move():
    run = run_of(shared=NONE, learns=False, records=still())
    assert run.verdict == "no movement after memorisation"


def still():
    """Records whose routes and routers are the same at each step."""
    records = records_of(samples_of(), shared=NONE)
    from dataclasses import replace

    return [replace(record, routes=records[0].routes, routers=records[0].routers) for record in records]


def widening(per_group, share):
    """A run that shares a little of its routing within groups at the very end."""
    samples = samples_of(group_size=per_group)
    return run_of(samples, records=records_of(samples, shared=(0.0,) * 9 + (share,), seed=1))


def test_a_gap_that_widens_by_next_to_nothing_is_flat_however_sure_that_is():
    run = widening(120, 0.15)
    assert run.significant_sign("gap") > 0
    assert run.changes["gap"].estimate.high < 0.02
    assert run.verdict == "routing drift without a generalisation signal"


def test_a_gap_that_may_have_widened_by_more_than_drift_does_is_undecided():
    run = widening(60, 0.22)
    assert run.significant_sign("gap") > 0
    assert 0 < run.changes["gap"].value < 0.02 < run.changes["gap"].estimate.high
    assert run.verdict == "undecided"
    assert "below the 0.02 that exceeds drift" in run.why


def test_rows_that_were_not_trained_on_date_no_memorisation():
    run = run_of(samples_of(trained=False))
    frames, values, text = measure(run)
    assert run.verdict == "withheld"
    assert not {"memorised_step", "memorised_share", "reorganising"} & values.keys()
    assert values["since_step"] == 0
    assert "Without train rows (--train) memorisation is not dated" in text
    assert frames["samples"]["memorised_step"].isna().all()


def test_a_loss_that_still_falls_at_the_end_is_not_memorised():
    from dataclasses import replace

    samples = samples_of()
    records = [
        replace(record, nats=record.nats + 9 - index) for index, record in enumerate(records_of(samples))
    ]
    run = run_of(samples, records=records)
    assert run.verdict == "not memorised"
    assert "memorised_step" not in measure(run)[1]


def test_an_epsilon_that_is_given_is_used_for_all_groups():
    samples = samples_of()
    records = records_of(samples)
    run = run_of(samples, records=records, asked=ask(epsilon=0.025, delta=0.01))
    losses = np.stack([record.nats for record in records])
    assert run.memorised.tolist() == memorised_at(losses, 0.025, 0.01).tolist()
    assert set(run.epsilon.values()) == {0.025}


def test_two_checkpoints_give_differences_with_intervals_and_no_trend():
    samples = samples_of()
    records = records_of(samples)
    run = run_of(samples, steps=(0.0, 1.0), records=[records[0], records[-1]])
    frames, values, text = measure(run)
    assert run.verdict == "withheld"
    assert not {"reorganising", "spearman_distance", "turn_step"} & values.keys()
    assert values["gap_change_low"] < values["gap_change"] < values["gap_change_high"]
    assert "two checkpoints show differences but no trend" in text
    first, second = run.snapshots[0].strings, run.snapshots[1].strings
    D, n = distances(first + second), lengths(first + second)
    drift = np.diag((D / longer(n, n))[:80, 80:])
    assert frames["samples"]["drift"].to_numpy() == pytest.approx(drift)
    assert values["drift"] == pytest.approx(drift.mean())
    assert values["drift_low"] < values["drift"] < values["drift_high"]


def test_below_six_checkpoints_since_memorisation_no_correlation_is_given():
    samples = samples_of()
    records = records_of(samples)[:7]  # 100 to 600 are five
    run = run_of(samples, steps=STEPS[:7], records=records)
    frames, values, text = measure(run)
    assert "spearman_distance" not in values
    assert frames["correlations"]["spearman"].isna().all()
    assert "Correlations are withheld: they need 6 checkpoints, and there are 5 since step 100." in text


def test_a_held_out_loss_counts_with_its_sign_turned():
    frames, values, _ = measure(run_of(asked=ask(metric="loss")))
    assert frames["steps"]["held_out"].iloc[-1] < frames["steps"]["held_out"].iloc[0]
    assert values["spearman_distance"] <= -0.95
    assert "turn_step" in values


def test_the_papers_figures_stand_beside_ours(planted):
    frames, _, text = measure(planted)
    row = frames["correlations"].query("quantity == 'distance' and lag == 0 and of == 'levels'").iloc[0]
    assert (row["paper_low"], row["paper_high"]) == (-0.975, -0.928)
    assert "(the paper's -0.975 to -0.928)" in text
    assert "4 to 6 checkpoints of one model" in text


def test_a_lag_correlates_a_number_with_the_metric_that_many_checkpoints_later(planted):
    frames, _, _ = measure(planted)
    row = frames["correlations"].query("quantity == 'gap' and lag == 2 and of == 'levels'").iloc[0]
    steps = frames["steps"][frames["steps"]["step"] >= 100]
    assert row["points"] == 6
    expected = np.corrcoef(steps["gap"].to_numpy()[:-2], steps["held_out"].to_numpy()[2:])[0, 1]
    assert row["pearson"] == pytest.approx(expected)


def test_distances_of_layers_and_groups_are_means_over_their_own_pairs(planted):
    frames, _, _ = measure(planted)
    snapshot, groups = planted.snapshots[5], planted.samples.groups
    words = snapshot.pathways.strings("tagged", 2)
    n = lengths(words)
    share = distances(words) / longer(n, n)
    within = [share[i, j] for i in range(80) for j in range(i) if groups[i] == groups[j]]
    row = frames["layers"].query("layer == 3 and step == 400").iloc[0]
    assert row["distance"] == pytest.approx(np.mean(within))
    share = snapshot.share()
    within_group = [share[i, j] for i in range(80) for j in range(i) if groups[i] == groups[j] == 1]
    others = [share[i, j] for i in range(80) for j in range(80) if groups[i] == 1 != groups[j]]
    row = frames["groups"].query("group == 'g1' and step == 400").iloc[0]
    assert row["distance"] == pytest.approx(np.mean(within_group))
    assert row["gap"] == pytest.approx(np.mean(others) - np.mean(within_group))
    assert row["samples"] == 20


def test_other_readings_of_the_paper_give_the_same_verdict(planted):
    for settings in ({"alphabet": "shared"}, {"alphabet": "chars"}, {"tau": 0.5}, {"weights": "top"}):
        assert run_of(asked=ask(**settings)).verdict == planted.verdict, settings


def test_the_default_policy_warns_of_drift_and_not_of_reorganising(planted, control):
    from diagnostics.core.analysis import Result

    for run, expected in ((planted, []), (control, ["drift_without_signal"])):
        frames, values, _ = measure(run)
        result = Result(metrics=values, tables=frames, analysis="pathways", parameters={})
        assert [finding.metric for finding in result.findings()] == expected
        assert not not_measured(result, default_policy())


def test_records_of_a_model_that_cannot_be_loaded_are_concluded_alike(planted):
    records = [snapshot.record for snapshot in planted.snapshots]
    result = result_of_records(
        STEPS, [f"{step:g}" for step in STEPS], records, planted.samples, planted.settings
    )
    assert result.metrics["turn_step"] == measure(planted)[1]["turn_step"]
    assert result.summary().startswith("reorganising after memorisation")
    assert "steps" in result.figures()


# --- choosing rows ---


def rows(count, group):
    return [{"text": f"{group} {number}", "group": group} for number in range(count)]


def test_at_most_so_many_rows_of_each_group_are_followed():
    task = task_of([*rows(30, "a"), *rows(5, "b")], ref="F")
    cut, groups, where = draw_rows({"F": task}, 10, 0)
    assert [groups.count(name) for name in "ab"] == [10, 5]
    assert len(cut["F"].rows) == len(set(where)) == 15
    assert [row.number for row in cut["F"].rows] == sorted(row.number for row in cut["F"].rows)
    assert where[-1] == "F:35"
    assert draw_rows({"F": task}, 10, 0)[2] == where
    assert draw_rows({"F": task}, 10, 1)[2] != where
    assert cut["F"].fingerprint != draw_rows({"F": task}, 10, 1)[0]["F"].fingerprint


def test_many_groups_share_the_most_that_is_followed():
    task = task_of([row for group in range(400) for row in rows(9, f"g{group}")])
    _, groups, _ = draw_rows({"F": task}, 400, 0)
    assert len(groups) == 400 * (MOST // 400)


def test_rows_without_a_group_are_of_the_group_of_their_file():
    first, second = task_of(["x", "y"], ref="one"), task_of(rows(2, "a"), ref="two")
    assert draw_rows({"one": first, "two": second}, 9, 0)[1] == ["one", "one", "a", "a"]
    assert draw_rows({"one": first}, 9, 0)[1] == ["all", "all"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": 0.0}, "tau is 0; it is a share"),
        ({"alphabet": "words"}, "alphabet is 'words'; give tagged, shared, chars"),
        ({"metric": "auc"}, "metric is 'auc'; give auto, accuracy or loss"),
        ({"samples": 1}, "samples is 1; distances need at least 2"),
        ({"epsilon": 0.0}, "epsilon is 0; it is a loss in nats"),
        ({"delta": 0.0}, "delta is 0; it is a difference"),
        ({"draws": 10}, "draws is 10; at least 100"),
    ],
)
def test_a_parameter_out_of_range_is_named(wrong, message):
    usual = {
        "tau": 0.7, "alphabet": "tagged", "samples": 400, "metric": "auto", "epsilon": None, "delta": 0.05,
        "permutations": 100, "draws": 100,
    }  # fmt: skip
    check(**usual)
    with pytest.raises(ValueError, match=message):
        check(**{**usual, **wrong})


# --- from files ---

LETTERS = "abcdefg"
SAVED = (0, 40, 60, 75, 90)


def mixture(seed=0, **settings):
    torch.manual_seed(seed)
    about = {
        "vocab_size": len(LETTERS) + 1, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2,
        "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**{**about, **settings}))


def drawn(count, seed):
    """Rows of five letters and one to be memorised, of two groups by their first letter."""
    ids = torch.randint(1, 8, (count, 6), generator=torch.Generator().manual_seed(seed))
    texts = ["".join(LETTERS[letter - 1] for letter in row) for row in ids.tolist()]
    return ids, [
        {"prompt": text[:5], "completion": text[5], "group": "early" if text[0] < "d" else "late"}
        for text in texts
    ]


TRAIN = drawn(24, 1)
TASK = drawn(16, 2)[1]


def save(directory, model):
    model.save_pretrained(directory)
    save_tokenizer(directory, LETTERS)
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny OLMoE that memorises 24 random rows, saved at five steps."""
    root = tmp_path_factory.mktemp("run")
    model = mixture()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    ids = torch.cat([torch.zeros(24, 1, dtype=torch.long), TRAIN[0]], dim=1)
    for step in range(SAVED[-1] + 1):
        if step in SAVED:
            save(root / f"checkpoint-{step}", model.eval())
        logits = model.train()(ids).logits[:, 5]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, ids[:, 6]).backward()
        optimizer.step()
    return root


@pytest.fixture(scope="module")
def followed(trained):
    return grokking_pathways([trained], TASK, TRAIN[1], permutations=200, draws=200)


def test_a_run_is_followed_from_its_files_with_its_losses(followed, trained):
    steps = followed.tables["steps"]
    assert steps["step"].tolist() == list(SAVED)
    model = transformers.OlmoeForCausalLM.from_pretrained(trained / "checkpoint-40").eval()
    ids = torch.cat([torch.zeros(24, 1, dtype=torch.long), TRAIN[0]], dim=1)
    with torch.no_grad():
        output = model(ids, output_router_logits=True)
    naive = torch.nn.functional.cross_entropy(output.logits[:, 5], ids[:, 6], reduction="none")
    values = followed.tables["values"].query("step == 40").sort_values("sample")
    where = followed.tables["samples"].sort_values("sample")["row"]
    order = [int(row.rpartition(":")[2]) - 1 for row in where]
    assert values["loss"].to_numpy() == pytest.approx(naive.double().numpy()[order], abs=1e-4)
    # The routes of one sample, by the definition: softmax over all experts, mean over its 7 tokens.
    routed = torch.stack([layer.softmax(-1).view(24, 7, 6).mean(1) for layer in output.router_logits], 1)
    rows = (
        model.get_parameter("model.layers.0.mlp.gate.weight"),
        model.get_parameter("model.layers.1.mlp.gate.weight"),
    )
    embedded = [routed[:, layer].double() @ rows[layer].detach().double() for layer in range(2)]
    first = torch.nn.functional.cosine_similarity(*embedded)
    layer = followed.tables["layers"].query("step == 40 and layer == 0").iloc[0]
    assert layer["cosine_ahead"] == pytest.approx(first.mean().item(), abs=1e-5)


def test_memorisation_of_a_run_is_dated_by_the_rule(followed):
    values = followed.tables["values"]
    losses = values.pivot(index="step", columns="sample", values="loss").to_numpy()
    epsilon = followed.tables["groups"].groupby("group")["epsilon"].first()
    groups = followed.tables["samples"]["group"]
    at = memorised_at(losses, groups.map(epsilon).to_numpy(), 0.05)
    expected = [SAVED[index] if index < len(SAVED) else math.nan for index in at]
    assert followed.tables["samples"]["memorised_step"].to_numpy() == pytest.approx(expected, nan_ok=True)
    assert followed.metrics["loss_last_nats"] < 0.05
    early = sorted(SAVED[index] for index in at if index < len(SAVED) - 1)
    assert followed.metrics["memorised_share"] == len(early) / 24 > 0.2
    assert followed.metrics["memorised_step"] == early[(len(early) - 1) // 2]


def test_letters_at_random_do_not_generalise_and_nothing_is_claimed(followed):
    assert followed.metrics.get("reorganising") == 0
    assert "turn_step" not in followed.metrics
    assert set(followed.metrics) <= set(METRICS)
    assert followed.summary().startswith(followed.tables["verdict"]["verdict"][0])
    assert followed.metrics["experts"] == 6
    assert followed.metrics["top_k"] == 2


def test_what_was_recorded_is_kept_and_serves_another_reading(trained, tmp_path, monkeypatch):
    series = CheckpointSeries([trained / "checkpoint-0", trained / "checkpoint-90"], cache=tmp_path)
    settings = {"permutations": 100, "draws": 100}
    grokking_pathways(series, TASK, TRAIN[1], **settings)
    monkeypatch.setattr("diagnostics.analyses.pathways.record.Editable", None)  # nothing is loaded again
    again = CheckpointSeries([trained / "checkpoint-0", trained / "checkpoint-90"], cache=tmp_path)
    other = grokking_pathways(again, TASK, TRAIN[1], tau=0.5, weights="top", alphabet="shared", **settings)
    assert other.metrics["checkpoints"] == 2
    assert other.parameters["weights"] == "top"


@pytest.fixture(scope="module")
def ends(trained):
    """The first and the last checkpoint, on the task rows alone."""
    return between(trained)


def between(trained, **settings):
    pair = [trained / f"checkpoint-{step}" for step in (SAVED[0], SAVED[-1])]
    return grokking_pathways(pair, TASK, permutations=100, draws=100, **settings)


def test_batches_change_nothing(trained, ends):
    other = between(trained, batch_tokens=64)
    for name in ("distance_last", "gap_last", "consistency_last", "loss_last_nats", "drift"):
        assert other.metrics[name] == pytest.approx(ends.metrics[name], abs=1e-5), name


def test_without_rows_of_training_the_task_rows_are_followed(ends):
    assert ends.metrics["samples"] == 16
    assert ends.tables["verdict"]["verdict"][0] == "withheld"


def test_a_dense_model_is_told_what_runs_instead(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    refs = [save(tmp_path / f"step{at}", transformers.LlamaForCausalLM(config)) for at in (1, 2)]
    with pytest.raises(NotApplicableError, match=r"step1: is a dense model, .* `dynamics` follows"):
        grokking_pathways(refs, TASK)


def test_checkpoints_with_other_experts_are_refused_by_name(tmp_path):
    refs = [save(tmp_path / f"step{at}", mixture(num_experts=experts)) for at, experts in ((1, 6), (2, 4))]
    message = r"2: has 3 layers of 4 experts of width 16, and 1 3 layers of 6 experts"
    with pytest.raises(ValueError, match=message):
        grokking_pathways(refs, TASK, permutations=100, draws=100)


def test_a_series_of_one_is_recorded_and_refused(trained, tmp_path):
    series = CheckpointSeries([trained / "checkpoint-40"], cache=tmp_path)
    with pytest.raises(
        TooShortError, match="a series of 1 checkpoint: a comparison of pathways needs at least 2"
    ):
        grokking_pathways(series, TASK)
    assert len(list(tmp_path.glob("pathways.*.npz"))) == 1


def test_folding_the_gain_of_the_norm_changes_smoothness_and_no_distance(trained, ends):
    plain, folded = ends.metrics, between(trained, fold_gain=True).metrics
    assert folded["distance_last"] == plain["distance_last"]
    assert folded["consistency_first"] == pytest.approx(plain["consistency_first"], abs=1e-6)  # gains are 1
    assert folded["consistency_last"] != pytest.approx(plain["consistency_last"], abs=1e-6)


def test_two_layers_leave_out_the_papers_consistency_and_say_so(tmp_path):
    refs = [save(tmp_path / f"step{seed}", mixture(seed, num_hidden_layers=2)) for seed in (1, 2)]
    result = grokking_pathways(refs, TASK, permutations=100, draws=100)
    assert result.tables["steps"]["gp_inconsistency"].isna().all()
    assert any("Two layers have experts" in note for note in result.notes)
    assert np.isfinite(result.tables["steps"]["consistency"]).all()


def test_a_running_training_records_the_numbers_that_its_saved_checkpoints_give(trained, followed, tmp_path):
    files = {}
    for role, rows in (("task", TASK), ("train", TRAIN[1])):
        files[role] = tmp_path / f"{role}.jsonl"
        files[role].write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"pathways": {"permutations": 100, "draws": 100}}
    callback = AuditCallback(
        tmp_path / "audit", task=[files["task"]], train=[files["train"]], settings=settings,
        skip=[name for name in installed() if name != "pathways"],
    )  # fmt: skip
    for step in SAVED[:2]:
        checkpoint = trained / f"checkpoint-{step}"
        model = transformers.OlmoeForCausalLM.from_pretrained(checkpoint).train()
        audit = callback.record(step, model, transformers.AutoTokenizer.from_pretrained(checkpoint))
        assert model.training
    recorded = audit.results["pathways"].tables["steps"].set_index("step")
    saved = followed.tables["steps"].set_index("step")
    for column in ("distance", "gap", "consistency", "gp_inconsistency", "loss", "held_out"):
        expected = saved.loc[list(SAVED[:2]), column].to_numpy()
        assert recorded[column].to_numpy() == pytest.approx(expected, abs=1e-5), column
