import math
from fractions import Fraction
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import LikelihoodRatioDetector
from diagnostics.analyses.ood.analysis import METRICS, gate_notes, likelihood_ratio_ood
from diagnostics.analyses.ood.tables import SCORES, over_length, ratio_scores
from diagnostics.audit.run import audit
from diagnostics.evaluation.paired_texts import TextOptions, read_sets
from diagnostics.numerics import detection_metrics
from diagnostics.store.audit_store import load
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.runnable import RunnablePair
from probes.text.batches import windows
from probes.text.rows import task_of
from tests.cases import make_case
from tests.diagnostics.chains import constant, save_chain, save_llama, save_tokenizer

LETTERS = "abcdefghij "


def texts(count, letters, seed):
    generator = np.random.default_rng(seed)
    return [
        "".join(generator.choice(list(letters), size=size)) for size in generator.integers(3, 20, size=count)
    ]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base and two tuned models, all related."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"base": 0.0, "tuned": 0.1, "other": 0.1}
    return {
        name: save_llama(root / name, seed=seed, characters=LETTERS, shift=size)
        for seed, (name, size) in enumerate(sizes.items())
    }


@pytest.fixture(scope="module")
def pair(places):
    return CheckpointPair(places["base"], places["tuned"])


SETS = {
    "task": texts(12, LETTERS, 0),
    "ood": {"few": [{"text": text, "group": "gh"[i % 2]} for i, text in enumerate(texts(8, "ab", 1))],
            "long": texts(6, "jjjj ", 2)},
    "keep": texts(12, "cde", 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def result(pair):
    return likelihood_ratio_ood(pair, **SETS, draws=20)


def ratios(result):
    return result.tables["rows"]["ratio"].to_numpy()


# --- closed forms ---

EIGHT = np.arange(11)  # how often the first symbol stands among ten


def two_symbols(base, tuned):
    counts = EIGHT.astype(float)
    log = [counts * math.log(p) + (10 - counts) * math.log(1 - p) for p in (base, tuned)]
    return ratio_scores(log[0], log[1], np.full(11, 10.0))["ratio"]


def binomial(p):
    return np.array([math.comb(10, k) * p**k * (1 - p) ** (10 - k) for k in EIGHT])


def weighted_auroc(score, inside, outside):
    """P(score of an outside text > of an inside one), ties as half, each text with its probability."""
    higher = score[None, :] > score[:, None]
    tie = score[None, :] == score[:, None]
    return float(inside @ (higher + tie / 2) @ outside)


def test_two_symbols_give_the_closed_form():
    ratio = two_symbols(0.5, 0.9)
    # −10 · KL(0.9‖0.5) = −10 · (0.9 ln 1.8 + 0.1 ln 0.2), and 10 · KL(0.5‖0.9) = 10 · ½ ln(0.25 / 0.09)
    assert binomial(0.9) @ ratio == pytest.approx(-3.680642071685, abs=5e-13)
    assert binomial(0.5) @ ratio == pytest.approx(5.108256237660, abs=5e-13)
    # The page prints 0.980806015509. The ratio falls with the count k of first symbols, so that the area is
    # Σ P(k | 9/10) P(j | 1/2) [j < k, ½ if j = k], here in fractions: 0.980806015508 to as many digits.
    inside, outside = (
        [math.comb(10, k) * p**k * (1 - p) ** (10 - k) for k in range(11)]
        for p in (Fraction(9, 10), Fraction(1, 2))
    )
    exact = sum(
        inside[k] * outside[j] * (1 if j < k else Fraction(j == k, 2)) for k in range(11) for j in range(11)
    )
    assert exact == Fraction(25108633997, 25600000000) == Fraction("0.9808060155078125")
    area = weighted_auroc(ratio.round(9), binomial(0.9), binomial(0.5))
    assert area == pytest.approx(0.980806015509, abs=1.5e-12)
    assert area == pytest.approx(float(exact), abs=1e-15)
    # The likelihood of tuned puts these texts in the same order.
    tuned = -(EIGHT * math.log(0.9) + (10 - EIGHT) * math.log(0.1))
    assert weighted_auroc(tuned.round(9), binomial(0.9), binomial(0.5)) == pytest.approx(area, abs=1e-15)


def chain_ratios(tmp_path, base, tuned, contents, **options):
    pair = CheckpointPair(
        save_chain(tmp_path / "base", base, **options), save_chain(tmp_path / "tuned", tuned, **options)
    )
    with RunnablePair(pair) as runnable:
        reading = read_sets(runnable, {"rows": task_of(contents)}, TextOptions())
    return reading.sets["rows"]


def total(text):
    return text.base.full.log_likelihood - text.tuned.full.log_likelihood


def test_a_model_that_is_the_two_symbol_chain_gives_the_closed_form(tmp_path):
    contents = ["a" * k + "b" * (10 - k) for k in EIGHT]
    got = np.array(
        [total(t) for t in chain_ratios(tmp_path, constant(0.5, 0.5, 0), constant(0.9, 0.1, 0), contents)]
    )
    assert got == pytest.approx(two_symbols(0.5, 0.9), abs=1e-5)


def test_three_symbols_are_the_smallest_case_in_which_the_ratio_wins():
    counts = [triple for triple in product(range(11), repeat=3) if sum(triple) == 10]
    multiplicity = np.array(
        [math.factorial(10) / math.prod(map(math.factorial, triple)) for triple in counts]
    )
    counts = np.array(counts, dtype=float)

    def probability(*p):
        return multiplicity * np.prod(np.array(p) ** counts, axis=1)

    base, tuned = (counts @ np.log(p) for p in ((0.6, 0.2, 0.2), (0.6, 0.35, 0.05)))
    scores = ratio_scores(base, tuned, np.full(len(counts), 10.0))
    inside, outside = probability(0.6, 0.35, 0.05), probability(0.8, 0, 0.2)
    areas = {
        name: weighted_auroc(scores[name].round(9), inside, outside) for name in ("ratio", "tuned_likelihood")
    }
    # Summed in fractions over all counts: 0.96785172318267295 and 0.68972813707169818.
    assert areas["ratio"] == pytest.approx(0.96785172318267295, abs=1e-13)
    assert areas["tuned_likelihood"] == pytest.approx(0.68972813707169818, abs=1e-13)
    # The page's 0.968 and 0.688 are of 20,000 draws each; the second is within its standard error, 0.003.
    assert areas["ratio"] == pytest.approx(0.968, abs=5e-4)
    assert areas["tuned_likelihood"] == pytest.approx(0.688, abs=0.003)


def test_a_long_text_of_a_markov_chain_gives_minus_the_divergence_rate(tmp_path):
    base = [[1 / 3] * 3, [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]
    tuned = [[1 / 3] * 3, [0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
    generator, length = np.random.default_rng(0), 5000
    state, letters = 0, []
    for _ in range(length):
        state = 1 + generator.choice(3, p=tuned[state])
        letters.append("abc"[state - 1])
    (text, _) = chain_ratios(tmp_path, base, tuned, ["".join(letters), "ab"], longest=8192)
    # Stationary π of tuned solves π = πP; the rate is Σ π_i KL(tuned_i ‖ base_i).
    P, Q = np.array(tuned[1:]), np.array(base[1:])
    values, vectors = np.linalg.eig(P.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    divergence = float(stationary @ (P * np.log(P / Q)).sum(axis=1))
    tokens = (text.base.full.tokens - text.tuned.full.tokens).astype(float)
    blocks = tokens.reshape(50, 100).mean(axis=1)  # of 100 tokens, which are nearly independent
    assert total(text) / length == pytest.approx(-divergence, abs=4 * blocks.std(ddof=1) / math.sqrt(50))


def test_no_token_of_a_mixture_is_more_foreign_than_its_weight_allows(tmp_path):
    w = 0.3
    base, other = np.array(constant(0.6, 0.3, 0.1)), np.array([[0.4, 0, 0.6]] * 4)
    mixed = ((1 - w) * base + w * other).tolist()
    *rows, extreme = chain_ratios(tmp_path, base.tolist(), mixed, [*texts(5, "abc", 0), "b" * 9])
    for row in rows:  # summed over the scored tokens: LR ≤ −(T−1) log(1 − w)
        assert (row.base.full.tokens - row.tuned.full.tokens <= -math.log(1 - w) + 1e-5).all()
        assert total(row) < -row.length * math.log(1 - w)
    # What the other part never writes, b, reaches the bound.
    assert total(extreme) == pytest.approx(-9 * math.log(1 - w), abs=1e-5)


def test_a_frequent_token_appended_fools_the_likelihood_and_moves_the_ratio_by_no_more_than_its_own(tmp_path):
    generator = np.random.default_rng(0)
    base, tuned = (0.6, 0.2, 0.2), (0.55, 0.4, 0.05)
    inside = ["".join(generator.choice(list("abc"), size=10, p=tuned)) for _ in range(40)]
    outside = ["".join(generator.choice(list("abc"), size=10, p=(0.8, 0, 0.2))) for _ in range(40)]
    longer = [text + "a" * copies for copies in (0, 1, 3, 6) for text in inside]
    rows = chain_ratios(tmp_path, constant(*base), constant(*tuned), [*longer, *outside])
    ratio = np.array([total(row) for row in rows])
    likelihood = -np.array([row.tuned.full.log_likelihood for row in rows])
    areas = []
    for index, copies in enumerate((0, 1, 3, 6)):
        here = slice(40 * index, 40 * index + 40)
        areas.append(detection_metrics.auroc(likelihood[here], likelihood[160:]))
        moved = np.abs(ratio[here] - ratio[:40])
        assert moved.max() <= copies * abs(math.log(0.6 / 0.55)) + 1e-5
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[-1] + 0.3


# --- identities ---


@given(st.lists(st.tuples(*[st.floats(-500, 0)] * 3, st.integers(1, 60)), min_size=1))
def test_the_ratio_is_antisymmetric_and_additive_and_its_mean_times_length_is_itself(rows):
    a, b, c, length = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    ratio = ratio_scores(a, b, length)["ratio"]
    assert (ratio == -ratio_scores(b, a, length)["ratio"]).all()
    through = ratio + ratio_scores(b, c, length)["ratio"]
    assert through == pytest.approx(ratio_scores(a, c, length)["ratio"], abs=1e-9)
    assert ratio_scores(a, b, length)["ratio_per_token"] * length == pytest.approx(ratio, abs=1e-9)


def test_models_too_are_antisymmetric_and_additive(places, pair, result):
    base, tuned, other = places.values()
    back = ratios(likelihood_ratio_ood(CheckpointPair(tuned, base), **SETS, draws=2))
    onwards = ratios(likelihood_ratio_ood(CheckpointPair(tuned, other), **SETS, draws=2))
    direct = ratios(likelihood_ratio_ood(CheckpointPair(base, other), **SETS, draws=2))
    assert (back == -ratios(result)).all()
    assert ratios(result) + onwards == pytest.approx(direct, abs=1e-5)


def test_a_base_compared_with_itself_gives_ratio_0_and_chance(places):
    result = likelihood_ratio_ood(CheckpointPair(places["base"], places["base"]), **SETS, draws=20)
    assert (ratios(result) == 0).all()
    assert (result.tables["tokens"]["ratio"] == 0).all()
    table = result.tables["detection"]
    ratio = table[table["score"].isin(["ratio", "ratio_per_token"])]
    assert (ratio["auroc"] == 0.5).all()
    assert (ratio["fpr95"].round(12) == 0.95).all()
    assert (ratio["aupr"] - ratio["prevalence"]).abs().max() < 1e-12
    assert (result.metrics["auroc_low"], result.metrics["gain_nats"]) == (0.5, 0)
    assert result.metrics["flagged_ood"] == 0


def test_an_adapter_that_adds_nothing_gives_ratio_0_too(places, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(places["base"])
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)  # B is 0
    result = likelihood_ratio_ood(CheckpointPair(places["base"], tmp_path), **SETS, draws=2)
    assert (ratios(result) == 0).all()
    assert result.metrics["auroc"] == 0.5


def test_scores_equal_a_row_by_row_computation_with_transformers_alone(places, result):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    contents = [
        *SETS["task"],
        *(row["text"] for row in SETS["ood"]["few"]),
        *SETS["ood"]["long"],
        *SETS["keep"],
    ]
    rows = result.tables["rows"]
    for side in ("base", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(places[side]).eval()
        tokenizer = AutoTokenizer.from_pretrained(places[side])
        expected, top, energy = [], [], []
        for text in contents:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].double()
            log = logits.log_softmax(dim=-1)
            expected.append(float(log.gather(1, ids[0, 1:, None]).sum()))
            top.append(-float(log.amax(dim=-1).exp().mean()))
            energy.append(-float(logits.logsumexp(dim=-1).mean()))
        assert rows[f"log_likelihood_{side}"].to_numpy() == pytest.approx(np.array(expected), abs=1e-4)
    assert rows["max_softmax"].to_numpy() == pytest.approx(np.array(top), abs=1e-5)
    assert rows["energy"].to_numpy() == pytest.approx(np.array(energy), abs=1e-4)
    assert rows["tokens"].tolist() == [len(text) for text in contents]


@pytest.mark.parametrize("batch_tokens", [1, 50])
def test_nothing_depends_on_the_batches(pair, result, batch_tokens):
    batched = likelihood_ratio_ood(pair, **SETS, draws=20, batch_tokens=batch_tokens)
    assert ratios(batched) == pytest.approx(ratios(result), abs=1e-4)
    pd.testing.assert_frame_equal(batched.tables["detection"], result.tables["detection"], atol=1e-3)


def test_the_tokens_of_a_row_add_up_to_its_ratio(result):
    rows = result.tables["rows"].set_index(["set", "row"])
    shown = result.tables["tokens"].groupby(["set", "row"], sort=False)
    sums, words = shown["ratio"].sum(), shown["token"].agg("".join)
    assert set(sums.index.get_level_values("set")) == {"task", "few", "long", "keep"}
    assert sums.to_numpy() == pytest.approx(rows.loc[sums.index, "ratio"].to_numpy(), abs=1e-5)
    assert words.tolist() == rows.loc[words.index, "text"].tolist()


def test_tokens_are_kept_of_both_ends_of_every_set_and_of_fewer_rows_where_they_are_long(
    pair, result, monkeypatch
):
    rows = result.tables["rows"].dropna(subset=["ratio"])

    def kept(scored):
        return {
            name: list(dict.fromkeys(part["row"])) for name, part in scored.tables["tokens"].groupby("set")
        }

    few = kept(likelihood_ratio_ood(pair, **SETS, draws=2, examples=2))
    order = {}
    for name, part in rows.groupby("set", sort=False):
        order[name] = part.sort_values("ratio_per_token", ascending=False, kind="stable")["row"].tolist()
        assert few[name] == list(dict.fromkeys([*order[name][:2], *order[name][-2:]]))
    # No room for a second row: the most foreign is kept, however long.
    monkeypatch.setattr("diagnostics.analyses.ood.tables.TOKENS", 1)
    assert kept(likelihood_ratio_ood(pair, **SETS, draws=2, examples=2)) == {
        name: rows[:1] for name, rows in order.items()
    }


def test_an_adapter_scores_as_it_does_merged(places, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(places["base"]),
        LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    save_tokenizer(tmp_path / "merged", LETTERS)
    adapted, merged = (
        likelihood_ratio_ood(CheckpointPair(places["base"], tmp_path / name), **SETS, draws=2)
        for name in ("adapter", "merged")
    )
    assert np.abs(ratios(adapted)).max() > 0.1
    assert ratios(adapted) == pytest.approx(ratios(merged), abs=1e-4)


# --- questions and answers ---


def test_question_and_answer_given_it_add_up_to_the_whole(pair):
    def rows(seed, letters):
        return [
            {"prompt": q + " ", "completion": a}
            for q, a in zip(texts(6, letters, seed), texts(6, letters, seed + 1), strict=True)
        ]

    result = likelihood_ratio_ood(pair, rows(0, "abc"), rows(5, "hij"), draws=2)
    table = result.tables["rows"]
    added = table["question_ratio"] + table["conditional_ratio"]
    assert added.to_numpy() == pytest.approx(ratios(result), abs=1e-4)
    assert {"question_ratio", "answer_ratio", "conditional_ratio"} <= set(result.tables["detection"]["score"])
    # The answer by itself is another text than the answer behind its question.
    assert (table["answer_ratio"] - table["conditional_ratio"]).abs().min() > 1e-4
    joined = likelihood_ratio_ood(
        pair,
        *([r["prompt"] + r["completion"] for r in rows(*of)] for of in ((0, "abc"), (5, "hij"))),
        draws=2,
    )
    assert ratios(joined) == pytest.approx(ratios(result), abs=1e-4)


def test_a_question_of_no_token_leaves_its_row_out_of_that_score_alone(pair):
    def rows(*prompts):
        return [{"prompt": prompt, "completion": "ab"} for prompt in prompts]

    ood = {"asked": rows("hi", "ji", "j"), "told": ["jj", "ih"]}
    result = likelihood_ratio_ood(pair, rows("abc", "", "de", "cab"), ood, draws=2)
    table = result.tables["detection"].set_index(["ood", "score"])
    assert table.loc[("asked", "question_ratio"), ["rows_id", "rows_ood"]].tolist() == [3, 3]
    assert table.loc[("asked", "answer_ratio"), ["rows_id", "rows_ood"]].tolist() == [4, 3]
    asked = result.tables["rows"].set_index("set")["question_ratio"]
    expected = detection_metrics.auroc(asked["task"].dropna(), asked["asked"])
    assert table.loc[("asked", "question_ratio"), "auroc"] == expected
    assert "1 rows have no question_ratio" in "\n".join(result.notes)
    # Texts have no question: neither they, nor all sets together, are judged by one.
    assert ("told", "question_ratio") not in table.index
    assert ("all", "question_ratio") not in table.index


def test_of_choices_the_right_one_is_the_answer(pair):
    choices = [{"prompt": "ab ", "choices": ["c", "de"], "answer": 1}] * 2
    completions = [{"prompt": "ab ", "completion": "de"}] * 2
    ood = [{"prompt": "h", "completion": "ij"}] * 2
    of_choices, of_completions = (
        likelihood_ratio_ood(pair, task, ood, draws=2) for task in (choices, completions)
    )
    assert (ratios(of_choices) == ratios(of_completions)).all()


def test_greedy_answers_are_the_tuned_models_own(places, pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["abc", "j", "de fg"]
    rows = [{"prompt": prompt, "completion": "a"} for prompt in prompts]
    ood = [{"prompt": prompt, "completion": "a"} for prompt in ("hh", "iiii")]
    result = likelihood_ratio_ood(pair, rows, ood, answers="greedy", longest_answer=4, draws=2)
    model = AutoModelForCausalLM.from_pretrained(places["tuned"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(places["tuned"])
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(4):
            with torch.no_grad():
                following = model(ids).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None, None]], dim=1)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    assert result.tables["rows"]["text"].tolist()[:3] == expected


def test_a_prompt_that_is_cut_to_leave_room_for_its_answer_is_said_to_be(pair):
    rows = [{"prompt": prompt, "completion": "a"} for prompt in ("abc", "de" * 20)]
    ood = [{"prompt": prompt, "completion": "a"} for prompt in ("hh", "iiii")]
    result = likelihood_ratio_ood(pair, rows, ood, answers="greedy", longest_answer=40, draws=2)
    # Half of 64 is the most for an answer, and the prompt has 41 with its BOS.
    assert result.notes[0] == (
        "task: the model saw only the last 32 tokens of 1 of 2 prompts, to have room for an answer of 32; "
        "the first is task:2. A lower longest_answer leaves more room"
    )


# --- the tables ---


def test_every_score_is_judged_on_every_set_as_scikit_learn_does(result):
    from sklearn.metrics import average_precision_score, roc_auc_score

    rows, table = result.tables["rows"], result.tables["detection"]
    assert set(table["ood"]) == {"all", "few", "long"}
    assert set(table.loc[table["group"].notna(), "group"]) == {"g", "h"}
    scored = set(SCORES) - {"question_ratio", "answer_ratio", "conditional_ratio"}
    for (name, group), part in table.groupby(["ood", "group"], dropna=False, sort=False):
        outside = rows[(rows["role"] == "ood") & ((rows["set"] == name) | (name == "all"))]
        outside = outside if pd.isna(group) else outside[outside["group"] == group]
        both = pd.concat([rows[rows["role"] == "task"], outside])
        assert set(part["score"]) == scored
        for row in part.to_dict("records"):
            auroc = roc_auc_score(both["role"] == "ood", both[row["score"]])
            assert row["auroc"] == pytest.approx(auroc, abs=1e-12)
            precision = average_precision_score(both["role"] == "ood", both[row["score"]])
            assert row["aupr"] == pytest.approx(precision, abs=1e-12)
            assert row["low"] <= row["auroc"] <= row["high"]
            assert row["ratio_gain_low"] <= row["ratio_gain"] <= row["ratio_gain_high"]


def test_metrics_are_those_of_the_ratio_with_all_ood_sets_pooled(result):
    table = result.tables["detection"].set_index(["ood", "score"])
    pooled = table.loc[("all", "ratio")]
    assert result.metrics["auroc"] == pooled["auroc"].item()
    assert result.metrics["fpr95"] == pooled["fpr95"].item()
    assert set(result.metrics) == set(METRICS)
    assert (result.metrics["rows_id"], result.metrics["rows_ood"], result.metrics["rows_keep"]) == (
        12,
        14,
        12,
    )
    assert result.metrics["noise_nats"] < 1e-4


def test_p_values_count_the_task_rows_that_score_as_high_without_the_row_itself(result):
    rows = result.tables["rows"]
    inside = rows.loc[rows["role"] == "task", "ratio"].to_numpy()
    for row in rows.to_dict("records"):
        reference = inside if row["role"] != "task" else np.delete(inside, row["row"] - 1)
        assert row["p_value"] == pytest.approx((1 + (reference >= row["ratio"]).sum()) / (len(reference) + 1))


def test_the_gain_of_a_set_is_its_loss_in_base_minus_that_in_tuned(result):
    table = result.tables["sets"]
    assert (table["loss_base"] - table["loss_tuned"] - table["gain"]).abs().max() < 1e-9
    rows = result.tables["rows"]
    task = rows[rows["role"] == "task"]
    assert result.metrics["gain_nats"] == pytest.approx(-task["ratio"].sum() / task["tokens"].sum())


def test_a_row_without_a_token_to_score_is_counted_and_left_out(pair):
    result = likelihood_ratio_ood(pair, ["ab", "", "cd"], ["ij", "hh"], draws=2)
    assert (result.metrics["unscored"], result.metrics["rows_id"]) == (1, 2)
    assert math.isnan(result.tables["rows"]["ratio"][1])
    assert any("1 of 3 rows without a token to score" in note for note in result.notes)


def test_a_row_longer_than_the_models_take_is_cut_and_counted(pair):
    result = likelihood_ratio_ood(pair, ["ab", "c" * 100], ["ij", "hh"], draws=2)
    assert result.metrics["truncated"] == 1
    assert result.tables["rows"]["tokens"][1] == 63  # of 64, the first being the BOS


def test_of_rows_that_are_cut_the_share_is_shown_and_how_to_read_them_whole(pair):
    result = likelihood_ratio_ood(pair, ["ab", "c" * 100], ["ij", "hh"], draws=2)
    assert result.tables["sets"].set_index("set")["truncated"].to_dict() == {"task": 0.5, "ood": 0}
    assert any("task: 1 of 2 rows longer than the longest sequence and cut" in note for note in result.notes)
    assert any(
        "1 of 4 rows were cut" in note and "--set ood.windows=true scores them to the end" in note
        for note in result.notes
    )


# --- long texts in windows ---


def in_windows(model, ids, longest):
    """Log-likelihood of every token behind the BOS, each window of the naive way run by itself."""
    bos, body, scores = ids[:1], ids[1:], []
    for start in range(0, len(body), longest // 2):
        window = bos + body[start : start + longest - 1]
        with torch.no_grad():
            log = model(torch.tensor([window])).logits[0, :-1].double().log_softmax(dim=-1)
        window_scores = log.gather(1, torch.tensor(window[1:])[:, None])[:, 0].tolist()
        scores += window_scores[len(scores) - start :]
        if start + longest - 1 >= len(body):
            return np.array(scores)
    raise AssertionError


@pytest.mark.parametrize("max_length", [None, 20])
def test_windows_give_what_each_gives_by_itself(places, pair, max_length):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [*texts(3, LETTERS, 7), "abcdefghij " * 15, "hgfe dcba" * 9]
    longest = max_length or 64
    result = likelihood_ratio_ood(pair, rows, ["j" * 150, "hh"], windows=True, max_length=max_length, draws=2)
    table = result.tables["rows"]
    assert result.metrics["truncated"] == 0
    assert table["tokens"].tolist() == [len(text) for text in [*rows, "j" * 150, "hh"]]
    tokenizer = AutoTokenizer.from_pretrained(places["base"])
    for side in ("base", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(places[side]).eval()
        for position, text in enumerate(rows):
            expected = in_windows(model, tokenizer(text)["input_ids"], longest)
            assert len(expected) == len(text)
            assert table[f"log_likelihood_{side}"][position] == pytest.approx(expected.sum(), abs=1e-4)
            of_row = result.tables["tokens"].query("set == 'task' and row == @position + 1")
            if len(of_row):
                assert of_row[f"log_likelihood_{side}"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert result.tables["tokens"].query("set == 'task'")["row"].nunique() == 5
    share = 2 if max_length is None else sum(len(text) >= longest for text in rows)
    assert any(
        f"task: {share} of 5 rows have more than {longest} tokens and were read in windows" in note
        for note in result.notes
    )


def test_windows_change_nothing_for_rows_that_are_short_enough(pair, result):
    windowed = likelihood_ratio_ood(pair, **SETS, windows=True, draws=20)
    assert windowed.metrics == result.metrics
    for name, table in windowed.tables.items():
        pd.testing.assert_frame_equal(table, result.tables[name], check_exact=True)
    assert windowed.notes == result.notes


def test_question_and_answer_add_up_to_the_whole_in_windows_too(pair):
    rows = [{"prompt": "abcde " * 20, "completion": "hij " * 30}, {"prompt": "ab", "completion": "cd"}]
    result = likelihood_ratio_ood(
        pair, rows, [{"prompt": "ij", "completion": "hh"}] * 2, windows=True, draws=2
    )
    table = result.tables["rows"]
    assert table["tokens"][0] == 240
    assert (table["question_ratio"] + table["conditional_ratio"]).to_numpy() == pytest.approx(
        table["ratio"].to_numpy(), abs=1e-4
    )


def test_means_over_windows_are_means_over_tokens(pair):
    from diagnostics.evaluation.likelihoods import score_texts
    from probes.text.encode import encode

    with RunnablePair(pair) as runnable, runnable.tuned() as model:
        encoded = encode(task_of(["abcdefghij " * 9]), runnable.tokenizer, max_length=None)
        (averaged,) = score_texts(model, encoded, longest=40)
        parts = score_texts(model, windows(encoded[0], 40))
    weights = [len(part.tokens) for part in parts]
    assert sum(weights) == 99
    assert len(parts) > 3
    for name in ("top", "energy"):
        values = [getattr(part, name) for part in parts]
        assert getattr(averaged, name) == pytest.approx(np.average(values, weights=weights))
    assert averaged.pooled == pytest.approx(np.average([p.pooled for p in parts], axis=0, weights=weights))


def test_texts_in_both_sets_are_said(pair):
    result = likelihood_ratio_ood(pair, ["ab", "cd"], ["CD".lower(), "hh"], draws=2)
    assert any("1 texts are in both the task and the OOD rows" in note for note in result.notes)


# --- what the length alone gives away ---


def scored_rows(**columns):
    return pd.DataFrame(
        {"set": "a", "group": None, **{name: np.array(v, float) for name, v in columns.items()}}
    )


@pytest.mark.parametrize("longer", [True, False])
def test_the_length_counts_in_the_direction_in_which_it_separates(longer):
    generator = np.random.default_rng(0)
    inside = scored_rows(ratio=generator.normal(size=40), length=generator.integers(10, 20, 40))
    # The ratio separates perfectly, and so does the length.
    lengths = generator.integers(30, 40, 40) if longer else generator.integers(1, 9, 40)
    outside = scored_rows(ratio=10 + generator.normal(size=40), length=lengths)
    area, lead = over_length(inside, outside)
    assert (area, lead.value) == (1, 0)
    assert lead.low < 0


def test_sets_that_differ_in_opposite_directions_do_not_hide_each_other():
    inside = scored_rows(ratio=np.linspace(0, 1, 30), length=np.full(30, 10) + np.arange(30) % 3)
    short, long = (
        scored_rows(ratio=np.linspace(0.5, 1.5, 30), length=size + np.arange(30) % 2) for size in (3, 20)
    )
    outside = pd.concat([short.assign(set="short"), long.assign(set="long")])
    area, lead = over_length(inside, outside)
    assert area == 1
    assert lead.value == pytest.approx(detection_metrics.auroc(inside["ratio"], short["ratio"]) - 1)


def test_rows_that_are_all_shorter_are_found_to_be_separated_by_length(pair):
    long, short = texts(30, LETTERS, 0), ["ab", "cj", "d", "ge", "hh", "ij"]
    result = likelihood_ratio_ood(pair, [text + "abcdefghij" for text in long], short, draws=2)
    assert result.metrics["auroc_length"] == 1
    assert "over_length_low" in {finding.metric for finding in result.findings()}


@pytest.mark.parametrize("per_token", [True, False])
def test_a_ratio_that_surely_separates_better_is_the_one_to_gate_with(per_token):
    sign = 1 if per_token else -1
    gains = {"per_token_gain": 0.3 * sign, "per_token_gain_low": 0.3 * sign - 0.1}
    (note,) = gate_notes({**gains, "per_token_gain_high": 0.3 * sign + 0.1})
    assert note.startswith(
        f"gate with the {'ratio per token' if per_token else 'summed ratio'}: its AUROC is 0.300"
    )
    assert "(at least 0.200)" in note
    assert f"per_token={per_token}" in note
    assert not gate_notes({"per_token_gain": 0.1, "per_token_gain_low": -0.1, "per_token_gain_high": 0.3})


def test_the_two_ratios_are_compared_on_the_same_rows(result):
    rows = result.tables["rows"]
    inside, outside = (rows[rows["role"] == role] for role in ("task", "ood"))
    areas = [detection_metrics.auroc(inside[score], outside[score]) for score in ("ratio_per_token", "ratio")]
    m = result.metrics
    assert m["per_token_gain"] == pytest.approx(areas[0] - areas[1])
    assert m["per_token_gain_low"] <= m["per_token_gain"] <= m["per_token_gain_high"]


# --- tokenizers that differ ---


def with_transformers(directory, texts):
    """The log-likelihood of each text, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    scores = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log = model.double().eval()(ids).logits[0, :-1].log_softmax(dim=-1)
        scores.append(float(log.gather(1, ids[0, 1:, None]).sum()))
    return scores


def columns(result):
    rows = result.tables["rows"]
    return rows["log_likelihood_base"].tolist(), rows["log_likelihood_tuned"].tolist()


FOUR = ["ab", "cd", "ij", "hh"]


def test_tokens_that_only_one_side_has_keep_the_probability_that_the_model_gives_them(places, tmp_path):
    more = save_llama(tmp_path / "more", seed=1, characters=LETTERS + "!?", shift=0.1)
    result = likelihood_ratio_ood(CheckpointPair(places["base"], more), FOUR[:2], FOUR[2:], draws=2)
    for column, directory in zip(columns(result), (places["base"], more), strict=True):
        assert column == pytest.approx(with_transformers(directory, FOUR), abs=1e-5)
    assert result.tables["rows"]["tokens"].tolist() == [2, 2, 2, 2]
    assert "tokens" in result.tables
    assert not any("tokenizer" in note for note in result.notes)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_rows_that_only_an_adapter_has_take_part_as_in_the_model_that_was_trained(places, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(places["base"])
    model.resize_token_embeddings(len(LETTERS) + 4, mean_resizing=False)
    torch.nn.init.normal_(model.lm_head.weight[-3:].detach())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    result = likelihood_ratio_ood(
        CheckpointPair(places["base"], tmp_path / "adapter"), FOUR[:2], FOUR[2:], draws=2
    )
    ids = AutoTokenizer.from_pretrained(places["base"])("ab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log = model(ids).logits[0, :-1].double().log_softmax(dim=-1)
    expected = float(log.gather(1, ids[0, 1:, None]).sum())
    assert columns(result)[1][0] == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def split_pair(tmp_path):
    """Two models with one vocabulary; only base's tokenizer merges "ab" and "ij"."""
    places = [
        save_llama(tmp_path / name, seed=1, characters=LETTERS, shift=shift, rows=14)
        for name, shift in (("base", 0.0), ("tuned", 0.1))
    ]
    for directory, merged in zip(places, (True, False), strict=True):
        save_tokenizer(directory, LETTERS, words=["ab", "ij"], merged=merged)
    return places


def test_each_side_reads_with_its_own_tokenizer_in_nats_per_byte(split_pair):
    result = likelihood_ratio_ood(CheckpointPair(*split_pair), FOUR[:2], FOUR[2:], draws=2)
    for column, directory in zip(columns(result), split_pair, strict=True):
        assert column == pytest.approx(with_transformers(directory, FOUR), abs=1e-5)
    assert result.tables["rows"]["tokens"].tolist() == [2, 2, 2, 2]
    assert "tokens" not in result.tables
    (note,) = (note for note in result.notes if "own tokenizer" in note)
    assert note.startswith(
        "base and tuned split 2 of 4 rows differently, the first at task:1 ('ab' in base, 'a'"
    )
    sets = result.tables["sets"].set_index("set")
    assert sets.loc["task", "loss_base"] == pytest.approx(-sum(columns(result)[0][:2]) / 4)


def test_tokenizers_that_split_the_given_rows_alike_are_one(split_pair):
    rows = ["cd", "efg", "hh", "jic"]
    result = likelihood_ratio_ood(CheckpointPair(*split_pair), rows[:2], rows[2:], draws=2)
    assert result.tables["rows"]["tokens"].tolist() == [2, 3, 2, 3]
    assert "tokens" in result.tables
    assert not any("tokenizer" in note for note in result.notes)
    in_bytes = likelihood_ratio_ood(
        CheckpointPair(*split_pair), ["çd", "efg"], rows[2:], approximate=True, draws=2
    )
    assert "tokens" not in in_bytes.tables


def test_other_vocabularies_are_each_read_as_they_are(places, tmp_path):
    other = save_llama(tmp_path / "other", seed=1, characters=LETTERS[::-1], shift=0.1)
    pair = CheckpointPair(places["base"], other)
    result = likelihood_ratio_ood(pair, ["ab", "cd ef"], ["ij", "hh"], draws=2)
    assert result.tables["rows"]["tokens"].tolist() == [2, 5, 2, 2]
    texts = ["ab", "cd ef", "ij", "hh"]
    for column, directory in zip(columns(result), (places["base"], other), strict=True):
        assert column == pytest.approx(with_transformers(directory, texts), abs=1e-5)
    (note,) = (note for note in result.notes if "own tokenizer" in note)
    assert "('a' = 1 'b' = 2 in base, 'a' = 11 'b' = 10 in tuned)" in note
    assert not any("BOS" in note or "the first token" in note for note in result.notes)
    save_tokenizer(other, LETTERS[::-1], bos=False)
    result = likelihood_ratio_ood(pair, ["ab", "cd ef"], ["ij", "hh"], draws=2)
    assert any("only base scores the first token of each text" in note for note in result.notes)


def test_a_base_without_a_chat_template_reads_the_messages_that_tuned_was_given(split_pair, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(split_pair[1])
    tokenizer.chat_template = "<s>c{{ messages[0].content }}d"
    tokenizer.save_pretrained(split_pair[1])
    pair = CheckpointPair(*split_pair)
    result = likelihood_ratio_ood(pair, ["ef", "gh"], ["hh", "ge"], chat_template=True, draws=2)
    assert result.tables["rows"]["tokens"].tolist() == [2, 2, 2, 2]
    given = likelihood_ratio_ood(pair, ["abe", "gh"], ["hh", "ge"], chat_template=True, draws=2)
    assert any("split 1 of 4 rows differently" in note for note in given.notes)


def test_the_detector_counts_bytes_of_every_text_where_tokenizers_are_written_differently(split_pair):
    detector = LikelihoodRatioDetector.fit(split_pair, ["abc", "cd", "efg", "hij"], per_token=True)
    texts = ["cd", "abij"]
    base, tuned = (np.array(with_transformers(directory, texts)) for directory in split_pair)
    assert detector.score(texts) == pytest.approx((base - tuned) / [2, 4], abs=1e-5)
    assert detector.records(["cd"], tokens=True)[0]["by_token"] is None
    with pytest.raises(InputError, match="a token has no ratio"):
        detector.explain("cd")


def test_the_case_of_one_vocabulary_and_other_splits(tmp_path):
    case = make_case("same_vocabulary_other_splits", tmp_path)
    result = likelihood_ratio_ood(
        CheckpointPair(case / "base", case / "tuned"), [case / "task.jsonl"], [case / "ood.jsonl"], draws=2
    )
    rows = result.tables["rows"].query("role == 'task'")
    assert -rows["log_likelihood_base"].mean() == pytest.approx(12.2, abs=0.05)


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": ["ab"]}, "has 1 row, and OOD detection needs at least 2"),
        ({"ood": ["ab", "cd"]}, "hold the same rows"),
        (
            {"task": ["ab", ""]},
            "--task: 1 of 2 rows have a token to score, and OOD detection needs at least 2",
        ),
        ({"alpha": 0.0}, "alpha is 0.0; it is a probability between 0 and 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(pair, given, message):
    with pytest.raises(ValueError, match=message):
        likelihood_ratio_ood(pair, **{"task": ["ab", "cd"], "ood": ["ij", "hh"], **given})


def test_a_likelihood_that_is_not_finite_is_refused_with_its_row_and_layer(places, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(places["base"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.inf
    model.save_pretrained(tmp_path / "broken")
    save_tokenizer(tmp_path / "broken", LETTERS)
    with pytest.raises(
        ValueError, match=r":\d \(tuned\): its logits are NaN or infinite \(first at layer 1\)"
    ):
        likelihood_ratio_ood(CheckpointPair(places["base"], tmp_path / "broken"), ["ab", "cd"], ["ij", "hh"])


# --- in an audit ---


def test_an_audit_runs_it_with_its_rows_and_the_saved_result_redraws(places, tmp_path):
    files = {}
    for name, contents in {"task": SETS["task"], "keep": SETS["keep"], "x": texts(8, "ab", 1)}.items():
        files[name] = tmp_path / f"{name}.csv"
        pd.DataFrame({"text": contents}).to_csv(files[name], index=False)
    audited = audit(
        places["base"], places["tuned"], out=tmp_path / "out", only=["ood"], task=[files["task"]],
        keep=[files["keep"]], ood=[f"x={files['x']}", f"<b>y</b>={files['x']}"], device="cpu",
        settings={"ood": {"draws": 5}},
    )  # fmt: skip
    assert audited.analyses["ood"].status == "ok", audited.analyses["ood"].reason
    result = load(tmp_path / "out").results["ood"]
    assert result.metrics == audited.results["ood"].metrics
    figures = result.figures()
    assert set(figures) == {"densities", "scores", "roc", "losses", "length", "gains", "tokens"}
    assert all(figure.layout.title.text and figure.layout.xaxis.title.text for figure in figures.values())
    assert {"x (ood)", "&lt;b&gt;y&lt;/b&gt; (ood)"} <= {trace.name for trace in figures["length"].data}
    assert "AUROC" in result.summary()


def test_without_rows_it_is_skipped_with_the_options_that_enable_it(checkpoints, tmp_path):
    audited = audit(*checkpoints, out=tmp_path / "out", only=["intruders", "ood"], device="cpu")
    assert audited.analyses["ood"].reason == "needs --task F and --ood NAME=F"


def test_the_default_policy_judges_it(result):
    metrics = {finding.metric for finding in result.findings()}
    low = {
        "auroc_low": result.metrics["auroc_low"] < 0.5,
        "over_length_low": result.metrics["over_length_low"] < 0,
        "gain_nats": result.metrics["gain_nats"] < 0.01,
        "keep_gain_high_nats": result.metrics["keep_gain_high_nats"] < 0,
    }
    assert metrics == {metric for metric, flagged in low.items() if flagged}
    assert metrics  # a tuned model that is base plus noise has lost something


def test_the_curve_drawn_has_the_area_that_is_reported(result):
    rows = result.tables["rows"]
    inside, outside = (rows.loc[rows["role"] == role, "ratio"].to_numpy() for role in ("task", "ood"))
    curve = result.figures()["roc"].data[0]
    assert curve.name == "ratio"
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(detection_metrics.auroc(inside, outside))


def test_the_letters_of_tokens_stand_in_lines_with_no_token_parted():
    from diagnostics.analyses.ood.figures import LINES, WIDTH, laid

    part = pd.DataFrame(
        {"token": [" ab", "\n", " ", "", "x" * (WIDTH - 8), "cd"], "ratio": [0.0, 1, 2, 3, 4, 5]}
    )
    cells = laid(part)
    # "ab ⏎ ␣ ·" and a space before the x's: they begin at 9, and end one letter short of the line's end
    lines = ["".join(cell.letter for cell in cells if cell.line == line) for line in range(2)]
    assert lines == ["ab⏎␣·", "x" * (WIDTH - 8) + "cd"]
    assert [cell.column for cell in cells if cell.line == 0] == [0, 1, 3, 5, 7]
    assert {cell.ratio for cell in cells if cell.line == 1} == {4, 5}
    long = laid(pd.DataFrame({"token": ["y" * (2 * WIDTH)] * 9, "ratio": 0.0}))
    assert len(long) == LINES * WIDTH
