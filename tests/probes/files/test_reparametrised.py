"""Reparametrised weights are those that torch's own modules use, whatever stands for them in the file."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from probes import CheckpointPair, open_checkpoint, open_model
from probes.checkpoints.save import write_checkpoint
from probes.errors import InputError
from probes.models.editable import Editable
from tests.probes.runnable import make

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")

REPARAMETRISED = {
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.4),
    "pruning of a bias": lambda module: prune.random_unstructured(module, "bias", 0.5),
    "weight norm": parametrizations.weight_norm,
    "weight norm of columns": lambda module: parametrizations.weight_norm(module, dim=1),
    "weight norm of all": lambda module: parametrizations.weight_norm(module, dim=None),
    "old weight norm": old_weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": old_spectral_norm,
}
MODULES = {
    "linear": lambda: nn.Linear(6, 8),
    "square": lambda: nn.Linear(6, 6),
    "conv": lambda: nn.Conv1d(4, 6, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("change", REPARAMETRISED.values(), ids=REPARAMETRISED)
def test_a_weight_is_the_one_that_the_module_uses(module, change, dtype):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([module().to(dtype)])})
    model["layers"][0].to(torch.float32)
    change(model["layers"][0])
    model.to(dtype).eval()
    with torch.no_grad():
        model["layers"][0](torch.ones(6 if module != MODULES["conv"] else (4, 5), dtype=dtype))  # hooks run
    checkpoint = open_checkpoint(model.state_dict())
    used = {name: getattr(model["layers"][0], name) for name in ("weight", "bias")}
    assert {name.rpartition(".")[2] for name in checkpoint.headers} == used.keys()
    for name, value in used.items():
        stored = checkpoint.tensor(f"layers.0.{name}")
        assert stored.dtype == checkpoint.headers[f"layers.0.{name}"].dtype == dtype
        assert stored.shape == checkpoint.headers[f"layers.0.{name}"].shape
        assert torch.equal(stored, value.detach())


class Doubled(nn.Module):
    def forward(self, original):
        return 2 * original


@pytest.mark.parametrize(
    "change",
    [parametrizations.orthogonal, lambda m: parametrize.register_parametrization(m, "weight", Doubled())],
    ids=["orthogonal", "own"],
)
def test_what_the_file_does_not_tell_is_refused_by_name(change):
    module = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 6)])})
    change(module["layers"][0])
    with pytest.raises(InputError, match=r"layers\.0\.weight is reparametrised .*remove_parametrizations"):
        open_checkpoint(module.state_dict())


@given(st.sampled_from(["x", "time_maa", "mix"]))
def test_names_that_only_look_alike_stay(stem):
    # RWKV mixes with x_g and x_v.
    state = {f"blocks.0.att.{stem}_{part}": torch.ones(1, 1, 4) for part in "gvk"}
    assert open_checkpoint(state).headers.keys() == state.keys()


def test_weight_norms_that_an_architecture_has_stay(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, vocab_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Wav2Vec2Model(config)
    model.save_pretrained(tmp_path / "new")
    config.save_pretrained(tmp_path / "old")
    g, v = (f"parametrizations.weight.original{number}" for number in (0, 1))
    old = {name.replace(g, "weight_g").replace(v, "weight_v"): t for name, t in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, tmp_path / "old/model.safetensors")
    # A checkpoint of the bare model may be described by the config of one with a head.
    settings = json.loads((tmp_path / "old" / "config.json").read_text())
    settings["architectures"] = ["Wav2Vec2ForCTC"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(settings))
    pair = CheckpointPair(tmp_path / "old", tmp_path / "new")
    assert f"encoder.pos_conv_embed.conv.{g}" in pair.tuned.headers
    assert "encoder.pos_conv_embed.conv.weight_g" in pair.base.headers
    assert pair.unmatched == []
    assert pair.compared == 1.0


@pytest.fixture
def pruned(tmp_path):
    """A pruned Llama as a directory, and the same with pruning made permanent."""
    model = make("llama", 0)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linear:
        prune.l1_unstructured(module, "weight", 0.5)
    (tmp_path / "masked").mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "masked")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "masked" / "model.safetensors", {"format": "pt"})
    for module in linear:
        prune.remove(module, "weight")
    model.save_pretrained(tmp_path / "permanent")
    return tmp_path / "masked", tmp_path / "permanent"


def test_a_pruned_model_is_the_one_with_its_pruning_made_permanent(pruned, tmp_path):
    masked, permanent = map(open_checkpoint, pruned)
    assert masked.headers.keys() == permanent.headers.keys()
    assert all(torch.equal(masked.tensor(name), permanent.tensor(name)) for name in masked.headers)
    assert masked.fingerprint() == permanent.fingerprint()
    assert masked.matrices.keys() == permanent.matrices.keys()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = [open_model(directory).model(ids).logits for directory in pruned]
    assert torch.equal(*logits)
    # What is written holds the weights themselves.
    write_checkpoint(masked, tmp_path / "written")
    written = open_checkpoint(tmp_path / "written")
    assert all(torch.equal(written.tensor(name), permanent.tensor(name)) for name in permanent.headers)


def test_intruders_are_those_of_the_weights_and_not_of_masks(pruned, tmp_path):
    from diagnostics import intruder_dimensions

    make("llama", 0).save_pretrained(tmp_path / "base")
    results = [intruder_dimensions(CheckpointPair(tmp_path / "base", side), k=2) for side in pruned]
    assert results[0].metrics == results[1].metrics
    assert results[0].tables["vectors"].equals(results[1].tables["vectors"])


def test_a_pruned_model_in_memory_runs_as_it_is_and_is_not_edited():
    model = make("llama", 0)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)
    checkpoint = open_checkpoint(model)
    for name in names:
        assert torch.equal(checkpoint.tensor(f"{name}.weight"), model.get_submodule(name).weight)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(open_model(model).model(ids).logits, model.eval()(ids).logits)
    with pytest.raises(InputError, match=r"reparametrised weights, which cannot be edited; .*prune\.remove"):
        Editable(checkpoint)


def test_a_damaged_mask_is_named():
    state = {"layers.0.weight_orig": torch.ones(4, 4), "layers.0.weight_mask": torch.ones(4, 3)}
    with pytest.raises(InputError, match=r"layers\.0\.weight: its mask is \(4, 3\).* damaged"):
        open_checkpoint(state)
