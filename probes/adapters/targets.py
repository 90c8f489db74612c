"""The tensor of a base that each tensor of a PEFT adapter belongs to.

An adapter names modules as in memory; a file may reorder names, unstack experts and store tied weights once.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod, sqrt
from typing import Any

from probes.adapters.config_patterns import Patterns, well_formed
from probes.adapters.parts import AdapterUpdate, Targets
from probes.errors import InputError
from probes.files.layout import Header, Matrix
from probes.naming.align import without_wrappers
from probes.naming.lookup import Lookup, probe

# Adapters that add a prompt or activations and change no weight.
WEIGHTLESS = {
    "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT",
    "CARTRIDGE",
}  # fmt: skip
# Fields of LoraConfig that give the factors another meaning.
VARIANTS = {
    "layer_replication": "it repeats layers of its base",
    "use_qalora": "it is a QA-LoRA",
    "use_bdlora": "it is a BD-LoRA",
    "kasa_config": "it is a KaSA, which cuts the smallest singular values of its base",
    "monteclora_config": "it is a MonteCLoRA",
    "arrow_config": "it routes between adapters",
    "alora_invocation_tokens": "it is an aLoRA, switched on by tokens",
}
# Initialisations that also change the base's weights: the factors are then no delta to the base on disk.
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE = "merge it where it was trained (`model.merge_and_unload().save_pretrained(DIR)`) and give DIR"

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<name>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
# Parts that PEFT's wrappers insert into the names of tensors saved in full.
_WRAPPED = re.compile(r"\.token_adapter(?=\.)|\.base_layer(?=\.)|\.modules_to_save(?:\.[^.]+)?(?=\.[^.]+$)")


def refuse(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for an adapter without factors, or with some that are no delta to the base on disk."""
    kind = str(config.get("peft_type", "unknown")).upper()
    if kind in WEIGHTLESS:
        raise InputError(f"{where}: a {kind} adapter changes no weights, so there is nothing to compare")
    if kind != "LORA":
        read = "LoRA, rsLoRA and DoRA are read as they are"
        raise InputError(f"{where}: adapter of type {kind}; {read}: {MERGE}")
    for name, meaning in VARIANTS.items():
        if config.get(name):
            raise InputError(f"{where}: {name} is set ({meaning}); {MERGE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED_BASE):
        raise InputError(
            f"{where}: init_lora_weights={start!r} also changed the base's weights in training; save it "
            f"again with `path_initial_model_for_weight_conversion`, or {MERGE}"
        )


class TargetSearch:
    """The role of every tensor of an adapter's file, as `targets`, found one kind of tensor after the other.

    Raises:
        InputError: a kind of adapter that is not read; a module that the base lacks, or has in another shape;
            a configuration that is damaged.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Header],
        base: Mapping[str, Header],
        matrices: Mapping[str, Matrix],
        where: str,
        of: str,
    ):
        refuse(config, where)
        well_formed(config, where)
        self.config, self.weights, self.where, self.of = config, weights, where, of
        self.names = Lookup(base, matrices)
        self.shapes = {name: header.shape for name, header in base.items()}
        self.targets = Targets()
        self.patterns = Patterns(where)
        self.moved: list[str] = []

        factors: dict[str, dict[str, str]] = defaultdict(dict)
        saved_in_full: dict[str, str] = {}
        tokens: dict[str, str] = {}
        adapters: set[str] = set()
        for key in weights:
            name = without_wrappers(key.removeprefix("base_model.model."))
            if match := _FACTOR.fullmatch(name):
                adapters.add(match["name"] or "default")
                leaf = match["factor"] + (".bias" if match["leaf"] == "bias" else "")
                factors[match["module"]][leaf] = key
            elif match := _TOKENS.fullmatch(name):
                tokens[match["module"]] = key
            elif ".lora_" in name:
                raise InputError(f"{where}: tensor {key!r} is of a variant of LoRA that is not read; {MERGE}")
            elif ".original_module." not in name:
                saved_in_full[key] = _WRAPPED.sub("", name)
        # With an embedding of another length PEFT saves the head, even if the base ties it.
        self.heads = {name for key, name in saved_in_full.items() if self._tied_head(name, key)}
        for key, name in saved_in_full.items():
            self._replacement(name, key)
        for module, key in tokens.items():  # rows of embeddings that may have been saved in full
            self._tokens(module, key)
        if len(adapters) > 1:
            raise InputError(f"{where}: holds several adapters ({', '.join(sorted(adapters))}); save one")
        if not factors and not self.targets.replaced and not self.targets.tokens:
            raise InputError(f"{where}: holds no tensor of an adapter; is it the adapter's own directory?")
        for module, keys in factors.items():
            self._factors(module, keys)
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
        # Under `base_layer` is a copy of the weight that the factors are added to.
        stored = self.names.weight(name) if ".base_layer." in key else self.names.find(name)
        modules = self.config.get("modules_to_save") or ()
        if name in self.heads and self.config.get("ensure_weight_tying"):
            return  # a tied copy of a tensor that is saved under its own name
        copied = any(re.search(rf"(?:^|\.){re.escape(module)}(?:\.|$)", name) for module in modules)
        if stored is None and name not in self.heads and not copied:
            raise self._fail(name, "is not in the base")
        stored = stored or name
        alone = ".base_layer." not in key and not self.config.get("ensure_weight_tying")
        if stored in self.names.shared and alone and not self.heads:
            self.targets.untied.add(stored)
            self.targets.notes.append(
                f"{stored} was trained as a copy: a head tied to it keeps the base's values, but follows the "
                "copy once full weights are loaded that have no head of their own"
            )
        self.targets.replaced[stored] = key
        self.shapes[stored] = self.weights[key].shape

    def _tied_head(self, name: str, key: str) -> bool:
        """Whether this is a head that the base stores only as its embedding."""
        alone = ".base_layer." not in key and self.names.find(name) is None
        return alone and self.names.weight(name) is not None

    def _tokens(self, module: str, key: str) -> None:
        """`trainable_token_indices`: some rows of an embedding."""
        stored = self.names.weight(f"{module}.weight")
        rows = self.config.get("trainable_token_indices") or []
        if isinstance(rows, Mapping):
            fitting = [chosen for name, chosen in rows.items() if _ends(module, name)]
            rows = fitting[0] if fitting else []
        if stored is None or len(self.shapes[stored]) != 2:
            raise self._fail(module, "has trained tokens, but the base has no such embedding")
        (height, width), trained_shape = self.shapes[stored], self.weights[key].shape
        if not rows or trained_shape != (len(rows), width) or max(rows) >= height:
            which = f"tokens {min(rows)} to {max(rows)}" if rows else "tokens that its config does not name,"
            shapes = f"{_by(trained_shape)}, the base has {height}x{width}"
            raise self._fail(module, f"trained {which} in {shapes}")
        self.targets.tokens[stored] = key, list(rows)

    # Factors

    def _factors(self, module: str, keys: Mapping[str, str]) -> None:
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
        parameters = self._parameters(path)
        updates = self._parameter(plain, parameters) if parameters else self._module(plain)
        for update in updates:
            self.targets.updates.setdefault(update.tensor, []).append(update)
        if "lora_B.bias" in keys:
            bias = self.names.find(f"{path}.bias")
            if bias is None:
                raise self._fail(path, "adds to a bias that the base lacks")
            if self.shapes[bias] != self.weights[keys["lora_B.bias"]].shape:
                raise self._fail(path, "adds to a bias of another length")
            self.targets.shifts[bias] = keys["lora_B.bias"], updates[0].scaling

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
            stored = self.names.weight(name)
            if stored is not None:
                shape = self._oriented(stored)
                if shape != (out, columns):
                    raise self._fail(path, f"the adapter is for {out}x{columns}, the base holds {_by(shape)}")
                if stored in self.targets.untied and self.names.find(name) != stored:
                    problem = f"is tied to {stored}, of which a copy was trained too: two weights in the end"
                    raise InputError(f"{self.where}: {path} {problem}; {MERGE}")
                if stored in self.names.shared:
                    outcome = "merged, both change; unmerged, only the adapted one"
                    self.targets.notes.append(f"{stored} serves a tied head too: {outcome}")
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
        fitting = {name: updates for name in parameters if (updates := self._stack(update, name))}
        if len(fitting) != 1:
            stored = {name: self.names.find(f"{path}.{name}") for name in parameters}
            candidates = ", ".join(
                f"{name} {_by(self._oriented(key))}" for name, key in stored.items() if key
            )
            problem = f"fits {'several' if fitting else 'none'} of target_parameters ({candidates})"
            raise self._fail(path, f"a delta of {_by(self._shape(update))} {problem}")
        ((name, updates),) = fitting.items()
        experts = max(updates[0].experts, 1)
        scaling = self._scaling(path, f"{path}.{name}", self._rank(update) // experts)
        return [replace(update, scaling=scaling) for update in updates]

    def _stack(self, update: AdapterUpdate, parameter: str) -> list[AdapterUpdate]:
        """The places of `update` if it is for this parameter; nothing if its shape says otherwise."""
        name = f"{update.module}.{parameter}"
        delta = self._shape(update)
        stored = self.names.find(name)
        if stored is not None:
            shape = self._oriented(stored)
            experts = shape[0] if len(shape) == 3 else 0
            fits = shape[-2:] == delta and self._rank(update) % max(experts, 1) == 0
            return [replace(update, tensor=stored, experts=experts)] if fits else []
        # In memory the experts are one tensor, in the file one each; routers differ in name.
        experts = self.names.experts(name)
        updates = []
        for theirs in probe(name, *([experts] if experts else []), *delta):
            ours = self.names.alike(theirs)
            if ours is None or (ours.rows, ours.columns) != (theirs.rows, theirs.columns):
                return []
            updates.append(replace(update, tensor=ours.tensor, matrix=ours, part=theirs, experts=experts))
        return updates if self._rank(update) % max(experts, 1) == 0 else []

    def _rank(self, update: AdapterUpdate) -> int:
        return self.weights[update.A].shape[0]

    def _shape(self, update: AdapterUpdate) -> tuple[int, int]:
        """(out, in) of the product of the factors."""
        A, B = self.weights[update.A].shape, self.weights[update.B].shape
        if A[0] != prod(B[1:]):
            raise self._error(update.module, f"factors {_by(A)} and {_by(B)} do not multiply")
        return (A[1], B[0]) if update.embedding else (B[0], prod(A[1:]))

    def _oriented(self, stored: str) -> tuple[int, ...]:
        """Shape of a stored tensor as (out, in) or (experts, out, in)."""
        shape = self.shapes[stored]
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
