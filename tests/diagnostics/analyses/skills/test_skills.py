"""A planted skill is found, what is not there is not, and every claim stands beside its controls."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.analysis import METRICS, mask_names, skill_localization
from diagnostics.analyses.skills.notes import percent, short_count, size_label
from diagnostics.core.analysis import Result, plain
from diagnostics.core.policy import default_policy, judge
from diagnostics.core.registry import find
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch, write_graft
from probes.models.editable import Editable
from probes.text.rows import task_of
from tests.diagnostics import planted

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

SIZE = 32
QUICK = {"steps": 20, "seeds": 2, "draws": 200}


def rows(task="small", count=120, **how):
    return planted.rows(task, count, seed=3, **how)


@pytest.fixture(scope="module")
def one_skill(tmp_path_factory):
    """A pair with one planted skill of 32 entries."""
    root = tmp_path_factory.mktemp("one_skill")
    entries = planted.draw(0, "small", SIZE, 1)
    return CheckpointPair(*planted.save_pair(root, {"small": entries})), entries


@pytest.fixture(scope="module")
def two_skills(tmp_path_factory):
    """A pair with two planted skills that share no entry."""
    root = tmp_path_factory.mktemp("two_skills")
    skills = {task: planted.draw(0, task, SIZE, 1) for task in ("small", "large")}
    return CheckpointPair(*planted.save_pair(root, skills)), skills


@pytest.fixture(scope="module")
def localisation(one_skill):
    """What is found of the one skill at the planted size."""
    ood = {"noisy": rows(noise=0.2, count=60)}
    return skill_localization(one_skill[0], rows(), rows("large", 50), ood, budgets=(SIZE,), **QUICK)


@pytest.fixture(scope="module")
def both(two_skills):
    """What is found of the two."""
    tasks = {name: rows(name, 120) for name in two_skills[1]}
    return skill_localization(two_skills[0], tasks, budgets=(4, 8, 16), steps=20, seeds=1, draws=200)


# --- what is planted is found ---


def test_a_planted_skill_is_recovered_at_its_size(one_skill, localisation):
    entries = one_skill[1]
    m = localisation.metrics
    assert m["base_metric"] < 0.75
    assert m["tuned_metric"] > 0.95
    assert m["region"] == SIZE
    assert m["share"] == m["skill_size"] == SIZE / m["entries"]
    assert m["rel"] >= 0.95
    index = localisation.masks["small"].index
    precision, recall = region.overlap(entries, index), region.overlap(index, entries)
    assert precision == recall >= 0.8  # of one size
    # Everything else moved by 1e-5: random entries of the same tensors carry next to nothing.
    assert m["random_rel"] < 0.5
    assert m["movement_rel"] > 0.9
    # Without them tuned is all but base.
    assert m["necessity"] > 0.9
    assert m["localised"] == 1


def test_a_skill_is_no_larger_than_half_as_large_again_as_planted(one_skill):
    result = skill_localization(one_skill[0], rows(), budgets=(4, 8, 16, 32, 48), **QUICK)
    m = result.metrics
    assert m["skill_size"] * m["entries"] <= 1.5 * SIZE
    assert m["rel"] >= 0.9
    budget = result.tables["budget"]
    learned = budget[budget["method"] == "learned"]
    assert {4, 8, 16, 32, 48} <= set(learned["entries"])
    assert (learned["chosen"].sum(), learned[learned["chosen"]]["entries"].iloc[0]) == (1, m["region"])
    assert m["gradients"] <= 10 + 2 * 20 + 3 * 20 + 20


@pytest.mark.parametrize("search", ["faithful", "movement"])
def test_the_other_searches_find_it_too(one_skill, search):
    pair, entries = one_skill
    result = skill_localization(pair, rows(count=100), budgets=(SIZE,), search=search, steps=60, seeds=1,
                                draws=100)  # fmt: skip
    assert result.metrics["rel"] >= 0.9
    # A faithful search leaves out the planted entries that do harm, and fills up with others.
    least = 0.5 if search == "faithful" else 0.9
    assert region.overlap(entries, result.masks["small"].index) > least
    methods = set(result.tables["budget"]["method"])
    assert ("learned" in methods) == (search == "faithful")
    assert (result.metrics["gradients"] > 0) == (search == "faithful")
    assert result.figures()


def test_two_planted_skills_have_regions_of_their_own(two_skills, both):
    assert both.metrics["localised"] == 2
    rel = both.tables["rel"].pivot(index="region", columns="task", values="rel")
    for name in ("small", "large"):
        other = "large" if name == "small" else "small"
        assert rel.loc[name, name] > 0.9
        assert abs(rel.loc[name, other]) < 0.2
        # What is found was planted for this task, and not for the other.
        index = both.masks[name].index
        assert region.overlap(two_skills[1][name], index) > 0.9
        assert region.overlap(two_skills[1][other], index) < 0.1
    # The plants share nothing, and neither do the regions.
    overlap = both.tables["overlap"].set_index(["task", "other"])["overlap"]
    assert overlap[("small", "small")] == 1
    assert overlap[("small", "large")] < 0.1
    union = both.tables["unions"]
    assert (union["member"]).all()
    assert (union["rel"] > 0.8).all()
    assert union["entries"].iloc[0] == region.size(
        region.union([both.masks[name].index for name in ("small", "large")])
    )
    assert both.metrics["purity"] == pytest.approx(rel.loc["small", "small"] - rel.loc["small", "large"])
    assert {"overlap", "rel", "unions"} <= set(both.figures())


# --- controls, calibration, other sets ---


def test_every_claim_stands_beside_its_controls(localisation):
    budget = localisation.tables["budget"]
    assert set(budget["method"]) == {
        "base", "tuned", "ones", "interpolation", "learned", "movement", "random", "complement",
    }  # fmt: skip
    assert sorted(budget["alpha"].dropna()) == [0.25, 0.5, 0.75]
    # The random region was drawn three times, as large as the learned one.
    drawn = budget[budget["method"] == "random"]
    assert drawn["entries"].tolist() == [SIZE] * 3
    assert localisation.metrics["random_rel"] == pytest.approx(drawn["rel"].mean())
    by_method = budget.set_index("method")
    assert by_method.loc["base", "rel"] == 0
    assert by_method.loc["tuned", "rel"] == by_method.loc["ones", "rel"] == 1
    assert by_method.loc["tuned", "agreement"] == 1
    summary = localisation.summary()
    for word in (
        "a sufficient region of 32 of 10,464 entries (0.31 %)",
        "top movement",
        "random",
        "half of the update",
    ):
        assert word in summary
    assert "the region" not in summary
    tempered = localisation.tables["calibration"].set_index("model").loc["tempered"]
    assert tempered["temperature"] == localisation.metrics["temperature"]
    assert tempered["accuracy"] == localisation.metrics["tuned_metric"]


def test_other_sets_are_answered_by_the_graft_and_held_against_tuned(localisation):
    sets = localisation.tables["sets"].set_index(["role", "set", "model"])
    assert {role for role, *_ in sets.index} == {"task", "keep", "ood"}
    graft = sets.loc[("ood", "noisy", "graft")]
    tuned = sets.loc[("ood", "noisy", "tuned")]
    assert graft["over_tuned"] == pytest.approx(graft["metric"] - tuned["metric"])
    assert graft["over_tuned_low"] <= graft["over_tuned"] <= graft["over_tuned_high"]
    # A fifth of the answers are wrong there: nobody is right about more.
    assert tuned["metric"] == pytest.approx(0.8, abs=0.12)
    assert {"curve", "region", "reliability", "sets"} <= set(localisation.figures())


def test_where_the_region_lies_adds_up(localisation):
    where = localisation.tables["region"]
    assert where["entries"].sum() == SIZE
    assert where["share"].sum() == pytest.approx(1)
    assert where["size"].sum() == localisation.metrics["entries"]
    # An even spread has density 1: weighted by size it averages to 1.
    assert (where["density"] * where["size"]).sum() / where["size"].sum() == pytest.approx(1)
    top = where.nlargest(1, "density").iloc[0]
    assert (top["layer"], top["component"]) == (0, "down_proj")
    densest = localisation.tables["densest"]
    assert (densest["density"].diff().dropna() <= 0).all()
    assert densest["component"].iloc[0] == "down_proj"


def test_searches_with_other_seeds_tell_how_stable_the_region_is(localisation):
    stability = localisation.tables["stability"]
    assert stability[["seed", "other"]].to_numpy().tolist() == [[0, 1]]
    assert localisation.metrics["stability"] == stability["jaccard"].iloc[0] > 0.5


# --- the mask as a file ---


def test_the_mask_grafts_what_was_measured(one_skill, localisation, tmp_path):
    from diagnostics.evaluation.row_losses import encoded

    pair, _ = one_skill
    localisation.masks["small"].save(tmp_path / "mask.safetensors")
    patch = Patch.load(tmp_path / "mask.safetensors")
    patch.check(pair)
    assert patch.count == SIZE
    assert patch.about["task"] == "small"
    write_graft(pair, patch, tmp_path / "graft")
    for name, side in (("graft", "graft_metric"), ("base", "base_metric")):
        ref = tmp_path / "graft" if name == "graft" else pair.base.ref
        graft = Editable(CheckpointPair(pair.base, ref).tuned)
        task = encoded(graft, rows(), max_length=None, chat_template=False, batch_tokens=500)
        right = task.measure(graft.model).right
        # Of all 120 rows, of which 48 were reported on.
        assert right.mean() == pytest.approx(localisation.metrics[side], abs=0.12), side


def test_an_audit_keeps_the_mask_and_redraws(one_skill, tmp_path, monkeypatch):
    from diagnostics.audit.run import audit
    from diagnostics.core import registry
    from diagnostics.store.audit_store import load

    # Whatever else is installed.
    monkeypatch.setattr(registry, "entry_points", lambda **_: [])
    file = tmp_path / "small.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"prompt": row.prompt, "choices": row.choices, "answer": row.answer})
            for row in rows(count=60).rows
        )
    )
    places = [one_skill[0].base.ref, one_skill[0].tuned.ref]
    how = {"budgets": (SIZE,), "steps": 5, "seeds": 1, "draws": 100}
    audit(*places, out=tmp_path / "audit", only=("skills",), task=[str(file)], settings={"skills": how})
    saved = load(tmp_path / "audit").results["skills"]
    assert {name: path.name for name, path in saved.masks.items()} == {"small": "skills.small.safetensors"}
    assert Patch.load(saved.masks["small"]).count == SIZE
    assert {"curve", "region"} <= set(saved.figures())


def test_names_of_masks_are_names_of_files():
    assert mask_names(["a/b", "a b", "c.jsonl", "..", "ü"]) == {
        "a/b": "a-b", "a b": "a-b-2", "c.jsonl": "c-jsonl", "..": "task", "ü": "ü",
    }  # fmt: skip


# --- the contract ---


def test_it_keeps_the_contract(localisation):
    assert list(localisation.metrics) == [name for name in METRICS if name in localisation.metrics]
    assert all(math.isfinite(value) for value in localisation.metrics.values())
    assert {"base_metric", "tuned_metric", "graft_metric", "share"} <= set(localisation.metrics)
    assert {"share", "metric"} <= set(localisation.tables["budget"])
    assert {"layer", "component", "entries", "share"} <= set(localisation.tables["region"])
    json.dumps(plain(localisation.parameters))
    record = find("skills")
    assert (record.inputs, record.optional) == (("pair", "task"), ("keep", "ood"))
    for name, figure in localisation.figures().items():
        assert figure.layout.title.text, name


def test_the_same_arguments_give_the_same_result_and_batches_change_nothing(one_skill):
    how = {"budgets": (SIZE,), "steps": 4, "seeds": 1, "draws": 100}
    first, again = (skill_localization(one_skill[0], rows(count=60), **how) for _ in range(2))
    for name, table in first.tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name])
    small = skill_localization(one_skill[0], rows(count=60), batch_tokens=40, **how)
    first_metric, small_metric = (result.tables["budget"]["metric"].to_numpy() for result in (first, small))
    np.testing.assert_allclose(first_metric[:6], small_metric[:6])  # what no search decides


def test_progress_is_told(one_skill):
    seen = []
    skill_localization(one_skill[0], rows(count=60), budgets=(SIZE,), steps=3, seeds=1, draws=100,
                       progress=lambda *step: seen.append(step))  # fmt: skip
    assert seen
    assert all(done <= total for done, total, _ in seen)
    assert {what for *_, what in seen} == {"small: integrated gradients", "small: budget search"}


# --- nothing to localise ---


def test_tuned_that_equals_base_has_nothing_to_localise(one_skill):
    pair = CheckpointPair(one_skill[0].base.ref, one_skill[0].base.ref)
    result = skill_localization(pair, rows(count=60), **QUICK)
    assert result.metrics["base_metric"] == result.metrics["tuned_metric"]
    assert result.metrics["entries"] == result.metrics["gradients"] == 0
    assert "share" not in result.metrics
    assert result.masks == {}
    assert "nothing to localise: tuned equals base" in result.summary()
    assert [f.metric for f in judge(result, default_policy())] == ["without_gain"]
    result.figures()


def test_a_task_that_tuned_is_no_better_at_is_said_so_with_its_figures(one_skill):
    result = skill_localization(one_skill[0], {"large": rows("large", 60)}, **QUICK)
    m = result.metrics
    assert m["without_gain"] == 1
    assert m["gain"] <= 2 * m["gain_error"]
    assert m["gradients"] == 0
    assert result.masks == {}
    assert "large: nothing to localise: tuned is not surely better than base" in result.summary()
    assert f"{m['base_metric']:.3g}" in result.summary()
    assert set(result.tables) == {"tasks", "budget", "sets", "calibration", "reliability"}
    assert set(result.figures()) == {"reliability", "sets"}


def test_one_task_without_a_gain_does_not_hide_the_other(one_skill):
    tasks = {"large": rows("large", 60), "small": rows(count=60)}
    result = skill_localization(one_skill[0], tasks, budgets=(SIZE,), steps=10, seeds=1, draws=100)
    assert (result.metrics["without_gain"], result.metrics["localised"]) == (1, 1)
    assert set(result.masks) == {"small"}
    assert "overlap" not in result.tables


# --- kinds of rows and models ---


def test_of_texts_it_is_the_loss_that_is_localised(one_skill):
    texts = task_of(
        [
            {"prompt": row.prompt, "completion": row.choices[row.answer]}
            for row in rows(count=80).rows
        ],
        ref="texts",
    )  # fmt: skip
    result = skill_localization(one_skill[0], texts, budgets=(SIZE,), steps=10, seeds=1, draws=100)
    m = result.metrics
    # Two answers of which one is nearly sure, out of ten letters: the loss falls.
    assert m["tuned_metric"] < m["base_metric"]
    assert m["gain"] == pytest.approx(m["base_metric"] - m["tuned_metric"])
    assert m["rel"] > 0.9
    assert {"agreement", "ece_tuned", "recovery", "temperature"}.isdisjoint(m)
    assert "calibration" not in result.tables
    assert "of the loss reduction of tuning" in result.summary()
    assert any("Rel is of the loss" in note for note in result.notes)


def classifier(seed, head):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(planted.LETTERS) + 1, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, initializer_range=0.3, num_labels=2,
    )  # fmt: skip
    model_class = transformers.LlamaForSequenceClassification if head else transformers.LlamaForCausalLM
    return model_class(config).eval()


def test_a_head_that_base_lacks_stays_tuneds_on_both_sides(tmp_path):
    base, tuned = classifier(0, False), classifier(0, True)
    tuned.model.load_state_dict(base.model.state_dict())
    with torch.no_grad():
        tuned.model.layers[0].mlp.down_proj.weight[:, :8].normal_(std=4.0)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
        planted.save_tokenizer(tmp_path / name, planted.LETTERS)
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    editable = Editable(pair.tuned)
    texts = [row.prompt for row in rows(count=80).rows]
    with torch.no_grad():
        ids = editable.tokenizer(texts, return_tensors="pt")["input_ids"]
        labels = editable.model(input_ids=ids).logits.argmax(dim=1).tolist()
    assert 10 < sum(labels) < 70
    task = task_of([{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)], ref="labelled")
    result = skill_localization(pair, task, budgets=(0.2, 1.0), steps=5, seeds=1, draws=100)
    assert result.metrics["tuned_metric"] == 1
    assert result.metrics["entries"] == 16 * 24
    assert any("Base lacks score.weight; it is measured with tuned's" in note for note in result.notes)
    # All that moved are 16 x 8 entries, so that a graft of every entry has no more.
    assert any("truncated" in note for note in result.notes)
    largest = result.tables["budget"].query("method == 'learned'").nlargest(1, "entries").iloc[0]
    assert (largest["entries"], largest["rel"]) == (128, 1)


# --- bad input ---


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"budgets": (0.0,)}, "budgets holds 0; give a share of the entries"),
        ({"budgets": (-3,)}, "budgets holds -3"),
        ({"budgets": (2.5,)}, "budgets holds 2.5"),
        ({"budgets": ()}, "budgets is empty"),
        (
            {"budgets": (20_000,)},
            "budgets holds 20000, but the changed tensors have 10,464 eligible entries",
        ),
        ({"candidates": 0.0}, "candidates is 0; it is a share"),
        ({"splits": (0.5, 0.5)}, "splits is 0.5, 0.5; give three shares that sum to 1"),
        ({"splits": (0.5, 0.5, 0.5)}, "three shares that sum to 1"),
        ({"kept": 0.0}, "kept is 0"),
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"rate": 0.0}, "rate is 0; it is a share of the largest score, above 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"draws": 10}, "draws is 10; at least 100"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(one_skill, how, message):
    with pytest.raises(ValueError, match=message):
        skill_localization(one_skill[0], rows(count=60), **how)


def test_rows_that_cannot_be_split_or_scored_are_refused(one_skill):
    with pytest.raises(ValueError, match=r"small: has 20 rows; at least 40 are needed"):
        skill_localization(one_skill[0], rows(count=20))
    labels = task_of([{"text": str(i), "label": "a"} for i in range(60)], ref="labels")
    with pytest.raises(ValueError, match="labels: holds rows of label, and a causal model scores"):
        skill_localization(one_skill[0], labels)


# --- words ---


def test_words_for_sizes():
    assert [size_label(share) for share in (1e-5, 1e-4, 2e-4, 1e-2, 0.011)] == [
        "sharp", "sharp", "moderate", "moderate", "diffuse",
    ]  # fmt: skip
    assert [short_count(n) for n in (8505, 85_054_464, 7_200_000_000)] == ["8,505", "85.1 M", "7.2 B"]
    assert percent(8505 / 85_054_464) == "0.01 %"


def test_a_saved_result_redraws(localisation, tmp_path):
    from diagnostics.store.files import read_table, write_table

    tables = {}
    for name, table in localisation.tables.items():
        write_table(tmp_path / f"{name}.parquet", table)
        tables[name] = read_table(tmp_path / f"{name}.parquet")
    saved = Result(
        metrics=localisation.metrics,
        tables=tables,
        analysis="skills",
        parameters=dict(localisation.parameters),
    )
    assert {n: f.to_json() for n, f in saved.figures().items()} == {
        n: f.to_json() for n, f in localisation.figures().items()
    }
    assert saved.summary() == localisation.summary()


def test_nothing_of_this_machine_is_in_a_result(localisation):
    assert str(Path.home()) not in "".join(map(str, localisation.notes))
