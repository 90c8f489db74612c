import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from probes import open_checkpoint
from probes.files.layout import Header
from probes.files.locate import UNWANTED, WANTED, WANTED_TORCH
from probes.files.quantised import refuse_quantised

Q = "model.layers.0.self_attn.q_proj.weight"


def refuse(match, ref, **options):
    with pytest.raises(ValueError, match=match) as caught:
        open_checkpoint(ref, **options)
    assert "\n" not in str(caught.value)


def bert(path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture
def adapter(directory, tmp_path):
    """A LoRA of rank 2 on q_proj of both layers, its factors all set."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(directory)}  # fmt: skip
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(1)
    factors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        factors[f"{stem}.lora_A.weight"] = torch.randn(2, 32, generator=random)
        factors[f"{stem}.lora_B.weight"] = torch.randn(32, 2, generator=random)
    save_file(factors, path / "adapter_model.safetensors")
    return path


# ------------------------------------------------------------------------------------- kinds of reference


def test_a_directory_is_opened_with_its_configuration(directory, llama):
    checkpoint = open_checkpoint(directory)
    model = llama()
    assert checkpoint.kind == "full"
    assert checkpoint.base is None
    assert checkpoint.adapter is None
    assert checkpoint.directory == directory
    assert checkpoint.config["hidden_size"] == 32
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.dtype == "float32"
    assert checkpoint.parameters == sum(p.numel() for p in model.parameters())
    assert set(checkpoint.headers) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), value)


@pytest.mark.parametrize("form", ["directory", "str", "file", "sharded", "index", "bin", "pt", "opened"])
def test_every_form_of_one_model_is_the_same_checkpoint(directory, llama, tmp_path, form):
    expected = open_checkpoint(directory)
    state = llama().state_dict()
    if form == "sharded":
        llama().save_pretrained(tmp_path / "s", max_shard_size="20KB")
        assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    if form in ("bin", "pt"):
        (tmp_path / "b").mkdir()
        shutil.copy(directory / "config.json", tmp_path / "b")
        torch.save(state, tmp_path / "b" / "pytorch_model.bin")
        torch.save({"model": state}, tmp_path / "w.pt")
    if form == "index":
        llama().save_pretrained(tmp_path / "s", max_shard_size="20KB")
    checkpoint = open_checkpoint(
        {
            "directory": directory,
            "str": str(directory),
            "file": directory / "model.safetensors",
            "sharded": tmp_path / "s",
            "index": tmp_path / "s" / "model.safetensors.index.json",
            "bin": tmp_path / "b",
            "pt": tmp_path / "w.pt",
            "opened": expected,
        }[form]
    )
    assert checkpoint.fingerprint() == expected.fingerprint()
    assert set(checkpoint.matrices) == set(expected.matrices)
    assert torch.equal(checkpoint.matrix(Q), expected.matrix(Q))
    assert checkpoint.config == ({} if form == "pt" else expected.config)


def test_a_file_without_a_configuration_beside_it_has_no_directory(directory, tmp_path):
    shutil.copy(directory / "model.safetensors", tmp_path / "alone.safetensors")
    checkpoint = open_checkpoint(tmp_path / "alone.safetensors")
    assert checkpoint.directory is None
    assert checkpoint.architecture == "unknown"


def test_an_adapter_is_opened_on_the_base_that_it_names(adapter, directory):
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.kind == "adapter"
    assert checkpoint.base.ref == str(directory)
    assert checkpoint.adapter["r"] == 2
    assert checkpoint.touched(Q)
    assert not checkpoint.touched(Q.replace("q_proj", "k_proj"))
    assert checkpoint.delta(Q.replace("q_proj", "k_proj")) is None
    factors = load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{Q}".replace("weight", f"lora_{which}.weight")] for which in "AB")
    expected = checkpoint.base.matrix(Q) + 2 * B @ A  # alpha / r = 4 / 2
    assert torch.allclose(checkpoint.matrix(Q), expected, atol=1e-5)
    assert torch.allclose(checkpoint.tensor(Q), expected, atol=1e-5)
    assert torch.allclose(checkpoint.delta(Q).dense(), 2 * B @ A, atol=1e-5)
    assert checkpoint.parameters == checkpoint.base.parameters
    assert checkpoint.fingerprint() != checkpoint.base.fingerprint()
    assert checkpoint.stamp() != checkpoint.base.stamp()


def test_an_adapter_takes_the_base_that_is_given_instead(adapter, llama, tmp_path):
    llama(seed=5).save_pretrained(tmp_path / "other")
    checkpoint = open_checkpoint(adapter, base=tmp_path / "other")
    assert checkpoint.base.ref == str(tmp_path / "other")
    assert torch.equal(checkpoint.tensor("model.norm.weight"), checkpoint.base.tensor("model.norm.weight"))


def test_an_adapter_is_opened_by_its_file(adapter):
    by_file = open_checkpoint(adapter / "adapter_model.safetensors")
    assert by_file.fingerprint() == open_checkpoint(adapter).fingerprint()


def test_a_checkpoint_is_described_for_the_audit(adapter):
    described = open_checkpoint(adapter).describe()
    assert list(described) == ["ref", "kind", "fingerprint", "parameters", "dtype", "architecture", "adapter"]
    assert described["kind"] == "adapter"
    assert json.loads(json.dumps(described)) == described


def test_a_checkpoint_survives_pickling(adapter):
    checkpoint = open_checkpoint(adapter)
    again = pickle.loads(pickle.dumps(checkpoint))
    assert torch.equal(again.matrix(Q), checkpoint.matrix(Q))
    assert again.stamp() == checkpoint.stamp()


def test_weights_that_share_their_bytes_are_given_and_counted_once(tmp_path):
    embed = torch.randn(10, 4)
    torch.save({"lm_head.weight": embed, "model.embed_tokens.weight": embed}, tmp_path / "w.bin")
    checkpoint = open_checkpoint(tmp_path / "w.bin")
    assert list(checkpoint.matrices) == ["model.embed_tokens.weight"]
    assert checkpoint.matrices["model.embed_tokens.weight"].tied == ("lm_head.weight",)
    assert checkpoint.parameters == 40


def test_a_head_with_values_of_its_own_is_given_whatever_the_config_ties(tmp_path):
    """As transformers 5 loads it: "different values, so we will NOT tie them"."""
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    embed = torch.randn(10, 4)
    for head, copies in ((embed.clone(), ("lm_head.weight",)), (embed + 1, ())):
        tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
        save_file(tensors, tmp_path / "model.safetensors")
        matrices = open_checkpoint(tmp_path).matrices
        assert set(matrices) == set(tensors) - set(copies)
        assert matrices["model.embed_tokens.weight"].tied == copies


def test_an_unknown_tensor_or_matrix_is_answered_with_the_nearest(directory):
    checkpoint = open_checkpoint(directory)
    with pytest.raises(
        LookupError, match=r"has no tensor 'model.norm.wieght'; the nearest .* model.norm.weight"
    ):
        checkpoint.tensor("model.norm.wieght")
    with pytest.raises(LookupError, match=rf"has no matrix 'layers.0.q_proj'; the nearest of its .*{Q}"):
        checkpoint.matrix("layers.0.q_proj")


def test_opening_safetensors_needs_neither_transformers_nor_peft(directory):
    script = (
        "import sys; import probes; assert 'torch' not in sys.modules\n"
        f"from probes import CheckpointPair; pair = CheckpointPair({str(directory)!r}, {str(directory)!r})\n"
        "[pair.read(name) for name in pair.matrices]; assert not pair.unmatched\n"
        "heavy = 'transformers', 'peft', 'transformer_lens', 'pandas', 'huggingface_hub'\n"
        "print([module for module in heavy if module in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout == "[]\n"


# ----------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty Hugging Face cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, repository, directory, commit="a" * 40, ref="main"):
    """Lay a directory out as the cache keeps a snapshot: links to blobs."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    for file in directory.iterdir():
        blob = root / "blobs" / f"{commit[0]}{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_hub_id_is_opened_from_the_cache_without_network(cache, directory, llama, tmp_path):
    llama(seed=7).save_pretrained(tmp_path / "old")
    put(cache, "org/name", directory)
    put(cache, "org/name", tmp_path / "old", commit="b" * 40, ref="v1")
    latest = open_checkpoint("org/name")
    assert latest.ref == "org/name"
    assert latest.fingerprint() == open_checkpoint(directory).fingerprint()
    old = open_checkpoint("org/name@v1")
    assert old.fingerprint() == open_checkpoint(tmp_path / "old").fingerprint() != latest.fingerprint()
    for other in (open_checkpoint("org/name", revision="v1"), open_checkpoint("org/name@" + "b" * 40)):
        assert other.fingerprint() == old.fingerprint()


def test_a_hub_adapter_and_its_base_are_opened_from_the_cache(cache, adapter, directory):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/name"}))
    put(cache, "org/name", directory)
    put(cache, "org/adapter", adapter)
    assert open_checkpoint("org/adapter").base.ref == "org/name"


def test_a_hub_model_of_torch_files_is_opened_from_the_cache(cache, llama, tmp_path):
    (tmp_path / "bin").mkdir()
    torch.save(llama().state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    put(cache, "org/name", tmp_path / "bin")
    assert open_checkpoint("org/name").parameters == sum(p.numel() for p in llama().parameters())


def test_a_hub_id_that_is_not_cached_is_an_error_without_network(cache):
    refuse(
        "org/name: no such local path, not in the Hugging Face cache, .*download it while online", "org/name"
    )
    refuse("gpt2@v9: no such local path, not in the Hugging Face cache", "gpt2@v9")


def test_what_another_program_left_in_the_cache_is_enough(cache, directory, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def incomplete(*args, **options):
        raise LocalEntryNotFoundError("the cached snapshot lacks merges.txt")

    put(cache, "org/name", directory)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    assert open_checkpoint("org/name").fingerprint() == open_checkpoint(directory).fingerprint()
    (cache / "models--org--name/snapshots" / ("a" * 40) / "model.safetensors").unlink()
    refuse("no weights", "org/name")


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("GatedRepoError", "org/name@v1: is open to accepted users only; accept its terms, then log in"),
        ("RevisionNotFoundError", "org/name@v1: org/name has no such revision on the hub"),
        ("RepositoryNotFoundError", "org/name@v1: no such local path, and no such repository on the hub"),
        ("HfHubHTTPError", r"org/name@v1: cannot be downloaded \(HfHubHTTPError: busy\)"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(cache, monkeypatch, kind, match):
    import huggingface_hub
    from huggingface_hub import errors

    def answer(*args, **options):
        raise getattr(errors, kind)("busy\nand more", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    refuse(match, "org/name@v1")


def test_only_configuration_tokenizer_and_weights_are_fetched():
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja",
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "README.md", "modeling_x.py", "original/model.safetensors", "onnx/model.onnx",
        "consolidated.00.safetensors", "tf_model.h5", "model.gguf", "optimizer.pt", "training_args.bin",
    ]  # fmt: skip
    kept = filter_repo_objects([*files, *left], allow_patterns=WANTED, ignore_patterns=UNWANTED)
    assert list(kept) == files
    torch_files = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin", "adapter_model.bin"]
    kept = filter_repo_objects([*torch_files, *left], allow_patterns=WANTED_TORCH, ignore_patterns=UNWANTED)
    assert sorted(kept) == sorted([*torch_files, "pytorch_model.bin"])


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "ref", ["./missing", "no/such/path", "/no/such", "x.safetensors", "a/b.bin", "~/nothing here"]
)
def test_a_missing_path_is_named(ref):
    refuse("no such file or directory", ref)
    refuse("no such file or directory", Path(ref))


def test_a_local_path_has_no_revision(directory):
    refuse("is a local path, and those have no revision", directory, revision="main")
    refuse("names revision 'v1', but revision='v2' was given", "org/name@v1", revision="v2")


def test_a_directory_without_weights_is_named(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    refuse("base: no weights .*is it a model directory", directory)
    (tmp_path / "empty").mkdir()
    refuse("empty: no weights", tmp_path / "empty")


def test_a_broken_configuration_is_named(directory):
    (directory / "config.json").write_text("{'hidden_size': 3}")
    refuse("config.json: not readable as JSON", directory)
    (directory / "config.json").write_text("[]")
    refuse("config.json: should hold a JSON object, holds a list", directory)


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "w.safetensors")
    refuse("w.safetensors: holds no tensors", tmp_path / "w.safetensors")


def test_an_adapter_without_a_base_says_what_to_give(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refuse("is an adapter, and adapter_config.json names no base; name it there as base_model_name", adapter)
    missing = str(tmp_path / "gone" / "model")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": missing}))
    refuse("cannot open the base that this adapter names: .*gone/model: no such file or directory", adapter)


def test_half_an_adapter_is_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "away")
    refuse("has adapter_config.json but no weights", adapter)
    (adapter / "away").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").unlink()
    refuse("has adapter weights but no adapter_config.json", adapter)


def test_a_model_and_an_adapter_in_one_directory_are_not_guessed_between(adapter, directory):
    for file in adapter.iterdir():
        shutil.copy(file, directory)
    refuse(
        "holds a model and an adapter; name one file, model.safetensors or adapter_model",
        directory,
    )
    assert open_checkpoint(directory / "model.safetensors").kind == "full"
    assert (
        open_checkpoint(directory / "adapter_model.safetensors", base=directory / "model.safetensors").kind
        == "adapter"
    )


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    refuse("q_proj", adapter, base=bert(tmp_path / "bert"))


def header(name, shape=(8, 8), dtype=torch.float16):
    return {name: Header(name, shape, dtype)}


INT4 = header("m.qweight", (1, 8), torch.int32) | header("m.qzeros", (1, 1), torch.int32)


@pytest.mark.parametrize(
    ("headers", "config", "match"),
    [
        (INT4 | header("m.g_idx", (8,), torch.int32), {}, r"quantised with GPTQ \(m.g_idx\)"),
        (INT4, {}, r"quantised with GPTQ \(m.qweight\)"),
        (
            header("m.qweight", (8, 1), torch.int32) | header("m.qzeros", (1, 1), torch.int32),
            {},
            "quantised with AWQ",
        ),
        (header("m.weight.absmax", (4,)), {}, "bitsandbytes 4-bit .*model.dequantize()"),
        (header("m.weight.quant_map", (16,)), {}, "bitsandbytes 4-bit .*model.dequantize()"),
        (
            header("m.weight.quant_state.bitsandbytes__nf4", (9,), torch.uint8),
            {},
            r"bitsandbytes 4-bit \(nf4\)",
        ),
        (header("m.SCB", (8,)), {}, "bitsandbytes 8-bit .*model.dequantize()"),
        (
            header("m.weight", dtype=torch.float8_e4m3fn),
            {},
            "float8_e4m3fn without scales .*get the unquantised",
        ),
        (
            header("m.weight", dtype=torch.float8_e4m3fn) | header("m.weight_scale", ()),
            {},
            r"fp8 with scales \(m.weight_scale\).*FineGrainedFP8Config\(dequantize=True\)",
        ),
        (
            header("m.weight", dtype=torch.float8_e4m3fn) | header("m.weight_scale_inv", (1, 1)),
            {},
            r"fp8 with scales \(m.weight_scale_inv\)",
        ),
        (
            header("m.weight", dtype=torch.int8) | header("m.weight_scale", (8, 1)),
            {},
            "int8 codes with scales",
        ),
        (
            header("e.gate_up_proj_blocks", (2, 8, 1, 16), torch.uint8),
            {},
            r"MXFP4 .*Mxfp4Config\(dequantize=True\)",
        ),
        (header("m.weight_packed", dtype=torch.int32), {}, "compressed-tensors"),
        (header("m.weight", dtype=torch.uint8), {}, r"uint8 codes \(m.weight\)"),
        (
            header("m.weight"),
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "gptq 4-bit .config.json",
        ),
        (
            header("m.weight"),
            {"quantization_config": {"load_in_4bit": True}},
            "bitsandbytes 4-bit .config.json",
        ),
        (
            header("m.weight"),
            {"quantization_config": {"quant_method": "fp8"}},
            "fp8 .config.json.*FineGrained",
        ),
        (
            header("m.weight"),
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            "awq .config.json",
        ),
        (header("m.weight"), {"quantization_config": {"group_size": 128}}, "an unnamed method"),
    ],
)
def test_quantised_weights_are_refused_by_name_with_the_way_back(headers, config, match):
    with pytest.raises(ValueError, match=match) as caught:
        refuse_quantised("org/model", headers, config)
    assert str(caught.value).startswith("org/model: quantised with ")
    assert "cannot be compared as weights; " in str(caught.value)


def test_plain_weights_and_buffers_are_not_taken_for_quantised_ones(directory, tmp_path):
    stored = {
        "m.weight": torch.randn(8, 8).half(),
        "blocks.0.transformer_blocks": torch.randn(8, 8).half(),  # ends as MXFP4's codes do, which are bytes
        "position_ids": torch.arange(64)[None],
        "attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "attn.mask_blocks": torch.ones(8, 8, dtype=torch.bool),
        "num_batches_tracked": torch.tensor(3),
    }
    (tmp_path / "plain").mkdir()
    save_file(stored, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "config.json").write_text('{"quantization_config": null}')
    for path in (tmp_path / "plain", directory, bert(tmp_path / "bert")):
        checkpoint = open_checkpoint(path)
        tensors = load_file(path / "model.safetensors")
        assert set(checkpoint.headers) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.tensor(name), tensor), name
    weights = ["blocks.0.transformer_blocks", "m.weight"]
    assert sorted(open_checkpoint(tmp_path / "plain").matrices) == weights


def test_a_quantised_directory_is_refused_when_opened(directory):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    refuse(r"base: quantised with gptq 4-bit \(config.json: quantization_config\)", directory)


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    import struct

    text = json.dumps({"m.weight": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refuse("tensor 'm.weight' is of dtype F4", tmp_path / "w.safetensors")


# ------------------------------------------------------------------------ configurations made to do harm


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": "2"}, "r is '2'; it is a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is .*; it is a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'; it is a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .* an object of numbers by the names of modules"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is .* an object of numbers"),
        ({"modules_to_save": 3}, "modules_to_save is '3'; it is a list of names"),
        ({"target_parameters": [3]}, r"target_parameters is '\[3\]'; it is a list of names"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices is .* a list of token ids"),
        ({"trainable_token_indices": {"embed": "x"}}, "trainable_token_indices is .* a list of token ids"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is no regular expression"),
        ({"rank_pattern": {"x" * 501 + "+": 2}}, "takes too long; name the modules instead"),
        ({"base_model_name_or_path": {"w": 1}}, "names no base"),
    ],
)
def test_a_damaged_adapter_configuration_is_named(adapter, changes, match):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    refuse(match, adapter)


def test_an_expression_without_end_is_given_up(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    # 30 letters can be divided among 30 groups of 30 groups in more ways than anybody has time for.
    config["rank_pattern"] = {"(?:(?:(?:[a-z._0-9]{1,30}){1,30}){1,30})[A-Z]": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refuse("the regular expression .* takes too long; name the modules instead", adapter)


def test_patterns_mean_what_they_mean_to_peft(adapter):
    from probes.adapters.config_patterns import Patterns

    patterns = Patterns("adapter")
    key = "model.layers.0.self_attn.q_proj"
    for pattern in (
        "q_proj",
        r"self_attn\.q_proj",
        "^model.layers.0.self_attn.q_proj",
        "[qk]_proj",
        "layers.*",
    ):
        assert patterns.fits(pattern, key), pattern
    for pattern in ("proj", "k_proj", "layers", "^q_proj", "self_attn"):
        assert not patterns.fits(pattern, key), pattern


@pytest.mark.parametrize(
    ("factor", "shape", "match"),
    [
        ("lora_A.weight", (), "is no factor; damaged"),
        ("lora_B.weight", (32, 0), "lora_B.weight is of size 0; ZeRO-3"),
        ("lora_magnitude_vector", (3,), "has not a length for each output"),
    ],
)
def test_a_factor_of_an_impossible_shape_is_refused(adapter, factor, shape, match):
    from safetensors.torch import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    factors[f"base_model.model.model.layers.0.self_attn.q_proj.{factor}"] = torch.ones(shape)
    save_file(factors, adapter / "adapter_model.safetensors")
    refuse(match, adapter)
