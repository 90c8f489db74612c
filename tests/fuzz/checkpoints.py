"""Targets and inputs of checkpoints: safetensors, indices, config.json, torch files, adapters, masks."""

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from safetensors.torch import save_file

from probes import CheckpointPair, open_checkpoint
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.mask_file import Patch
from probes.checkpoints.series import step_of
from probes.files.locate import open_files
from probes.files.sources import Source
from tests.fuzz.bundle import HEADER, LINK, LINKS, RAW, RISING, File, pack, unpack, wrapped
from tests.fuzz.hostile import (
    HOME,
    OUTSIDE,
    REGEXES,
    TEXTS,
    damaged,
    documents,
    edited,
    encoded,
    rarely,
    values,
)

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
EXPERTS = "model.layers.0.mlp.experts"
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "C64": 8,
}
# Names that the tables of families know, and names that are not meant for any table.
TENSORS = (
    Q, K, "model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.q_proj.weight",
    "model.embed_tokens.weight", "lm_head.weight", "shared.weight", f"{EXPERTS}.gate_up_proj",
    f"{EXPERTS}.gate_up_proj_bias", f"{EXPERTS}.down_proj", "model.layers.0.mlp.router.weight",
    "transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight",
    "transformer.h.0.mlp.c_proj.weight",
    "transformer.h.0.self_attention.query_key_value.weight", "model.layers.0.attention.wqkv.weight",
    "transformer.blocks.0.ffn.experts.mlp.w1", "transformer.blocks.0.ffn.experts.mlp.w2",
    "transformer.blocks.0.ffn.router.layer.weight", "encoder.layers.1.blocks.0.attention.self.query.weight",
    "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight",
    "w", "0.1.2.3", ".", "..",
    "layers." + "9" * 5000 + ".q_proj.weight", "layers.²." + "q_proj.weight", "a" * 400 + ".",
    "a" * 3000 + ".", ".1" * 400 + ".", "a.1" * 300, "layer" * 200, "._orig_mod." * 50,
)  # fmt: skip
# As the base of the adapters has them.
FITTING = {
    Q: (4, 4), K: (2, 4), "model.embed_tokens.weight": (6, 4), "lm_head.weight": (6, 4),
    f"{EXPERTS}.gate_up_proj": (2, 6, 4), f"{EXPERTS}.down_proj": (2, 4, 3),
    "transformer.h.0.attn.c_attn.weight": (4, 12),
    "transformer.h.0.self_attention.query_key_value.weight": (8, 4),
    "model.layers.0.self_attn.qkv_proj.weight": (12, 4), "transformer.blocks.0.ffn.experts.mlp.w1": (6, 4),
    "transformer.blocks.0.ffn.router.layer.weight": (2, 4),
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "multi_query": False,
    "text_config": {"model_type": "falcon", "num_kv_heads": 1, "new_decoder_architecture": True},
    "quantization_config": {},
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": f"{HOME}/base",
    "revision": None,
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {"k_proj": 8},
    "use_rslora": False,
    "use_dora": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "init_lora_weights": True,
    "ensure_weight_tying": False,
}


# --------------------------------------------------------------------------------------------- targets


def prepare(home: Path) -> None:
    """A base for adapters, and decoys that could be read if anybody went there."""
    outside, base = home / "outside", home / "base"
    for directory in (outside, base):
        directory.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(2, 2), Q: torch.ones(4, 4)}, outside / "secret.safetensors")
    torch.save({"w": torch.ones(2, 2)}, outside / "secret.bin")
    (outside / "secret.json").write_text(json.dumps(CONFIG))
    (outside / "adapter_config.json").write_text(json.dumps(ADAPTER))
    Patch(index={}, values={}, base="", tuned="").save(outside / "secret_patch.safetensors")
    state = {
        Q: torch.randn(4, 4),
        K: torch.randn(2, 4),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(4),
        "model.embed_tokens.weight": torch.randn(6, 4),
        f"{EXPERTS}.gate_up_proj": torch.randn(2, 6, 4),
        f"{EXPERTS}.down_proj": torch.randn(2, 4, 3),
        "model.norm.weight": torch.ones(4),
    }
    save_file(state, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))


def read_source(source: Source) -> None:
    """Everything that a source offers."""
    source.stamp()
    for name, header in source.headers.items():
        source.location(name)
        assert source.read(name).shape == header.shape
    source.fingerprint()


def read_checkpoint(checkpoint: Checkpoint) -> None:
    """Everything that an analysis may ask of a checkpoint."""
    json.dumps(checkpoint.describe())
    step_of(checkpoint)
    read_source(checkpoint.source)
    for name, matrix in checkpoint.matrices.items():
        assert checkpoint.matrix(name).shape == (matrix.rows, matrix.columns)
        if checkpoint.touched(name) and (low := checkpoint.delta(name)):
            assert low.dense().shape == (matrix.rows, matrix.columns)


def safetensors(data: bytes, directory: Path) -> None:
    """One safetensors file."""
    (directory / "x.safetensors").write_bytes(data)
    read_source(open_files(directory / "x.safetensors"))


def model(data: bytes, directory: Path) -> None:
    """A model's directory: configuration, index, shards, links."""
    unpack(data, directory)
    read_checkpoint(open_checkpoint(directory))


def pair(data: bytes, directory: Path) -> None:
    """A model's directory beside a good base: alignment, naming, what is left over."""
    unpack(data, directory)
    opened = CheckpointPair(directory.parent / "base", directory)
    for name in opened.matrices:
        opened.identical(name)
        assert opened.counterpart(name).rows
    assert opened.unmatched is not None


def adapter(data: bytes, directory: Path) -> None:
    """An adapter's directory, on the base that is given or that it names."""
    unpack(data, directory)
    base = directory.parent / "base" if data[-1:] < b"\xc0" else None
    # Its base may lie anywhere, as PEFT has it: which files are opened then is not the reader's to limit.
    if base is None and elsewhere(directory / "adapter_config.json"):
        return
    read_checkpoint(open_checkpoint(directory, base=base))


def elsewhere(settings: Path) -> bool:
    """Whether an adapter names a base that exists, other than the good one beside it."""
    if settings.is_symlink():  # which the reader is to refuse
        return False
    try:
        named = json.loads(settings.read_bytes())["base_model_name_or_path"]
        return Path(named).exists() and not Path(named).samefile(settings.parents[1] / "base")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def torch_file(data: bytes, directory: Path) -> None:
    """A `torch.save` file."""
    (directory / "x.bin").write_bytes(data)
    source = open_files(directory / "x.bin")
    Checkpoint("inside", source, {})
    read_source(source)


def patch(data: bytes, directory: Path) -> None:
    """A mask of a skill."""
    (directory / "mask.safetensors").write_bytes(wrapped(data[1:], RISING) if data[:1] == b"h" else data)
    mask = Patch.load(directory / "mask.safetensors")
    assert mask.count >= 0
    assert mask.index.keys() <= mask.values.keys()
    json.dumps(dict(mask.about))


# ---------------------------------------------------------------------------------------------- inputs


@st.composite
def headers(draw: DrawFn, names: tuple[str, ...] = TENSORS) -> dict[str, Any]:
    """The header of a safetensors file, mostly one whose offsets fit."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    at = 0
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(tuple(SIZES))) if rarely(draw, 8) else "F32"
        shape = (
            FITTING.get(name, (4, 4))
            if not rarely(draw, 4)
            else draw(
                st.sampled_from(
                    ((4, 4), (2, 4), (6, 4), (4,), (), (2, 6, 4), (2, 4, 3), (12, 4), (0, 4), (4, 0))
                )
                | st.lists(st.sampled_from((0, 1, 2, 3, 4, 8)), max_size=4)
            )
        )
        size = SIZES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    if header and rarely(draw, 6):  # without bytes any shape fits
        name = draw(st.sampled_from((*names[:12], "x.experts.w")))
        huge = draw(
            st.permutations(
                (0, *draw(st.lists(st.sampled_from((1, 2**31, 2**40, 2**63 - 1, 2**64 - 1)), max_size=3)))
            )
        )
        header[name] = {"dtype": "F32", "shape": list(huge), "data_offsets": [at, at]}
        if rarely(draw, 10):
            header[name] = {"dtype": "F32", "shape": [1] * 3000 + [0], "data_offsets": [at, at]}
    return header


header_files = damaged(edited(headers(), most=1).map(encoded), often=8)
safetensors_files: SearchStrategy[bytes] = damaged(header_files.map(wrapped), often=3)


@st.composite
def models(draw: DrawFn) -> bytes:
    """A model's directory, in one file or in shards, in which some is wrong."""
    files = [File("config.json", RAW, draw(documents(CONFIG)))]
    kind = draw(st.sampled_from(("one", "shards", "shards", "bin", "links")))
    if kind == "one":
        files.append(File("model.safetensors", HEADER, draw(header_files)))
    elif kind == "bin":
        files.append(File("pytorch_model.bin", RAW, draw(torch_files)))
    else:
        shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        weights: dict[str, Any] = {}
        for shard, names in zip(shards, (TENSORS[:8], TENSORS[8:22]), strict=True):
            header = draw(headers(names))
            weights |= dict.fromkeys(header.keys() - {"__metadata__"}, shard)
            files.append(File(shard, HEADER, encoded(header)))
        if weights and draw(st.booleans()):
            weights[draw(st.sampled_from(sorted(weights)))] = draw(st.sampled_from(OUTSIDE) | values)
        index = documents(
            {"metadata": {"total_size": 1}, "weight_map": weights}, most=draw(st.integers(0, 2))
        )
        files.append(File("model.safetensors.index.json", RAW, draw(index)))
    if draw(st.booleans()):
        files.append(File("trainer_state.json", RAW, draw(documents({"global_step": 3}))))
    if kind == "links" or rarely(draw, 5):
        names = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "model-00001-of-00002.safetensors", "out.safetensors", "trainer_state.json")  # fmt: skip
        linked = draw(st.sampled_from(names))
        files.insert(0, File(linked, LINK, bytes([draw(st.integers(0, len(LINKS) - 1))])))
    return pack(files)


FACTORS = tuple(
    f"base_model.model.{module}.{factor}"
    for module in (Q.removesuffix(".weight"), K.removesuffix(".weight"), EXPERTS, "model.embed_tokens")
    for factor in (
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A",
        "lora_embedding_B", "lora_C.weight", "token_adapter.trainable_tokens_delta", "modules_to_save.weight",
        "base_layer.weight", "weight", "bias",
    )
)  # fmt: skip


@st.composite
def adapters(draw: DrawFn) -> bytes:
    """An adapter's directory in which something may be wrong."""
    config = dict(ADAPTER, rank_pattern={"experts.gate_up_proj": 2})
    header: dict[str, Any] = {}
    at = 0

    def put(name: str, shape: list[int], dtype: str = "F32") -> None:
        nonlocal at
        size = 4
        for length in shape:
            size *= length
        header[f"base_model.model.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size

    r = draw(st.sampled_from((2, 2, 2, 2, 1, 0)))
    kinds = draw(st.sets(st.sampled_from(("q", "k", "embed", "tokens", "whole", "experts", "bias", "dora"))))
    kinds |= {"q"} if not kinds or kinds & {"bias", "dora"} else set()
    q = Q.removesuffix(".weight")
    if "q" in kinds:
        put(f"{q}.lora_A.weight", [r, 4])
        put(f"{q}.lora_B.weight", [4, r])
        config["rank_pattern"] |= {"q_proj": r}
    if "bias" in kinds:
        put(f"{q}.lora_B.bias", [4])
    if "dora" in kinds:
        config["use_dora"] = draw(st.booleans())
        put(f"{q}.lora_magnitude_vector", draw(st.sampled_from(([4], [1, 4], [3], []))))
    if "k" in kinds:
        k = K.removesuffix(".weight")
        put(f"{k}.lora_A.weight", [2, 4])
        put(f"{k}.lora_B.weight", [2, 2])
    if "embed" in kinds:
        put("model.embed_tokens.lora_embedding_A", [2, 6])
        put("model.embed_tokens.lora_embedding_B", [4, 2])
    if "tokens" in kinds:
        put("model.embed_tokens.token_adapter.trainable_tokens_delta", [2, 4])
        config["trainable_token_indices"] = draw(
            st.sampled_from(([0, 5], {"embed_tokens": [1, 2]}, [0, -1], [1, 1]))
        )
    if "whole" in kinds:
        wholes = ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", f"{q}.weight")
        shapes: tuple[list[int], ...] = ([4], [6, 4], [4, 4], [2, 2, 2], [], [0, 4])
        put(draw(st.sampled_from(wholes)), draw(st.sampled_from(shapes)))
        config["modules_to_save"] = ["norm", "lm_head", "q_proj"]
    if "experts" in kinds:
        put(f"{EXPERTS}.lora_A.weight", [4, 4])
        put(f"{EXPERTS}.lora_B.weight", [6, 4])
        config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    if rarely(draw, 4):
        pattern = draw(st.sampled_from(REGEXES))
        config[draw(st.sampled_from(("rank_pattern", "alpha_pattern")))] = {pattern: 2, "q_proj": r}
        config["target_modules"] = pattern
    if rarely(draw, 4):
        keys = (
            "trainable_token_indices modules_to_save target_parameters base_model_name_or_path rank_pattern r"
        )
        key = draw(st.sampled_from((*keys.split(), "lora_alpha")))
        config[key] = draw(values | st.sampled_from((*OUTSIDE, "../base", "gpt2", "org/name@main")))
    tensors = draw(edited(header, most=1)) if rarely(draw, 3) else header
    if rarely(draw, 6):
        tensors = draw(headers(FACTORS))
    files = [
        File("adapter_config.json", RAW, draw(documents(config, most=2))),
        File("adapter_model.safetensors", HEADER, draw(damaged(st.just(encoded(tensors)), often=8))),
    ]
    if rarely(draw, 6):
        linked = draw(
            st.sampled_from(
                ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "config.json")
            )
        )
        files.insert(0, File(linked, LINK, bytes([draw(st.integers(0, len(LINKS) - 1))])))
    return pack(files) + bytes([draw(st.integers(0, 255))])


def saved(content: Any, *, zipped: bool = True) -> bytes:
    """A torch file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def replaced(archive: bytes, change: Mapping[str, bytes], *, deflated: bool = False) -> bytes:
    """A torch file with other records, whose checksums are right."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change.get(name.partition("/")[2], old.read(name)))
    return buffer.getvalue()


def tupled(depth: int) -> bytes:
    """A pickled dict, the key of which is a tuple of 2 ** depth parts in depth letters."""
    code = b"\x80\x02})\x85q\x00"
    for index in range(1, depth):
        code += b"0h" + bytes([index - 1]) + b"h" + bytes([index - 1]) + b"\x86q" + bytes([index])
    return code + b"0}h" + bytes([depth - 1]) + b"K\x01s."


def strange_files() -> list[bytes]:
    """Torch files that are whole, and are meant ill or by nobody."""
    plain = {"w": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    plain_file = saved(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    contents: list[Any] = [
        plain,
        {"state_dict": plain, "step": 3},
        {"w": torch.ones(1).expand(60000, 60000)},
        {"w": torch.ones(4, 4).T, "v": torch.ones(8)[::2]},
        {1: torch.ones(2), None: torch.ones(2), ("a", 2): torch.ones(1), "x\ny": torch.ones(1)},
        {"w": torch.ones(3).to_sparse()},
        {"w": torch.ones(2, 2).to("meta")},
        {"w": quantised},
        {"w": torch.complex(torch.ones(2, 2), torch.ones(2, 2))},
        {"w": torch.tensor([float("nan"), float("inf")])},
        {"w": torch.empty(0, 2**40)},
        {"w": torch.nn.Parameter(torch.ones(2, 2)), "x": torch.Size([2])},
        {"w": torch.ones(2, 2, dtype=torch.float8_e4m3fn)},
        {"a" * 5000: torch.ones(1)},
        [torch.ones(2)],
        torch.ones(2),
        {"w": {"w": {"w": torch.ones(1)}}},
        {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)},
    ]
    files = []
    for content in contents:
        for zipped in (True, False):
            try:
                files.append(saved(content, zipped=zipped))
            except (RuntimeError, AttributeError, NotImplementedError, pickle.PicklingError):
                continue
    files += [
        replaced(plain_file, {"data.pkl": b"\x80\x02" + b"\x8c\x04pad." * 2**21}, deflated=True),
        replaced(plain_file, {}, deflated=True),
        replaced(plain_file, {"data.pkl": tupled(60)}),
        tupled(60),
        replaced(plain_file, {"data.pkl": b"(" * 2**16}),
        replaced(plain_file, {"data.pkl": b"\x80\x02" + b"]" * 2**16 + b"a" * (2**16 - 1) + b"."}),
        replaced(plain_file, {"data.pkl": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b"."}),
        replaced(plain_file, {"data.pkl": b"\x80\x02X\xff\xff\xff\x7fabc."}),
        replaced(plain_file, {"data.pkl": b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc."}),
        replaced(plain_file, {"byteorder": b"big"}),
        replaced(plain_file, {"version": b"99999"}),
        replaced(plain_file, {"data/0": b""}),
    ]
    return files


STRANGE = strange_files()
_PICKLE = zipfile.ZipFile(io.BytesIO(STRANGE[0])).read("archive/data.pkl")

torch_files: SearchStrategy[bytes] = st.one_of(
    damaged(st.sampled_from(STRANGE), often=3),
    damaged(st.just(_PICKLE), often=1).map(lambda code: replaced(STRANGE[0], {"data.pkl": code})),
    damaged(st.just(STRANGE[1]), often=1),
)


@st.composite
def patches(draw: DrawFn) -> bytes:
    """A mask in which something may be wrong."""
    if rarely(draw, 10):
        return draw(safetensors_files)
    header: dict[str, Any] = {
        "__metadata__": {
            "tunescope_patch": "1", "base": "00", "tuned": "01",
            "about": draw(st.sampled_from(('{"a": 1}', "", "{", "[1]", "null", "NaN", "[" * 3000, *TEXTS))),
        }
    }  # fmt: skip
    at = 0
    for name in draw(st.lists(st.sampled_from(("w", Q, "x\ny")), max_size=2, unique=True)):
        index = draw(st.sampled_from(("I32", "I32", "I64", "U8", "BOOL", "F32", "C64", "F8_E4M3", "F16")))
        count = draw(st.integers(0, 3))
        for kind, dtype in (("index", index), ("value", draw(st.sampled_from(tuple(SIZES))))):
            size = count * SIZES[dtype]
            header[f"{kind}/{name}"] = {"dtype": dtype, "shape": [count], "data_offsets": [at, at + size]}
            at += size
    content = draw(documents(header, most=draw(st.integers(0, 2))))
    return b"h" + content
