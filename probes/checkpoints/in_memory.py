"""Models in memory as checkpoints: modules, PEFT models, TransformerLens models, state dicts.

A model has the names of its own class, without wrappers. Its tensors are not copied: never write to them.
"""

import json
import re
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probes.adapters.adapter import Adapter
from probes.adapters.config_fields import refuse
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.layout import Header
from probes.files.reparametrised import resolve
from probes.files.sources import Source, fingerprint
from probes.naming.architecture import names_of_model

KNOWN = "an nn.Module, a PeftModel, a TransformerLens model or a state dict"


def open_memory(ref: Any) -> Checkpoint:
    """A model in memory as a checkpoint.

    The matrices of a HookedTransformer are named as in `blocks.0.attn.q_proj.weight`.

    Raises:
        InputError: it is no model, or its weights are merged, folded, quantised or not loaded.
    """
    checkpoint = _of_model(ref)
    checkpoint.module = None if isinstance(ref, Mapping) else ref
    return checkpoint


def _of_model(ref: Any) -> Checkpoint:
    if isinstance(ref, nn.Module):
        name, libraries = type(ref).__name__, _libraries(ref)
        if "transformer_lens" in libraries and hasattr(type(ref), "original_model"):
            return _bridge(ref)
        if "transformer_lens" in libraries:
            return Checkpoint(name, StateSource(_unhook(ref.state_dict()), where=name), {})
        if "peft" in libraries:
            return _peft(ref, ref.get_base_model())  # type: ignore[operator]
        if getattr(ref, "_hf_peft_config_loaded", False):
            return _peft(ref, ref)
        if any("peft" in _libraries(module) for module in ref.modules()):
            raise InputError(
                f"{name}: has adapters inside that nothing tells from its own weights; give the PeftModel "
                "around it (as a base, get_base_model() serves with that PeftModel as tuned)"
            )
        return _module(ref, name, ref.state_dict())
    if isinstance(ref, Mapping) and ref and all(isinstance(value, Tensor) for value in ref.values()):
        tensors = {str(name): tensor for name, tensor in ref.items()}
        return Checkpoint("state dict", resolve(StateSource(_unhook(tensors)), "state dict"), {})
    raise InputError(f"a {type(ref).__name__}: is no checkpoint; give a path, a hub id, {KNOWN}")


def wraps(model: Any, base: Any) -> bool:
    """Whether a PeftModel holds this very module as its base."""
    modules = isinstance(model, nn.Module) and isinstance(base, nn.Module)
    return modules and "peft" in _libraries(model) and model.get_base_model() is base


def _libraries(model: nn.Module) -> set[str]:
    """The packages that a model's class and its parents are from; asking imports none of them."""
    return {kind.__module__.partition(".")[0] for kind in type(model).__mro__}


class StateSource:
    """Tensors in memory by name; tensors that share their bytes appear once, under the first name.

    Args:
        once: leave out the others.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, where: str = "state dict", once: bool = True):
        self.headers: dict[str, Header] = {}
        self._tensors: dict[str, Tensor] = {}
        locations: set[Hashable] = set()
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise InputError(f"{where}: {name} is on the meta device, without values; load them first")
            if once and (location := _location(tensor)) in locations:
                continue
            if once and tensor.numel():
                locations.add(location)
            self.headers[name] = Header(name, tuple(tensor.shape), tensor.dtype)
            self._tensors[name] = tensor.detach()

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU."""
        return self._tensors[name].cpu()

    def location(self, name: str) -> Hashable:
        """Its place in memory."""
        return _location(self._tensors[name])

    def stamp(self) -> str:
        """The hash of its content: memory can change at any time without a trace."""
        return self.fingerprint()

    def fingerprint(self) -> str:
        """Hash of the content."""
        return fingerprint(self)


def _location(tensor: Tensor) -> Hashable:
    return str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _module(model: nn.Module, ref: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A model's tensors as it would save them."""
    kept = dict(tensors)
    for name, original in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in kept and original in kept and _location(kept[name]) == _location(kept[original]):
            del kept[name]  # the copy that transformers leaves out when it saves
    config = _config(model)
    state = resolve(StateSource(kept, where=ref), ref, partial(names_of_model, config))
    saved = hasattr(model, "save_pretrained") and "transformers" in _libraries(model)
    return Checkpoint(ref, _as_saved(model, state) if saved else state, config)


def _as_saved(model: Any, state: Source) -> Source:
    """The tensors of the file: transformers renames and stacks what it loads, and reverts that to save it."""
    from transformers.core_model_loading import revert_weight_conversion as revert

    shapes = {name: torch.empty(h.shape, dtype=h.dtype, device="meta") for name, h in state.headers.items()}
    saved = revert(model, dict(shapes))
    moved = [name for name in shapes if name not in saved or saved[name].shape != shapes[name].shape]
    if not moved:
        return state
    sources: dict[str, tuple[str, ...]] = {}
    for name in moved:
        reverted = revert(model, {name: shapes[name]})
        sources |= dict.fromkeys(reverted if reverted.keys() <= saved.keys() else (), (name,))
    missing = [name for name in saved if name not in sources and name not in shapes]
    sources |= dict.fromkeys(missing, tuple(moved))  # made of several at once
    headers = {name: Header(name, tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()}
    return Reverted(state, headers, sources, lambda tensors: revert(model, tensors))


class Reverted(StateSource):
    """A model's tensors turned back into those of its file when they are read.

    Attributes:
        state: the model's own tensors.
        headers: the file's tensors.
        sources: the tensors of the model that each converted tensor of the file is made of.
    """

    def __init__(
        self,
        state: Source,
        headers: dict[str, Header],
        sources: Mapping[str, tuple[str, ...]],
        revert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ):
        self.state = state
        self.headers = headers
        self.sources = dict(sources)
        self._revert = revert
        self._recent: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._numbered: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The model stays behind: the tensors of the file are pickled in place of its own.
        tensors = {name: self.read(name) for name in self.headers}
        return {"state": StateSource(tensors), "headers": self.headers, "sources": {}, "_numbered": {}}

    def read(self, name: str) -> Tensor:
        """The tensor as it would be saved; the last two unstacked groups of experts are kept."""
        sources = self.sources.get(name)
        if sources is None:
            return self.state.read(name)
        tensors = self._recent.get(sources)
        if tensors is None:
            tensors = self._revert({source: self.state.read(source) for source in sources})
            self._recent = dict([*self._recent.items()][-1:]) | {sources: tensors}
        return tensors[name]

    def positions(self, name: str) -> tuple[tuple[str, ...], Tensor]:
        """The model's tensors that a tensor of the file is made of, and the position of each entry in them.

        Positions count through these tensors, flattened and concatenated. The reversal only moves entries, so
        that it carries their numbers as it carries weights.
        """
        sources = self.sources[name]
        if sources not in self._numbered:
            offset, numbered = 0, {}
            for source in sources:
                header = self.state.headers[source]
                numbered[source] = torch.arange(offset, offset + header.entries).reshape(header.shape)
                offset += header.entries
            self._numbered = {sources: self._revert(numbered)}
        return sources, self._numbered[sources][name]

    def location(self, name: str) -> Hashable:
        """The places of the tensors that it is made of."""
        sources = self.sources.get(name)
        if sources is None:
            return self.state.location(name)
        return name, *map(self.state.location, sources)


def _config(model: nn.Module) -> dict[str, Any]:
    """The content of its config.json."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}


# PEFT


def _peft(wrapper: Any, model: nn.Module) -> Checkpoint:
    """A model with PEFT's layers, as an adapter and its base; `wrapper`, maybe the same, has its config."""
    from peft import get_peft_model_state_dict

    ref = type(model).__name__
    active = wrapper.active_adapters
    names = list(active() if callable(active) else active)
    if len(names) != 1:
        held = f"{len(names)} active adapters ({', '.join(names)})" if names else "no active adapter"
        raise InputError(f"{ref}: has {held}; activate the one that is meant with set_adapter")
    where = f"{ref} with adapter {names[0]!r}"
    merged = {name for module in model.modules() for name in getattr(module, "merged_adapters", ())}
    if merged:
        raise InputError(
            f"{where}: {', '.join(sorted(merged))} is merged into the base's weights, which are gone; "
            "call unmerge_adapter() first, or merge_and_unload() and give the model that it returns"
        )
    config = {key: _plain(value) for key, value in wrapper.peft_config[names[0]].to_dict().items()}
    refuse(config, where)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not _ADDED.search(name)}
    base = _module(model, ref, {_WRAPPER.sub("", name): tensor for name, tensor in kept.items()})
    factors = get_peft_model_state_dict(wrapper, adapter_name=names[0], save_embedding_layers=False)
    weights = StateSource(factors, where=where, once=False)
    source = Adapter(
        config, weights, base.source, base.matrices, base_config=base.config, where=where, of=ref
    )
    return Checkpoint(where, source, source.model_config, base=base)


# Tensors that PEFT adds to a model, and parts that it inserts into the names of the model's own.
_ADDED = re.compile(r"\.lora_\w+(?:\.|$)|\.modules_to_save\.|\.trainable_tokens_\w+\.")
_WRAPPER = re.compile(r"\.token_adapter(?=\.)|\.base_layer(?=\.)|\.original_module(?=\.)")


def _plain(value: Any) -> Any:
    """As adapter_config.json would hold it."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else value


# TransformerLens


def _bridge(bridge: Any) -> Checkpoint:
    """A TransformerBridge, as the model inside it.

    The bridge's components give a tensor several paths; a bare model of the class tells which is its name.
    """
    if getattr(bridge, "_weights_processed", False):
        raise InputError(
            "TransformerBridge: its weights are folded and centred (enable_compatibility_mode), no longer "
            "those that were trained; boot it again, or call enable_compatibility_mode(no_processing=True)"
        )
    try:
        model = bridge.original_model
    except AttributeError as error:
        raise InputError(f"TransformerBridge: holds no weights in this process ({error})") from error
    ref = f"TransformerBridge of {type(model).__name__}"
    if "peft" in _libraries(model):
        raise InputError(f"{ref}: has an adapter inside; give the PeftModel itself")
    with torch.device("meta"):
        bare = type(model)(getattr(model, "config", None) or model.cfg)
    names = list(bare.state_dict())
    reached = {_COMPONENT.sub("", name): tensor for name, tensor in model.state_dict().items()}
    lost = [name for name in names if name not in reached]
    if lost:
        raise InputError(f"{ref}: {lost[0]} is not found in it; give the model that it was made from")
    return _module(bare, ref, {name: reached[name] for name in names})


_COMPONENT = re.compile(r"\._original_component(?=\.)")
_BRIDGED = re.compile(r"blocks\.\d+\.attn\.[qkvo]\.weight")


def _unhook(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A HookedTransformer's state dict as (out, in) matrices under the field's names; others unchanged."""
    if any(_BRIDGED.fullmatch(name) for name in tensors):
        problem = "is of a TransformerBridge and does not tell (in, out) from (out, in)"
        raise InputError(f"state dict: {problem}; give the bridge")
    if not any(name.endswith(".attn.W_Q") for name in tensors):
        return dict(tensors)
    _refuse_folded(tensors)
    unhooked = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if name in _EMBEDDINGS:
            unhooked[_EMBEDDINGS[name]] = tensor.mT if leaf == "W_U" else tensor
        elif leaf == "W_gate" and f"{path}.experts.0.W_in.weight" in tensors:
            unhooked[f"{path}.router.weight"] = tensor.mT
        elif leaf in _MATRICES:
            turned = tensor.mT if leaf != "W_O" else tensor.flatten(0, 1).mT
            unhooked[f"{path}.{_MATRICES[leaf]}.weight"] = turned.flatten(0, -2)
        elif leaf.lstrip("_").startswith("b_"):
            unhooked[name] = tensor.flatten()
        elif leaf not in _BUFFERS:
            unhooked[_EXPERT.sub(lambda match: _MATRICES[match[0]], name)] = tensor
    return unhooked


_EMBEDDINGS = {
    "embed.W_E": "embed.weight", "pos_embed.W_pos": "position_embed.weight", "unembed.W_U": "lm_head.weight",
}  # fmt: skip
# W_Q, W_K and W_V are (head, d_model, d_head), W_O is (head, d_head, d_model); the others are for x @ W.
_MATRICES = {
    "W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj", "_W_K": "k_proj", "_W_V": "v_proj", "W_O": "o_proj",
    "W_in": "up_proj", "W_gate": "gate_proj", "W_out": "down_proj",
}  # fmt: skip
_EXPERT = re.compile(r"W_(?:in|gate|out)(?=\.weight$)")
_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "alibi")


def _refuse_folded(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with folded layer norms, or centred ones."""
    mend = "load it with from_pretrained_no_processing, or give the checkpoint that it was made from"
    if not any(re.fullmatch(r"blocks\.\d+\.ln1\.w", name) for name in tensors):
        raise InputError(f"HookedTransformer: its layer norms are folded into the next weights; {mend}")
    for name, tensor in tensors.items():
        if name.endswith((".W_O", ".W_out")):
            # Centred: what is written to the residual stream sums to zero.
            size = tensor.float().abs().mean()
            if size > 0 and tensor.float().mean(dim=-1).abs().max() < 1e-5 * size:
                raise InputError(f"HookedTransformer: {name} is centred; {mend}")
