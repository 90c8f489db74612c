"""`tunescope interpolate`: a place on the line from base to tuned becomes a checkpoint."""

import json

import pytest
import torch

from diagnostics.edits.interpolate import interpolate
from probes.checkpoints.opening import open_checkpoint
from tests.diagnostics.shell import shell
from tests.probes.runnable import make


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        make("llama", seed).save_pretrained(tmp_path / name)
    return tmp_path


def test_the_command_writes_the_blend_and_says_what_it_is(models, monkeypatch, capsys):
    arguments = [models / "base", models / "tuned", "--alpha", "0.25", "--out", models / "out"]
    assert shell(monkeypatch, "interpolate", *arguments) == 0
    base, tuned, blended = (open_checkpoint(models / name) for name in ("base", "tuned", "out"))
    square = 0.0
    for name in blended.headers:
        start, end = base.tensor(name).double(), tuned.tensor(name).double()
        assert torch.equal(blended.tensor(name), (start + 0.25 * (end - start)).float()), name
        square += float((end - start).square().sum())
    output = capsys.readouterr().out
    assert "Wrote the model at alpha 0.25 (0 is base, 1 is tuned): 21 tensors differ" in output
    trail = json.loads((models / "out" / "tunescope_interpolate.json").read_text())
    assert trail["alpha"] == 0.25
    assert trail["displacement"] == pytest.approx(square**0.5)


@pytest.mark.parametrize(("alpha", "end"), [(0.0, "base"), (1.0, "tuned")])
def test_the_ends_are_copied_bit_for_bit(models, alpha, end):
    blend = interpolate(models / "base", models / "tuned", alpha, models / "out")
    assert f"the model at alpha {alpha:g} (0 is base, 1 is tuned)" in blend.summary()
    written, original = open_checkpoint(models / "out"), open_checkpoint(models / end)
    for name in original.headers:
        assert torch.equal(written.tensor(name).view(torch.int32), original.tensor(name).view(torch.int32))


@pytest.mark.parametrize(
    ("alpha", "out", "message"),
    [
        ("1.5", "out", "alpha is 1.5; it goes from 0, base, to 1, tuned"),
        ("nan", "out", "alpha is nan; it goes from 0, base, to 1, tuned"),
        ("-0.1", "out", "alpha is -0.1"),
        ("0.5", "base", "is not empty; name a new directory"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_writes_nothing(
    models, monkeypatch, capsys, alpha, out, message
):
    arguments = ["interpolate", models / "base", models / "tuned", f"--alpha={alpha}", "--out", models / out]
    assert shell(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert sorted(path.name for path in models.iterdir()) == ["base", "tuned"]


def test_what_a_reader_must_know_is_said(models):
    make("llama_classes", 1).bfloat16().save_pretrained(models / "classes")
    blend = interpolate(models / "base", models / "classes", 0.5, models / "out")
    alone, lost, wider = blend.notes
    assert "1 tensors that tuned lacks were left out, such as lm_head.weight" in lost
    assert "(0 is base but for what the notes name, 1 is tuned)" in blend.summary()
    assert "1 tensors that base lacks come from tuned, such as score.weight" in alone
    assert "Base is float32, tuned bfloat16: below alpha 1 weights are written in a dtype that holds" in wider
