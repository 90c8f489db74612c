"""The checkpoints of a run: which they are, their steps, and what is measured on each."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from probes.checkpoints.series import (
    CheckpointSeries,
    RecordedSeries,
    TooShortError,
    expand,
    read_measurement,
    series_of,
    write_measurement,
)
from probes.checkpoints.steps import in_order, step_label
from probes.naming.align import natural_key

NAME = "model.layers.0.self_attn.q_proj.weight"


def saved(directory, value=1.0, step=None):
    directory.mkdir(parents=True)
    save_file({NAME: value * torch.eye(2)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if step is not None:
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return str(directory)


def trace(checkpoint):
    return {"trace": checkpoint.tensor(NAME).trace().item()}


# --- which checkpoints ---


def test_a_pattern_and_a_directory_of_a_run_stand_for_checkpoints_in_step_order(tmp_path):
    places = {step: saved(tmp_path / f"checkpoint-{step}") for step in (1000, 200, 50)}
    (tmp_path / "checkpoint-9").mkdir()  # a checkpoint that was pruned away
    in_step_order = [places[50], places[200], places[1000]]
    assert expand([str(tmp_path / "checkpoint-*")]) == in_step_order
    (tmp_path / "checkpoint-9").rmdir()
    (tmp_path / "logs").mkdir()
    assert expand([str(tmp_path)]) == in_step_order
    base = saved(tmp_path / "base")
    assert expand([base, tmp_path / "checkpoint-*"]) == [base, *in_step_order]


def test_a_directory_with_weights_of_its_own_is_one_checkpoint(tmp_path):
    run = saved(tmp_path / "run")
    saved(tmp_path / "run" / "checkpoint-5")
    assert expand([run]) == [run]


def test_a_pattern_without_a_match_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"step-\*: no checkpoint matches this pattern"):
        expand([str(tmp_path / "step-*")])


def test_revisions_of_a_hub_repository_are_taken_in_step_order(monkeypatch):
    asked = []

    def list_repo_refs(self, name):
        asked.append(name)
        branches = [SimpleNamespace(name=name) for name in ("main", "step10000", "step500")]
        return SimpleNamespace(branches=branches, tags=[SimpleNamespace(name="step2000-tokens8B")])

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", list_repo_refs)
    assert expand(["org/name@step*"]) == [
        "org/name@step500",
        "org/name@step2000-tokens8B",
        "org/name@step10000",
    ]
    assert asked == ["org/name"]
    with pytest.raises(ValueError, match=r"none of the 4 revisions of org/name matches 'epoch\*'"):
        expand(["org/name@epoch*"])


def test_a_hub_that_cannot_be_asked_is_an_error_with_a_way_out(monkeypatch):
    def refuse(self, name):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", refuse)
    with pytest.raises(
        ValueError, match=r"cannot be listed \(ConnectionError: no route\); name each as org/name@REV"
    ):
        expand(["org/name@step*"])


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbers_in_names_sort_by_value(numbers):
    assert sorted((f"step-{n}-x" for n in numbers), key=natural_key) == [
        f"step-{n}-x" for n in sorted(numbers)
    ]


# --- steps ---


def test_steps_come_from_the_trainer_then_from_names_and_the_base_is_at_0(tmp_path):
    refs = [saved(tmp_path / "base"), saved(tmp_path / "a", step=30), saved(tmp_path / "checkpoint-90")]
    series = CheckpointSeries(refs)
    assert series.steps == (0, 30, 90)
    assert series.labels == ("0", "30", "90")
    assert series.stepped


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("global_step20", 20),
        ("iter_7k", 7000),
        ("step1000-tokens4B", 1000),
        ("r8", None),
    ],
)
def test_steps_are_read_out_of_names(tmp_path, name, step):
    series = CheckpointSeries([saved(tmp_path / "base"), saved(tmp_path / name)])
    assert series.steps == (0, 1 if step is None else step)
    assert series.stepped == (step is not None)


def test_checkpoints_whose_steps_are_known_are_put_in_order(tmp_path):
    names = ("base", "checkpoint-1000", "checkpoint-50")  # as a shell sorts them
    refs = [saved(tmp_path / name) for name in names]
    series = CheckpointSeries(refs)
    assert series.steps == (0, 50, 1000)
    assert [checkpoint.ref for checkpoint in series.checkpoints] == [refs[0], refs[2], refs[1]]


@pytest.mark.parametrize("trained", [None, 7000])
def test_the_base_comes_first_whatever_step_it_tells(tmp_path, trained):
    base = saved(tmp_path / "earlier" / "checkpoint-500", step=trained)
    others = [saved(tmp_path / "run" / f"checkpoint-{step}") for step in (25, 50)]
    for refs in ([base, *others], [base, *reversed(others)], [base, tmp_path / "run"]):
        series = CheckpointSeries(refs)
        assert [checkpoint.ref for checkpoint in series.checkpoints] == [base, *others]
        assert (series.labels, series.stepped) == (("0", "25", "50"), True)


def test_a_base_of_an_earlier_run_is_at_0_and_one_of_the_same_run_at_its_step(tmp_path):
    base, *others = (saved(tmp_path / "run" / f"checkpoint-{step}") for step in (10, 25, 50))
    assert CheckpointSeries([base, *others]).labels == ("10", "25", "50")
    elsewhere = saved(tmp_path / "earlier" / "checkpoint-10")
    assert CheckpointSeries([elsewhere, *others]).labels == ("0", "25", "50")


def test_in_one_directory_the_first_is_the_base_unless_a_shell_put_it_there(tmp_path):
    refs = {step: saved(tmp_path / f"checkpoint-{step}") for step in (25, 50, 500, 1000)}
    written = [refs[500], refs[25], refs[50]]
    assert [checkpoint.ref for checkpoint in CheckpointSeries(written).checkpoints] == written
    globbed = sorted(refs.values())
    assert globbed[0] == refs[1000]  # before 25
    assert CheckpointSeries(globbed).labels == ("25", "50", "500", "1000")


@pytest.fixture
def run(tmp_path):
    """A base and three checkpoints."""
    base = saved(tmp_path / "base")
    return base, [saved(tmp_path / "run" / f"checkpoint-{step}", step=step) for step in (100, 200, 1000)]


def unwritten(path):
    (path / "model.safetensors").unlink()


def without_index(path):
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")


def half_of_the_shards(path):
    without_index(path)
    files = {NAME: "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def cut_off(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-4])


def emptied(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize("begun", [unwritten, without_index, half_of_the_shards, cut_off, emptied])
def test_a_checkpoint_that_is_being_written_is_left_out_and_named(run, begun, caplog):
    base, checkpoints = run
    last = Path(checkpoints[-1])
    begun(last)
    series = CheckpointSeries([base, last.parent])
    assert series.labels == ("0", "100", "200")
    assert list(series.left_out) == [str(last)]
    assert f"{last} is left out of the series: " in caplog.text
    if begun is not emptied:  # a shell gives an empty directory, a pattern of ours does not
        assert list(CheckpointSeries([base, last.parent / "checkpoint-*"]).left_out) == [str(last)]
    assert CheckpointSeries([base, *checkpoints], steps=[0, 1, 2, 3]).labels == ("0", "1", "2")


def test_a_base_that_is_being_written_and_a_lone_checkpoint_are_refused(run):
    base, checkpoints = run
    unwritten(Path(checkpoints[0]))
    with pytest.raises(ValueError, match="no weights"):
        CheckpointSeries([base, checkpoints[0]])
    unwritten(Path(base))
    with pytest.raises(ValueError, match="no weights"):
        CheckpointSeries([base, *checkpoints])


def test_a_checkpoint_that_is_wrong_is_not_left_out(run, tmp_path):
    base, checkpoints = run
    with pytest.raises(ValueError, match="no such file"):
        CheckpointSeries([base, *checkpoints, tmp_path / "run" / "checkpoint-1O00"])


def test_where_one_checkpoint_tells_no_step_all_are_counted(tmp_path):
    refs = [saved(tmp_path / name) for name in ("base", "best", "checkpoint-9")]
    series = CheckpointSeries(refs)
    assert series.steps == (0, 1, 2)
    assert series.labels == tuple(refs)


def test_steps_that_are_given_count(tmp_path):
    refs = [saved(tmp_path / name) for name in ("base", "checkpoint-9")]
    assert CheckpointSeries(refs, steps=["10", "20"]).steps == (10, 20)
    named = CheckpointSeries(refs, steps=["start", "end"])
    assert (named.steps, named.labels, named.stepped) == ((0, 1), ("start", "end"), False)


def test_steps_that_do_not_rise_are_refused(tmp_path):
    refs = [saved(tmp_path / name) for name in ("base", "checkpoint-9", "run/checkpoint-9")]
    with pytest.raises(ValueError, match="step 9 comes after step 9: give the checkpoints in step order"):
        CheckpointSeries(refs)
    with pytest.raises(ValueError, match="step 3 comes after step 9: give the checkpoints in step order"):
        CheckpointSeries(refs, steps=[0, 9, 3])
    with pytest.raises(ValueError, match="--steps: 2 steps for 3 checkpoints, the first included"):
        CheckpointSeries(refs, steps=[1, 2])
    with pytest.raises(ValueError, match="a series needs checkpoints; none is given"):
        CheckpointSeries([])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=6))
def test_steps_in_order_rise_strictly_or_are_refused(steps):
    finite = all(np.isfinite(steps))
    rising = all(a < b for a, b in itertools.pairwise(steps))
    if finite and not rising:
        with pytest.raises(ValueError, match="comes after step"):
            in_order(steps)
    else:
        assert in_order(steps) == (tuple(steps) if finite else None)


# --- measurements ---


def test_every_checkpoint_is_measured_once_and_the_same_series_remembers(tmp_path):
    series = series_of([{NAME: size * torch.eye(2)} for size in (1.0, 2.0)])
    seen, steps = [], []

    def measure(checkpoint):
        seen.append(checkpoint)
        return trace(checkpoint)

    for _ in range(2):
        measurements = series.measured("trace", {"x": 1}, measure, progress=lambda *step: steps.append(step))
        assert [entry["trace"].item() for entry in measurements] == [2, 4]
    assert len(seen) == 2
    assert steps[:2] == [(0, 2, "state dict"), (1, 2, "state dict")]
    series.measured("trace", {"x": 2}, measure)  # other parameters, another measurement
    assert len(seen) == 4


def test_a_killed_run_finds_what_it_had_measured_and_a_changed_checkpoint_is_measured_again(tmp_path):
    refs = [
        saved(tmp_path / "base"),
        saved(tmp_path / "checkpoint-1", 2.0),
        saved(tmp_path / "checkpoint-2", 3.0),
    ]
    cache = tmp_path / "cache"

    def dies(checkpoint):
        if "checkpoint-2" in checkpoint.ref:
            raise KeyboardInterrupt
        return trace(checkpoint)

    with pytest.raises(KeyboardInterrupt):
        CheckpointSeries(refs, cache=cache).measured("trace", {}, dies)
    seen = []

    def counted(checkpoint):
        seen.append(checkpoint.ref)
        return trace(checkpoint)

    measurements = CheckpointSeries(refs, cache=cache).measured("trace", {}, counted)
    assert seen == refs[2:]
    assert [entry["trace"].item() for entry in measurements] == [2, 4, 6]
    # Nothing half written is left, and a damaged file counts as none.
    assert {path.suffix for path in cache.iterdir()} == {".npz"}
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    CheckpointSeries(refs, cache=cache).measured("trace", {}, counted)
    assert len(seen) == 4
    save_file({NAME: 5 * torch.eye(2)}, tmp_path / "base" / "model.safetensors")
    measurements = CheckpointSeries(refs, cache=cache).measured("trace", {}, counted)
    assert seen[4:] == refs[:1]
    assert measurements[0]["trace"].item() == 10


def test_another_context_is_another_measurement(tmp_path):
    series = series_of([{NAME: torch.eye(2)}])
    first, second = series.within("rows a", tmp_path), series.within("rows b", tmp_path)
    for context in (first, second, first.within("rows a", tmp_path)):
        context.measured("trace", {}, trace)
    assert len(list(tmp_path.iterdir())) == 2


def test_measurements_are_kept_exactly(tmp_path):
    arrays = {"a": np.array([[1.5, np.nan]]), "names": np.array(["x", "long one"]), "n": np.asarray(3)}
    write_measurement(tmp_path / "new" / "m.npz", arrays)
    again = read_measurement(tmp_path / "new" / "m.npz")
    assert again.keys() == arrays.keys()
    for name, value in arrays.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name], value)


def test_objects_are_no_measurements(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        write_measurement(tmp_path / "m.npz", {"a": np.array([object()])})
    assert list(tmp_path.iterdir()) == []


def test_a_series_says_when_it_is_too_short():
    series = series_of([{NAME: torch.eye(2)}])
    series.at_least(1, "a value")
    with pytest.raises(TooShortError, match="a series of 1 checkpoint: a trough needs at least 4; give more"):
        series.at_least(4, "a trough")


@pytest.mark.parametrize(("cached", "complete", "kept"), [(0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 2)])
def test_a_series_that_is_too_short_is_measured_only_where_that_is_kept_for_a_longer_one(
    tmp_path, cached, complete, kept
):
    weights = [{NAME: torch.eye(2)}, {NAME: 2 * torch.eye(2)}]
    series = CheckpointSeries(weights, cache=tmp_path if cached else None, complete=bool(complete))
    with pytest.raises(TooShortError, match="a trough needs at least 4"):
        series.measured("trace", {}, trace, least=(4, "a trough"))
    assert len(list(tmp_path.iterdir())) == kept


# --- labels and keys that tell every step from every other ---


@pytest.mark.parametrize(
    ("step", "label"),
    [
        (0, "0"), (500, "500"), (500.0, "500"), (0.5, "0.5"), (1e-5, "1e-05"), (-3.0, "-3"),
        ("step-7", "step-7"), (np.int64(12), "12"), (np.float64(12.0), "12"), (1_000_001.0, "1000001"),
        (2**53 + 1, "9007199254740993"), (1e300, "1e+300"),
    ],
)  # fmt: skip
def test_a_step_is_labelled_in_as_many_digits_as_it_has(step, label):
    assert step_label(step) == label


@given(st.lists(st.one_of(st.integers(0, 2**60), st.floats(0, 2**60)), min_size=2, max_size=8, unique=True))
def test_labels_of_any_steps_are_exact_and_no_two_are_alike(steps):
    steps = sorted(steps)
    labels = RecordedSeries(steps, Path()).labels
    assert len(set(labels)) == len(steps)
    for step, label in zip(steps, labels, strict=True):
        assert step == (float(label) if isinstance(step, float) else int(label))


@pytest.mark.parametrize("steps", [(1_000_001, 1_000_002), (2**53, 2**53 + 1), (1e6 + 0.25, 1e6 + 0.5)])
def test_steps_that_differ_in_their_last_digit_have_measurements_of_their_own(tmp_path, steps):
    for count, value in ((1, 2.0), (2, 3.0)):
        live = RecordedSeries(steps[:count], tmp_path, {NAME: value * torch.eye(2)})
        traces = [measurement["trace"].item() for measurement in live.measured("trace", {}, trace)]
    assert traces == [4, 6]


def test_steps_beyond_what_a_float_tells_apart_are_read_from_names_and_put_in_order(tmp_path):
    steps = (2**53 + 1, 2**53)
    refs = [saved(tmp_path / f"checkpoint-{step}") for step in steps]
    series = CheckpointSeries([saved(tmp_path / "base"), *refs])
    assert series.steps == (0, *sorted(steps))
    assert series.labels == ("0", *map(str, sorted(steps)))


# --- a run that is going on ---


def test_a_recording_measures_however_short_it_is_and_says_so_afterwards(tmp_path):
    for step in (0, 10):
        series = RecordedSeries(range(0, step + 1, 10), tmp_path, {NAME: (1.0 + step) * torch.eye(2)})
        with pytest.raises(TooShortError, match="a line needs at least 3"):
            series.measured("trace", {}, trace, least=(3, "a line"))
    measurements = RecordedSeries([0, 10], tmp_path).measured("trace", {}, trace)
    assert [entry["trace"].item() for entry in measurements] == [2, 22]


def test_a_recording_measures_the_model_as_it_is_and_remembers_how_it_was(tmp_path):
    weights = {NAME: torch.eye(2)}
    for step in (0, 10, 20):
        weights[NAME] = (1.0 + step) * torch.eye(2)
        series = RecordedSeries(range(0, step + 1, 10), tmp_path, weights)
        measurements = series.measured("trace", {}, trace)
        assert [entry["trace"].item() for entry in measurements] == [2 * (1 + step) for step in series.steps]
    done = RecordedSeries([0, 10, 20], tmp_path)
    assert [entry["trace"].item() for entry in done.measured("trace", {}, trace)] == [2, 22, 42]
    with pytest.raises(ValueError, match="holds no other of step 0 with these parameters"):
        done.measured("other", {}, trace)
