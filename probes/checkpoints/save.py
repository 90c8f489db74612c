"""Writing an edited checkpoint: a directory that `from_pretrained` loads, one tensor at a time.

The safetensors library needs all tensors of a file in memory; here they are streamed behind the header.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.layout import Header
from probes.files.locate import inside
from probes.files.reparametrised import Resolved
from probes.files.sources import DTYPES, FileSource, finite, raw
from probes.files.untrusted import read_json
from probes.progress import Progress

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INDEX = "model.safetensors.index.json"
# Shards of weights that were in memory; what transformers writes by default.
_SHARD_BYTES = 5 * 10**9
# Not copied: weights in any format, and the state of a training run.
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz",
}  # fmt: skip
_STATE = {"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")


def write_checkpoint(
    source: Checkpoint,
    out: str | Path,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint with some of its tensors changed; an adapter is written merged, as full weights.

    Shards, names, shapes and dtypes stay; configuration, tokenizer and other files of the directory are
    copied. One tensor is in memory at a time. The directory appears complete or not at all.

    Args:
        out: a directory that does not exist yet, or is empty.
        change: from a tensor's name and value to its new value, of the same shape; called in any order. A
            tensor that it returns unchanged is copied byte for byte.
        dtypes: of tensors that are written in another dtype than the source's; config.json then names the
            widest, or `from_pretrained` would round them.

    Raises:
        InputError: `out` is a file, is not empty or cannot be written; the disk is full; a change gives
            another shape, or NaN or infinite values.
    """
    tied = {name: matrix.tensor for matrix in source.matrices.values() for name in matrix.tied}
    other = dict(dtypes or {})
    other |= {name: other[kept] for name, kept in tied.items() if kept in other}
    shards = {
        file: [replace(header, dtype=other.get(header.name, header.dtype)) for header in headers]
        for file, headers in _plan(source).items()
    }
    total, done = sum(map(len, shards.values())), 0

    def value(name: str) -> Tensor:
        nonlocal done
        # A tied copy that kept its old value would disagree with the changed one.
        name = tied.get(name, name)
        stored = source.tensor(name)
        changed = change(name, stored)
        if changed.shape != stored.shape:
            raise InputError(f"{name}: is {tuple(stored.shape)}, but its change {tuple(changed.shape)}")
        final = changed.to(other.get(name, source.headers[name].dtype))
        if final is not stored and final.is_floating_point():
            finite(f"{out}", f"{name}, as changed,", final)
        done += 1
        if progress is not None:
            progress(done, total, name)
        return final

    size = sum(header.bytes for headers in shards.values() for header in headers)
    with atomic_directory(Path(out).expanduser(), size) as directory:
        for file, headers in shards.items():
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            _write(directory / file, headers, value)
        if len(shards) > 1:
            _write_json(directory / _INDEX, _index(source, shards))
        changed_dtypes = [dtype for name, dtype in other.items() if dtype != source.headers[name].dtype]
        _carry(source, directory, reduce(torch.promote_types, changed_dtypes) if changed_dtypes else None)
    return Path(out)


def _plan(source: Checkpoint) -> dict[str, list[Header]]:
    """The tensors of each file, as in the source; those that an adapter brings go into the last."""
    shards: dict[str, list[Header]] = {}
    if source.base is not None:
        added = dict(source.headers)
        for key, headers in _plan(source.base).items():
            shards[key] = [added.pop(header.name) for header in headers]
        shards[key] += added.values()
        return shards
    filled = 0
    for name, header in source.headers.items():
        if isinstance(source.source, FileSource | Resolved):
            file = source.source.file(name)
            key = os.path.relpath(file, source.directory) if source.directory else file.name
        else:
            filled += header.bytes
            key = str(filled // _SHARD_BYTES)
        shards.setdefault(key, []).append(header)
    if len(shards) == 1:
        return {"model.safetensors": next(iter(shards.values()))}
    kept = all(key.endswith(".safetensors") for key in shards)
    return {
        key if kept else f"model-{number:05}-of-{len(shards):05}.safetensors": shards[key]
        for number, key in enumerate(sorted(shards), start=1)
    }


def _write(path: Path, headers: list[Header], value: Callable[[str], Tensor]) -> None:
    """One safetensors file: the length of the header, the header, the bytes."""
    # Wide dtypes first, so that every tensor is aligned to its own; then by name, as the library does.
    ordered = sorted(headers, key=lambda header: (-header.dtype.itemsize, header.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for header in ordered:
        if header.dtype not in _NAMES:
            raise InputError(f"{header.name}: safetensors has no dtype for {header.dtype}")
        begin, end = end, end + header.bytes
        dtype, shape = _NAMES[header.dtype], list(header.shape)
        entries[header.name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for header in ordered:
            file.write(raw(value(header.name)))
        file.flush()
        os.fsync(file.fileno())


def _index(source: Checkpoint, shards: Mapping[str, list[Header]]) -> dict[str, Any]:
    directory = (source.base or source).directory
    old = directory / _INDEX if directory else None
    kept = read_json(old).get("metadata") if old and old.is_file() else None
    size = sum(header.bytes for headers in shards.values() for header in headers)
    weights = {header.name: file for file, headers in shards.items() for header in headers}
    return {
        "metadata": {**(kept if isinstance(kept, dict) else {}), "total_size": size},
        "weight_map": dict(sorted(weights.items())),
    }


def _carry(source: Checkpoint, out: Path, dtype: torch.dtype | None = None) -> None:
    """Copy the other files of the directory; an adapter's own tokenizer replaces its base's.

    Args:
        dtype: that config.json must name, in place of its own.
    """
    model = source
    while model.base is not None:
        model = model.base
    if model.directory is not None:
        for file in companion_files(model.directory):
            carry_file(model.directory, file, out)
    if source is not model and source.directory is not None:
        for file in companion_files(source.directory):
            if file.startswith(_TOKENIZER) or file.endswith(".jinja"):
                carry_file(source.directory, file, out)
    config = dict(source.config)
    before, after = (
        {m.component: m.rows for m in side.matrices.values() if m.part == "embedding"}.get("embed")
        for side in (model, source)
    )
    if before != after and config.get("vocab_size") == before:
        config["vocab_size"] = after
    if dtype is not None and config:
        config = _named_dtype(config, str(dtype).removeprefix("torch."))
    if config and (config != model.config or not (out / "config.json").exists()):
        _write_json(out / "config.json", config)


def _named_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that names a dtype, as do the parts that named one."""
    parts = {
        name: _named_dtype(part, dtype)
        for name, part in config.items()
        if isinstance(part, Mapping) and not {"dtype", "torch_dtype"}.isdisjoint(part)
    }
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **parts, **dict.fromkeys(keys, dtype)}


def companion_files(directory: Path) -> Iterator[str]:
    """The names of the files, other than weights, that a copy of a checkpoint's directory needs."""
    templates = "additional_chat_templates"
    for path in sorted(directory.iterdir()) + sorted((directory / templates).glob("*.jinja")):
        weights = path.suffix in _WEIGHTS or path.name.startswith("adapter_")
        weights = weights or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in _STATE and not path.name.startswith("."):
            yield str(path.relative_to(directory))


def carry_file(directory: Path, name: str, out: Path) -> None:
    """Copy one file of a checkpoint's directory to another directory."""
    target = out / name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(inside(directory, name, directory), target)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_occupied(out: Path) -> None:
    """Raise InputError unless a new directory can be made here; checked before the work, not after it."""
    if out.is_file():
        raise InputError(f"{out}: is a file; name a new directory")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; name a new directory")


@contextmanager
def atomic_directory(out: Path, size: int) -> Iterator[Path]:
    """A hidden directory for `size` bytes that becomes `out` on success and is removed otherwise."""
    refuse_occupied(out)
    partial = out.resolve().parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial.parent).free
        if free < size:
            problem = f"needs {size / 1e9:.1f} GB, but its disk has only {free / 1e9:.1f} GB left"
            raise InputError(f"{out}: {problem}")
        partial.mkdir()
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            partial.rename(out.resolve())
            _sync(partial.parent)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{out}: cannot be written ({reason}); nothing is left of it") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A hidden file that becomes `path` on success and is removed otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file to the disk before the directory gets its final name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
