"""Factorisations of a base that are kept between runs: another model tuned from it finds them made.

An entry is a safetensors file named by a hash of all that its bits depend on: the values of the matrix and
how they lie in memory, what was asked, the device, the threads and the versions. What is read back is what
would have been computed, bit for bit; what is damaged, or was deleted meanwhile, is computed again.
"""

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from filelock import FileLock
from torch import Tensor

from diagnostics.store.source_files import sources
from probes.errors import InputError
from probes.files.sources import raw

log = logging.getLogger(__name__)

Made: TypeAlias = Mapping[str, Tensor]
# Bytes of a cache unless told otherwise.
ROOM = 20 * 10**9
# Says to programs that copy directories that this one can be made again (bford.info/cachedir).
TAG = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n# Kept by tunescope; safe to delete.\n"
# What a GPU takes longer to make than its matrix takes to be hashed.
WORTH_HASHING = {"left singular vectors"}
# Seconds for which another process is waited for.
PATIENCE = 60
# The code that makes entries: this module and all that it imports. Between two versions only its hash tells.
MAKES = "diagnostics.analyses.intruders.decide"


class Recall:
    """What is made of one matrix: computed or remembered. This one remembers nothing."""

    def __call__(self, kind: str, parts: Sequence[Any], make: Callable[[], Made]) -> Made:
        """What is remembered, or else is made and kept.

        Args:
            kind: what is made.
            parts: all that it depends on besides the matrix: tensors, and what has a telling `repr`.
            make: makes it.
        """
        found = self.known(kind, parts)
        if found is None:
            found = make()
            self.keep(kind, parts, found)
        return found

    def known(self, kind: str, parts: Sequence[Any]) -> Made | None:
        """What is remembered, or None."""
        return None

    def keep(self, kind: str, parts: Sequence[Any], made: Made) -> None:
        """Remember it."""


afresh = Recall()


@dataclass(frozen=True)
class FactorCache:
    """A directory of factorisations, shared by any number of processes, that may be deleted at any time.

    Attributes:
        directory: made if need be.
        room: most bytes in it.
        began: when this run began. Only what was last used before makes room for new entries, so that a
            model larger than the cache finds one part of itself again rather than none.
    """

    directory: Path
    room: int = ROOM
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.room <= 0:
            raise InputError(f"a cache of {self.room} bytes holds nothing; give it some, or no directory")

    @classmethod
    def at(cls, directory: "FactorCache | str | Path | None", room: int = ROOM) -> "FactorCache | None":
        """The cache in a directory; None for None.

        Raises:
            InputError: the directory cannot be made or written to.
        """
        if directory is None or isinstance(directory, FactorCache):
            return directory
        made = cls(Path(directory).expanduser().absolute(), room)
        try:
            made.directory.mkdir(parents=True, exist_ok=True)
            (made.directory / TAG[0]).write_text(TAG[1], encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--cache {directory}: cannot be written ({error.strerror}); name another directory, or none"
            ) from error
        return made

    def of(self, stored: Tensor, W: Tensor) -> Recall:
        """What remembers for one matrix.

        Args:
            stored: its values as they were read, on the CPU.
            W: the same as it is computed with.
        """
        return _Remembered(self, stored, W)

    def get(self, key: str) -> Made | None:
        """An entry; None where there is none, or a damaged one."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # Copies: BLAS may round otherwise where data is aligned otherwise, as mapped data is.
                found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            turned = metadata.get("turned", "").split()
            if metadata.get("content") != _digest(found):
                raise InputError("its content is not what was written")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            log.warning("%s: is damaged (%s); computed again", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        return {name: tensor.mT if name in turned else tensor for name, tensor in found.items()}

    def put(self, key: str, made: Made) -> None:
        """Keep an entry, if there is room; what goes wrong costs the entry alone."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        # As they lie in memory: a product may round otherwise with a transposed factor.
        turned = [name for name, tensor in made.items() if not tensor.is_contiguous()]
        plain = {
            name: (t.mT if name in turned else t).detach().cpu().contiguous() for name, t in made.items()
        }
        size = sum(tensor.nbytes for tensor in plain.values())
        path = self._path(key)
        part = path.with_name(f".{key}.{os.getpid()}.part")
        try:
            if not self._fits(size):
                return
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(plain, part, {"content": _digest(plain), "turned": " ".join(turned)})
            with FileLock(self.directory / ".lock", timeout=PATIENCE):
                if self._make_room():
                    os.replace(part, path)
        except (OSError, SafetensorError, NotImplementedError) as error:  # the last: no locks on this disk
            log.warning("%s: cannot be written (%s); goes on without", path, error)
        finally:
            with suppress(OSError):
                part.unlink()

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"

    def _entries(self) -> list[tuple[float, int, str]]:
        """When each file was last used, its size, and where it is; the longest unused first."""
        found = []
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.directory):
                with suppress(FileNotFoundError):  # deleted by another meanwhile
                    told = entry.stat()
                    if entry.name.endswith(".safetensors") or entry.name.endswith(".part"):
                        found.append((told.st_mtime, told.st_size, entry.path))
        return sorted(found)

    def _fits(self, size: int) -> bool:
        """Whether so many bytes more find room beside what is used in this run."""
        return size + sum(taken for used, taken, _ in self._entries() if used >= self.began) <= self.room

    def _make_room(self) -> bool:
        """Delete what was not used for longest and not in this run; whether all that is left has room."""
        entries = self._entries()
        over = sum(taken for _, taken, _ in entries) - self.room
        for used, taken, path in entries:
            if over <= 0 or used >= self.began:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            over -= taken
        return over <= 0


class _Remembered(Recall):
    """The recall of one matrix, which is hashed when it is first asked for anything."""

    def __init__(self, cache: FactorCache, stored: Tensor, W: Tensor):
        self.cache, self.stored, self.W = cache, stored, W

    def known(self, kind: str, parts: Sequence[Any]) -> Made | None:
        if not self._worth(kind):
            return None
        found = self.cache.get(self._key(kind, parts))
        return None if found is None else {name: tensor.to(self.W.device) for name, tensor in found.items()}

    def keep(self, kind: str, parts: Sequence[Any], made: Made) -> None:
        if self._worth(kind):
            self.cache.put(self._key(kind, parts), made)

    def _worth(self, kind: str) -> bool:
        return not self.W.is_cuda or kind in WORTH_HASHING

    def _key(self, kind: str, parts: Sequence[Any]) -> str:
        return _digest({str(place): part for place, part in enumerate((kind, self.content, *parts))})

    @cached_property
    def content(self) -> str:
        """The matrix and all else that bits depend on."""
        W = self.W
        lies = (W.dtype, tuple(W.shape), W.stride(), W.data_ptr() % 64)
        return _digest({"values": self.stored, "lies": lies, "here": _here(W.device)})


def _here(device: torch.device) -> tuple[Any, ...]:
    """Where and by what code products are taken."""
    if device.type == "cuda":
        place: tuple[Any, ...] = (torch.cuda.get_device_name(device), torch.version.cuda)
    else:
        place = (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    return device.type, *place, _software()


@cache
def _software() -> str:
    versions = {name: version(name) for name in ("tunescope", "torch", "scipy", "numpy")}
    return _digest(sources(MAKES) | versions)


def _digest(parts: Mapping[str, Any]) -> str:
    """Hash of named tensors, bytes, and what has a telling `repr`."""
    # SHA-256, for most processors have instructions for it.
    made = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, Tensor):
            made.update(f"\0{name}\0{part.dtype}{list(part.shape)}\0".encode())
            made.update(raw(part))
        else:
            made.update(f"\0{name}\0{part!r}\0".encode())
    return made.hexdigest()
