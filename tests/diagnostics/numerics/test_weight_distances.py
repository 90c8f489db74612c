"""Distances between checkpoints, against numpy on all weights at once, and what may be held meanwhile."""

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diagnostics import intruder_dimensions
from diagnostics.analyses.dynamics.tables import movement
from diagnostics.numerics.weight_distances import inefficiency, pairs, path_rows, shared, squared_distances
from probes import CheckpointPair
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.opening import open_checkpoint
from tests.conftest import save_model, weights
from tests.probes.runnable import make


def numpy_squares(points):
    return {(i, j): float(((points[i] - points[j]) ** 2).sum()) for i, j in pairs(len(points))}


vectors = st.lists(
    st.tuples(*[st.floats(-5, 5).map(lambda value: round(value, 2))] * 3).map(np.array),
    min_size=3,
    max_size=6,
)


@given(vectors)
def test_a_way_is_at_least_as_long_as_the_line_and_never_shorter_for_one_more_checkpoint(points):
    full = inefficiency(path_rows(numpy_squares(points), len(points)))
    fewer = inefficiency(path_rows(numpy_squares([points[0], *points[2:]]), len(points) - 1))
    if np.linalg.norm(points[-1] - points[0]) > 0:
        assert full >= 1 - 1e-9
        assert full >= fewer - 1e-9
    else:
        assert math.isnan(full)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6))
def test_a_straight_way_has_inefficiency_1_and_steps_that_turn_nowhere(lengths):
    way, positions = np.array([1.0, -2.0, 0.5]), np.cumsum([0.0, *lengths])
    rows = path_rows(numpy_squares([position * way for position in positions]), len(positions))
    assert inefficiency(rows) == pytest.approx(1)
    # An angle is told to about the root of the precision of its cosine.
    assert max(row["angle"] for row in rows[1:]) == pytest.approx(0, abs=1e-3)


def test_angles_and_turns_of_a_corner_are_those_of_the_drawing():
    # East by 3, then north by 4: the whole way is 5 long and points 53.13° up.
    rows = path_rows(numpy_squares([np.array([0.0, 0]), np.array([3.0, 0]), np.array([3.0, 4])]), 3)
    assert [row["length"] for row in rows[1:]] == [3, 4]
    assert rows[1]["angle"] == pytest.approx(math.degrees(math.atan2(4, 3)))
    assert rows[2]["angle"] == pytest.approx(math.degrees(math.atan2(3, 4)))
    assert rows[2]["turn"] == pytest.approx(90)
    assert (rows[1]["distance_start"], rows[1]["distance_end"]) == (3, 4)
    assert inefficiency(rows) == pytest.approx(7 / 5)
    assert math.isnan(rows[1]["turn"])


def run_of(directory, count, seed=0):
    """Checkpoints that walk at random, in files."""
    generator = torch.Generator().manual_seed(seed)
    state = weights(0)
    checkpoints = []
    for step in range(count):
        checkpoints.append(open_checkpoint(save_model(directory / str(step), state)))
        state = {name: value + torch.randn(value.shape, generator=generator) for name, value in state.items()}
    return checkpoints


def test_distances_are_those_of_all_weights_at_once(tmp_path):
    run = run_of(tmp_path, 5)
    names = shared(run).names
    points = [
        np.concatenate([checkpoint.tensor(name).double().numpy().ravel() for name in names])
        for checkpoint in run
    ]
    squares, meant = squared_distances(shared(run)), numpy_squares(points)
    assert squares.keys() == meant.keys()
    for places, value in meant.items():
        assert squares[places] == pytest.approx(value, rel=1e-12)
    rows = path_rows(squares, len(run))
    for index in range(1, 5):
        step, way = points[index] - points[index - 1], points[-1] - points[0]
        cosine = step @ way / np.linalg.norm(step) / np.linalg.norm(way)
        assert rows[index]["angle"] == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-6)


def test_two_tensors_are_in_memory_at_most(tmp_path, monkeypatch):
    run, alive, most = run_of(tmp_path, 5), weakref.WeakSet(), []
    read_tensor = Checkpoint.tensor

    def counted(checkpoint, name):
        tensor = read_tensor(checkpoint, name).clone()
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    squared_distances(shared(run))
    assert max(most) == 2


def test_a_tied_tensor_counts_once(tmp_path):
    run = []
    for seed in (0, 1):
        make("llama", seed, tie_word_embeddings=True).save_pretrained(tmp_path / str(seed))
        run.append(open_checkpoint(tmp_path / str(seed)))
    assert [name for name in shared(run).names if "embed" in name or "lm_head" in name] == [
        "model.embed_tokens.weight"
    ]
    # Also where it is in memory under both names.
    held = [open_checkpoint(make("llama", seed, tie_word_embeddings=True)) for seed in (0, 1)]
    assert sum(squared_distances(shared(held)).values()) == pytest.approx(
        sum(squared_distances(shared(run)).values())
    )


def test_what_not_all_checkpoints_hold_in_one_shape_is_named(tmp_path):
    state = weights(0)
    names = list(state)
    more = {**state, "extra.weight": torch.ones(2, 2)}
    other = {**state, names[0]: torch.ones(3, 8)}
    run = [
        open_checkpoint(save_model(tmp_path / str(i), tensors))
        for i, tensors in enumerate((state, more, other))
    ]
    common = shared(run)
    assert set(common.left_out) == {names[0], "extra.weight"}
    assert set(common.names) == set(names[1:])


def test_checkpoints_without_a_tensor_in_common_are_refused(tmp_path):
    run = [
        open_checkpoint(save_model(tmp_path / name, {f"{name}.weight": torch.ones(2, 2)}))
        for name in ("a", "b")
    ]
    with pytest.raises(ValueError, match=r"no tensor is in all 2 checkpoints; are they of one run\?"):
        shared(run)


def test_weights_that_are_not_finite_are_named(tmp_path):
    state = weights(0)
    name = next(iter(state))
    broken = {**state, name: state[name].clone().fill_(math.nan)}
    run = [
        open_checkpoint(save_model(tmp_path / str(i), tensors))
        for i, tensors in enumerate((state, broken, state))
    ]
    with pytest.raises(ValueError, match=rf"1: {name} holds 64 NaN or infinite values"):
        squared_distances(shared(run))


# ------------------------------------------------------------------- the same weights, saved in another way


def resized(model, directory):
    model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    model.save_pretrained(directory)


def sharded(model, directory):
    model.save_pretrained(directory, max_shard_size="4KB")
    assert len(list(directory.glob("*.safetensors"))) > 1


def with_old_names(model, directory):
    model.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def with_its_head_stored_too(model, directory):
    model.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    alias, original = next(pair for pair in model.all_tied_weights_keys.items() if pair[0].endswith("weight"))
    state[alias] = state[original].clone()
    save_file(state, directory / "model.safetensors", {"format": "pt"})


OTHERWISE = {
    "two unused tokens": resized, "shards": sharded, "names of old": with_old_names,
    "a tied head stored twice": with_its_head_stored_too,
}  # fmt: skip


@pytest.mark.parametrize("save", OTHERWISE.values(), ids=OTHERWISE)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_the_same_weights_are_as_far_from_the_first_however_they_are_saved(family, save, tmp_path):
    make(family, 0, tie_word_embeddings=True).save_pretrained(tmp_path / "first")
    make(family, 1, tie_word_embeddings=True).save_pretrained(tmp_path / "last")
    save(make(family, 1, tie_word_embeddings=True), tmp_path / "otherwise")
    first, last, otherwise = (open_checkpoint(tmp_path / name) for name in ("first", "last", "otherwise"))
    usual, other = movement(shared([first, last]), 1), movement(shared([first, otherwise]), 1)
    assert usual["name"].tolist() == other["name"].tolist()
    assert usual["moved"] == pytest.approx(other["moved"], rel=1e-12)
    assert usual["size"] == pytest.approx(other["size"], rel=1e-12)
    # And the other way round, but for the order of the names.
    usual, other = movement(shared([last, first]), 1), movement(shared([otherwise, first]), 1)
    assert usual["moved"].sum() == pytest.approx(other["moved"].sum(), rel=1e-12)
    assert usual["size"].sum() == pytest.approx(other["size"].sum(), rel=1e-12)
    results = [
        intruder_dimensions(CheckpointPair(tmp_path / "first", tmp_path / name), k=2)
        for name in ("last", "otherwise")
    ]
    assert results[0].metrics == results[1].metrics
    norms = [result.tables["matrices"].set_index("matrix")["update_norm"] for result in results]
    assert norms[0].to_dict() == pytest.approx(norms[1].to_dict(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_another_dtype_has_not_moved(dtype, tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "first")
    make("llama", 0).to(dtype).save_pretrained(tmp_path / "copy")
    run = [open_checkpoint(tmp_path / name) for name in ("first", "copy")]
    for order in (run, run[::-1]):
        assert not movement(shared(order), 1)["moved"].any()
