import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import diagnostics
from diagnostics import likelihood_ratio_ood
from diagnostics.analyses.ood.detector import LikelihoodRatioDetector
from probes import CheckpointPair
from tests.diagnostics.chains import save_llama

LETTERS = "abcdefghij "
TASK = ["abc", "bcd", "cab", "dab c", "ade", "bad", "cede", "abcde", "dead", "cab bed"]
NEW = ["hij", "ijij hij", "", "abc"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tuple(
        str(save_llama(root / name, seed=1, characters=LETTERS, shift=shift))
        for name, shift in (("base", 0.0), ("tuned", 0.1))
    )


@pytest.fixture(scope="module")
def fitted(places):
    return LikelihoodRatioDetector.fit(CheckpointPair(*places), TASK, alpha=0.2)


def test_its_scores_are_the_ratios_of_the_analysis(places, fitted):
    table = likelihood_ratio_ood(CheckpointPair(*places), TASK, NEW, draws=2).tables["rows"]
    assert np.concatenate([fitted.score(TASK), fitted.score(NEW)]) == pytest.approx(
        table["ratio"].to_numpy(), abs=1e-5, nan_ok=True
    )
    mean = LikelihoodRatioDetector.fit(places, TASK, per_token=True)
    assert mean.score(NEW) == pytest.approx(
        table["ratio_per_token"].to_numpy()[len(TASK) :], abs=1e-5, nan_ok=True
    )


def test_alpha_of_the_rows_that_it_was_fitted_on_are_flagged(fitted):
    # 0.2 of ten: the two highest lie above the eighth.
    assert fitted.threshold_ == np.sort(fitted.calibration_)[7]
    assert (fitted.calibration_ > fitted.threshold_).sum() == 2


def test_its_decisions_are_scikit_learns(fitted):
    score = fitted.score(NEW)
    assert (fitted.score_samples(NEW) == -score)[~np.isnan(score)].all()
    assert fitted.decision_function(NEW) == pytest.approx(fitted.threshold_ - score, nan_ok=True)
    expected = [1 if value <= fitted.threshold_ else -1 for value in score]
    assert fitted.predict(NEW).tolist() == expected
    assert expected[2] == -1  # nothing vouches for an empty text


def test_what_it_says_of_a_row_agrees_with_its_scores(fitted):
    table = fitted.rows(NEW)
    score = fitted.score(NEW)
    assert table["score"].to_numpy() == pytest.approx(score, nan_ok=True)
    higher = [(fitted.calibration_ >= value).sum() for value in score]
    expected = [np.nan if np.isnan(value) else (1 + n) / 11 for value, n in zip(score, higher, strict=True)]
    assert table["p_value"].to_numpy() == pytest.approx(expected, nan_ok=True)
    assert table["flagged"].tolist() == (fitted.predict(NEW) == -1).tolist()


def test_tokens_add_up_to_the_score_of_their_text(fitted):
    table = fitted.explain("hi ja")
    assert "".join(table["token"]) == "hi ja"
    assert table["ratio"].sum() == pytest.approx(fitted.score(["hi ja"])[0], abs=1e-5)


def test_it_is_fitted_in_one_way_and_takes_what_scikit_learn_takes(places):
    once = LikelihoodRatioDetector.fit(places, np.array(TASK, dtype=object))
    again = LikelihoodRatioDetector.fit(pair=places, task=TASK)
    assert (once.predict(TASK) == again.predict(np.array(TASK, dtype=object))).all()
    assert (pickle.loads(pickle.dumps(once)).score(NEW[:2]) == once.score(NEW[:2])).all()
    with pytest.raises(TypeError):
        once.fit(TASK)  # an instance is no other signature


def test_a_saved_detector_decides_as_it_did(fitted, tmp_path):
    fitted.save(tmp_path / "detector.json")
    again = LikelihoodRatioDetector.load(tmp_path / "detector.json")
    assert again.alpha == 0.2
    assert (again.threshold_, again.offset_) == (fitted.threshold_, fitted.offset_)
    assert (again.predict(NEW) == fitted.predict(NEW)).all()
    stricter = LikelihoodRatioDetector.load(tmp_path / "detector.json", alpha=0.1)
    assert stricter.threshold_ == fitted.calibration_[8]


def test_a_saved_detector_refuses_other_models(places, fitted, tmp_path):
    fitted.save(tmp_path / "detector.json")
    with pytest.raises(ValueError, match=r"tuned .* has other weights than when the detector was fitted"):
        LikelihoodRatioDetector.load(tmp_path / "detector.json", pair=(places[0], places[0]))
    (tmp_path / "other.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"other.json: is no saved detector"):
        LikelihoodRatioDetector.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"nowhere.json: cannot be read"):
        LikelihoodRatioDetector.load(tmp_path / "nowhere.json")


def test_a_saved_detector_does_not_decide_whose_code_is_run(fitted, tmp_path):
    fitted.save(tmp_path / "detector.json")
    record = json.loads((tmp_path / "detector.json").read_text())
    assert "trust_remote_code" not in record["parameters"]
    record["parameters"]["trust_remote_code"] = True
    (tmp_path / "detector.json").write_text(json.dumps(record))
    assert not LikelihoodRatioDetector.load(tmp_path / "detector.json").trust_remote_code
    assert LikelihoodRatioDetector.load(tmp_path / "detector.json", trust_remote_code=True).trust_remote_code


@pytest.mark.parametrize(
    ("parameters", "rows", "message"),
    [
        (
            {},
            ["", "abc"],
            "rows: 1 of 2 rows have a token to score, and calibrating a detector needs at least 2",
        ),
        ({}, ["abc"], "rows: has 1 row, and calibrating a detector needs at least 2; give it more"),
        ({"alpha": 1.5}, TASK, "alpha is 1.5; it is a share between 0 and 1"),
        ({}, 7, "texts must be a list, and this is int"),
    ],
)
def test_what_cannot_calibrate_is_refused(places, parameters, rows, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodRatioDetector.fit(places, rows, **parameters)


def run(*arguments):
    code = "from diagnostics.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_the_command_scores_a_file_row_by_row_and_again_from_a_saved_detector(places, fitted, tmp_path):
    files = {}
    for name, rows in (("task", TASK), ("new", NEW)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    base, tuned = places
    saved = tmp_path / "detector.json"
    first = run(
        "detect", files["new"], "--base", base, "--tuned", tuned, "--task", files["task"], "--save", saved,
        "--alpha", 0.2, "--device", "cpu",
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    records = [json.loads(line) for line in first.stdout.splitlines()]
    assert [record["row"] for record in records] == [1, 2, 3, 4]
    assert records[2]["score"] is None
    expected = fitted.score(NEW)
    assert [record["score"] for record in records if record["score"] is not None] == pytest.approx(
        expected[~np.isnan(expected)], abs=1e-5
    )
    assert [record["flagged"] for record in records] == (fitted.predict(NEW) == -1).tolist()
    second = run("detect", files["new"], "--detector", saved, "--tokens", "--device", "cpu")
    again = [json.loads(line) for line in second.stdout.splitlines()]
    assert [record["p_value"] for record in again] == [record["p_value"] for record in records]
    assert "".join(token["token"] for token in again[1]["by_token"]) == NEW[1]


def test_the_command_says_nothing_beside_its_records_of_an_adapter(tmp_path):
    bundled = Path(diagnostics.__file__).parent / "bundled"
    lines = (bundled / "ood-code.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    process = run(
        "detect", tmp_path / "rows.jsonl", "--base", bundled / "base", "--tuned", bundled / "lora-r1",
        "--task", tmp_path / "rows.jsonl", "--device", "cpu",
    )  # fmt: skip
    assert (process.returncode, process.stderr, len(process.stdout.splitlines())) == (0, "", 3)


def test_the_command_says_what_it_needs(tmp_path):
    process = run("detect", "rows.jsonl", "--base", "b")
    assert process.returncode == 2
    assert "detect needs --base, --tuned and --task, or a saved --detector" in process.stderr
    process = run("detect", "rows.jsonl", "--detector", "d.json", "--task", "t")
    assert process.returncode == 2
    assert (
        "a saved --detector has its own --base, --tuned, --task, --per-token, --windows and" in process.stderr
    )
