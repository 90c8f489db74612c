"""Sources of tensors: names, shapes and dtypes at once, bytes only when a tensor is read.

A source holds no open file. A read maps the bytes of its tensor alone, so that memory is that of the tensors
in use, and a source can be pickled and used in another process.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from probes.errors import IncompleteError, InputError
from probes.files.layout import Header
from probes.files.pickle_bombs import refuse_bombs
from probes.files.untrusted import plain

# The dtypes of the safetensors format.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# Most characters in the name of a tensor, and most axes; models use a third of either.
NAME, AXES = 512, 64

# Keys of a state dict inside a larger dict.
NESTED = ("state_dict", "model_state_dict", "model", "module")


@runtime_checkable
class Source(Protocol):
    """A set of named tensors that are read one at a time."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor by name."""

    def read(self, name: str) -> Tensor:
        """The tensor as stored: its dtype, its layout. Must not be written to."""

    def location(self, name: str) -> Hashable:
        """The location of its bytes; equal locations hold equal bytes."""

    def stamp(self) -> str:
        """A hash that changes when the files do; does not read their content."""

    def fingerprint(self) -> str:
        """Hash of every name, shape, dtype and byte, however the tensors are spread over files."""


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row order, without a copy where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# Floats are compared as integers of their size.
_CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN equals itself, and 0 is not -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    codes = _CODES.get(first.dtype.itemsize)
    if first.ndim == 0 or codes is None:
        return raw(first) == raw(second)
    # Tuning changes entries everywhere: the first rows nearly always decide.
    parts = (slice(0, 2), slice(2, None))
    return all(torch.equal(first[part].view(codes), second[part].view(codes)) for part in parts)


def finite(checkpoint: str, name: str, tensor: Tensor) -> None:
    """Raise InputError if a tensor holds NaN or infinite weights, in one pass and without a copy."""
    if tensor.numel() == 0:
        return
    # Row order is an order of magnitude faster; a NaN becomes both extremes, an infinity one of them.
    in_order = tensor.mT if tensor.ndim > 1 and tensor.stride(-1) != 1 else tensor
    if all(torch.isfinite(extreme) for extreme in torch.aminmax(in_order)):
        return
    bad = ~torch.isfinite(tensor)
    first = tuple(bad.nonzero()[0].tolist())
    raise InputError(
        f"{checkpoint}: {name} holds {int(bad.sum())} NaN or infinite values, the first at {first}; the file "
        "is damaged or its training diverged: take another checkpoint"
    )


def fingerprint(source: Source) -> str:
    """Content hash of a source: blake2b over each tensor, then over these in the order of names."""

    def digest(name: str) -> bytes:
        header = source.headers[name]
        content = hashlib.blake2b(f"{name}\0{header.dtype}\0{list(header.shape)}\0".encode(), digest_size=32)
        content.update(raw(source.read(name)))  # hashlib lets other threads run meanwhile
        return content.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(digest, sorted(source.headers))
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _state(file: Path | int) -> tuple[int, int]:
    """Size and time of change of a path or an open file."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


class FileSource(ABC):
    """Tensors of the files of one checkpoint, as the files were when they were opened."""

    def __init__(self, paths: list[Path]):
        self.paths = [path.absolute() for path in paths]
        self.headers: dict[str, Header] = {}
        self._shard: dict[str, int] = {}
        # The offset of a tensor's bytes, or the first name with the same storage, which tied weights share.
        self._storage: dict[str, Any] = {}
        self._states = [_state(path) for path in self.paths]

    def _add(self, shard: int, header: Header, storage: Hashable) -> None:
        """Record a tensor; raises InputError if it is stored twice, or its name or shape is implausible."""
        if header.name in self.headers:
            first = self.file(header.name).name
            raise InputError(f"{self.paths[shard]}: {header.name!r} is also in {first}; which is meant?")
        _refuse_implausible(self.paths[shard], header)
        self.headers[header.name] = header
        self._shard[header.name], self._storage[header.name] = shard, storage

    def _refuse_changed(self, shard: int, file: Path | int) -> None:
        """Refuse a file that has changed: the tensors would come from two versions."""
        if _state(file) != self._states[shard]:
            path = self.paths[shard]
            raise InputError(f"{path}: changed since it was opened; start again when it is complete")

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.paths[self._shard[name]]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor as stored."""

    def location(self, name: str) -> Hashable:
        """File, and offset or first name of the storage."""
        shard = self._shard[name]
        return str(self.paths[shard].resolve()), self._states[shard], self._storage[name]

    def stamp(self) -> str:
        """Resolved path, size and time of change of every file, hashed."""
        facts = [(str(path.resolve()), *_state(path)) for path in sorted(self.paths)]
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def fingerprint(self) -> str:
        """Content hash, of the files as they were opened; computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self)


class SafetensorsSource(FileSource):
    """Tensors of safetensors files; raises InputError if one is missing, truncated or not safetensors."""

    def __init__(self, paths: list[Path]):
        super().__init__(paths)
        for shard, path in enumerate(self.paths):
            for header, offset in _layout(path):
                self._add(shard, header, offset)

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file: bytes are read as they are touched."""
        header, offset = self.headers[name], self._storage[name]
        with self.file(name).open("rb") as file:
            self._refuse_changed(self._shard[name], file.fileno())
            if header.bytes == 0:
                return torch.empty(header.shape, dtype=header.dtype)
            page = offset - offset % mmap.ALLOCATIONGRANULARITY
            length = offset - page + header.bytes
            # Copy on write: torch warns of read-only memory, and the file must stay as it is.
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
        values = torch.frombuffer(pages, dtype=header.dtype, count=header.entries, offset=offset - page)
        return values.reshape(header.shape)


def _layout(path: Path) -> Iterator[tuple[Header, int]]:
    """Headers of one safetensors file and the offset of each tensor's bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # the library checks sizes, offsets and dtypes against the file
            pass
    except SafetensorError as error:
        problem = f"not a whole safetensors file ({plain(str(error))}); truncated or corrupt?"
        raise IncompleteError(f"{path}: {problem} copy or download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: tensor {name!r} is of dtype {entry['dtype']}, which torch cannot read")
        header = Header(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        yield header, 8 + length + entry["data_offsets"][0]


def _refuse_implausible(path: Path, header: Header) -> None:
    """Refuse unprintable names and shapes that overflow, before anything is allocated or printed."""
    name, shape = header.name, header.shape
    if len(name) > NAME or not name.isprintable():
        raise InputError(f"{path}: {name[:80]!r} is no name of a tensor; is the file damaged?")
    if len(shape) > AXES or math.prod(max(1, length) for length in shape) >= 2**63:
        # An empty tensor of any shape fits into no bytes, but its strides may overflow.
        raise InputError(f"{path}: tensor {name!r} is of a shape that torch cannot hold; damaged file?")


# Bytes read from a mapped torch file before it is closed, which frees their memory. Opening it again costs
# unpickling, some 0.2 ms a tensor.
MAPPED_BYTES = 2**28


class TorchSource(FileSource):
    """Tensors of `torch.save` files; raises InputError if one is damaged, holds code, or is no state dict.

    Files in torch's format from before 1.6 cannot be mapped; one of them is in memory at a time.
    """

    def __init__(self, paths: list[Path]):
        super().__init__(paths)
        self._open: tuple[int, dict[str, Tensor], bool] | None = None
        self._touched = 0
        for shard in range(len(self.paths)):
            shared: dict[Hashable, str] = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an unusual pickle: it is read, or refused just below
                tensors = self._load(shard)
            for name, tensor in tensors.items():
                view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
                # Pointers mean nothing once the file is closed; the first name with this storage stays.
                first = shared.setdefault(view, name) if tensor.numel() else name
                self._add(shard, Header(name, tuple(tensor.shape), tensor.dtype), first)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def _load(self, shard: int) -> dict[str, Tensor]:
        """The tensors of one file; only the last one is kept open."""
        opened = self._open
        if opened is None or opened[0] != shard:
            self._refuse_changed(shard, self.paths[shard])
            self._open, self._touched = None, 0  # close one before the next
            opened = self._open = (shard, *_state_dict(self.paths[shard]))
        return opened[1]

    def read(self, name: str) -> Tensor:
        """The tensor as stored, mapped where the format allows."""
        tensor = self._load(self._shard[name])[name]
        self._touched += self.headers[name].bytes
        if self._open is not None and self._open[2] and self._touched > MAPPED_BYTES:
            self._open = None
        return tensor


def _state_dict(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a `torch.save` file, and whether they are mapped from it."""
    with path.open("rb") as file:
        magic = file.read(2)
    zipped, pickled = magic == b"PK", magic[:1] == b"\x80"
    refuse_bombs(path, zipped)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error)
        refusals = "Unsupported", "GLOBAL", "allowlist", "TorchScript"  # in what torch says of them
        if (zipped or pickled) and any(word in reason for word in refusals):
            raise InputError(
                f"{path}: holds code or objects besides tensors and is not opened, because that could run "
                "the code; where you trust it, save its tensors again as safetensors"
            ) from error
        raise IncompleteError(
            f"{path}: not a whole torch file; truncated or corrupt? copy it again"
        ) from error
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {str(key): value.detach() for key, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no state dict (names with tensors); save `model.state_dict()`")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InputError(f"{path}: {name!r} is a {tensor.layout} tensor; save it dense")
        if tensor.device.type != "cpu":
            raise InputError(f"{path}: {name!r} has no values, only a shape; save the model after loading it")
        if tensor.numel() * tensor.element_size() > path.stat().st_size:
            shape = "x".join(map(str, tensor.shape))
            raise InputError(f"{path}: {name!r} repeats few bytes as {shape}; save a copy (`.contiguous()`)")
    return tensors, zipped
