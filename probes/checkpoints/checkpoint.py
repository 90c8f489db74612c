"""A checkpoint: headers are read when it is opened, a tensor when it is asked for."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from html import escape
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
from probes.naming.architecture import Architecture, architecture_of


class Checkpoint:
    """Weights that are opened but not read; `open_checkpoint` makes one.

    Attributes:
        ref: the reference that it was opened by.
        source: its tensors; of an adapter, the base's with the adapter merged in.
        config: config.json of the model, or {}.
        directory: holds its configuration and tokenizer; None if its files lie in no directory.
        base: the checkpoint that an adapter is applied to; None for full weights.
        module: the model in memory that it was opened from; not pickled.
        tokenizer: the tokenizer given with it; None: the one in its directory. Not pickled.
        tokenizer_lost: it came from another process, without the tokenizer that was given with it there.
        opened: path and stamp of its files, which are pickled in place of their content.
        reopen: opens it from these in another process.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_checkpoint
    >>> checkpoint = open_checkpoint(BUNDLED / "base")
    >>> checkpoint.architecture, checkpoint.parameters, checkpoint.matrix("model.embed_tokens.weight").shape
    ('LlamaForCausalLM', 1000576, torch.Size([1536, 128]))
    """

    module: Any = None
    tokenizer: Any = None
    tokenizer_lost: bool = False
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
        """Take a source as a checkpoint; raises InputError if it holds no tensor or quantised weights."""
        if not source.headers:
            raise InputError(f"{ref}: holds no tensors")
        refuse_quantised(ref, source.headers, config)
        self.ref, self.source, self.config = ref, source, config
        self.directory, self.base = directory, base

    def __getstate__(self) -> dict[str, Any]:
        lost = self.tokenizer_lost or self.tokenizer is not None
        return {**self.__dict__, "module": None, "tokenizer": None, "tokenizer_lost": lost}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.opened is None or self.reopen is None:
            return super().__reduce_ex__(protocol)
        reopened = self.reopen, (self.ref, *self.opened, pickle.dumps(self.config), self.base)
        lost = self.tokenizer_lost or self.tokenizer is not None
        return (_without_tokenizer, reopened) if lost else reopened

    def __repr__(self) -> str:
        ref, kind, architecture, dtype, parameters = self.summary.values()
        return f"<Checkpoint {ref}: {kind}, {architecture}, {dtype}, {parameters} parameters>"

    def _repr_html_(self) -> str:
        return summary_table({"checkpoint": self.summary})

    @property
    def summary(self) -> dict[str, str]:
        """What a notebook shows of it; reads headers alone."""
        return {
            "ref": self.ref, "kind": self.kind, "architecture": self.architecture, "dtype": self.dtype,
            "parameters": f"{self.parameters:,}",
        }  # fmt: skip

    def with_tokenizer(self, tokenizer: Any) -> "Checkpoint":
        """The same weights, read with this tokenizer in place of the one in their directory."""
        return self._with(tokenizer=tokenizer, tokenizer_lost=False)

    def _with(self, **attributes: Any) -> "Checkpoint":
        changed = object.__new__(type(self))
        changed.__dict__ = {**self.__dict__, **attributes}
        return changed

    @property
    def kind(self) -> Literal["full", "adapter"]:
        """Whether it stores every weight, or what is added to a base."""
        return "full" if self.base is None else "adapter"

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """Type, rank, alpha and variant of an adapter; None for full weights."""
        return self.source.summary if isinstance(self.source, Adapter) else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of an adapter's numbers must know of how it is read."""
        return self.source.notes if isinstance(self.source, Adapter) else ()

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor by name; of an adapter, those of the merged model."""
        return self.source.headers

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every two-dimensional weight as (out, in); weights that share their bytes, once."""
        from probes.naming.matrices import matrices

        try:
            named = matrices(self.headers, self._tying_config)
            tied = [(name, matrix.tensor) for matrix in named.values() for name in matrix.tied]
            untied = [name for name, other in tied if self._differ(name, other)]
            if untied:  # transformers ties no weights that the file holds with other values
                named = matrices(self.headers, self._tying_config, untied=untied)
        except ValueError as error:
            raise InputError(plain(f"{self.ref}: {error}")) from error
        first: dict[Any, Matrix] = {}
        # The embedding gives its name to a tied pair.
        for matrix in sorted(named.values(), key=lambda matrix: matrix.part != "embedding"):
            location = self.source.location(matrix.tensor), matrix.expert, matrix.start, matrix.stop
            kept = first.setdefault(location, matrix)
            if kept is not matrix:
                named[kept.name] = first[location] = replace(kept, tied=(*kept.tied, matrix.tensor))
                del named[matrix.name]
        return named

    @property
    def _tying_config(self) -> Mapping[str, Any]:
        """Its config.json; where that is silent about tied embeddings, a copy of equal bytes is tied."""
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, Mapping))]
        silent = not any("tie_word_embeddings" in part for part in parts)
        return {**self.config, "tie_word_embeddings": True} if silent else self.config

    @property
    def structure(self) -> Architecture | None:
        """The model that transformers builds from its config, without weights; None if it builds none."""
        return architecture_of(self.config)

    @property
    def architecture(self) -> str:
        """Class of the model as its configuration names it."""
        classes = self.config.get("architectures")
        if isinstance(classes, list) and classes:
            return str(classes[0])
        return str(self.config.get("model_type") or "unknown")

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
        """The factors that an adapter adds to a matrix; None if it adds none, or no product of factors."""
        return self.source.delta(self._find(name)) if isinstance(self.source, Adapter) else None

    def touched(self, name: str) -> bool:
        """Whether an adapter changes a matrix."""
        return isinstance(self.source, Adapter) and self.source.touched(self._find(name))

    def stamp(self) -> str:
        """Changes when weights, config.json or a given tokenizer do; reads no tensor of a file."""
        text = f"{self.source.stamp()} {json.dumps(dict(self.config), sort_keys=True, default=str)}"
        if self.tokenizer is not None:
            text += f" {_tokenizer_text(self.tokenizer)}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint()

    def fingerprint(self) -> str:
        """Hash of names, shapes, dtypes and bytes, however they are sharded; reads everything once."""
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """The record of it in an audit."""
        return {
            "ref": self.ref, "kind": self.kind, "fingerprint": self.fingerprint(),
            "parameters": self.parameters, "dtype": self.dtype, "architecture": self.architecture,
            "adapter": None if self.adapter is None else dict(self.adapter),
        }  # fmt: skip

    def described_by(self, config: Mapping[str, Any]) -> "Checkpoint":
        """The same weights under another config.json."""
        described = Checkpoint(self.ref, self.source, config, directory=self.directory, base=self.base)
        described.opened, described.tokenizer = self.opened, self.tokenizer
        described.tokenizer_lost = self.tokenizer_lost
        return described

    def _differ(self, name: str, other: str) -> bool:
        """Whether two tensors of the same shape hold other values."""
        source = self.source
        apart = source.location(name) != source.location(other)
        return apart and not same_bytes(source.read(name), source.read(other))

    def _find(self, name: str) -> Matrix:
        if name not in self.matrices:
            raise UnknownNameError(f"{self.ref}: has no matrix {name!r}; {nearest(name, self.matrices)}")
        return self.matrices[name]


def nearest(name: str, names: Collection[str]) -> str:
    """The names most like an unknown one, as a clause of a message."""
    from difflib import get_close_matches

    parts = set(name.split("."))
    shared = {other: len(parts.intersection(other.split("."))) for other in names}
    most = max(shared.values(), default=0)
    alike = [other for other, count in shared.items() if count == most]
    close = get_close_matches(name, alike, n=3, cutoff=0)
    return f"the nearest of its {len(names)}: {', '.join(close)}"


# A worker unpickles the checkpoints of a pair with each job; one object for all of them keeps its caches.
@lru_cache(maxsize=8)
def _without_tokenizer(reopen: "Callable[..., Checkpoint]", arguments: tuple[Any, ...]) -> Checkpoint:
    """A checkpoint in another process, where the tokenizer that was given with it is not."""
    return reopen(*arguments)._with(tokenizer_lost=True)


def _tokenizer_text(tokenizer: Any) -> str:
    """All of a tokenizer that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    special = sorted(getattr(tokenizer, "special_tokens_map", {}).items())
    return f"{rules} {special} {getattr(tokenizer, 'chat_template', None)}"


def summary_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Summaries side by side as an HTML table, for notebooks; every text is escaped."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *columns))
    body = "".join(
        f"<tr><th>{escape(row)}</th>"
        + "".join(f"<td>{escape(str(column.get(row, '')))}</td>" for column in columns.values())
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
