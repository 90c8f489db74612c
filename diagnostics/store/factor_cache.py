"""A cache of factorisations of a base, for other models tuned from it.

An entry is a safetensors file named by a hash of all that its bits depend on: the values of the matrix and
their layout in memory, the arguments, the device, the threads and the versions. An entry equals what would be
computed, bit for bit. One that is damaged or was deleted is computed again.
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

Factors: TypeAlias = Mapping[str, Tensor]
# Default size of a cache, in bytes.
ROOM = 20 * 10**9
# Tells backup programs that this directory can be skipped (bford.info/cachedir).
TAG = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n# Kept by tunescope; safe to delete.\n"
# On a GPU, the kinds that take longer to compute than their matrix takes to hash.
WORTH_HASHING = {"left singular vectors"}
# Seconds to wait for another process.
PATIENCE = 60
# The code that makes entries: this module and all that it imports. Between two versions only its hash tells.
MAKES = "diagnostics.analyses.intruders.decide"


class Recall:
    """Factors of one matrix, computed or recalled from a cache. This class has no cache."""

    def __call__(self, kind: str, parts: Sequence[Any], make: Callable[[], Factors]) -> Factors:
        """The cached factors; else `make` computes them, and they are kept.

        Args:
            parts: all that they depend on besides the matrix: tensors, and values with a full `repr`.
        """
        factors = self.lookup(kind, parts)
        if factors is None:
            factors = make()
            self.keep(kind, parts, factors)
        return factors

    def lookup(self, kind: str, parts: Sequence[Any]) -> Factors | None:
        """The cached factors, or None."""
        return None

    def keep(self, kind: str, parts: Sequence[Any], factors: Factors) -> None:
        """Cache them."""


NO_RECALL = Recall()


@dataclass(frozen=True)
class FactorCache:
    """A directory of factorisations, shared by any number of processes, that may be deleted at any time.

    Attributes:
        began: start of this run. Only entries last used before it make room for new ones, so that a model
            larger than the cache finds a part of itself again rather than none.
    """

    directory: Path  # created if it is missing
    room: int = ROOM  # its largest size, in bytes
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.room <= 0:
            raise InputError(f"a cache of {self.room} bytes holds nothing; give it some, or no directory")

    @classmethod
    def at(cls, directory: "FactorCache | str | Path | None", room: int = ROOM) -> "FactorCache | None":
        """The cache in a directory; None for None."""
        if directory is None or isinstance(directory, FactorCache):
            return directory
        cache = cls(Path(directory).expanduser().absolute(), room)
        try:
            cache.directory.mkdir(parents=True, exist_ok=True)
            (cache.directory / TAG[0]).write_text(TAG[1], encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--cache {directory}: cannot be written ({error.strerror}); name another directory, or none"
            ) from error
        return cache

    def of(self, stored: Tensor, W: Tensor) -> Recall:
        """The recall of one matrix, by its values as read, on the CPU, and as computed with."""
        return _MatrixRecall(self, stored, W)

    def get(self, key: str) -> Factors | None:
        """An entry; None where there is none, or a damaged one."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # Copies: BLAS may round otherwise where data is aligned otherwise, as mapped data is.
                factors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            turned = metadata.get("turned", "").split()
            if metadata.get("content") != _digest(factors):
                raise InputError("its content is not what was written")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            log.warning("%s: is damaged (%s); computed again", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        return {name: tensor.mT if name in turned else tensor for name, tensor in factors.items()}

    def put(self, key: str, factors: Factors) -> None:
        """Keep an entry, if there is room; an error costs this entry alone."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        # As they lie in memory: a product may round otherwise with a transposed factor.
        turned = [name for name, tensor in factors.items() if not tensor.is_contiguous()]
        plain = {
            name: (t.mT if name in turned else t).detach().cpu().contiguous() for name, t in factors.items()
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
        """Time of last use, size and path of each file, the longest unused first."""
        entries = []
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.directory):
                with suppress(FileNotFoundError):  # deleted by another meanwhile
                    status = entry.stat()
                    if entry.name.endswith((".safetensors", ".part")):
                        entries.append((status.st_mtime, status.st_size, entry.path))
        return sorted(entries)

    def _fits(self, size: int) -> bool:
        """Whether so many bytes fit in addition to the entries used in this run."""
        return size + sum(taken for used, taken, _ in self._entries() if used >= self.began) <= self.room

    def _make_room(self) -> bool:
        """Delete the longest unused entries, none of this run; whether the rest fits."""
        entries = self._entries()
        over = sum(taken for _, taken, _ in entries) - self.room
        for used, taken, path in entries:
            if over <= 0 or used >= self.began:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            over -= taken
        return over <= 0


class _MatrixRecall(Recall):
    """The recall of one matrix, which is hashed at the first lookup."""

    def __init__(self, cache: FactorCache, stored: Tensor, W: Tensor):
        self.cache, self.stored, self.W = cache, stored, W

    def lookup(self, kind: str, parts: Sequence[Any]) -> Factors | None:
        if not self._worth(kind):
            return None
        factors = self.cache.get(self._key(kind, parts))
        return factors and {name: tensor.to(self.W.device) for name, tensor in factors.items()}

    def keep(self, kind: str, parts: Sequence[Any], factors: Factors) -> None:
        if self._worth(kind):
            self.cache.put(self._key(kind, parts), factors)

    def _worth(self, kind: str) -> bool:
        return not self.W.is_cuda or kind in WORTH_HASHING

    def _key(self, kind: str, parts: Sequence[Any]) -> str:
        return _digest({str(index): part for index, part in enumerate((kind, self.content, *parts))})

    @cached_property
    def content(self) -> str:
        """The matrix and all else that bits depend on."""
        W = self.W
        layout = (W.dtype, tuple(W.shape), W.stride(), W.data_ptr() % 64)
        return _digest({"values": self.stored, "layout": layout, "hardware": _hardware(W.device)})


def _hardware(device: torch.device) -> tuple[Any, ...]:
    """The device, and the code that takes products on it."""
    if device.type == "cuda":
        return device.type, torch.cuda.get_device_name(device), torch.version.cuda, _software()
    capability = torch.backends.cpu.get_cpu_capability()
    return device.type, platform.machine(), capability, torch.get_num_threads(), _software()


@cache
def _software() -> str:
    versions = {name: version(name) for name in ("tunescope", "torch", "scipy", "numpy")}
    return _digest(sources(MAKES) | versions)


def _digest(parts: Mapping[str, Any]) -> str:
    """Hash of named tensors, bytes, and values with a full `repr`."""
    # SHA-256, for most processors have instructions for it.
    state = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if isinstance(part, Tensor):
            state.update(f"\0{name}\0{part.dtype}{list(part.shape)}\0".encode())
            state.update(raw(part))
        else:
            state.update(f"\0{name}\0{part!r}\0".encode())
    return state.hexdigest()
