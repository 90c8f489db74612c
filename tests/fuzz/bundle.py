"""Several files of one directory in one string of bytes, so that a fuzzer can change all of them.

Whatever the bytes are, they are some directory: names and kinds are taken modulo how many there are, and what
is cut short ends early.
"""

import json
import struct
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.hostile import HOME

NAMES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "trainer_state.json",
    "sub/part.safetensors",
    "audit.json",
    "series.json",
    "tables/made.matrices.parquet",
    "tables/made.vectors.parquet",
    "masks/made.task.safetensors",
    "out.safetensors",
)
RAW, HEADER, LINK = range(3)
# Where a link may lead; all but the last few are outside.
LINKS = (
    "../outside/secret.safetensors",
    "../outside/secret.json",
    "../outside/secret.bin",
    "../outside/secret.parquet",
    "../outside/secret_patch.safetensors",
    "../outside",
    f"{HOME}/outside/secret.safetensors",
    f"{HOME}/outside/adapter_config.json",
    "../../outside/secret.safetensors",
    "/dev/zero",
    "/proc/self/environ",
    "config.json",
    "model.safetensors",
    "sub",
    ".",
    "nowhere",
    "out.safetensors",
)
# The largest payload that is made for a header, bytes.
PAYLOAD = 2**16


class File(NamedTuple):
    """One file; its content is its bytes, a safetensors header without the rest, or the number of a link."""

    name: str
    kind: int
    content: bytes


def pack(files: list[File]) -> bytes:
    """The files as one string of bytes."""
    return b"".join(
        bytes([NAMES.index(name), kind]) + len(content).to_bytes(3, "big") + content
        for name, kind, content in files
    )


def unpack(data: bytes, directory: Path) -> None:
    """Write the files of a string of bytes into a directory."""
    home = directory.parent
    at = 0
    while at + 5 <= len(data):
        name, kind = NAMES[data[at] % len(NAMES)], data[at + 1] % 3
        length = int.from_bytes(data[at + 2 : at + 5], "big")
        content = data[at + 5 : at + 5 + length]
        at += 5 + length
        path = directory / name
        if path.is_symlink() or path.parent.is_symlink() or path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        if kind == LINK:
            path.symlink_to(LINKS[sum(content) % len(LINKS)].replace(HOME, str(home)))
        else:
            content = content.replace(HOME.encode(), str(home).encode())
            path.write_bytes(wrapped(content) if kind == HEADER else content)


# Payloads: small floats in any dtype; ascending whole numbers.
FLOATS = b"\x00\x00\x80\x3f\x00\x3c\x00\x3c"
RISING = struct.pack("<256i", *range(256))


def wrapped(header: bytes, fill: bytes = FLOATS) -> bytes:
    """A safetensors file with this header and as many bytes as its offsets ask for, if they are not many."""
    try:
        entries = json.loads(header)
        ends = [max(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"]
        length = max(ends, default=0)
        length = length if isinstance(length, int) and 0 <= length <= PAYLOAD else 0
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        length = 0
    return struct.pack("<Q", len(header)) + header + (fill * (length // len(fill) + 1))[:length]
