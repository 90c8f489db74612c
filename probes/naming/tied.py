"""What transformers declares of a model's weights: which are one tensor. It is asked without values."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

# PEFT's names of tasks, and the classes of transformers that run them.
TASKS = {"CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING", "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"}


def tied_weights(config: Mapping[str, Any], task: str | None = None) -> dict[str, str] | None:
    """The parameter that each tied parameter of a model shares, as transformers names both.

    Args:
        config: config.json.
        task: of PEFT, such as "SEQ_CLS", where it decides on the model's class; else the config names that.

    Returns:
        {} if nothing is tied; None if transformers does not know the model.

    >>> llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    >>> tied_weights(llama | {"tie_word_embeddings": True}), tied_weights(llama)
    ({'lm_head.weight': 'model.embed_tokens.weight'}, {})
    """
    if not config.get("model_type"):
        return None
    modules = _modules(json.dumps(dict(config), sort_keys=True, default=str), task)
    return dict(modules[0][1].all_tied_weights_keys) if modules else None


def transposed_experts(config: Mapping[str, Any]) -> bool | None:
    """Whether transformers stacks a model's experts as (experts, in, out); None without stacked experts.

    PEFT reads the attribute of the module, which some models that stack them so do not have.
    """
    modules = _modules(json.dumps(dict(config), sort_keys=True, default=str), None)
    flags = [getattr(module, "is_transposed", False) for name, module in modules if name.endswith("experts")]
    return bool(flags[0]) if flags else None


@lru_cache(maxsize=4)
def _modules(config: str, task: str | None) -> list[tuple[str, Any]]:
    """The modules of a model without values, itself first; none if transformers does not know it."""
    import torch
    import transformers

    stored = json.loads(config)
    if stored.get("model_type") not in transformers.CONFIG_MAPPING:
        return []
    try:
        settings = transformers.CONFIG_MAPPING[stored["model_type"]].from_dict(stored)
        architecture = next(iter(stored.get("architectures") or ()), "")
        model_class = getattr(transformers, architecture, None)
        if task in TASKS:
            model_class = getattr(transformers, TASKS[task]).get(type(settings), model_class)
        with torch.device("meta"):
            return list(model_class(settings).named_modules())  # type: ignore[misc]
    except Exception:  # whatever a malformed config makes transformers hit; it is said when the model is run
        return []


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model with no tied weights."""
    changed = {**config, "tie_word_embeddings": False}
    for name, part in config.items():
        if isinstance(part, Mapping) and "tie_word_embeddings" in part:
            changed[name] = {**part, "tie_word_embeddings": False}
    return changed
