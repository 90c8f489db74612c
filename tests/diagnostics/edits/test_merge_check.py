"""What edits of an adapter's model wrote is read again, and is base plus so many times the delta."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diagnostics.audit.demo import BUNDLED
from diagnostics.edits.graft import graft
from diagnostics.edits.interpolate import interpolate
from diagnostics.edits.merge_check import check_graft, check_merge
from diagnostics.edits.mitigate import mitigate
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch

BASE, ADAPTER = BUNDLED / "base", BUNDLED / "lora-r8"


def trail(out):
    return json.loads(next(out.glob("tunescope_*.json")).read_text())


def damaged(out, name="model.layers.1.self_attn.q_proj.weight", factor=1.05):
    """Files in which the delta of one matrix was added once more in part."""
    tensors, base = load_file(out / "model.safetensors"), load_file(BASE / "model.safetensors")
    delta = tensors[name].float() - base[name].float()
    tensors[name] = (base[name].float() + factor * delta).to(tensors[name].dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_trail_of_an_interpolation_names_the_adapter_and_its_factor(alpha, tmp_path):
    out = tmp_path / "out"
    interpolate(BASE, ADAPTER, alpha, out)
    merge = trail(out)["merge"]
    assert (merge["adapter"], merge["factor"], merge["matrices"]) == (str(ADAPTER), alpha, 28)
    if alpha:
        assert merge["low"] <= alpha <= merge["high"]
        assert merge["high"] - merge["low"] < 0.01


def test_a_full_fine_tune_has_no_adapter_in_its_trail(tmp_path):
    interpolate(BASE, BUNDLED / "full", 0.5, tmp_path / "out")
    assert "merge" not in trail(tmp_path / "out")


@pytest.mark.parametrize(
    "options", [{"full": True}, {}, {"mode": "update"}, {"mode": "update", "full": True}]
)
def test_mitigation_is_checked_where_it_edits_nothing_or_scales_all(options, tmp_path):
    mitigate(BASE, ADAPTER, tmp_path / "out", scale=0.7, **options)
    merge = trail(tmp_path / "out")["merge"]
    assert merge["factor"] == (0.7 if options.get("mode") else 1.0)
    assert merge["matrices"] == (28 if options.get("mode") else 13)  # 15 hold an intruder


@pytest.mark.parametrize("without", [False, True])
def test_a_graft_is_checked(without, tmp_path):
    pair = CheckpointPair(BASE, ADAPTER)
    index = {"model.layers.0.mlp.up_proj.weight": torch.arange(0, 40_000, 3)}
    patch = Patch.of(pair, index)
    patch.save(tmp_path / "mask.safetensors")
    out = tmp_path / "out"
    graft(BASE, ADAPTER, tmp_path / "mask.safetensors", out, without=without)
    assert trail(out)["merge"]["adapter"] == str(ADAPTER)
    with pytest.raises(
        RuntimeError, match=r"up_proj\.weight was not written as the masked entries of one model"
    ):
        check_graft(pair, out, patch, without=not without)


def test_a_matrix_that_was_written_otherwise_is_named(tmp_path):
    out = tmp_path / "out"
    interpolate(BASE, ADAPTER, 0.5, out)
    pair = CheckpointPair(BASE, ADAPTER)
    assert check_merge(pair, out, 0.5).matrices == 28
    damaged(out)
    reason = (
        r"layers\.1\.self_attn\.q_proj\.weight was not written as base plus 0\.5 times the adapter's delta"
    )
    with pytest.raises(RuntimeError, match=reason):
        check_merge(pair, out, 0.5)
    assert check_merge(pair, out, 0.5, edited=["model.layers.1.self_attn.q_proj.weight"]).matrices == 27
