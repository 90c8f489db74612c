"""Weights that a model holds as one tensor, as transformers declares them."""

from collections.abc import Mapping
from typing import Any

from probes.naming.architecture import architecture_of

# PEFT's names of tasks, and transformers' classes that run them.
TASKS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


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
    # Vision-language models are adapted for a task that no class of theirs is listed under.
    if task in TASKS and (name := _class_name(config, TASKS[task])):
        config = {**config, "architectures": [name]}
    architecture = architecture_of(config)
    return None if architecture is None else dict(architecture.tied)


def _class_name(config: Mapping[str, Any], auto: str) -> str | None:
    """The class of transformers that runs a model for a task."""
    import transformers

    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    settings = transformers.CONFIG_MAPPING[config["model_type"]]
    classes = getattr(transformers, auto)._model_mapping.get(settings, None)
    first = classes[0] if isinstance(classes, tuple) else classes
    return None if first is None else str(first.__name__)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model with no tied weights."""
    changed = {**config, "tie_word_embeddings": False}
    for name, part in config.items():
        if isinstance(part, Mapping) and "tie_word_embeddings" in part:
            changed[name] = {**part, "tie_word_embeddings": False}
    return changed
