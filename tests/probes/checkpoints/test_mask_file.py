"""Patches: what a graft takes from tuned, on disk and laid on base."""

import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from probes.checkpoints.mask_file import Patch, write_graft
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.pair import CheckpointPair
from tests.probes.runnable import make

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        make("llama", seed).save_pretrained(tmp_path / name)
    return CheckpointPair(tmp_path / "base", tmp_path / "tuned")


def everything(pair):
    return {name: torch.arange(header.entries) for name, header in pair.tuned.headers.items()}


def contents(checkpoint):
    return {name: checkpoint.tensor(name) for name in checkpoint.headers}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_with_every_entry_it_is_tuned_and_with_none_it_is_base(pair, tmp_path):
    write_graft(pair, Patch.of(pair, everything(pair)), tmp_path / "all")
    write_graft(pair, Patch.of(pair, {}), tmp_path / "none")
    assert same(contents(open_checkpoint(tmp_path / "all")), contents(pair.tuned))
    assert same(contents(open_checkpoint(tmp_path / "none")), contents(pair.base))
    write_graft(pair, Patch.of(pair, everything(pair)), tmp_path / "without", without=True)
    assert same(contents(open_checkpoint(tmp_path / "without")), contents(pair.base))


def test_only_its_entries_are_tuneds_and_the_complement_is_the_rest(pair, tmp_path):
    patch = Patch.of(pair, {NAME: torch.tensor([5, 0, 9])})
    assert patch.index[NAME].tolist() == [0, 5, 9]
    graft = write_graft(pair, patch, tmp_path / "graft")
    assert patch.count == 3
    assert graft.weights == sum(header.entries for header in pair.tuned.headers.values())
    write_graft(pair, patch, tmp_path / "rest", without=True)
    base, tuned = pair.base.tensor(NAME).flatten(), pair.tuned.tensor(NAME).flatten()
    grafted, rest = (open_checkpoint(tmp_path / name).tensor(NAME).flatten() for name in ("graft", "rest"))
    inside = torch.zeros(len(base), dtype=torch.bool)
    inside[[0, 5, 9]] = True
    assert torch.equal(grafted, torch.where(inside, tuned, base))
    assert torch.equal(rest, torch.where(inside, base, tuned))


def test_what_is_written_is_loaded_by_transformers(pair, tmp_path):
    write_graft(pair, Patch.of(pair, {NAME: torch.tensor([0])}), tmp_path / "graft")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "graft")
    assert model.state_dict()[NAME][0, 0] == pair.tuned.tensor(NAME)[0, 0]


def test_a_patch_is_the_same_after_saving(pair, tmp_path):
    patch = Patch.of(pair, {NAME: torch.tensor([1, 4]), "lm_head.weight": torch.tensor([7])}, {"task": "t"})
    patch.save(tmp_path / "m.safetensors")
    again = Patch.load(tmp_path / "m.safetensors")
    assert same(dict(again.index), dict(patch.index))
    assert same(dict(again.values), dict(patch.values))
    assert (again.base, again.tuned, again.about) == (patch.base, patch.tuned, {"task": "t"})
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["m.safetensors"]


def test_eight_thousand_entries_are_tens_of_kilobytes(tmp_path):
    # 8,505 entries of 4 bytes of index and 4 of value: 68 kB
    patch = Patch(index={"w": torch.arange(8505)}, values={"w": torch.rand(8505)}, base="b", tuned="t")
    patch.save(tmp_path / "m.safetensors")
    assert 68_000 < (tmp_path / "m.safetensors").stat().st_size < 69_000


def test_a_patch_of_another_pair_is_refused(pair, tmp_path):
    make("llama", 2).save_pretrained(tmp_path / "other")
    patch = Patch.of(pair, {NAME: torch.tensor([1])})
    for base, tuned, role in (("base", "other", "tuned"), ("other", "tuned", "base")):
        other = CheckpointPair(tmp_path / base, tmp_path / tuned)
        with pytest.raises(ValueError, match=f"was made for another pair: its {role} has the content hash"):
            write_graft(other, patch, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_entries_that_tuned_does_not_have_are_refused(pair):
    real = Patch.of(pair, {NAME: torch.tensor([1])})
    for name, message in (
        ("nonsense", "has no 'nonsense'; the nearest"),
        (NAME, "entry 448 of .*, which has 448"),
    ):
        index = {name: torch.tensor([16 * 28])}
        patch = Patch(index=index, values={name: torch.ones(1)}, base=real.base, tuned=real.tuned)
        with pytest.raises(ValueError, match=message):
            patch.check(pair)


def test_files_that_are_no_patches_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="no such file; audits keep theirs in AUDIT/masks"):
        Patch.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="is no mask of tunescope's"):
        Patch.load(tmp_path / "base" / "model.safetensors")
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(ValueError, match="torn: cannot be read as a mask"):
        Patch.load(tmp_path / "torn")
    path = tmp_path / "m.safetensors"
    Patch.of(pair, {NAME: torch.tensor([1, 4])}).save(path)
    tensors = load_file(path)
    tensors[f"index/{NAME}"] = torch.tensor([4, 1], dtype=torch.int32)
    save_file(tensors, path, {"tunescope_patch": "1"})
    with pytest.raises(ValueError, match=r"damaged: the entries of .* do not go with their values"):
        Patch.load(path)


def test_a_directory_that_is_occupied_is_refused_and_kept(pair, tmp_path):
    patch = Patch.of(pair, {})
    with pytest.raises(ValueError, match="is not empty; name a new directory"):
        write_graft(pair, patch, tmp_path / "base")


def test_of_an_adapter_the_merged_weights_are_grafted(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    wrapped = get_peft_model(make("llama", 0), config)
    wrapped.save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    write_graft(pair, Patch.of(pair, {NAME: torch.arange(448)}), tmp_path / "graft")
    grafted = open_checkpoint(tmp_path / "graft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = wrapped.merge_and_unload().state_dict()
    torch.testing.assert_close(grafted.tensor(NAME), merged[NAME])
    other = NAME.replace("layers.0", "layers.1")
    assert torch.equal(grafted.tensor(other), pair.base.tensor(other))


def test_a_base_that_is_wider_than_tuned_is_kept_exactly(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    make("llama", 1).bfloat16().save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    graft = write_graft(pair, Patch.of(pair, {}), tmp_path / "none")
    assert same(contents(open_checkpoint(tmp_path / "none")), contents(pair.base))
    assert NAME in graft.widened


def test_a_head_that_base_lacks_is_tuneds(tmp_path):
    make("llama", 0).save_pretrained(tmp_path / "base")
    make("llama_classes", 1).save_pretrained(tmp_path / "tuned")
    pair = CheckpointPair(tmp_path / "base", tmp_path / "tuned")
    graft = write_graft(pair, Patch.of(pair, {}), tmp_path / "none")
    assert graft.alone == ("score.weight",)
    assert "lm_head.weight" in graft.lost
    grafted = open_checkpoint(tmp_path / "none")
    assert torch.equal(grafted.tensor("score.weight"), pair.tuned.tensor("score.weight"))
    assert torch.equal(grafted.tensor(NAME), pair.base.tensor(NAME))


@pytest.mark.parametrize(
    ("index", "about", "match"),
    [
        (torch.tensor([1.0]), "{}", "the entries of w do not go with their values"),
        (torch.tensor([True]), "{}", "the entries of w do not go with their values"),
        (torch.tensor([1]), "", "its description is not JSON"),
        (torch.tensor([1]), "[]", "its description is not a JSON object"),
        (torch.tensor([1]), "[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_damaged_mask_is_one_clear_error(tmp_path, index, about, match):
    metadata = {"tunescope_patch": "1", "base": "0", "tuned": "1", "about": about}
    save_file({"index/w": index, "value/w": torch.ones(1)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ValueError, match=f"m.safetensors: .*{match}"):
        Patch.load(tmp_path / "m.safetensors")
