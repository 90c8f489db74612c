import json

import pytest
import torch

from diagnostics.analyses.sparsification import analysis as sparsification
from diagnostics.audit.run import audit
from diagnostics.audit.series import series
from diagnostics.core.policy import parse
from diagnostics.core.registry import REGISTRY
from diagnostics.store.audit_store import load
from probes.errors import InputError
from tests.conftest import save_model, weights

SPARSIFICATION = REGISTRY["sparsification"]
NAME = "model.layers.0.self_attn.q_proj.weight"


def steps(*sizes):
    """Checkpoints of one 4x4 matrix: each is the identity times a size, of Frobenius norm 2 * size."""
    return [{NAME: size * torch.eye(4)} for size in sizes]


def test_each_checkpoint_is_compared_with_the_first_and_with_the_one_before_it(norms, tmp_path):
    followed = series(steps(1.0, 2.0, 4.0), out=tmp_path, labels=["0", "100", "200"])
    # |2 I - I| = 2, |4 I - I| = 6, |4 I - 2 I| = 4
    for row, label, first, previous in zip(
        followed.rows, ("100", "200"), (2.0, 6.0), (2.0, 4.0), strict=True
    ):
        assert row.label == label
        assert row.first.results["norms"].metrics["norm"] == pytest.approx(first)
        assert row.previous.results["norms"].metrics["norm"] == pytest.approx(previous)
    assert len(norms) == 3  # the second checkpoint's first and previous are one audit
    assert followed.exit_code == 0
    assert followed.measures == ["norms.norm"]


def test_a_series_is_written_with_the_numbers_of_every_audit(norms, tmp_path):
    series(steps(1.0, 2.0, 4.0), out=tmp_path)
    stored = json.loads((tmp_path / "series.json").read_text())
    last = stored["checkpoints"][-1]
    assert last["against_first"]["metrics"]["norms"]["norm"] == pytest.approx(6.0)
    assert last["against_previous"]["metrics"]["norms"]["norm"] == pytest.approx(4.0)
    for comparison in (last["against_first"], last["against_previous"]):
        assert (tmp_path / comparison["audit"] / "report.html").exists()


@pytest.fixture
def sparseness(norms, registry):
    """Registers an analysis of a whole run beside `norms`."""
    registry["sparsification"] = SPARSIFICATION


def test_the_run_as_a_whole_is_an_audit_of_its_own(sparseness, tmp_path):
    checkpoints = steps(*[1.0] * 6)
    for checkpoint in checkpoints:  # dense: 16 entries of several sizes
        checkpoint[NAME] = torch.arange(1.0, 17).reshape(4, 4)
    for index in (4, 5):  # half of them gone, from the fifth on
        checkpoints[index] = {NAME: checkpoints[index][NAME] * (torch.arange(16).reshape(4, 4) % 2)}
    followed = series(checkpoints, out=tmp_path, labels=[str(step) for step in range(0, 600, 100)])
    stored = json.loads((tmp_path / "series.json").read_text())["run"]
    assert stored["metrics"]["sparsification"]["jump"] == 4
    run = load(tmp_path / stored["audit"])
    table = run.results["sparsification"].tables["checkpoints"]
    assert table["step"].tolist() == [0, 100, 200, 300, 400, 500]
    assert table["zero"].tolist() == [0, 0, 0, 0, 0.5, 0.5]
    assert set(run.results) == {"sparsification"}
    assert run.analyses["norms"].reason == "compares two checkpoints: see the audits in the same directory"
    assert "sparsification" not in followed.rows[0].first.results
    assert (tmp_path / "run" / "report.html").exists()


def test_what_a_run_cannot_show_is_left_out_and_the_audits_stand(sparseness, tmp_path):
    matrices = [{"some.weight": size * torch.eye(4)} for size in (1.0, 2.0)]  # in no block
    followed = series(matrices, out=tmp_path / "all")
    assert followed.exit_code == 0
    assert followed.run.analyses["sparsification"].status == "skipped"
    assert "has no matrix in block" in followed.run.analyses["sparsification"].reason
    # Asked for by name it is wrong input.
    named = series(matrices, out=tmp_path / "named", only=["sparsification"])
    assert named.rows == ()
    assert named.exit_code == 2


def test_a_run_that_goes_on_measures_only_the_new_checkpoint(sparseness, tmp_path, monkeypatch):
    seen = []
    measure = sparsification.checkpoint_sparseness
    monkeypatch.setattr(
        sparsification,
        "checkpoint_sparseness",
        lambda checkpoint, parts: seen.append(checkpoint) or measure(checkpoint, parts),
    )
    checkpoints = steps(1.0, 2.0, 4.0)
    series(checkpoints[:2], out=tmp_path, only=["sparsification"])
    assert len(seen) == 2
    followed = series(checkpoints, out=tmp_path, only=["sparsification"])
    assert len(seen) == 3
    assert len(followed.run.results["sparsification"].tables["checkpoints"]) == 3


def test_steps_that_do_not_rise_are_refused_before_anything_runs(norms, tmp_path):
    with pytest.raises(ValueError, match="step 100 comes after step 200: give the checkpoints in step order"):
        series(steps(1.0, 2.0, 4.0), out=tmp_path / "out", labels=["0", "200", "100"])
    assert norms == []
    assert not (tmp_path / "out").exists()


def test_a_series_goes_on_where_it_stopped(norms, tmp_path):
    checkpoints = steps(1.0, 2.0, 4.0)
    series(checkpoints[:2], out=tmp_path)
    assert len(norms) == 1
    series(checkpoints, out=tmp_path)
    assert len(norms) == 3


def test_a_directory_with_another_series_is_refused_before_anything_runs(norms, tmp_path):
    first, second, third = steps(1.0, 2.0, 4.0)
    series([first, second], out=tmp_path / "out")
    for other in ([first, third, second], [second, first]):
        with pytest.raises(
            InputError, match=r"001-against-first: holds an audit of another pair, .*--replace"
        ):
            series(other, out=tmp_path / "out")
    assert len(norms) == 1
    assert len(series([first, third, second], out=tmp_path / "out", replace=True).rows) == 2
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"--out .*model: holds a model \(config.json\)"):
        series([first, second], out=tmp_path / "model")
    audit(first, second, out=tmp_path / "single")
    with pytest.raises(InputError, match=r"--out .*single: holds a single audit"):
        series([first, second], out=tmp_path / "single")


def test_a_checkpoint_that_is_being_written_is_named_and_the_others_run(norms, tmp_path):
    names = ("base", "run/checkpoint-1", "run/checkpoint-2")
    refs = [save_model(tmp_path / name, weights(0)) for name in names]
    (refs[2] / "model.safetensors").unlink()
    audited = series([refs[0], tmp_path / "run"], out=tmp_path / "out")
    assert [row.label for row in audited.rows] == ["1"]
    record = json.loads((tmp_path / "out/series.json").read_text())
    assert list(record["left_out"]) == [str(refs[2])]
    assert "no weights" in record["left_out"][str(refs[2])]


def test_the_worst_audit_decides_the_exit_code(norms, tmp_path):
    rules = parse({"norms": {"norm": {"fail": 5.0}}}, "a test")
    followed = series(steps(1.0, 4.0, 2.0), out=tmp_path, policy=rules)  # 6 from the first, then back
    assert [row.verdict for row in followed.rows] == ["fail", "pass"]
    assert followed.exit_code == 1


def test_progress_says_which_checkpoints_are_compared(sparseness, tmp_path):
    seen = []
    series(steps(1.0, 2.0), out=tmp_path, labels=["a", "b"], progress=lambda *step: seen.append(step))
    assert seen[0] == ("b against a: norms", 0, 1, NAME)
    assert {name for name, *_ in seen[1:]} == {"the run: sparsification"}


@pytest.mark.parametrize(
    ("sizes", "labels", "message"),
    [
        ([1.0], [], "a series needs at least two checkpoints, the base first"),
        ([1.0, 2.0], ["1"], "--steps: 1 steps for 2 checkpoints, the first included"),
    ],
)
def test_a_series_that_is_none_is_refused(norms, tmp_path, sizes, labels, message):
    with pytest.raises(ValueError, match=message):
        series(steps(*sizes), out=tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_last_checkpoint_is_found_before_anything_runs(norms, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        series([*steps(1.0, 2.0), str(tmp_path / "nowhere")], out=tmp_path / "out")
    assert norms == []


def test_checkpoints_that_do_not_align_are_named(norms, tmp_path):
    other = {NAME: torch.ones(3, 3)}
    with pytest.raises(ValueError, match="big against small: "):
        series([*steps(1.0), other], out=tmp_path, labels=["small", "big"])
