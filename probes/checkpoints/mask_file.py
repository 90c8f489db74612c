"""Patches: the entries of a pair that a graft takes from tuned, as one file.

The analyses `skills` and `sparsity` write them. Format: safetensors, `index/<tensor>` and `value/<tensor>`,
with the content hashes of both checkpoints.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from probes.checkpoints.blend import Blender
from probes.checkpoints.checkpoint import Checkpoint, nearest
from probes.checkpoints.pair import CheckpointPair
from probes.checkpoints.save import atomic_file, write_checkpoint
from probes.errors import InputError
from probes.files.sources import SafetensorsSource
from probes.files.untrusted import one_line
from probes.progress import Progress

VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Entries of tuned by tensor, under the names of its file, and the content hashes of both checkpoints."""

    index: Mapping[str, Int[Tensor, " entries"]]  # flat, ascending, each once
    values: Mapping[str, Shaped[Tensor, " entries"]]  # in the dtype of tuned's file
    base: str
    tuned: str
    about: Mapping[str, Any] = field(default_factory=dict)  # further facts, as JSON keeps them

    @property
    def count(self) -> int:
        """Number of entries."""
        return sum(len(index) for index in self.index.values())

    @classmethod
    def of(
        cls,
        pair: CheckpointPair,
        index: Mapping[str, Int[Tensor, " entries"]],
        about: Mapping[str, Any] | None = None,
    ) -> "Patch":
        """The patch with these entries of tuned."""
        index = {name: entries.sort().values for name, entries in index.items() if len(entries)}
        values = {name: as_stored(pair.tuned, name).reshape(-1)[at] for name, at in index.items()}
        hashes = {"base": pair.base.fingerprint(), "tuned": pair.tuned.fingerprint()}
        return cls(index=index, values=values, **hashes, about=about or {})

    def save(self, path: str | Path) -> None:
        """Write it to a file, completely or not at all; raises OSError."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {}
        for name, index in self.index.items():
            small = not len(index) or int(index[-1]) < 2**31
            tensors[f"index/{name}"] = index.to(torch.int32 if small else torch.int64).contiguous()
            tensors[f"value/{name}"] = self.values[name].contiguous()
        about = json.dumps(dict(self.about))
        metadata = {"tunescope_patch": VERSION, "base": self.base, "tuned": self.tuned, "about": about}
        try:
            with atomic_file(path) as part:
                save_file(tensors, part, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> "Patch":
        """Read a file that `save` wrote; raises InputError for any other."""
        with one_line(path):
            return cls._read(Path(path))

    @classmethod
    def _read(cls, path: Path) -> "Patch":
        from safetensors import safe_open

        try:
            source = SafetensorsSource([path])  # checks the header against the file
            tensors = {key: source.read(key).clone() for key in source.headers}
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; audits keep theirs in AUDIT/masks") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a mask ({error})") from error
        if metadata.get("tunescope_patch") != VERSION:
            raise InputError(
                f"{path}: is no mask of tunescope's; `skills` and `sparsity` write theirs to AUDIT/masks"
            )
        index, values = ({key.partition("/")[2]: tensor for key, tensor in tensors.items()
                          if key.startswith(kind)} for kind in ("index/", "value/"))  # fmt: skip
        for name, entries in index.items():
            consistent = name in values and entries.ndim == 1 and values[name].shape == entries.shape
            consistent = consistent and entries.dtype in (torch.int32, torch.int64)
            if not consistent or (len(entries) and (entries[0] < 0 or bool((entries.diff() <= 0).any()))):
                raise InputError(f"{path}: damaged: the entries of {name} do not go with their values")
        try:
            about = json.loads(metadata.get("about", "{}"))
        except ValueError as error:
            raise InputError(f"{path}: damaged: its description is not JSON ({error})") from error
        if not isinstance(about, dict):
            raise InputError(f"{path}: damaged: its description is not a JSON object")
        index = {name: entries.long() for name, entries in index.items()}
        hashes = {side: metadata.get(side, "") for side in ("base", "tuned")}
        return cls(index=index, values=values, **hashes, about=about)

    def check(self, pair: CheckpointPair, where: str = "mask") -> None:
        """Raise InputError for another pair than its own; `where` names the patch in the message."""
        for role, side, expected in (("base", pair.base, self.base), ("tuned", pair.tuned, self.tuned)):
            fingerprint = side.fingerprint()
            if fingerprint != expected:
                raise InputError(
                    f"{where}: was made for another pair: its {role} has the content hash {expected}, and "
                    f"{side.ref} {fingerprint}; give the checkpoints that it was made from"
                )
        for name, index in self.index.items():
            header = pair.tuned.headers.get(name)
            if header is None:
                hint = nearest(name, pair.tuned.headers)
                raise InputError(f"{where}: {pair.tuned.ref} has no {name!r}; {hint}")
            if len(index) and int(index[-1]) >= header.entries:
                raise InputError(f"{where}: entry {int(index[-1])} of {name}, which has {header.entries}")


@dataclass(frozen=True)
class Graft:
    """The composition of a graft: how many weights both sides have, and tensors of other treatment."""

    weights: int
    alone: tuple[str, ...]  # base lacks them; they are tuned's
    lost: tuple[str, ...]  # tuned lacks them; they are not written
    widened: tuple[str, ...]  # written in base's dtype because it is wider than tuned's


def write_graft(
    pair: CheckpointPair,
    patch: Patch,
    out: str | Path,
    *,
    without: bool = False,
    progress: Progress | None = None,
) -> Graft:
    """Write base with the entries of a patch from tuned, as full weights under the names of tuned.

    Values are selected, never computed: with every entry the result is tuned bit for bit, with none base.

    Args:
        out: a directory that does not exist yet, or is empty.
        without: write the complement instead: tuned with these entries from base.
        progress: called with (done, total, name).

    Raises:
        InputError: the patch is of another pair; `out` is occupied or cannot be written.
    """
    patch.check(pair)
    blender = Blender(pair)
    dtypes = blender.dtypes
    alone: list[str] = []

    def change(name: str, stored: Tensor) -> Tensor:
        tuned = stored.to(pair.tuned.headers[name].dtype)
        base = blender.base_of(name, tuned)
        if base is None or not tuned.is_floating_point():
            alone.extend([name] if base is None else [])
            return stored
        index = patch.index.get(name)
        kept, put = (tuned, base) if without else (base, tuned)
        if index is None:
            return kept if kept is not tuned else stored
        value = kept.to(dtypes[name], copy=True).contiguous()
        value.view(-1)[index] = put.reshape(-1)[index].to(value.dtype)
        return value

    write_checkpoint(pair.tuned, out, change, dtypes=dtypes, progress=progress)
    total = sum(pair.tuned.headers[name].entries for name in dtypes)
    lost = [tensor.tensor for tensor in pair.unmatched if tensor.tuned_shape is None]
    widened = [name for name, dtype in dtypes.items() if dtype != pair.tuned.headers[name].dtype]
    return Graft(total, tuple(alone), tuple(lost), tuple(widened))


def as_stored(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor in the dtype of its file; merged weights are rounded once."""
    return checkpoint.tensor(name).to(checkpoint.headers[name].dtype)
