import contextlib
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from probes.files.locate import open_files
from probes.files.sources import DTYPES, SafetensorsSource, finite, raw


def tensors() -> dict[str, torch.Tensor]:
    values = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 5, generator=values),
        "a.weight": torch.randn(7, 2, generator=values).bfloat16(),
        "a.bias": torch.randn(7, generator=values).half(),
        "scale": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and bytes(raw(first)) == bytes(raw(second))
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def sharded(path: Path, parts: dict[str, list[str]], values: dict[str, torch.Tensor] | None = None) -> Path:
    values = values or tensors()
    path.mkdir(parents=True, exist_ok=True)
    for name, members in parts.items():
        save_file({member: values[member] for member in members}, path / name)
    index = {"weight_map": {member: name for name, members in parts.items() for member in members}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def refuse(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        open_files(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_every_tensor_comes_back_as_it_was_stored(tmp_path, save):
    path = tmp_path / ("w.safetensors" if save is save_file else "w.pt")
    save(tensors(), path)
    source = open_files(path)
    assert set(source.headers) == set(tensors())
    for name, value in tensors().items():
        assert source.headers[name].shape == tuple(value.shape)
        assert source.headers[name].dtype == value.dtype
        assert same(source.read(name), value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 2**20),
)
def test_any_dtype_and_shape_survives_bit_for_bit(tmp_path, dtype, shape, seed):
    dtype = DTYPES[dtype]
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (torch.Size(shape).numel() * dtype.itemsize,),
                         generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)  # fmt: skip
    value = bits.view(dtype).reshape(shape) if bits.numel() else torch.empty(shape, dtype=dtype)
    # A neighbour of odd length, so that offsets are of any alignment.
    save_file({"x": value, "y": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "one.safetensors")
    assert same(SafetensorsSource([tmp_path / "one.safetensors"]).read("x"), value)


def test_a_read_tensor_outlives_its_source_and_cannot_write_to_the_file(file):
    before = file.read_bytes()
    value = open_files(file).read("b.weight")
    value.zero_()
    assert value.sum() == 0
    assert file.read_bytes() == before


def test_opening_reads_no_weights_and_reading_maps_one_tensor_only(tmp_path):
    # 64 tensors of 4 MiB: whoever kept them would hold 256 MiB at the end.
    script = f"""
import resource, torch
from safetensors.torch import save_file
from probes.files.sources import SafetensorsSource, raw
from pathlib import Path
path = Path({str(tmp_path / "big.safetensors")!r})
size = 4 * 2**20
header = {{
    f"t{{i:02}}": {{"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}}
    for i in range(64)
}}
import json, struct
text = json.dumps(header).encode(); text += b" " * (-len(text) % 8)
with path.open("wb") as out:
    out.write(struct.pack("<Q", len(text)) + text)
    for i in range(64):
        out.write(bytes([i]) * size)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
torch.set_num_threads(1)
source = SafetensorsSource([path])
before, most = resident(), 0
for name in source.headers:
    value = source.read(name)
    assert int(value.max()) == int(name[1:])
    most = max(most, resident())
print(most - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert float(done.stdout) < 24


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_source_is_opened_again_by_another_process(tmp_path, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.bin")
    (save_file if kind == "safetensors" else torch.save)(tensors(), path)
    source = open_files(path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sum, (source, "b.weight")) == float(tensors()["b.weight"].sum())
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint()


def _sum(source, name):
    return float(source.read(name).sum())


def test_the_fingerprint_depends_on_content_and_not_on_files_or_order(tmp_path, file):
    names = list(tensors())
    single = open_files(file)
    split = open_files(sharded(tmp_path / "two", {"x.safetensors": names[:2], "y.safetensors": names[2:]}))
    swapped = open_files(
        sharded(tmp_path / "three", {"y.safetensors": names[:2], "x.safetensors": names[2:]})
    )
    torch.save(dict(reversed(tensors().items())), tmp_path / "w.bin")
    pickled = open_files(tmp_path / "w.bin")
    sources = single, split, swapped, pickled
    assert len({source.fingerprint() for source in sources}) == 1
    assert len({source.stamp() for source in sources}) == 4


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t["b.weight"].view(-1)[0].neg_(),
        lambda t: t.update({"c.weight": t.pop("b.weight")}),
        lambda t: t.update({"b.weight": t["b.weight"].reshape(5, 3)}),
        lambda t: t.update({"b.weight": t["b.weight"].view(torch.int32)}),
    ],
    ids=["one sign", "a name", "a shape", "a dtype"],
)
def test_the_fingerprint_sees_every_change(tmp_path, file, edit):
    values = tensors()
    edit(values)
    save_file(values, tmp_path / "other.safetensors")
    assert open_files(tmp_path / "other.safetensors").fingerprint() != open_files(file).fingerprint()


def test_the_stamp_changes_when_the_file_does_and_old_headers_are_not_used_on_it(file):
    source = open_files(file)
    before = source.stamp()
    os.utime(file, ns=(1, 1))
    assert source.stamp() != before
    with pytest.raises(ValueError, match="changed since it was opened"):
        source.read("b.weight")


def test_tied_weights_of_a_torch_file_lie_in_one_place(tmp_path):
    value = torch.randn(4, 3)
    torch.save(
        {"embed": value, "head": value, "other": value.clone(), "first row": value[0]}, tmp_path / "w.pt"
    )
    source = open_files(tmp_path / "w.pt")
    assert source.location("embed") == source.location("head")
    assert len({source.location(name) for name in source.headers}) == 3


def test_a_torch_file_in_the_old_format_is_read(tmp_path):
    torch.save(tensors(), tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    source = open_files(tmp_path / "w.bin")
    assert all(same(source.read(name), value) for name, value in tensors().items())


def test_a_mapped_torch_file_is_let_go_of_when_enough_of_it_was_touched(tmp_path, monkeypatch):
    torch.save({name: torch.full((10,), float(name)) for name in "012345"}, tmp_path / "w.pt")
    source = open_files(tmp_path / "w.pt")
    opened = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: opened.append(args) or load(*args, **options))
    monkeypatch.setattr("probes.files.sources.MAPPED_BYTES", 100)  # two and a half tensors of 40 bytes
    values = [source.read(name) for name in "012345"]
    assert [float(value.sum()) for value in values] == [0, 10, 20, 30, 40, 50]
    # The first three are read from the file as it was opened, the others after opening it once more.
    assert len(opened) == 1


def test_a_state_dict_is_found_inside_a_training_checkpoint(tmp_path):
    content = {"epoch": 3, "state_dict": tensors(), "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "w.ckpt.pt")
    assert set(open_files(tmp_path / "w.ckpt.pt").headers) == set(tensors())


def test_strided_tensors_of_a_torch_file_keep_their_values(tmp_path):
    value = torch.arange(6.0).reshape(2, 3)
    torch.save({"t": value.mT, "s": value[:, ::2]}, tmp_path / "w.pt")
    source = open_files(tmp_path / "w.pt")
    assert torch.equal(source.read("t"), value.mT)
    assert bytes(raw(source.read("s"))) == bytes(raw(torch.tensor([[0.0, 2.0], [3.0, 5.0]])))


def test_sharded_torch_files_are_found_by_their_index(tmp_path):
    names = list(tensors())
    for part, members in enumerate((names[:3], names[3:])):
        torch.save({name: tensors()[name] for name in members}, tmp_path / f"pytorch_model-{part}.bin")
    where = {name: f"pytorch_model-{int(names.index(name) >= 3)}.bin" for name in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    source = open_files(tmp_path)
    assert all(same(source.read(name), value) for name, value in tensors().items())


# ------------------------------------------------------------------------------------------- bad input


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, zipped):
    torch.save(
        {"w": torch.ones(2), "x": Bomb(tmp_path / "ran")},
        tmp_path / "w.pt",
        _use_new_zipfile_serialization=zipped,
    )
    refuse(tmp_path / "w.pt", "holds code or objects besides tensors and is not opened.*safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_pickled_code_alone_is_refused_and_not_run(tmp_path):
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refuse(tmp_path / "w.bin", "holds code or objects besides tensors and is not opened")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_safetensors_are_named_whole_or_not(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refuse(file, "not a whole safetensors file .*copy or download it again")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, 0.95])
def test_truncated_torch_files_are_named(tmp_path, zipped, keep):
    path = tmp_path / "w.pt"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refuse(path, "not a whole torch file; truncated or corrupt")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_but_never_crashes(tmp_path, data):
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.ones(2, 3), "y": torch.zeros(4)}, path)
    content = bytearray(path.read_bytes())
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    read_or_refuse(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_torch_file_is_refused_or_read_but_never_crashes(tmp_path, data):
    path = tmp_path / "w.pt"
    torch.save({"x": torch.ones(2, 3)}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # The old format names a storage by its address, so that its length is not always the same.
        content[data.draw(st.integers(0, 2**16)) % len(content)] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    read_or_refuse(path)


def read_or_refuse(path: Path) -> None:
    with contextlib.suppress(ValueError):
        source = open_files(path)
        for name, header in source.headers.items():
            assert source.read(name).shape == header.shape


def test_a_huge_header_length_allocates_nothing(tmp_path):
    import tracemalloc

    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}" * 50)
    tracemalloc.start()
    refuse(tmp_path / "w.safetensors", "not a whole safetensors file .*header too large")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refuse(tmp_path / "notes.txt", "weights are read from .safetensors, .bin, .pt or .pth files")
    (tmp_path / "fake.safetensors").write_text("this is a text, longer than eight bytes")
    refuse(tmp_path / "fake.safetensors", "not a whole safetensors file")
    (tmp_path / "fake.pt").write_text("this is a text, longer than eight bytes")
    refuse(tmp_path / "fake.pt", "not a whole torch file")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"lr": 0.1}, {}, torch.ones(3)], ids=str)
def test_a_torch_file_without_a_state_dict_says_so(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", r"holds no state dict \(names with tensors\)")


def test_a_sparse_tensor_is_named(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse_coo()}, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", "'w' is a torch.sparse_coo tensor; save it dense")


def test_an_empty_directory_has_no_weights(tmp_path):
    refuse(tmp_path, "no weights .*model.safetensors.*is it a model directory")


def test_several_files_without_an_index_are_not_guessed_between(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    refuse(tmp_path, r"2 safetensors files \(a.safetensors, b.safetensors\) and no index; name one")


def test_a_device_is_no_checkpoint():
    refuse(Path("/dev/null"), "neither a file nor a directory")


PARTS = {"x.safetensors": ["b.weight", "a.weight", "a.bias"], "y.safetensors": ["scale", "none", "mask"]}


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path):
    (sharded(tmp_path, PARTS) / "y.safetensors").unlink()
    refuse(tmp_path, r"index.json: names 'y.safetensors', which is missing from")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path):
    index = sharded(tmp_path, PARTS) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["c.weight"] = "x.safetensors"
    index.write_text(json.dumps(content))
    refuse(tmp_path, r"says that x.safetensors holds 'c.weight', but it does not")
    content["weight_map"]["c.weight"] = content["weight_map"].pop("a.bias").replace("x", "y")
    index.write_text(json.dumps(content))
    refuse(tmp_path, r"says that y.safetensors holds 'c.weight', but it does not")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path, PARTS)
    save_file(
        {name: tensors()[name] for name in ["scale", "none", "mask", "a.bias"]}, tmp_path / "y.safetensors"
    )
    refuse(tmp_path, r"y.safetensors: 'a.bias' is also in x.safetensors; which is meant")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "{root}/x.safetensors", "in/../../x.safetensors", "..\\x.safetensors"]
)
def test_an_index_cannot_lead_outside(tmp_path, name):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    inner = tmp_path / "model"
    (inner / "in").mkdir(parents=True)
    name = name.format(root=tmp_path)
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refuse(inner, "outside of the checkpoint; not opened")


def test_a_link_in_an_index_cannot_lead_outside(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "x.safetensors").symlink_to("../secret.safetensors")
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
    refuse(inner, "is a link to .*secret.safetensors, outside of the checkpoint; not opened")


def test_links_to_the_blobs_of_a_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    sharded(blobs, PARTS)
    snapshot.mkdir(parents=True)
    for name in [*PARTS, "model.safetensors.index.json"]:
        (blobs / name).rename(blobs / f"blob-{name.split('.')[0]}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob-{name.split('.')[0]}")
    source = open_files(snapshot)
    assert all(same(source.read(name), value) for name, value in tensors().items())
    # but not to another repository's
    (tmp_path / "models--org--other").mkdir()
    blobs.rename(tmp_path / "models--org--other" / "blobs")
    for name in PARTS:
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(Path("../../../models--org--other/blobs") / f"blob-{name.split('.')[0]}")
    (snapshot / "model.safetensors.index.json").unlink()
    index = {"weight_map": {member: name for name, members in PARTS.items() for member in members}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(snapshot, "outside of the checkpoint; not opened")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 3}}'])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refuse(
        tmp_path,
        "model.safetensors.index.json: (not readable as JSON|should hold a JSON object|has no weight_map)",
    )


# -------------------------------------------------------------------------------------- finite weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_are_not_finite_are_counted_and_placed(dtype, bad, transposed):
    value = torch.randn(20, 30).to(dtype)
    value[3, 7] = value[11, 2] = bad
    # In (row, column) order (3, 7) comes first; in the transposed one (2, 11).
    first = r"\(2, 11\)" if transposed else r"\(3, 7\)"
    with pytest.raises(
        ValueError, match=rf"org/model: q_proj holds 2 NaN or infinite values, the first at {first}"
    ):
        finite("org/model", "q_proj", value.mT if transposed else value)


def test_the_largest_finite_values_are_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        finite("m", "w", torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype))
    finite("m", "w", torch.zeros(0, 3))
    finite("m", "w", torch.tensor(1.0))


# ----------------------------------------------------------------------------------- files made to do harm


def headed(path: Path, header: object, payload: bytes = b"") -> Path:
    """A safetensors file with any header."""
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + payload)
    return path


@pytest.mark.parametrize("shape", [[0, 2**63], [2**40, 0, 2**40], [0] + [1] * 100])
def test_a_shape_that_torch_cannot_count_is_refused(tmp_path, shape):
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    refuse(headed(tmp_path / "x.safetensors", header), "tensor 'w' is of a shape that torch cannot hold")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a" * 600])
def test_a_name_that_no_line_can_hold_is_refused(tmp_path, name):
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    refuse(headed(tmp_path / "x.safetensors", header, bytes(4)), "is no name of a tensor")
    torch.save({name: torch.ones(1)}, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", "is no name of a tensor")


def test_a_tensor_without_entries_holds_no_matrix_of_any_expert(tmp_path):
    from probes.naming.matrices import matrices

    name = "model.layers.0.mlp.experts.gate_up_proj"
    header = {name: {"dtype": "F32", "shape": [2**40, 2, 0], "data_offsets": [0, 0]}}
    assert matrices(open_files(headed(tmp_path / "x.safetensors", header)).headers, {}) == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_value_repeated_beyond_the_size_of_its_file_is_refused(tmp_path, zipped):
    wide = torch.ones(1).expand(60_000, 60_000)  # 14 GB of one number
    torch.save({"w": wide}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    refuse(tmp_path / "x.pt", "'w' repeats few bytes as 60000x60000; save a copy")


def test_a_tensor_without_storage_is_refused(tmp_path):
    torch.save({"w": torch.ones(2, device="meta")}, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", "'w' has no values, only a shape")


def rewritten(path: Path, pickled: bytes, compression: int) -> Path:
    """A torch file with another pickle in it."""
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return path


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = rewritten(tmp_path / "x.pt", bytes(2**22), zipfile.ZIP_DEFLATED)
    refuse(path, "is made to fill the memory .*is compressed, which torch never does")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_key_that_takes_for_ever_to_hash_is_refused(tmp_path, zipped):
    # t0 = (empty dict,), t1 = (t0, t0), t2 = (t1, t1) …: 40 of them are a tuple of 2 ** 40 parts.
    code = b"\x80\x02})\x85q\x00"
    for index in range(1, 40):
        code += b"0h" + bytes([index - 1]) + b"h" + bytes([index - 1]) + b"\x86q" + bytes([index])
    code += b"0}h" + bytes([39]) + b"K\x01s."
    path = tmp_path / "x.pt"
    path.write_bytes(code) if not zipped else rewritten(path, code, zipfile.ZIP_STORED)
    refuse(path, "is made to fill the memory .a tuple of [0-9]+ parts")
