"""The tensor of a base that each tensor of a PEFT adapter belongs to.

An adapter names modules as in memory; a file may reorder names, unstack experts and store tied weights once.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod, sqrt
from typing import Any

from probes.adapters.config_fields import MERGE, refuse
from probes.adapters.config_patterns import Patterns, well_formed
from probes.adapters.expert_layouts import first_in_a, grouped
from probes.adapters.parts import AdapterUpdate, Targets
from probes.adapters.ties import Ties
from probes.errors import InputError
from probes.files.layout import Header, Matrix
from probes.files.sources import Source
from probes.naming.align import without_wrappers
from probes.naming.architecture import architecture_of
from probes.naming.lookup import Lookup, is_head, probe

GROW = (
    "Resize the base as in training (`base.resize_token_embeddings(N)`), save it and give that as base, or "
    "save the adapter again with `save_embedding_layers=True`"
)
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<name>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_COPIED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.[^.]+$)")
# Parts that PEFT's wrappers insert into the names of tensors saved in full.
_WRAPPED = re.compile(r"\.token_adapter(?=\.)|\.base_layer(?=\.)|\.modules_to_save(?:\.[^.]+)?(?=\.[^.]+$)")


def canonical(key: str) -> str:
    """The name that today's PEFT saves a tensor under.

    >>> canonical("base_model.model._orig_mod.lm_head.lora_A.default.weight")
    'base_model.model.lm_head.lora_A.weight'
    """
    name = without_wrappers(key.removeprefix("base_model.model."))
    if match := _FACTOR.fullmatch(name):
        name = ".".join(filter(None, (match["module"], match["factor"], match["leaf"])))
    return f"base_model.model.{_COPIED.sub('', name)}"


class TargetSearch:
    """The role of every tensor of an adapter's file, as `targets`, found one kind of tensor after the other.

    Raises:
        InputError: a kind of adapter that is not read; a module that the base lacks, or has in another shape;
            a configuration that is damaged.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Source,
        base: Mapping[str, Header],
        matrices: Mapping[str, Matrix],
        base_config: Mapping[str, Any],
        where: str,
        of: str,
    ):
        refuse(config, where)
        well_formed(config, where)
        self.config, self.weights, self.where, self.of = config, weights.headers, where, of
        self.names = Lookup(base, matrices)
        self.base_config = base_config
        self.ties = Ties(self.names, base_config, config, weights)
        self.shapes = {name: header.shape for name, header in base.items()}
        self.targets = Targets()
        self.patterns = Patterns(where)
        self.moved: list[str] = []

        factors: dict[str, dict[str, str]] = defaultdict(dict)
        saved_in_full: dict[str, str] = {}
        tokens: dict[str, str] = {}
        adapters: set[str] = set()
        for key in self.weights:
            name = without_wrappers(key.removeprefix("base_model.model."))
            if match := _FACTOR.fullmatch(name):
                adapters.add(match["name"] or "default")
                leaf = match["factor"] + (".bias" if match["leaf"] == "bias" else "")
                factors[match["module"]][leaf] = key
            elif match := _TOKENS.fullmatch(name):
                tokens[match["module"]] = key
            elif ".lora_" in name:
                raise InputError(f"{where}: tensor {key!r} is of a variant of LoRA that is not read; {MERGE}")
            else:
                saved_in_full[key] = _WRAPPED.sub("", name)
        for key, name in saved_in_full.items():
            self._replacement(name, key)
        self.ties.spread(self.targets.replaced, self.shapes)
        for module, key in tokens.items():  # rows of embeddings that may have been saved in full
            self._tokens(module, key)
        if len(adapters) > 1:
            raise InputError(f"{where}: holds several adapters ({', '.join(sorted(adapters))}); save one")
        if not factors and not self.targets.replaced and not self.targets.tokens:
            raise InputError(f"{where}: holds no tensor of an adapter; is it the adapter's own directory?")
        plain = {module: self._plain(module, keys) for module, keys in factors.items()}
        parameters = {module: self._parameters(update.module) for module, update in plain.items()}
        self.exchanged = self._exchanged(
            [(plain[module], names) for module, names in parameters.items() if names]
        )
        for module, update in plain.items():
            self._factors(update, parameters[module], factors[module].get("lora_B.bias"))
        self.ties.settle(self.targets)
        self._refuse_unsaved_rows()
        for name in (*self.targets.tokens, *self.targets.tied_tokens):
            if is_head(name) and self.ties.with_bias(name):
                problem = "PEFT runs a head with trained tokens without its bias, and no full weights do"
                raise self._error(name, f"{problem}; {MERGE}")
        if self.moved:
            self.targets.notes.append(
                f"{len(self.moved)} modules are called otherwise in the base's file and are taken by "
                f"layer and component, such as {self.moved[0]}"
            )

    def _error(self, module: str, problem: str) -> InputError:
        return InputError(f"{self.where}: {module}: {problem}")

    def _fail(self, module: str, problem: str) -> InputError:
        return self._error(module, f"{problem}; was it trained on another model than {self.of}?")

    # Tensors saved in full

    def _replacement(self, name: str, key: str) -> None:
        """`modules_to_save`, biases, and embeddings that PEFT saves with their factors."""
        modules = self.config.get("modules_to_save") or ()
        copied = any(re.search(rf"(?:^|\.){re.escape(module)}(?:\.|$)", name) for module in modules)
        below = ".base_layer." in key or ".original_module." in key
        stored = self.ties.member(name) or (self.names.weight(name) if below else self.names.find(name))
        if ".original_module." in key and (
            stored is None or self.weights[key].shape == self._stored_shape(stored)
        ):
            return  # the base's own weight, which old versions saved with the trained copy
        if stored is None and not copied:
            raise self._fail(name, "is not in the base")
        stored = stored or name
        if self.ties.of(stored) and (below or not copied):
            # PEFT loads it into the one weight of all these modules; only copies are apart.
            self.ties.shared[self.ties.of(stored)] = key
            return
        self.targets.replaced[stored] = key
        self.shapes[stored] = self.weights[key].shape

    def _tokens(self, module: str, key: str) -> None:
        """`trainable_token_indices`: some rows of an embedding."""
        name = f"{module}.weight"
        stored = self.ties.member(name) or self.names.weight(name)
        rows = self.config.get("trainable_token_indices") or []
        if isinstance(rows, Mapping):
            fitting = [chosen for ending, chosen in rows.items() if _ends(module, ending)]
            rows = fitting[0] if fitting else []
        if stored is None or len(self._stored_shape(stored)) != 2:
            raise self._fail(module, "has trained tokens, but the base has no such embedding")
        (height, width), trained_shape = self._stored_shape(stored), self.weights[key].shape
        if rows and trained_shape == (len(rows), width) and max(rows) >= height:
            problem = (
                f"trained the token {max(rows)} of a vocabulary that had grown; {self.of} has {height} rows"
            )
            raise self._error(module, f"{problem}, and the adapter does not hold the others. {GROW}")
        if not rows or trained_shape != (len(rows), width):
            which = f"tokens {min(rows)} to {max(rows)}" if rows else "tokens that its config does not name,"
            shapes = f"{_by(trained_shape)}, the base has {height}x{width}"
            raise self._fail(module, f"trained {which} in {shapes}")
        self.targets.tokens[stored] = key, list(rows)

    def _refuse_unsaved_rows(self) -> None:
        """Raise if the vocabulary grew, and not all of its weights were saved."""
        heads, embeddings = self.names.heads, self.names.embeddings
        groups = [list(group) for group in self.ties.groups()]
        if len(heads) == len(embeddings) == 1 and not any(heads[0] in group for group in groups):
            groups.append([embeddings[0], heads[0]])
        for group in groups:
            lengths = {name: self.shapes[name][0] for name in group if name in self.shapes}
            before = {self.names.headers[name].shape[0] for name in group if name in self.names.headers}
            if len(set(lengths.values())) > 1 and len(before) == 1:
                longest, shortest = (
                    max(lengths, key=lengths.__getitem__),
                    min(lengths, key=lengths.__getitem__),
                )
                problem = (
                    f"has {lengths[longest]} rows, but {shortest} {lengths[shortest]}: the vocabulary grew"
                )
                raise self._error(longest, f"{problem}, and its new rows were not all saved. {GROW}")

    # Factors

    def _plain(self, module: str, keys: Mapping[str, str]) -> AdapterUpdate:
        """The factors of a module, before what they change is known."""
        embedding = "lora_embedding_A" in keys
        A, B = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if A not in keys or B not in keys:
            raise self._error(module, f"has {', '.join(keys)} but not both {A} and {B}; saved whole?")
        if self.config.get("use_dora") and "lora_magnitude_vector" not in keys:
            raise self._error(module, "use_dora is set, but lora_magnitude_vector is missing")
        for key in (keys[A], keys[B]):
            header = self.weights[key]
            if len(header.shape) < 2 or 0 in header.shape or not header.dtype.is_floating_point:
                raise self._error(module, f"{key!r} of {_by(header.shape)} is no factor; damaged?")
        path = _WRAPPED.sub("", module + ".").removesuffix(".")
        plain = AdapterUpdate(
            module=path, tensor="", A=keys[A], B=keys[B], scaling=0.0,
            magnitude=keys.get("lora_magnitude_vector"), embedding=embedding,
        )  # fmt: skip
        if plain.magnitude and prod(self.weights[plain.magnitude].shape) != self._shape(plain)[embedding]:
            raise self._error(module, "lora_magnitude_vector has not a length for each output")
        return plain

    def _factors(self, plain: AdapterUpdate, parameters: list[str], bias_key: str | None) -> None:
        path = plain.module
        updates = self._parameter(plain, parameters) if parameters else self._module(plain)
        for update in updates:
            self.targets.updates.setdefault(update.tensor, []).append(update)
        if bias_key is not None:
            bias = self.names.find(f"{path}.bias")
            if bias is None:
                raise self._fail(path, "adds to a bias that the base lacks")
            if self.shapes[bias] != self.weights[bias_key].shape:
                raise self._fail(path, "adds to a bias of another length")
            self.targets.shifts[bias] = bias_key, updates[0].scaling

    def _parameters(self, path: str) -> list[str]:
        """The names of a module's directly adapted parameters (`target_parameters`)."""
        names = set()
        for parameter in self.config.get("target_parameters") or ():
            owner, _, name = parameter.rpartition(".")
            # PEFT writes the bare name where it turned the modules of experts into their stack.
            bare = not owner and (_ends(path, "experts") or self.names.find(f"{path}.{name}") is not None)
            if bare or (owner and _ends(path, owner)):
                names.add(name)
        return sorted(names)

    def _module(self, update: AdapterUpdate) -> list[AdapterUpdate]:
        """Factors of a linear layer, a convolution or an embedding."""
        path = update.module
        out, columns = self._shape(update)
        update = replace(update, scaling=self._scaling(path, path, self._rank(update)))
        for name in (f"{path}.weight", f"{path}.in_proj_weight"):
            stored = self.ties.member(name) or self.names.weight(name)
            if stored is not None:
                shape = self._oriented(stored)
                if shape != (out, columns):
                    raise self._fail(path, f"the adapter is for {out}x{columns}, the base holds {_by(shape)}")
                return [replace(update, tensor=stored)]
        # Names, stacks and fusions may differ between memory and file: match by layer and component.
        updates = []
        for theirs in probe(f"{path}.weight", out, columns):
            ours = self.names.alike(theirs)
            if ours is None:
                raise self._fail(path, "is not in the base")
            if (ours.rows, ours.columns) != (theirs.rows, theirs.columns):
                shapes = f"{theirs.rows}x{theirs.columns}, the base holds {ours.rows}x{ours.columns}"
                raise self._fail(path, f"the adapter is for {shapes} in {ours.name}")
            updates.append(replace(update, tensor=ours.tensor, matrix=ours, part=theirs))
        self.moved.append(f"{path} for {updates[0].matrix and updates[0].matrix.name}")
        return updates

    def _parameter(self, update: AdapterUpdate, parameters: list[str]) -> list[AdapterUpdate]:
        """Factors of an `nn.Parameter` (`target_parameters`): a matrix, or the stacked experts of a layer.

        PEFT nests one wrapper for each parameter of a module and saves the depth, not the name; shapes tell.
        """
        path = update.module
        fitting = self._fitting(update, parameters, self.exchanged)
        if len(fitting) != 1:
            stored = {name: self.names.find(f"{path}.{name}") for name in parameters}
            candidates = ", ".join(
                f"{name} {_by(self._oriented(key))}" for name, key in stored.items() if key
            )
            problem = f"fits {'several' if fitting else 'none'} of target_parameters ({candidates})"
            raise self._fail(path, f"a delta of {_by(self._shape(update))} {problem}")
        ((name, updates),) = fitting.items()
        experts = max(updates[0].experts, 1)
        if min(experts, self._rank(update) // experts) > 1:
            packed = grouped(self.config, name, self.where)
            updates = [replace(update, grouped=packed) for update in updates]
        scaling = self._scaling(path, f"{path}.{name}", self._rank(update) // experts)
        return [replace(update, scaling=scaling) for update in updates]

    def _exchanged(self, stacks: list[tuple[AdapterUpdate, list[str]]]) -> bool:
        """Whether `lora_A` is over the outputs of stacked experts, and `lora_B` over their inputs.

        The shapes tell, unless every stack is square; then the version of PEFT does.
        """
        fitting = [[self._fitting(*stack, exchanged) for stack in stacks] for exchanged in (False, True)]
        fits = [all(len(names) == 1 for names in way) for way in fitting]
        ways = [way for way, fit in zip(fitting, fits, strict=True) if fit] or fitting
        stacked = [updates[0] for names in ways[0] for updates in names.values() if updates[0].experts]
        self.targets.transposed_stacks = any(
            update.matrix is None and update.tensor in self.names.transposed for update in stacked
        )
        if fits[0] != fits[1]:
            return fits[1]
        if not stacked:
            return False
        transposed = self.targets.transposed_stacks
        architecture = architecture_of(self.base_config)
        module_says = None if architecture is None else architecture.transposed_experts
        version = self.config.get("peft_version")
        first = first_in_a(version, transposed if module_says is None else module_says)
        if first is None:
            raise self._error(
                stacked[0].module,
                "the factors of these experts fit as PEFT before 0.19.1 lays them out, and as it does since; "
                f"peft_version is {version!r}: set it in adapter_config.json to the version that trained it",
            )
        return first != transposed

    def _fitting(
        self, update: AdapterUpdate, parameters: list[str], exchanged: bool
    ) -> dict[str, list[AdapterUpdate]]:
        """The changes by the parameters that they may be of, if lora_A and lora_B are exchanged or not."""
        return {name: updates for name in parameters if (updates := self._stack(update, name, exchanged))}

    def _stack(self, update: AdapterUpdate, parameter: str, exchanged: bool) -> list[AdapterUpdate]:
        """The places of `update` if it is for this parameter; nothing if its shape says otherwise."""
        name = f"{update.module}.{parameter}"
        stored = self.names.find(name)
        # In memory the experts are one tensor, in the file one each; routers differ in name.
        shape = () if stored is None else self._oriented(stored)
        experts = self.names.experts(name) if stored is None else shape[0] if len(shape) == 3 else 0
        update = replace(update, experts=experts, exchanged=exchanged and experts > 0)
        delta = self._shape(update)
        if self._rank(update) % max(experts, 1):
            return []
        if stored is not None:
            return [replace(update, tensor=stored)] if shape[-2:] == delta else []
        updates = []
        for theirs in probe(name, *([experts] if experts else []), *delta):
            ours = self.names.alike(theirs)
            if ours is None or (ours.rows, ours.columns) != (theirs.rows, theirs.columns):
                return []
            updates.append(replace(update, tensor=ours.tensor, matrix=ours, part=theirs))
        return updates

    def _rank(self, update: AdapterUpdate) -> int:
        return self.weights[update.A].shape[0]

    def _shape(self, update: AdapterUpdate) -> tuple[int, int]:
        """(out, in) of the product of the factors."""
        A, B = self.weights[update.A].shape, self.weights[update.B].shape
        if A[0] != prod(B[1:]):
            raise self._error(update.module, f"factors {_by(A)} and {_by(B)} do not multiply")
        return (A[1], B[0]) if update.embedding or update.exchanged else (B[0], prod(A[1:]))

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the merged model, as it is before factors are added to it."""
        return self.shapes[name] if name in self.shapes else self.shapes[self.ties.of(name)]

    def _oriented(self, stored: str) -> tuple[int, ...]:
        """Shape of a stored tensor as (out, in) or (experts, out, in)."""
        shape = self._stored_shape(stored)
        if len(shape) < 2:
            raise self._fail(stored, f"has factors, but is a tensor of {_by(shape) or 'no axes'}")
        shape = shape if stored in self.names.stacked else (shape[0], prod(shape[1:]))
        return (*shape[:-2], shape[-1], shape[-2]) if stored in self.names.transposed else shape

    def _scaling(self, module: str, key: str, rank: int) -> float:
        """alpha/r, or alpha/√r for rsLoRA."""
        config = self.config
        expected = self.patterns.value(config.get("rank_pattern"), key, config.get("r", 8))
        if rank != expected:
            problem = f"factors of rank {rank}, but adapter_config.json says {expected}"
            raise self._error(module, f"{problem}; are the two files of one adapter?")
        alpha = self.patterns.value(config.get("alpha_pattern"), key, config.get("lora_alpha", 8))
        return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith(f".{ending}")
