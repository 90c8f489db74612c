"""Any reference to weights becomes a `Checkpoint`: headers now, one tensor when asked.

An adapter checkpoint presents the tensors of its base with the adapter merged in, one tensor at a time.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from probes.layout import Header, Matrix
from probes.locate import ADAPTER_FILES, MODEL_FILES, locate, open_files, read_json
from probes.sources import Source

if TYPE_CHECKING:
    from probes.adapters import Adapter, LowRank


class Checkpoint:
    """Weights that are opened but not read.

    Attributes:
        ref: what it was opened by.
        directory: where its files lie, if they do and belong together; configuration and tokenizer are there.
        config: its config.json, or {}.
        base: what an adapter was trained on.
    """

    def __init__(
        self,
        ref: str,
        source: Source,
        config: Mapping[str, Any],
        *,
        directory: Path | None = None,
        adapter: "Adapter | None" = None,
        base: "Checkpoint | None" = None,
    ):
        self.ref = ref
        self.source = source
        self.config = config
        self.directory = directory
        self.base = base
        self._adapter = adapter

    @property
    def kind(self) -> Literal["full", "adapter"]:
        """Whether it stores every weight or what is added to a base."""
        return "full" if self._adapter is None else "adapter"

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor by name; of an adapter, of the model that it makes."""
        return self.source.headers

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every two-dimensional weight, presented as (out, in)."""
        from probes.naming import matrices

        return matrices(self.headers, self.config)

    @property
    def architecture(self) -> str:
        """Class of the model as its configuration names it."""
        classes = self.config.get("architectures") or [self.config.get("model_type") or "unknown"]
        return str(classes[0])

    @cached_property
    def parameters(self) -> int:
        """Scalars stored; weights that share their bytes count once."""
        unique = {self.source.location(name): header.entries for name, header in self.headers.items()}
        return sum(unique.values())

    @cached_property
    def dtype(self) -> str:
        """The dtype of most scalars."""
        entries: Counter[str] = Counter()
        for header in self.headers.values():
            entries[str(header.dtype).removeprefix("torch.")] += header.entries
        return entries.most_common(1)[0][0]

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored."""
        return self.source.read(name)

    def matrix(self, name: str) -> Tensor:
        """A matrix as (out, in), in the stored dtype."""
        matrix = self.matrices[name]
        return matrix.take(self.tensor(matrix.tensor))

    def delta(self, name: str) -> "LowRank | None":
        """What the adapter adds to a matrix, as factors; None when it leaves it alone or has no such factors."""
        return None

    def touched(self, name: str) -> bool:
        """Whether the adapter changes a matrix."""
        return False

    def stamp(self) -> str:
        """What changes when the files do, without reading them."""
        return self.source.stamp()

    @cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint()

    def fingerprint(self) -> str:
        """Hash of the content, the same however it is sharded; reads everything once."""
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What an audit records of it."""
        return {
            "ref": self.ref,
            "kind": self.kind,
            "fingerprint": self.fingerprint(),
            "parameters": self.parameters,
            "dtype": self.dtype,
            "architecture": self.architecture,
            "adapter": None,
        }


def open_checkpoint(
    ref: Any, *, base: "Checkpoint | str | Path | None" = None, revision: str | None = None
) -> Checkpoint:
    """Open a checkpoint by any reference.

    Args:
        ref: a model directory, an adapter directory, a .safetensors, .bin or .pt file, a hub id (`org/name`,
            `org/name@revision`), or in memory an `nn.Module`, `PeftModel`, TransformerLens model or state dict.
        base: what an adapter is applied to; otherwise its configuration names it.
        revision: of a hub id.

    Raises:
        ValueError: nothing there, or not readable; the message says what, where and how to mend it.
    """
    if isinstance(ref, Checkpoint):
        return ref
    path = locate(ref, revision=revision)
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    source = open_files(path)
    return Checkpoint(str(ref), source, config, directory=directory if path.is_dir() or config else None)
