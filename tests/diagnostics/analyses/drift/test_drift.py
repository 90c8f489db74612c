import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.analyses.drift.analysis import _local_residuals, metrics_of, representation_drift
from diagnostics.analyses.drift.similarity import cka, class_shift, displacement, procrustes, rsa, unit
from diagnostics.audit.run import audit
from diagnostics.store.audit_store import load
from probes import CheckpointPair
from tests.diagnostics.chains import save_llama, save_tokenizer
from tests.probes.runnable import make, rows_of

LETTERS = "abcdefghij "
TASK = ["abc", "bcd", "cab", "dab c", "ade", "bad", "cede", "abcde"]
KEEP = ["hij", "ijij hij", "j", "jihgf", "gg hh"]


def points(seed, rows=12, width=5):
    return np.random.default_rng(seed).normal(size=(rows, width)) + 1


def rotation(seed, width=5):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


@given(st.integers(0, 100), st.floats(0.1, 10))
def test_rotation_and_scale_change_no_similarity(seed, scale):
    X = points(seed)
    Y = scale * X @ rotation(seed + 1)
    assert (rsa(X, Y), cka(X, Y)) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-9))
    assert procrustes(X, Y) == pytest.approx(0, abs=1e-9)
    assert procrustes(X, Y + 3) == pytest.approx(0, abs=1e-9)
    assert cka(X, Y + 3) == pytest.approx(1, abs=1e-9)


@given(st.integers(0, 100))
def test_similarities_are_symmetric_and_know_no_order_of_rows(seed):
    X, Y = points(seed), points(seed + 1000, width=5)
    order = np.random.default_rng(seed).permutation(len(X))
    for measure in (rsa, cka, procrustes):
        assert measure(X, Y) == pytest.approx(measure(Y, X), abs=1e-9)
        assert measure(X, Y) == pytest.approx(measure(X[order], Y[order]), abs=1e-9)


def test_independent_data_are_not_similar_on_average():
    # The diagonal of ones would give an RSA near 0.44, and the biased CKA is near width / rows = 0.67.
    pairs = [
        (points(seed, rows=30, width=20) - 1, points(seed + 500, rows=30, width=20) - 1) for seed in range(60)
    ]
    for measure in (rsa, cka):
        values = [measure(X, Y) for X, Y in pairs]
        assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / math.sqrt(len(values)))


def test_debiased_cka_is_the_mean_over_four_different_rows():
    # HSIC_u is a U-statistic: the mean of K_ij (M_ij + M_kl − 2 M_ik) over all (i, j, k, l) that differ.
    from itertools import permutations

    X, Y = points(0, rows=6, width=3), points(1, rows=6, width=3)

    def hsic(K, M):
        return np.mean(
            [K[i, j] * (M[i, j] + M[k, m] - 2 * M[i, k]) for i, j, k, m in permutations(range(len(K)), 4)]
        )

    K, M = X @ X.T, Y @ Y.T
    expected = hsic(K, M) / math.sqrt(hsic(K, K) * hsic(M, M))
    # Independent of centring, as the analysis does it: the statistic is of differences.
    assert cka(X, Y) == pytest.approx(expected, abs=1e-9)


def test_the_procrustes_residual_is_what_scipys_best_rotation_leaves():
    from scipy.spatial import procrustes as scipy_procrustes

    X, Y = points(0, rows=9, width=4), points(1, rows=9, width=4)
    # scipy's disparity with the best scale is 1 − s², where s is the normalised nuclear norm.
    disparity = scipy_procrustes(X, Y)[2]
    assert procrustes(X, Y) == pytest.approx(1 - math.sqrt(1 - disparity))


def test_what_moved_is_measured_against_base():
    X = np.array([[3.0, 4.0], [0.0, 0.0]])
    # The base's norm is 5, and each row moved by 1: √2 / 5.
    assert displacement(X, X + np.array([1.0, 0.0])) == pytest.approx(math.sqrt(2) / 5)
    X = np.array([[0.0], [2.0], [10.0], [12.0]])
    Y = X + np.array([[3.0], [3.0], [1.0], [1.0]])
    # Centres 1 and 11 moved by 3 and 1; every row is 1 from its centre.
    assert class_shift(X, Y, ["a", "a", "b", "b"]) == pytest.approx(2)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e4 / 3])
def test_rows_without_spread_have_no_similarity(value):
    # Round-off in the mean of equal rows is no spread, nor is that of float32 in the rows.
    X = np.full((5, 3), value)
    assert all(math.isnan(measure(X, X)) for measure in (rsa, cka, procrustes))
    Y = X * (1 + 1e-7 * np.random.default_rng(0).normal(size=X.shape))
    assert all(math.isnan(measure(X, Y)) for measure in (rsa, cka, procrustes))


def test_the_diagonal_of_ones_which_is_left_out_would_make_independent_rows_similar():
    # Telly's script takes the upper triangle with it: a share p = 2/(n + 1) of ones, and cosines of variance
    # 1/width. The correlation is p/(p + 1/width): 0.434 for 2,000 rows of 768, and here.
    n, width = 200, 77
    X, Y = (np.random.default_rng(seed).normal(size=(n, width)) for seed in (0, 1))
    upper = np.triu_indices(n)
    cosines = [(unit(rows) @ unit(rows).T)[upper] for rows in (X, Y)]
    assert np.corrcoef(*cosines)[0, 1] == pytest.approx(2 / 201 / (2 / 201 + 1 / 77), abs=0.02)
    # The n(n − 1)/2 pairs left are nearly independent: a standard error of 0.007.
    assert rsa(X, Y) == pytest.approx(0, abs=0.03)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [
        save_llama(root / name, seed=1, characters=LETTERS, shift=shift)
        for name, shift in (("base", 0.0), ("tuned", 0.2))
    ]


def test_base_compared_with_itself_does_not_drift(places):
    result = representation_drift(CheckpointPair(places[0], places[0]), TASK, KEEP)
    layers = result.tables["layers"]
    assert layers["layer"].unique().tolist() == [-1, 0, 1]
    assert (layers[["rsa", "cka"]] - 1).abs().to_numpy().max() < 1e-9
    assert layers[["procrustes", "displacement"]].abs().to_numpy().max() < 1e-9
    assert (result.metrics["rows_task"], result.metrics["layers"], result.metrics["keep_below_task"]) == (
        8,
        3,
        0,
    )
    assert not {"onset_keep", "onset_task"} & result.metrics.keys()  # nowhere
    assert "nowhere below 0.95" in result.summary()
    assert not result.findings()


@pytest.mark.parametrize("skip", [0, 1])
def test_it_compares_the_hidden_states_that_transformers_gives(places, skip):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = representation_drift(
        CheckpointPair(*places), {"t": TASK}, {"k": KEEP}, skip=skip, batch_tokens=20
    )
    pooled = {}
    for side, directory in zip(("base", "tuned"), places, strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        seen = []
        # transformers gives the last block's output only behind the last norm.
        model.model.layers[-1].register_forward_hook(
            lambda module, given, output, seen=seen: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for text in TASK:
            with torch.no_grad():
                states = model(
                    **tokenizer(text, return_tensors="pt"), output_hidden_states=True
                ).hidden_states
            stream = [*states[:-1], seen[-1].reshape(states[0].shape)]
            pooled.setdefault(side, []).append(
                torch.stack([state[0, skip:].double().mean(dim=0) for state in stream])
            )
    X, Y = (torch.stack(pooled[side]).numpy() for side in ("base", "tuned"))
    layers = result.tables["layers"].query("set == 't'")
    for depth, row in enumerate(layers.to_dict("records")):
        for name, measure in (
            ("rsa", rsa), ("cka", cka), ("procrustes", procrustes), ("displacement", displacement),
        ):  # fmt: skip
            assert row[name] == pytest.approx(measure(X[:, depth], Y[:, depth]), abs=1e-4)
    assert layers["rsa"].min() < 0.999
    assert result.metrics["lowest_rsa_task"] == layers["rsa"].min()
    assert any("captured through bridge" in note for note in result.notes)


@pytest.mark.parametrize("no_padding_id", [False, True])
@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt2_classes", "llama", "llama_classes", "bert", "bert_classes", "roberta_classes", "opt"],
)
def test_a_row_has_the_same_residuals_in_any_batch(family, no_padding_id):
    if no_padding_id and "bert" in family:
        pytest.skip("positions of this family are counted from the padding id")
    model = make(family, **{"pad_token_id": None} if no_padding_id else {})
    examples = rows_of(3, 20, 7, 11, 5, 28)
    together, alone = (_local_residuals(model, examples, tokens=tokens, skip=1)[0] for tokens in (10**4, 1))
    assert all(np.abs(together[layer] - alone[layer]).max() < 1e-4 for layer in alone)


def test_classifiers_without_a_padding_id_are_compared_as_transformers_runs_them(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    places, states = [], {}
    for seed, side in enumerate(("base", "tuned")):
        make("gpt2_classes", seed=seed).save_pretrained(tmp_path / side)
        save_tokenizer(tmp_path / side, LETTERS)
        places.append(tmp_path / side)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / side).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / side)
        with torch.no_grad():
            outputs = [
                model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True) for text in TASK
            ]
        rows = [output.hidden_states[1][0, 1:].double().mean(dim=0) for output in outputs]
        states[side] = torch.stack(rows).numpy()
    rows = [{"text": text, "label": index % 3} for index, text in enumerate(TASK)]
    layers = representation_drift(CheckpointPair(*places), rows).tables["layers"].set_index("layer")
    assert layers.loc[0, "rsa"] == pytest.approx(rsa(states["base"], states["tuned"]), abs=1e-4)


def test_rows_are_drawn_once_for_both_models(places):
    result = representation_drift(CheckpointPair(places[0], places[0]), TASK, rows=5, seed=3)
    assert result.metrics["rows_task"] == 5
    assert result.metrics["lowest_rsa_task"] == pytest.approx(1)


def test_too_few_rows_and_other_tokenizers_are_refused(places, tmp_path):
    with pytest.raises(ValueError, match="has 3 rows, and drift needs at least 4"):
        representation_drift(CheckpointPair(*places), TASK[:3])
    # With the BOS "ab" has three tokens, all of which are left out.
    with pytest.raises(ValueError, match="3 rows have a token behind the first 3; drift needs at least 4"):
        representation_drift(CheckpointPair(*places), ["abc", "abcd", "bcd", "ab", "b"], skip=3)
    with pytest.raises(ValueError, match="rows is 3 and skip 1; they are at least 4 and 0"):
        representation_drift(CheckpointPair(*places), TASK, rows=3)
    other = save_llama(tmp_path / "other", seed=1, characters=LETTERS[::-1])
    with pytest.raises(ValueError, match=r"split 8 of 8 rows differently.*not of the same tokens"):
        representation_drift(CheckpointPair(places[0], other), TASK)


def test_metrics_are_the_worst_of_each_role_and_of_the_lower_half():
    def layer(role, name, index, rsa):
        return {"set": name, "role": role, "layer": index, "rsa": rsa, "cka": rsa - 0.1, "rows": 7}

    values = {
        ("task", "a"): [1.0, 0.99, 0.96, 0.90, 0.6],
        ("keep", "b"): [1.0, 0.97, 0.80, 0.92, 0.7],
        ("keep", "c"): [1.0, 0.98, 0.94, 0.70, 0.9],
    }
    rows = [
        layer(*of, index, value)
        for of, similarities in values.items()
        for index, value in enumerate(similarities, start=-1)
    ]
    # Four blocks: the lower half ends behind block 1, which is at 0.80 there, not at 0.70 behind it.
    assert metrics_of(pd.DataFrame(rows)) == {
        "layers": 5, "rows_task": 7, "rows_keep": 14, "lowest_cka_task": 0.5, "lowest_rsa_task": 0.6,
        "lowest_cka_keep": pytest.approx(0.6), "lowest_rsa_keep": 0.7, "onset_task": 2, "onset_keep": 1,
        "lower_half_rsa_keep": 0.8, "keep_below_task": pytest.approx(0.20),
    }  # fmt: skip


def test_residuals_that_are_not_finite_are_refused_by_row_and_layer(tmp_path):
    from transformers import AutoModelForCausalLM

    base = save_llama(tmp_path / "base", seed=1, characters=LETTERS)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():  # what only "e" is made of
        model.model.embed_tokens.weight[1 + LETTERS.index("e")] = math.inf
    tuned = save_llama(tmp_path / "tuned", seed=1, characters=LETTERS)
    model.save_pretrained(tuned)
    with pytest.raises(ValueError, match=r"task:5 \(tuned\): the residuals at layer -1 are NaN or infinite"):
        representation_drift(CheckpointPair(base, tuned), TASK)


def test_an_adapter_drifts_as_it_does_merged_and_both_go_through_the_bridge(places, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(places[0]),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    merged = save_llama(tmp_path / "merged", seed=1, characters=LETTERS)
    model.merge_and_unload().save_pretrained(merged)
    adapted, merged_result = (
        representation_drift(CheckpointPair(places[0], tuned), TASK, KEEP)
        for tuned in (tmp_path / "adapter", merged)
    )
    measured = ["rsa", "cka", "procrustes", "displacement"]
    assert np.allclose(
        adapted.tables["layers"][measured], merged_result.tables["layers"][measured], atol=1e-4
    )
    assert adapted.tables["layers"]["rsa"].min() < 0.999
    assert adapted.notes == merged_result.notes
    assert "tuned: residuals captured through bridge" in adapted.notes


def test_an_encoder_with_labels_drifts_too_and_its_classes_move(tmp_path):
    from tests.probes.runnable import make

    places = []
    for seed, name in enumerate(("base", "tuned")):
        make("bert_classes", seed=seed).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, LETTERS)
        places.append(tmp_path / name)
    rows = [{"text": text, "label": index % 3} for index, text in enumerate(TASK)]
    result = representation_drift(CheckpointPair(*places), rows)
    assert result.tables["layers"]["class_shift"].gt(0).all()
    assert "class_shift" in result.figures()
    # Two unrelated random models.
    assert result.metrics["onset_task"] < 2


def test_an_audit_runs_it_on_task_and_keep_rows_and_the_saved_result_redraws(places, tmp_path):
    files = []
    for name, rows in (("task", TASK), ("keep", KEEP)):
        files.append(tmp_path / f"{name}.csv")
        files[-1].write_text("text\n" + "".join(f"{row}\n" for row in rows))
    audited = audit(
        *places, out=tmp_path / "out", only=["drift"], task=files[:1], keep=files[1:], device="cpu"
    )
    assert audited.analyses["drift"].status == "ok", audited.analyses["drift"].reason
    result = load(tmp_path / "out").results["drift"]
    figures = result.figures()
    assert set(figures) == {"rsa", "cka", "procrustes", "displacement"}
    assert all(figure.layout.title.text and figure.layout.yaxis.title.text for figure in figures.values())
    assert {trace.name for trace in figures["rsa"].data} == {"task", "keep"}
    assert "keep rows: RSA at least" in result.summary()
    low = result.metrics["lower_half_rsa_keep"] < 0.8
    assert low == ("lower_half_rsa_keep" in {finding.metric for finding in audited.findings})
