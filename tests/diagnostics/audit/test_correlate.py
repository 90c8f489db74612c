"""Correlations over several tuned models, out of made-up audits with planted relations."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from diagnostics.audit.correlate import correlate
from diagnostics.cli.main import main
from diagnostics.core.analysis import Result
from diagnostics.core.policy import parse
from diagnostics.store.audit_store import Audit, Outcome, Store

MODELS = 14


def audit(displacement, sharp, loss, *, name="model", **given):
    """An audit of two layers, whose sharpness at tuned is given."""
    layers = pd.DataFrame(
        {
            "name": ["block 0", "block 1"],
            "moved": [0.6 * displacement, 0.8 * displacement],
            "sharpness_tuned": sharp,
        }
    )
    path = pd.DataFrame(
        [
            {"alpha": alpha, "role": role, "set": role, "metric": metric, "value": value}
            for role, shift in (("task", 9.0), ("ood", 0.0))
            for metric, sign in (("loss", 1.0), ("accuracy", -1.0))
            for alpha, value in ((0.0, 5.0), (0.5, sign * loss + shift), (1.0, 7.0))
        ]
    )
    result = Result(
        metrics={"stragglers": 0, "best_alpha": 0.5, "sharpness_tuned": float(sum(sharp))},
        tables={"layers": layers, "path": path},
        analysis="sharpness",
        parameters={"rho": 0.5, **given.pop("parameters", {})},
    )
    return Audit(
        base={"ref": "base", "fingerprint": given.pop("base", "b")},
        tuned={"ref": name, "fingerprint": name},
        policy=parse({}, "a test"),
        analyses={"sharpness": Outcome(status="ok", result=result)},
        created="2026-01-01T00:00:00Z",
        tunescope="0",
        data={"task": [{"fingerprint": given.pop("task", "t")}], "ood": [{"fingerprint": "o"}]},
        **given,
    )


def many(count=MODELS, seed=0):
    """The loss is how far a model moved, plus what the sharpness of the second layer shows."""
    random = np.random.default_rng(seed)
    audits = []
    for i in range(count):
        moved, shared = 1 + i, random.normal()
        sharp = [moved + random.normal(), 10 + shared]
        audits.append(audit(moved, sharp, moved + 2 * shared, name=f"m{i}"))
    return audits


def test_what_only_follows_displacement_falls_away_once_displacement_is_given():
    correlation = correlate(many(), permutations=1000)
    table = correlation.table.set_index("predictor")
    assert list(table.index) == ["all blocks", "block 0", "block 1"]
    assert table.loc["block 0", "raw"] > 0.7
    assert abs(table.loc["block 0", "partial"]) < 0.6
    assert table.loc["block 1", "partial"] > 0.8
    assert table.loc["block 1", "partial_holm"] < 0.05
    assert correlation.outcome == "OOD loss half-way"
    # 0.6² + 0.8² = 1
    assert correlation.models["displacement"].tolist() == pytest.approx(range(1, MODELS + 1))


def test_the_outcome_is_of_ood_rows_at_the_place_that_is_asked_for():
    audits = many()
    half = correlate(audits, permutations=100).models["outcome"]
    assert correlate(audits, metric="accuracy", permutations=100).models["outcome"].tolist() == pytest.approx(
        -half
    )
    assert correlate(audits, where="best", permutations=100).models["outcome"].tolist() == pytest.approx(half)
    at_tuned = correlate(audits, where="tuned", permutations=100)
    assert set(at_tuned.models["outcome"]) == {7.0}
    assert at_tuned.table["raw"].isna().all()  # constant: no correlation


def test_below_twelve_models_no_correlation_is_told_but_the_models_are_shown():
    correlation = correlate(many(11))
    assert correlation.table[["raw", "partial", "raw_p"]].isna().all().all()
    assert correlation.notes[0] == "11 models: correlations are computed from 12 on."
    assert set(correlation.figures()) == {"scatter"}
    assert correlation.record()["correlations"][0]["raw"] is None


def test_audits_that_do_not_compare_are_refused_by_name():
    reference, other = audit(1, [1, 1], 1, name="own"), audit(1, [1, 1], 1, name="other", base="c")
    with pytest.raises(
        ValueError, match="other: has other bases than own; sharpness compares only at equal ones"
    ):
        correlate([reference, other])
    with pytest.raises(ValueError, match="other: has other task rows than own"):
        correlate([reference, audit(1, [1, 1], 1, name="other", task="u")])
    with pytest.raises(ValueError, match="other: has other parameters of sharpness than own"):
        correlate([reference, audit(1, [1, 1], 1, name="other", parameters={"norm": "linf"})])
    with pytest.raises(ValueError, match="1 audit given; a correlation needs several"):
        correlate([reference])
    with pytest.raises(ValueError, match="own: has no result of sharpness; run `tunescope audit"):
        correlate([replace(reference, analyses={}), reference])
    path = reference.results["sharpness"].tables["path"]
    silent = replace(
        reference.results["sharpness"], tables={**reference.results["sharpness"].tables, "path": path[:6]}
    )
    with pytest.raises(ValueError, match="measured without OOD rows; run it with --ood NAME=F"):
        correlate(
            [replace(reference, analyses={"sharpness": Outcome(status="ok", result=silent)}), reference]
        )


def test_the_pictures_show_every_model_and_every_interval():
    correlation = correlate(many(), permutations=100)
    figures = correlation.figures()
    points = figures["scatter"].data
    assert [len(trace.x) for trace in points] == [MODELS] * 3
    raw, partial = figures["correlations"].data
    assert list(partial.y) == ["block 1", "block 0", "all blocks"]
    assert list(raw.x) == correlation.table["raw"].tolist()[::-1]


def test_from_the_shell_saved_audits_are_compared_and_written(tmp_path):
    places = []
    for audited in many():
        store = Store(tmp_path / audited.tuned["ref"])
        with store:
            store.write_result("sharpness", audited.results["sharpness"])
            store.write(replace(audited, path=store.out))
        places.append(str(store.out))
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["correlate", *places, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "block 1" in result.output
    assert "read the column given displacement" in " ".join(result.output.split())
    assert len(pd.read_parquet(out / "models.parquet")) == MODELS
    page = (out / "correlations.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "cdn" not in page[:2000]
    as_json = CliRunner().invoke(main, ["correlate", *places, "--json"])
    assert json.loads(as_json.stdout)["models"] == MODELS
