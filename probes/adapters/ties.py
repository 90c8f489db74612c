"""Tied weights under an adapter: which stay one tensor, and which it trains apart.

PEFT wraps modules. Where the base's embedding and head are one tensor, factors or a copy on one of them leave
the other as it is: the model as trained has two weights, whatever its base's config says.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from probes.adapters.parts import Targets
from probes.files.sources import Source
from probes.naming.lookup import Lookup, is_head
from probes.naming.tied import tied_weights


@dataclass
class Group:
    """The weights of one tied tensor.

    Attributes:
        stored: the tensor in the base's file.
        source: the one of its weights that transformers ties the others to.
        members: names in the merged model, by the names in a model in memory.
    """

    stored: str
    source: str
    members: dict[str, str] = field(default_factory=dict)


class Ties:
    """The tied weights of an adapter's base; transformers is asked only where a name may be of one.

    Attributes:
        shared: by the stored tensor, the adapter's replacement of it in all members.
    """

    def __init__(
        self,
        names: Lookup,
        base_config: Mapping[str, Any],
        config: Mapping[str, Any],
        weights: Source,
    ):
        self.names, self.base_config, self.config, self.weights = names, base_config, config, weights
        self.shared: dict[str, str] = {}
        self._asked = False

    @cached_property
    def _groups(self) -> list[Group]:
        self._asked = True
        task = self.config.get("task_type")
        pairs = tied_weights(self.base_config, task if isinstance(task, str) else None)
        if pairs is None:  # as far as the file tells
            pairs = dict(self.names.tied)
            if not self.names.heads and len(self.names.embeddings) == 1:
                heads = (
                    key.removeprefix("base_model.model.").split(".lora_")[0] for key in self.weights.headers
                )
                names = {f"{head.removesuffix('.weight')}.weight" for head in heads}
                pairs |= dict.fromkeys(filter(is_head, names), self.names.embeddings[0])
        groups: dict[str, Group] = {}
        for copy, source in pairs.items():
            if source not in groups:
                both = (self.names.find(source), self.names.find(copy))
                stored = next((name for name in both if name is not None), None)
                if stored is None:
                    continue
                groups[source] = Group(stored, self.names.find(source) or source)
                groups[source].members[source] = groups[source].source
            groups[source].members[copy] = self.names.find(copy) or copy
        return list(groups.values())

    def groups(self) -> Iterator[list[str]]:
        """The members of each tied tensor, if any was asked for."""
        yield from (list(group.members.values()) for group in (self._groups if self._asked else ()))

    def member(self, name: str) -> str | None:
        """The tied weight of a model in memory, as the merged model names it; None if it is not tied."""
        stored = self.names.find(name)
        vocabulary = (*self.names.embeddings, *self.names.heads, *self.names.tied)
        if stored not in vocabulary and re.search(r"\.\d+\.", name):
            return None  # in a block
        members = {module: merged for group in self._groups for module, merged in group.members.items()}
        if name in members:
            return members[name]
        alike = [
            m for module, m in members.items() if module.endswith(f".{name}") or name.endswith(f".{module}")
        ]
        if not alike and is_head(name):
            alike = [merged for module, merged in members.items() if is_head(module)]
        return alike[0] if len(alike) == 1 else None

    def of(self, name: str) -> str:
        """The stored tensor that a merged weight is tied to; empty if to none."""
        groups = self._groups if self._asked else ()
        return next((group.stored for group in groups if name in group.members.values()), "")

    def spread(self, replaced: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
        """Give every member the replacement of its tensor, unless a copy of the member was saved."""
        for group in self._groups if self._asked else ():
            key = self.shared.get(group.stored)
            for name in group.members.values():
                if key is not None and name not in replaced:
                    replaced[name] = key
                if name in replaced:
                    shapes[name] = self.weights.headers[replaced[name]].shape
                else:
                    shapes[name] = self.names.headers[group.stored].shape

    def settle(self, targets: Targets) -> None:
        """Take members that the adapter changes alike as one tensor, and name the others in `untied`."""
        if not self._asked:
            return
        targets.in_place = dict(self.shared)
        for group in self._groups:
            self._follow(group, targets)
        roles = {
            group.stored: {_role(name, targets) for name in group.members.values()} for group in self._groups
        }
        apart = [stored for stored in roles if len(roles[stored]) > 1]
        for group in self._groups:
            for name in set(group.members.values()) - {group.stored}:
                if apart:  # one flag ties all of them
                    targets.untied[name] = group.stored
                else:
                    if name in targets.tokens:
                        targets.tied_tokens.append(name)
                    for role in (targets.replaced, targets.tokens, targets.updates):
                        role.pop(name, None)

    def with_bias(self, name: str) -> bool:
        """Whether the module of a weight has a bias, in the file or tied to one in it."""
        bias = f"{name.removesuffix('.weight')}.bias"
        members = (module for group in self._groups for pair in group.members.items() for module in pair)
        return self.names.find(bias) is not None or bias in members

    def _follow(self, group: Group, targets: Targets) -> None:
        """Let the members follow the source where PEFT ties what it adds."""
        for name in set(group.members.values()) - {group.source}:
            if group.source in targets.tokens and name not in targets.tokens:
                targets.tokens[name] = targets.tokens[group.source]
            if not self.config.get("ensure_weight_tying"):
                continue
            saved = targets.replaced.get(group.source), targets.replaced.get(name)
            if None not in saved and saved[0] != saved[1] and self._equal(*saved):
                targets.mirrors[targets.replaced[name]] = targets.replaced[group.source]
                targets.replaced[name] = targets.replaced[group.source]
            both = [*targets.updates.get(group.source, ()), *targets.updates.get(name, ())]
            if len(both) == 2 and {update.tensor for update in both} == {group.source, name}:
                ours, theirs = both
                pairs = {theirs.A: ours.B, theirs.B: ours.A}
                if not ours.magnitude and all(self._transposed(*pair) for pair in pairs.items()):
                    targets.mirrors |= pairs
                    targets.updates[name] = [ours]

    def _equal(self, key: Any, other: Any) -> bool:
        return torch.equal(self.weights.read(key), self.weights.read(other))

    def _transposed(self, key: str, other: str) -> bool:
        return torch.equal(self.weights.read(key), self.weights.read(other).mT)


def _role(name: str, targets: Targets) -> tuple[Any, ...]:
    """All that an adapter does to a weight."""
    updates = tuple((update.A, update.B) for update in targets.updates.get(name, ()))
    tokens = targets.tokens.get(name)
    return targets.replaced.get(name), updates, tokens and (tokens[0], *tokens[1])
