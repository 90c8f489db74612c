"""What transformers makes of a file: the names of a model's parameters, and which of them are one.

The model is built on the meta device, without weights. transformers is imported only when this is asked for.
"""

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from probes.files.layout import Header


@dataclass(frozen=True)
class Architecture:
    """A model as transformers builds it from a config.json.

    Attributes:
        parameters, buffers: by the names in its state dict; of the buffers those that are saved.
        tied: parameters that are another one, by name.
        body: prefix of what is in the model before its head; "" where it is not told apart.
    """

    parameters: Mapping[str, Header]
    buffers: Mapping[str, Header]
    tied: Mapping[str, str]
    body: str
    _model: Any = field(repr=False, compare=False)

    @property
    def transposed_experts(self) -> bool:
        """Whether a module of stacked experts says `is_transposed`: it holds (experts, in, out)."""
        return any(getattr(module, "is_transposed", False) for module in self._model.modules())

    def loaded(self, stored: Collection[str]) -> dict[str, tuple[str, str]]:
        """What transformers calls the tensors of a file when it loads them.

        Two names for each: its own, and that of the parameter that it becomes, or becomes part of where
        transformers stacks or divides it. What the model does not load keeps its name.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )

        state = {**self.parameters, **self.buffers}
        mapping = get_model_conversion_mapping(
            self._model
        )  # anew: groups of renamings remember what they saw
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        names: dict[str, tuple[str, str]] = {}
        for name in sorted(stored, key=dot_natural_key):
            parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if parameter not in state and name in state:
                parameter, pattern = rename_source_key(name, [], [], prefix, state)
            renamed = parameter if pattern is None else apply_renamings(name, renamings)
            if pattern is not None:  # part of a parameter: with the prefix that the parameter got or lost
                bare, _ = rename_source_key(name, renamings, converters)
                if parameter == f"{prefix}.{bare}":
                    renamed = parameter.removesuffix(bare) + renamed
                elif bare == f"{prefix}.{parameter}":
                    renamed = renamed.removeprefix(f"{prefix}.")
            names[name] = (renamed, parameter) if parameter in state else (name, name)
        return names


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a config.json describes; None if transformers does not know it.

    >>> config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_head": 2}
    >>> architecture = architecture_of(config | {"n_layer": 1, "vocab_size": 16})
    >>> architecture.tied
    {'lm_head.weight': 'transformer.wte.weight'}
    >>> architecture.loaded(["h.0.ln_1.weight"])["h.0.ln_1.weight"][0]
    'transformer.h.0.ln_1.weight'
    """
    if not config.get("model_type"):
        return None
    try:
        text = json.dumps(dict(config), sort_keys=True)
    except TypeError:
        return None
    return _built(text)


def names_of_model(config: Mapping[str, Any], stored: Collection[str]) -> list[str]:
    """Those of a file's names under which the model of a config.json has a tensor, by today's spelling.

    >>> names_of_model({"model_type": "gpt2", "n_layer": 1}, ["wte.weight", "h.0.attn.c_attn.weight_mask"])
    ['wte.weight']
    """
    structure = architecture_of(config)
    if structure is None:
        return []
    tensors = {*structure.parameters, *structure.buffers}
    return [name for name, (_, parameter) in structure.loaded(stored).items() if parameter in tensors]


@lru_cache(maxsize=8)
def _built(text: str) -> Architecture | None:
    import torch
    from transformers.utils import logging

    config, level = json.loads(text, object_hook=_number), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = _model(config)
    except Exception:  # a config that transformers cannot build anything from says nothing of names
        return None
    finally:
        logging.set_verbosity(level)
    return None if model is None else _read(model)


def _model(config: dict[str, Any]) -> Any:
    """A model without weights, of the class that the config names."""
    import transformers

    if config["model_type"] not in transformers.CONFIG_MAPPING:
        return None
    settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    for name in config.get("architectures") or ():
        model_class = getattr(transformers, str(name), None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class(settings)
    return transformers.AutoModel.from_config(settings)


def _read(model: Any) -> Architecture:
    inside = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    headers = {name: Header(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return Architecture(
        parameters={name: header for name, header in headers.items() if name in inside},
        buffers={name: header for name, header in headers.items() if name not in inside},
        tied=dict(model.all_tied_weights_keys),
        body=f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or "-") else "",
        _model=model,
    )


def legacy_name(name: str) -> str:
    """A name as the first versions of transformers wrote it, in today's; of any architecture.

    >>> legacy_name("bert.embeddings.LayerNorm.gamma")
    'bert.embeddings.LayerNorm.weight'
    """
    old = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
    return next((name.removesuffix(end) + new for end, new in old.items() if name.endswith(end)), name)


def _number(value: dict[str, Any]) -> Any:
    """The number that transformers writes as {"__float__": "Infinity"}; other objects are returned as is."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
