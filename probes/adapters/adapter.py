"""PEFT adapters as low-rank deltas: LoRA, rsLoRA, DoRA, and tensors saved with them.

Source of the rules: PEFT's `merge_and_unload` (peft/tuners/lora/layer.py, variants.py).
"""

import hashlib
import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.adapters.parts import AdapterUpdate, LowRank, sum_of
from probes.files.layout import Matrix
from probes.files.sources import Source
from probes.naming.tied import untied


class Adapter:
    """A source: the tensors of a base with an adapter merged in float32, one tensor at a time when read."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Source,
        base: Source,
        matrices: Mapping[str, Matrix],
        *,
        base_config: Mapping[str, Any] | None = None,
        where: str = "adapter",
        of: str = "its base",
    ):
        """Find the tensor of the base that each tensor of an adapter changes.

        Args:
            config: adapter_config.json.
            matrices: the base's matrices by name.
            base_config: config.json of the base.
            where, of: names of the adapter and its base in messages.

        Raises:
            InputError: a kind of adapter that is not read, or one that does not fit this base.
        """
        from probes.adapters.targets import TargetSearch

        self.config, self.weights, self.base = config, weights, base
        self._base_config = dict(base_config or {})
        search = TargetSearch(config, weights, base.headers, matrices, base_config or {}, where, of)
        self.targets = search.targets
        self.headers = dict(base.headers)
        for name, original in self.targets.untied.items():
            self.headers[name] = replace(base.headers[original], name=name)
        for name, key in self.targets.replaced.items():
            self.headers[name] = replace(weights.headers[key], name=name)
        # A file with both copies of a tied weight has the change in one of them.
        tied = {alias: matrix.tensor for matrix in matrices.values() for alias in matrix.tied}
        self._tied = {alias: name for alias, name in tied.items() if alias not in self.targets.untied}
        self._transposed = {m.tensor for m in matrices.values() if m.transposed and m.experts is None}

    @property
    def summary(self) -> dict[str, Any]:
        """Type, the base that it names, rank, alpha and variant, as plain values."""
        config, targets = self.config, self.targets
        return {
            "type": "LORA",
            "base": config.get("base_model_name_or_path"),
            "r": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "rslora": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
            "rank_pattern": dict(config.get("rank_pattern") or {}),
            "alpha_pattern": dict(config.get("alpha_pattern") or {}),
            "updated": len(targets.updates),
            "replaced": sorted(targets.replaced),
            "notes": list(targets.notes),
        }

    @property
    def model_config(self) -> dict[str, Any]:
        """config.json of the merged model."""
        return untied(self._base_config) if self.targets.untied else self._base_config

    def stamp(self) -> str:
        """A hash that changes when the files of base or adapter do."""
        return self._hash(self.base.stamp(), self.weights.stamp())

    def fingerprint(self) -> str:
        """Hash of the content of base and adapter."""
        return self._hash(self.base.fingerprint(), self.weights.fingerprint())

    def _hash(self, *parts: str) -> str:
        facts = json.dumps([*parts, self.summary], sort_keys=True)
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its numbers must know: how far apart weights are that the base ties."""
        notes = list(self.targets.notes)
        for name, original in self.targets.untied.items():
            other, value = self.read(original), self.read(name)
            if other.dim() != 2 or other.shape != value.shape:
                continue
            norm = float(torch.linalg.vector_norm(other.float() - value.float()))
            share = norm / (float(torch.linalg.vector_norm(self.base.read(original).float())) or 1.0)
            if norm:
                notes.append(
                    f"{name} and {original} are one tensor in the base, and the adapter trains them apart: "
                    "every number, and what is written, is of the unmerged model, with two weights that "
                    f"differ by a norm of {norm:.3g} ({share:.2g} of the base's); merged into one tied "
                    "weight, as PEFT's merge_and_unload does with factors, both would change alike"
                )
        return tuple(notes)

    def original(self, name: str) -> str:
        """The base's tensor that a tensor stands on: itself, or the one that the base ties it to."""
        return name if name in self.base.headers else self.targets.untied.get(name, name)

    def location(self, name: str) -> Hashable:
        """The location of a tensor's bytes: the base's if the adapter leaves it alone."""
        if not self.changes(name):
            return self.base.location(self.original(name))
        if name in self.targets.replaced and name not in self.targets.updates:
            return self.weights.location(self.targets.replaced[name])
        return name, self._identity

    @cached_property
    def _identity(self) -> Hashable:
        """Identifies the adapter and its base."""
        sides = (tuple(map(side.location, side.headers)) for side in (self.weights, self.base))
        return json.dumps(self.summary, sort_keys=True), *sides

    def changes(self, name: str) -> bool:
        """Whether a stored tensor is not the base's own."""
        if name not in self.targets.replaced:
            name = self._tied.get(name, name)
        roles = self.targets
        return any(name in role for role in (roles.updates, roles.replaced, roles.tokens, roles.shifts))

    def touched(self, matrix: Matrix) -> bool:
        """Whether the adapter changes a matrix."""
        replaced = matrix.tensor in self.targets.replaced or matrix.tensor in self.targets.tokens
        return replaced or bool(self.updates(matrix))

    def delta(self, matrix: Matrix) -> LowRank | None:
        """The factors added to a matrix; None without any, or if it is no product (DoRA, replaced)."""
        updates = self.updates(matrix)
        if not updates or any(u.magnitude for u in updates) or matrix.tensor in self.targets.tokens:
            return None
        if matrix.tensor in self.targets.replaced and not self.carried(matrix.tensor):
            return None
        return sum_of(*(self._factors(update, matrix) for update in updates))

    def matrix(self, matrix: Matrix) -> Float[Tensor, "out in"]:
        """One matrix as (out, in): merged in float32 where factors change it, else in its stored dtype."""
        value = matrix.take(self.stored(matrix.tensor))
        for update in self.updates(matrix):
            value = self._merge(update, matrix, value)
        return value

    def read(self, name: str) -> Tensor:
        """A tensor in its stored layout: merged in float32 where factors change it, else as stored."""
        if name not in self.targets.replaced:
            name = self._tied.get(name, name)
        stored = self.stored(name)
        for update in self.targets.updates.get(name, ()):
            stored = stored.to(_wide(stored.dtype), copy=True)
            for matrix in self.undivided(update) if update.matrix is None else ():
                view = matrix.take(stored)
                view.copy_(self._merge(update, matrix, view))
            if (part := update.matrix) is not None:
                stored = part.put(stored, self._merge(update, part, part.take(stored)))
        return stored

    def stored(self, name: str) -> Tensor:
        """The tensor that factors are added to: the base's, or the adapter's replacement."""
        targets = self.targets
        replacement = targets.replaced.get(name)
        key = self.original(name)
        stored = self.base.read(key) if replacement is None else self.weights.read(replacement)
        if name in targets.tokens:
            key, rows = targets.tokens[name]
            stored = stored.index_copy(0, torch.tensor(rows), self.weights.read(key).to(stored.dtype))
        if name in targets.shifts:
            key, scaling = targets.shifts[name]
            stored = stored.to(_wide(stored.dtype)) + self.weights.read(key).float() * scaling
        return stored

    def carried(self, name: str) -> bool:
        """Whether a saved tensor is the base's own: PEFT saves an adapted embedding in full."""
        key = self.original(name)
        if key not in self.base.headers or self.base.headers[key].shape != self.headers[name].shape:
            return False
        return torch.equal(self.base.read(key), self.weights.read(self.targets.replaced[name]))

    def _merge(self, update: AdapterUpdate, matrix: Matrix, value: Tensor) -> Tensor:
        low = self._factors(update, matrix)
        merged = value.to(_wide(value.dtype)) + low.dense()
        if update.magnitude is None:
            return merged
        # DoRA sets the length of each output; an embedding's outputs are the columns of its table.
        lengths = self.weights.read(update.magnitude).float().flatten()
        if update.embedding:
            return merged * (lengths / torch.linalg.vector_norm(merged, dim=0))
        lengths = rows_of_part(update.part or matrix, lengths[:, None]).flatten()
        return merged * (lengths / torch.linalg.vector_norm(merged, dim=1))[:, None]

    def updates(self, matrix: Matrix) -> list[AdapterUpdate]:
        """The factors that change a matrix."""
        updates = self.targets.updates.get(matrix.tensor, ())
        return [update for update in updates if update.matrix is None or update.matrix.name == matrix.name]

    def _factors(self, update: AdapterUpdate, matrix: Matrix) -> LowRank:
        """The factors that an update adds to a matrix, as (r, in) and (out, r)."""
        chosen = update.part or matrix
        low = self.factors(update, chosen.expert)
        A, B = low.A, low.B
        if chosen.experts is not None:  # the whole stack is one matrix to PEFT
            assert chosen.expert is not None
            B = B.unflatten(0, (chosen.experts, -1))[chosen.expert]
            if chosen.transposed:
                A, B = B.mT, A.mT
        return LowRank(A, rows_of_part(chosen, B), update.scaling)

    def factors(self, update: AdapterUpdate, expert: int | None = None) -> LowRank:
        """The undivided factors of an update, as (r, in) and (out, r); in a stack, of one expert."""
        A, B = self.weights.read(update.A), self.weights.read(update.B)
        if update.embedding:
            A, B = B.mT, A.mT
        A, B = A.flatten(1), B.flatten(1)  # convolutions
        if update.experts:
            assert expert is not None
            A, B = expert_rows(A, update, expert), expert_columns(B, update, expert)
        if update.exchanged:
            A, B = B.mT, A.mT
        return LowRank(A, B, update.scaling)

    def undivided(self, update: AdapterUpdate) -> list[Matrix]:
        """The undivided (out, in) matrices of the updated tensor: one, or one for each expert."""
        header = self.headers[update.tensor]
        A, B = self.weights.headers[update.A].shape, self.weights.headers[update.B].shape
        exchanged = update.embedding or update.exchanged
        out, columns = (A[1], B[0]) if exchanged else (B[0], math.prod(A[1:]))
        matrix = Matrix(
            name=update.tensor, tensor=update.tensor, layer=None, component="", part="other",
            rows=out, columns=columns, dtype=header.dtype,
            transposed=update.tensor in self._transposed,
        )  # fmt: skip
        return [replace(matrix, expert=e) for e in range(header.shape[0])] if update.experts else [matrix]


def expert_rows(A: Tensor, update: AdapterUpdate, expert: int) -> Tensor:
    """The rows of `lora_A` that are one expert's: expert after expert."""
    r = A.shape[0] // update.experts
    return A[expert * r : (expert + 1) * r]


def expert_columns(B: Tensor, update: AdapterUpdate, expert: int) -> Tensor:
    """The columns of `lora_B` that are one expert's."""
    r = B.shape[1] // update.experts
    return B[:, expert * r : (expert + 1) * r] if update.grouped else B[:, expert :: update.experts]


def rows_of_part(matrix: Matrix, undivided: Tensor) -> Tensor:
    """The rows of an undivided (out, …) matrix that belong to a part of it."""
    return replace(matrix, expert=None, experts=None, transposed=False).take(undivided)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)
