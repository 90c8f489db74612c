import json
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from probes import CheckpointPair, open_checkpoint
from probes.checkpoints.save import write_checkpoint

Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"
IDS = torch.tensor([[1, 5, 9, 2]])


def doubled(*names):
    return lambda name, tensor: tensor * 2 if name in names else tensor


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def refuse(match, source, out, change=lambda name, tensor: tensor):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} if out.is_dir() else None
    with pytest.raises(ValueError, match=match) as caught:
        write_checkpoint(source, out, change)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.glob(".*partial"))
    if before is None:
        assert not out.is_dir()
    else:
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# -------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_unchanged_copy_is_the_same_checkpoint_and_loads(llama, tmp_path, shards, dtype):
    model = llama().to(dtype)
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": shards} if shards else {}))
    source = open_checkpoint(tmp_path / "base")
    assert write_checkpoint(source, tmp_path / "out") == tmp_path / "out"
    copy = open_checkpoint(tmp_path / "out")
    assert copy.fingerprint() == source.fingerprint()
    weights = {path.name for path in (tmp_path / "base").glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == weights
    assert len(weights) > 2 or shards is None
    for path in (tmp_path / "base").iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    loaded = load(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


def test_the_files_are_as_the_library_writes_them(directory, tmp_path):
    write_checkpoint(open_checkpoint(directory), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_the_index_is_kept_and_counted_again(llama, tmp_path):
    llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    write_checkpoint(open_checkpoint(tmp_path / "base"), tmp_path / "out")
    name = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
        (tmp_path / "base" / name).read_text()
    )


@pytest.fixture(scope="module")
def sharded(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    llama().save_pretrained(path, max_shard_size="20KB")
    return open_checkpoint(path)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_exactly_the_changed_tensors_change(sharded, tmp_path, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(sharded.headers)), max_size=5))
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    write_checkpoint(sharded, out, doubled(*chosen))
    copy = open_checkpoint(out)
    for name in sharded.headers:
        expected = sharded.tensor(name) * (2 if name in chosen else 1)
        assert torch.equal(copy.tensor(name), expected)
    pair = CheckpointPair(sharded, copy)
    assert {name for name in pair.matrices if not pair.identical(name)} == chosen & set(pair.matrices)


def test_both_copies_of_a_tied_weight_are_written_in_another_dtype(llama, tmp_path):
    model = llama(tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path / "base")
    embedding = model.get_input_embeddings().weight.detach()
    tensors = load_file(tmp_path / "base/model.safetensors") | {"lm_head.weight": embedding.clone()}
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    source = open_checkpoint(tmp_path / "base")
    write_checkpoint(source, tmp_path / "out", dtypes={"model.embed_tokens.weight": torch.float32})
    written = load_file(tmp_path / "out/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert written[name].dtype == torch.float32
        assert torch.equal(written[name], embedding.float())
    assert load(tmp_path / "out").dtype == torch.float32


def test_a_change_made_in_single_precision_is_stored_in_the_dtype_of_the_file(llama, tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "base")
    source = open_checkpoint(tmp_path / "base")
    write_checkpoint(source, tmp_path / "out", lambda n, t: t.float() * 1.1 if n == Q else t)
    copy = open_checkpoint(tmp_path / "out")
    assert {header.dtype for header in copy.headers.values()} == {torch.bfloat16}
    assert torch.equal(copy.tensor(Q), (source.tensor(Q).float() * 1.1).bfloat16())


def test_the_source_is_left_as_it_was(directory, tmp_path):
    before = (directory / "model.safetensors").read_bytes()
    write_checkpoint(open_checkpoint(directory), tmp_path / "out", lambda name, tensor: tensor.mul_(2))
    assert (directory / "model.safetensors").read_bytes() == before


def test_what_lies_beside_the_weights_is_carried_over_and_training_state_is_not(directory, tmp_path):
    carried = [
        "tokenizer.json", "tokenizer_config.json", "merges.txt", "spiece.model", "chat_template.jinja",
        "LICENSE", "special_tokens_map.json", "README.md", "modeling_x.py", "preprocessor_config.json",
    ]  # fmt: skip
    left = ["optimizer.pt", "trainer_state.json", "training_args.bin", "model.gguf", "tf_model.h5", ".secret"]
    for name in [*carried, *left]:
        (directory / name).write_text(name)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (directory / "checkpoint-5").mkdir()
    (directory / "checkpoint-5" / "model.safetensors").write_text("x")
    write_checkpoint(open_checkpoint(directory), tmp_path / "out")
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert written == model | set(carried) | {"additional_chat_templates/tool.jinja"}
    assert all((tmp_path / "out" / name).read_text() == name for name in carried)


def test_a_real_tokenizer_is_carried_over(directory, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(directory)
    write_checkpoint(open_checkpoint(directory), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("b a c")["input_ids"] == [1, 0, 2]


# -------------------------------------------------------------------------------------- kinds of source


def test_a_changed_tied_embedding_stays_tied(llama, tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    write_checkpoint(open_checkpoint(tmp_path / "base"), tmp_path / "out", doubled(EMBED))
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, 2 * load(tmp_path / "base").lm_head.weight)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_torch_files_are_written_as_safetensors(llama, tmp_path, split, tied):
    model = llama(tie_word_embeddings=tied)
    base = tmp_path / "base"
    base.mkdir()
    model.config.save_pretrained(base)
    state = model.state_dict()
    assert "lm_head.weight" in state  # tied too: both names, one storage
    if split:
        names = sorted(state)
        where = {}
        for part in (0, 1):
            file = f"pytorch_model-0000{part + 1}-of-00002.bin"
            torch.save({name: state[name] for name in names[part::2]}, base / file)
            where |= dict.fromkeys(names[part::2], file)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(state, base / "pytorch_model.bin")
    write_checkpoint(open_checkpoint(base), tmp_path / "out", doubled(EMBED))
    weights = {path.name for path in (tmp_path / "out").iterdir() if "model" in path.name}
    shards = {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert weights == (shards if split else {"model.safetensors"})
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.model.embed_tokens.weight, 2 * state[EMBED])
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"] * (2 if tied else 1))


def test_one_file_without_configuration_becomes_a_directory(directory, tmp_path):
    shutil.copy(directory / "model.safetensors", tmp_path / "alone.safetensors")
    write_checkpoint(open_checkpoint(tmp_path / "alone.safetensors"), tmp_path / "out", doubled(Q))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[Q], 2 * open_checkpoint(directory).tensor(Q)
    )


def test_a_model_in_memory_is_written_so_that_it_loads(llama, tmp_path):
    model = llama()
    write_checkpoint(open_checkpoint(model), tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


@pytest.fixture
def adapter(directory, tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(directory)}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    stem = f"base_model.model.{Q.removesuffix('.weight')}"
    factors = {f"{stem}.lora_A.weight": torch.randn(2, 32), f"{stem}.lora_B.weight": torch.randn(32, 2)}
    save_file(factors, path / "adapter_model.safetensors")
    return path


def test_an_adapter_is_written_merged_with_its_own_tokenizer(adapter, directory, tmp_path):
    for name in ("tokenizer.json", "vocab.txt"):
        (directory / name).write_text("base")
    for name in ("tokenizer.json", "README.md", "trainer_state.json"):
        (adapter / name).write_text("adapter")
    source = open_checkpoint(adapter)
    write_checkpoint(source, tmp_path / "out")
    copy = open_checkpoint(tmp_path / "out")
    assert copy.kind == "full"
    assert torch.equal(copy.tensor(Q), source.matrix(Q))
    pair = CheckpointPair(directory, copy)
    assert [name for name in pair.matrices if not pair.identical(name)] == [Q]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "adapter"
    assert (tmp_path / "out" / "vocab.txt").read_text() == "base"
    others = {path.name for path in (tmp_path / "out").iterdir()} - {"tokenizer.json", "vocab.txt"}
    assert others == {"config.json", "generation_config.json", "model.safetensors"}


def test_an_adapter_on_half_precision_is_rounded_once(llama, adapter, tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "half")
    source = open_checkpoint(adapter, base=tmp_path / "half")
    write_checkpoint(source, tmp_path / "out", doubled(Q))
    written = load_file(tmp_path / "out" / "model.safetensors")[Q]
    assert source.matrix(Q).dtype == torch.float32
    assert torch.equal(written, (source.matrix(Q) * 2).bfloat16())


def test_links_of_a_hub_cache_become_files(directory, tmp_path):
    root = tmp_path / "models--org--name"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    directory.rename(root / "blobs")
    for file in (root / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    write_checkpoint(open_checkpoint(snapshot), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert open_checkpoint(tmp_path / "out").fingerprint() == open_checkpoint(snapshot).fingerprint()


def test_progress_counts_every_tensor(directory, tmp_path):
    seen = []
    write_checkpoint(open_checkpoint(directory), tmp_path / "out", progress=lambda *args: seen.append(args))
    total = len(open_checkpoint(directory).headers)
    assert [done for done, _, _ in seen] == list(range(1, total + 1))
    assert {of for _, of, _ in seen} == {total}
    assert {name for _, _, name in seen} == set(open_checkpoint(directory).headers)


def test_memory_holds_one_tensor_and_not_a_shard(tmp_path):
    # One shard of 64 tensors of 4 MiB: whoever held the shard would need 256 MiB.
    script = f"""
import json, resource, struct, torch
from pathlib import Path
from probes import open_checkpoint
from probes.checkpoints.save import write_checkpoint
size, path = 2**20, Path({str(tmp_path / "big.safetensors")!r})
header = {{
    f"layers.{{i}}.up_proj.weight": {{"dtype": "F32", "shape": [1024, 1024],
                                  "data_offsets": [4*i*size, 4*(i+1)*size]}}
    for i in range(64)
}}
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + 256 * size)
torch.set_num_threads(1)
source = open_checkpoint(path)
most = 0
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
before = resident()
def change(name, tensor):
    global most
    most = max(most, resident())
    return tensor + 1 if name.startswith("layers.3") else tensor
write_checkpoint(source, Path({str(tmp_path / "out")!r}), change)
print(most - before)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    assert float(done.stdout) < 40
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("layers.30.up_proj.weight").sum() == 2**20
        assert file.get_tensor("layers.29.up_proj.weight").sum() == 0


# --------------------------------------------------------------------------------------------- whole or not


def test_an_empty_directory_may_be_written_to(directory, tmp_path):
    (tmp_path / "out").mkdir()
    write_checkpoint(open_checkpoint(directory), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_missing_parents_are_made(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_checkpoint(open_checkpoint(directory), "a/b/out") == Path("a/b/out")
    assert Path("a/b/out/model.safetensors").is_file()


def test_what_is_there_is_never_overwritten(directory, tmp_path):
    source = open_checkpoint(directory)
    (tmp_path / "file").write_text("mine")
    refuse("file: is a file; name a new directory", source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    refuse("full: is not empty; name a new directory", source, tmp_path / "full")
    refuse("base: is not empty; name a new directory", source, directory)


def test_a_place_that_cannot_be_written_is_named(directory, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file/out: cannot be written \(.*\); nothing is left of it"):
        write_checkpoint(open_checkpoint(directory), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(directory, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    refuse(
        r"out: needs 0.0 GB, but its disk has only 0.0 GB left", open_checkpoint(directory), tmp_path / "out"
    )


def test_a_disk_that_fills_up_leaves_nothing(directory, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = open_checkpoint(directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the model has 90 thousand bytes
    try:
        with pytest.raises(
            ValueError, match=r"out: cannot be written \(File too large\); nothing is left of it"
        ):
            write_checkpoint(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(directory, tmp_path, error):
    def change(name, tensor):
        if "layers.1" in name:
            raise error("stop")
        return tensor

    with pytest.raises(error, match="stop"):
        write_checkpoint(open_checkpoint(directory), tmp_path / "out", change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_change_of_shape_is_refused(directory, tmp_path):
    match = rf"{Q}: is \(32, 32\), but its change \(16, 32\)"
    refuse(match, open_checkpoint(directory), tmp_path / "out", lambda n, t: t[:16] if n == Q else t)


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
def test_a_change_that_is_not_finite_in_the_stored_dtype_is_refused(llama, tmp_path, factor):
    llama().half().save_pretrained(tmp_path / "base")
    match = rf"out: {Q}, as changed, holds \d+ NaN or infinite values"
    source = open_checkpoint(tmp_path / "base")
    refuse(match, source, tmp_path / "out", lambda n, t: t.float() * factor if n == Q else t)


def test_links_out_of_the_source_are_not_copied(directory, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (directory / "tokenizer.json").symlink_to(tmp_path / "secret")
    match = r"'tokenizer.json' is a link to .*secret, outside of the checkpoint; not opened"
    refuse(match, open_checkpoint(directory), tmp_path / "out")
