"""`tunescope graft`: a mask of an audit becomes a checkpoint, and one of another pair becomes nothing."""

import json

import pytest
import torch

from diagnostics.edits.graft import graft
from probes.checkpoints.mask_file import Patch
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.pair import CheckpointPair
from tests.diagnostics.shell import shell
from tests.probes.runnable import make

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path):
    """Base and tuned in files, and a mask of three entries."""
    for seed, name in enumerate(("base", "tuned", "other")):
        make("llama", seed).save_pretrained(tmp_path / name)
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    Patch.of(pair, {NAME: torch.tensor([0, 5, 9])}, {"task": "made"}).save(tmp_path / "m.safetensors")
    return pair


def values(path):
    return open_checkpoint(path).tensor(NAME).flatten()


@pytest.mark.parametrize("without", [False, True])
def test_the_command_writes_the_graft_or_its_complement(pair, tmp_path, monkeypatch, capsys, without):
    arguments = ["graft", tmp_path / "base", tmp_path / "tuned", "--mask", tmp_path / "m.safetensors"]
    arguments += ["--out", tmp_path / "out", *(["--without"] if without else [])]
    assert shell(monkeypatch, *arguments) == 0
    base, tuned = (values(tmp_path / name) for name in ("base", "tuned"))
    inside = torch.zeros(len(base), dtype=torch.bool)
    inside[[0, 5, 9]] = True
    assert torch.equal(values(tmp_path / "out"), torch.where(inside != without, tuned, base))
    output = capsys.readouterr().out
    # 21 tensors of a Llama of width 16: 5,488 weights in all
    total = sum(header.entries for header in pair.tuned.headers.values())
    receiver, donor = ("tuned", "base") if without else ("base", "tuned")
    assert f"Wrote {receiver} with 3 of {total:,} weights" in output
    assert f"from {donor}, in 1 tensors" in output
    trail = json.loads((tmp_path / "out" / "tunescope_graft.json").read_text())
    assert trail["entries"] == 3
    assert trail["without"] is without
    assert trail["about"] == {"task": "made"}


@pytest.mark.parametrize(
    ("base", "tuned", "mask", "out", "message"),
    [
        ("base", "other", "m.safetensors", "out", "m.safetensors: was made for another pair: its tuned has"),
        ("other", "tuned", "m.safetensors", "out", "m.safetensors: was made for another pair: its base has"),
        ("base", "tuned", "none.safetensors", "out", "no such file; audits keep theirs in AUDIT/masks"),
        ("base", "tuned", "base/model.safetensors", "out", "is no mask of tunescope's"),
        ("base", "tuned", "m.safetensors", "base", "is not empty; name a new directory"),
        ("base", "nowhere", "m.safetensors", "out", "nowhere"),
    ],
)
def test_what_cannot_be_grafted_is_one_line_and_writes_nothing(
    pair, tmp_path, monkeypatch, capsys, base, tuned, mask, out, message
):
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = [tmp_path / base, tmp_path / tuned, "--mask", tmp_path / mask, "--out", tmp_path / out]
    assert shell(monkeypatch, "graft", *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert output.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_a_reader_must_know_is_said(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    make("llama_classes", 1).bfloat16().save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    Patch.of(pair, {NAME: torch.tensor([2])}).save(tmp_path / "m.safetensors")
    grafted = graft(tmp_path / "base", tmp_path / "tuned", tmp_path / "m.safetensors", tmp_path / "out")
    alone, lost, wider = grafted.notes
    assert "1 tensors that base lacks come from tuned, such as score.weight" in alone
    assert "1 tensors that tuned lacks were left out, such as lm_head.weight" in lost
    assert "tensors are written in base's wider dtype" in wider
