"""What a stranger's files may not do: lead out of their directory, or be quoted as more than one line."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.series import step_of
from probes.files.locate import open_files
from probes.files.untrusted import MESSAGE, confined, one_line, plain, read_json
from probes.text.rows import read_task

Q = "model.layers.0.self_attn.q_proj.weight"


@given(st.text())
def test_whatever_is_quoted_is_one_printable_line(text):
    line = plain(text * 50)
    assert line.isprintable()
    assert len(line) <= MESSAGE + len(" … ")


def test_a_long_message_keeps_what_is_wrong_and_how_to_mend_it():
    line = plain("file.json: " + "x" * 5000 + "; copy it again")
    assert line.startswith("file.json: ")
    assert line.endswith("; copy it again")


@pytest.mark.parametrize("kind", [ValueError, LookupError])
def test_an_error_in_many_lines_leaves_as_one_of_its_kind(kind):
    with pytest.raises(kind, match=r"^a\\nb$"), one_line("x"):
        raise kind("a\nb")


def test_nesting_that_cannot_be_followed_is_bad_input(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"x\.json: not readable as JSON \(nested too deeply\)"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"^x: is nested too deeply to be read$"), one_line("x"):
        raise RecursionError


@pytest.fixture
def model(tmp_path):
    """A model in `inside`, and what must not be read in `outside`."""
    for name in ("inside", "outside"):
        directory = tmp_path / name
        directory.mkdir()
        save_file({Q: torch.ones(4, 4)}, directory / "model.safetensors")
        (directory / "config.json").write_text('{"model_type": "llama"}')
        (directory / "trainer_state.json").write_text('{"global_step": 7}')
    return tmp_path / "inside"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_out_of_a_model_is_not_followed(model, name, absolute):
    (model / name).unlink()
    target = model.parent / "outside" / name if absolute else Path("../outside") / name
    (model / name).symlink_to(target)
    with pytest.raises(
        ValueError, match=f"inside: '{name}' is a link to .*{name}, outside of the checkpoint"
    ):
        open_checkpoint(model)


def test_a_link_out_of_an_adapter_is_not_followed(model):
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").symlink_to("../outside/config.json")
    with pytest.raises(ValueError, match=r"'adapter_config.json' is a link to .*outside of the checkpoint"):
        open_checkpoint(model, base=model.parent / "outside")


def test_a_step_is_not_read_through_a_link(model):
    assert step_of(open_checkpoint(model)) == 7
    (model / "trainer_state.json").unlink()
    (model / "trainer_state.json").symlink_to("../outside/trainer_state.json")
    assert step_of(open_checkpoint(model)) is None


def test_a_step_that_no_number_holds_is_none(model):
    (model / "trainer_state.json").write_text('{"global_step": 1%s}' % ("0" * 400))
    assert step_of(open_checkpoint(model)) is None


def test_links_inside_and_a_file_that_a_person_names_are_followed(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "model.safetensors").symlink_to("weights.safetensors")
    assert list(open_checkpoint(model).matrices) == [Q]
    (model / "link.safetensors").symlink_to("../outside/model.safetensors")
    assert list(open_files(model / "link.safetensors").headers) == [Q]
    (model.parent / "other").symlink_to("inside")
    assert list(open_checkpoint(model.parent / "other").matrices) == [Q]


def test_a_snapshot_leads_to_the_blobs_of_its_own_repository_alone(tmp_path):
    hub = tmp_path / "hub"
    snapshot = hub / "models--org--name" / "snapshots" / "abc" / "sub"
    other = hub / "models--org--other" / "blobs"
    for directory in (snapshot, hub / "models--org--name" / "blobs", other):
        directory.mkdir(parents=True)
        (directory / "x").touch()
    (snapshot / "own").symlink_to("../../../blobs/x")
    (snapshot / "others").symlink_to("../../../../models--org--other/blobs/x")
    assert confined(snapshot / "own", snapshot) == snapshot / "own"
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        confined(snapshot / "others", snapshot)
    # An archive may be laid out like the cache, and its blobs be a link to anywhere.
    (hub / "models--org--name" / "blobs" / "x").unlink()
    (hub / "models--org--name" / "blobs").rmdir()
    (hub / "models--org--name" / "blobs").symlink_to("/etc")
    (snapshot / "passwords").symlink_to("../../../blobs/passwd")
    with pytest.raises(ValueError, match="is a link to /etc/passwd, outside of the checkpoint"):
        confined(snapshot / "passwords", snapshot)


def test_a_circle_of_links_leads_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match="'a' is a link that leads nowhere"):
        confined(tmp_path / "a", tmp_path)


@pytest.mark.parametrize(
    "name", ["a" * 300 + ".safetensors", "a/" * 3000 + "x", "~nobody-of-that-name/x.bin"]
)
def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path, name):
    with pytest.raises(ValueError, match="no such file or directory"):
        open_checkpoint(name)
    with pytest.raises(ValueError, match="there is no such file"):
        read_task(name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="which is missing from"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("classes", [3, "Llama", {}, [], [["x"]], None])
def test_a_configuration_may_name_its_class_in_any_way(model, classes):
    (model / "config.json").write_text(json.dumps({"architectures": classes, "model_type": ["llama"]}))
    assert isinstance(open_checkpoint(model).architecture, str)
    assert list(open_checkpoint(model).matrices) == [Q]
