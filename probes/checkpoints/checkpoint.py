"""Any reference to weights becomes a `Checkpoint`: headers now, one tensor when asked.

An adapter is opened as the model that it makes of its base, with the adapter merged in one tensor at a time.
"""

import pickle
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from probes.adapters.adapter import Adapter
from probes.adapters.parts import LowRank
from probes.errors import InputError, UnknownNameError
from probes.files.layout import Header, Matrix
from probes.files.quantised import refuse_quantised
from probes.files.sources import Source, same_bytes
from probes.files.untrusted import plain


class Checkpoint:
    """Weights that are opened but not read.

    Attributes:
        ref: what it was opened by.
        source: where its tensors come from; of an adapter, its base with the adapter merged in.
        config: config.json of the model, or {}.
        directory: where its own files lie, if they lie in one: configuration and tokenizer are there.
        base: what an adapter is applied to; None for full weights.
        module: the model in memory that it was opened from; not pickled.
        opened: path and stamp of its own files, where it has any: these are pickled, and not what they hold.
        reopen: what opens it again from these in another process.
    """

    module: Any = None
    opened: tuple[Path, str] | None = None
    reopen: "Callable[..., Checkpoint] | None" = None

    def __init__(
        self,
        ref: str,
        source: Source,
        config: Mapping[str, Any],
        *,
        directory: Path | None = None,
        base: "Checkpoint | None" = None,
    ):
        """Take a source as a checkpoint.

        Raises:
            InputError: it holds no tensor, or its weights are quantised.
        """
        if not source.headers:
            raise InputError(f"{ref}: holds no tensors")
        refuse_quantised(ref, source.headers, config)
        self.ref = ref
        self.source = source
        self.config = config
        self.directory = directory
        self.base = base

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.opened is None or self.reopen is None:
            return super().__reduce_ex__(protocol)
        return self.reopen, (self.ref, *self.opened, pickle.dumps(self.config), self.base)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.ref}: {self.kind}, {self.architecture}, {len(self.headers)} tensors>"

    @property
    def kind(self) -> Literal["full", "adapter"]:
        """Whether it stores every weight, or what is added to a base."""
        return "full" if self.base is None else "adapter"

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """Type, rank, alpha and variant of an adapter; None for full weights."""
        return self.source.summary if isinstance(self.source, Adapter) else None

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor by name; of an adapter, of the model that it makes."""
        return self.source.headers

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every two-dimensional weight, presented as (out, in); what shares its bytes with another, once."""
        from probes.naming.matrices import matrices

        try:
            found = matrices(self.headers, self.config)
            if own := [name for one in found.values() for name in one.tied if self._differ(name, one.tensor)]:
                # transformers does not tie what the file holds with other values, whatever the config says.
                found = matrices(self.headers, self.config, untied=own)
        except ValueError as error:
            raise InputError(plain(f"{self.ref}: {error}")) from error
        first: dict[Any, Matrix] = {}
        # The embedding gives its name to a tied pair.
        for matrix in sorted(found.values(), key=lambda matrix: matrix.part != "embedding"):
            place = self.source.location(matrix.tensor), matrix.expert, matrix.start, matrix.stop
            kept = first.setdefault(place, matrix)
            if kept is not matrix:
                found[kept.name] = first[place] = replace(kept, tied=(*kept.tied, matrix.tensor))
                del found[matrix.name]
        return found

    @property
    def architecture(self) -> str:
        """Class of the model as its configuration names it."""
        classes = self.config.get("architectures")
        named = classes[:1] if isinstance(classes, list) else []
        return str((*named, self.config.get("model_type") or "unknown")[0])

    @cached_property
    def parameters(self) -> int:
        """Scalars of the model; weights that share their bytes count once."""
        unique = {self.source.location(name): header.entries for name, header in self.headers.items()}
        return sum(unique.values())

    @cached_property
    def dtype(self) -> str:
        """The dtype of most scalars, such as "bfloat16"."""
        entries: Counter[str] = Counter()
        for header in self.headers.values():
            entries[str(header.dtype).removeprefix("torch.")] += header.entries
        return entries.most_common(1)[0][0]

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored; merged in float32 where an adapter changes it. Must not be written to."""
        if name not in self.headers:
            raise UnknownNameError(f"{self.ref}: has no tensor {name!r}; {nearest(name, self.headers)}")
        return self.source.read(name)

    def matrix(self, name: str) -> Tensor:
        """A matrix as (out, in) in the stored dtype; merged in float32 where an adapter changes it."""
        matrix = self._find(name)
        if isinstance(self.source, Adapter):
            return self.source.matrix(matrix)
        return matrix.take(self.source.read(matrix.tensor))

    def delta(self, name: str) -> LowRank | None:
        """What an adapter adds to a matrix; None if nothing, or if it is no product of two factors."""
        return self.source.delta(self._find(name)) if isinstance(self.source, Adapter) else None

    def touched(self, name: str) -> bool:
        """Whether an adapter changes a matrix."""
        return isinstance(self.source, Adapter) and self.source.touched(self._find(name))

    def stamp(self) -> str:
        """Changes when the files do; reads none of their tensors."""
        return self.source.stamp()

    @cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint()

    def fingerprint(self) -> str:
        """Hash of names, shapes, dtypes and bytes, the same however sharded; reads everything once."""
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
            "adapter": None if self.adapter is None else dict(self.adapter),
        }

    def described_by(self, config: Mapping[str, Any]) -> "Checkpoint":
        """This checkpoint, read by another's config.json."""
        described = Checkpoint(self.ref, self.source, config, directory=self.directory, base=self.base)
        described.opened = self.opened
        return described

    def _differ(self, name: str, other: str) -> bool:
        """Whether two tensors of the same shape hold other values."""
        if self.source.location(name) == self.source.location(other):
            return False
        return not same_bytes(self.source.read(name), self.source.read(other))

    def _find(self, name: str) -> Matrix:
        if name not in self.matrices:
            raise UnknownNameError(f"{self.ref}: has no matrix {name!r}; {nearest(name, self.matrices)}")
        return self.matrices[name]


def nearest(name: str, known: Collection[str]) -> str:
    """The known names that are most like an unknown one, in words."""
    from difflib import get_close_matches

    parts = set(name.split("."))
    shared = {other: len(parts.intersection(other.split("."))) for other in known}
    most = max(shared.values(), default=0)
    alike = [other for other, count in shared.items() if count == most]
    close = get_close_matches(name, alike, n=3, cutoff=0)
    return f"the nearest of its {len(known)}: {', '.join(close)}"
