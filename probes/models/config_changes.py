"""In what the configurations of base and tuned differ, and what of it changes the function.

The same weights compute something else under another rope base, epsilon, activation or window. Every field
counts as changing the function, but for the few that are listed here: a field that nobody has thought of is
then reported in vain, and not passed over.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeGuard

from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.sources import same_bytes
from probes.models.loading import Loading

# Fields that no logit depends on, of any model.
HARMLESS = frozenset({
    # names, versions and where code is found
    "_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "architectures", "auto_map",
    "tokenizer_class", "finetuning_task", "task_specific_params", "prefix", "unsloth_version",
    "unsloth_fixed",
    # precision, caching, and how the same is computed
    "dtype", "torch_dtype", "use_bfloat16", "use_cache", "cache_implementation", "num_logits_to_keep",
    "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp", "deterministic_flash_attn",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "_experts_implementation",
    "use_mamba_kernels", "use_mambapy", "use_associative_scan", "torchscript",
    # what is returned beside the logits
    "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    # training alone: initialisation and losses
    "initializer_range", "initializer_factor", "initializer_cutoff_factor", "initializer_std", "init_std",
    "embed_init_std", "embedding_initializer_range", "init_device", "rescale_prenorm_residual",
    "problem_type", "router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef", "z_loss_coefficient",
    "mtp_loss_scaling_factor",
    # a number of rows, which the embedding itself has
    "vocab_size",
    # the inverse of id2label
    "label2id",
})  # fmt: skip
# Dropout is off in evaluation, by whatever name. ESM's `token_dropout` is not: it rescales embeddings.
DROPOUT = re.compile(r"(?<!token_)(?:^|_|(?<=layer))(dropout|pdrop|drop|drop_path)(_prob|_rate|_p)?$")
# Only generation reads them, unless a decoder's input is made with them.
TOKEN_IDS = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
})  # fmt: skip
# From these the configuration derives `layer_types`, which is compared itself.
BEHIND_LAYER_TYPES = frozenset({
    "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "use_sliding_window",
})  # fmt: skip
# Rotary embeddings of these types do not depend on the length that they were trained for.
LENGTH_FREE_ROPE = frozenset({"default", "linear", "llama3", "proportional"})
LENGTHS = frozenset({"max_position_embeddings", "original_max_position_embeddings"})
# Steps of Mamba's initialisation; other state space models clamp to them.
STEPS = frozenset({
    "time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme",
})  # fmt: skip
# Every configuration had them once, and was written with them; off, they are as good as not there.
OLDER_DEFAULTS = ("is_decoder", "add_cross_attention", "tie_encoder_decoder", "cross_attention_hidden_size")
# Fields that a message lists.
SHOWN = 4
# The id of the padding decides which position a token has: in RoBERTa, or in a table with a row of zeros.
POSITIONS_FROM_PADDING = re.compile(r"create_position_ids_from_input_ids|padding_idx ?\+|emb\[padding_idx")


@dataclass(frozen=True)
class ConfigChange:
    """A field in which two configurations differ.

    Attributes:
        field: dotted, such as `rope_parameters.rope_theta`.
        base, tuned: its values; None where a configuration has no such field.
        changes_function: equal weights give other logits under the two values.
    """

    field: str
    base: Any
    tuned: Any
    changes_function: bool

    def __str__(self) -> str:
        values = [_shown(value) for value in (self.base, self.tuned)]
        if values[0] == values[1]:
            values = [shorten(repr(value), 60) for value in (self.base, self.tuned)]
        return f"{self.field} ({values[0]} and {values[1]})"


def config_changes(base: Checkpoint, tuned: Checkpoint) -> tuple[ConfigChange, ...]:
    """Every field in which the configurations differ, as transformers understands them.

    Defaults are filled in, and older spellings are brought to today's: `rope_theta` and `rope_scaling` equal
    the same in `rope_parameters`. Where transformers does not know the model, the files are compared as they
    are.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_checkpoint
    >>> base = open_checkpoint(BUNDLED / "base")
    >>> tuned = base.described_by({**base.config, "rms_norm_eps": 0.1, "use_cache": False})
    >>> [(change.field, change.tuned, change.changes_function) for change in config_changes(base, tuned)]
    [('rms_norm_eps', 0.1, True), ('use_cache', False, False)]
    """
    if base.config == tuned.config:
        return ()
    ours, theirs = _understood(base), _understood(tuned)
    if ours is None or theirs is None:
        ours, theirs = _plain(dict(base.config)), _plain(dict(tuned.config))
    elif ours.get("model_type") != theirs.get("model_type"):
        # A model of text and images, and its language model saved alone.
        texts = [config.get("text_config", config) for config in (ours, theirs)]
        if texts[0].get("model_type") == texts[1].get("model_type"):
            ours, theirs = texts
    return tuple(_compared(ours, theirs, sides=(base, tuned)))


def function_changes(base: Checkpoint, tuned: Checkpoint) -> tuple[ConfigChange, ...]:
    """The fields of `config_changes` under which equal weights give other logits.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_checkpoint
    >>> base = open_checkpoint(BUNDLED / "base")
    >>> print(*function_changes(base, base.described_by({**base.config, "rms_norm_eps": 0.1})))
    rms_norm_eps (1e-06 and 0.1)
    """
    return tuple(change for change in config_changes(base, tuned) if change.changes_function)


def differing(changes: Sequence[ConfigChange]) -> str:
    """The first of some changes as the beginning of a message; the others as a number.

    >>> print(differing([ConfigChange("rms_norm_eps", 1e-6, 1e-5, True)]))
    base and tuned differ in rms_norm_eps (1e-06 and 1e-05)
    """
    shown, more = changes[:SHOWN], len(changes) - SHOWN
    listed = ", ".join(map(str, shown)) + (f" and {more} more" if more > 0 else "")
    return f"base and tuned differ in {listed}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "not set" if value is None else shorten(str(value), 60)


def _understood(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The configuration as transformers completes it; None if transformers does not know the model."""
    try:
        config = Loading(None, None, None, False).config(checkpoint, brought={})
    except InputError:
        return None
    return _completed(_plain(config.to_dict()))


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """As JSON keeps it, so that a tuple equals a list and a key is a text."""
    plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return plain


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """Numbers that models derive where the configuration has none."""
    for name, value in config.items():
        if isinstance(value, dict):
            config[name] = _completed(value)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    if "head_dim" in config and config["head_dim"] is None and heads and hidden:
        config["head_dim"] = hidden // heads
    if "n_inner" in config and config["n_inner"] is None and config.get("n_embd"):
        config["n_inner"] = 4 * config["n_embd"]
    if "rope_type" in config:
        config.pop("type", None)  # its older name
    for name in OLDER_DEFAULTS:
        if not config.get(name):
            config.pop(name, None)
    return config


def _compared(
    base: Mapping[str, Any], tuned: Mapping[str, Any], *, sides: tuple[Checkpoint, Checkpoint],
    inside: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] = (), prefix: str = "",
) -> Iterator[ConfigChange]:  # fmt: skip
    """The changes of two configurations of one model or part of a model; `inside` holds those around them."""
    for name in sorted({*base, *tuned}):
        ours, theirs = base.get(name), tuned.get(name)
        if ours == theirs:
            continue
        if name not in HARMLESS | {"id2label"} and any(isinstance(value, dict) for value in (ours, theirs)):
            parts = [value if isinstance(value, dict) else {} for value in (ours, theirs)]
            around = (*inside, (base, tuned))
            yield from _compared(*parts, sides=sides, inside=around, prefix=f"{prefix}{name}.")
        else:
            changes = _changes_function(name, [*inside, (base, tuned)], sides)
            yield ConfigChange(f"{prefix}{name}", ours, theirs, changes)


def _changes_function(
    name: str, around: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    sides: tuple[Checkpoint, Checkpoint],
) -> bool:  # fmt: skip
    """Whether a field that differs changes the function; the last of `around` are the two that have it."""
    configs = around[-1]
    model_type = next((str(c[1]["model_type"]) for c in reversed(around) if c[1].get("model_type")), "")
    if name in HARMLESS or DROPOUT.search(name):
        return False
    if name == "id2label":
        return _classifies(*sides) and _reordered(*(config.get(name) for config in configs))
    if name in TOKEN_IDS:
        decoding = any(config.get("is_encoder_decoder") for config in around[0])
        pads = name == "pad_token_id" and (
            _classifies(*sides) or POSITIONS_FROM_PADDING.search(_code(model_type, "modeling_*.py"))
        )
        return bool(decoding or pads)
    if name in LENGTHS:
        return not all(_length_free(around, side) for side in (0, 1))
    if name in STEPS:
        return model_type not in ("mamba", "falcon_mamba")
    if name == "tie_word_embeddings":
        return _loses_head(sides, [bool(config.get(name)) for config in configs])
    if name in BEHIND_LAYER_TYPES and all(config.get("layer_types") for config in configs):
        return name in _words(_code(model_type, "modeling_*.py"))
    return not _stray(model_type, name)


def _classifies(*sides: Checkpoint) -> bool:
    """Whether both sides end in a classifier."""
    classes = [str(side.config.get("architectures") or "") for side in sides]
    return all("Classification" in names for names in classes)


def _reordered(base: Any, tuned: Any) -> bool:
    """Whether a class has another number; names alone change nothing."""
    names = [
        [str(labels[index]).casefold() for index in sorted(labels, key=int)] if _is_labels(labels) else []
        for labels in (base, tuned)
    ]
    return len(names[0]) != len(names[1]) or (sorted(names[0]) == sorted(names[1]) and names[0] != names[1])


def _is_labels(labels: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(labels, dict) and all(str(index).isdecimal() for index in labels)


def _length_free(around: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], side: int) -> bool:
    """Whether positions are rotary and do not depend on the longest sequence."""
    text = json.dumps(next((c[side] for c in reversed(around) if "rope_parameters" in c[side]), {}))
    types = re.findall(r'"rope_type": "(\w+)"', text)
    return bool(types) and LENGTH_FREE_ROPE.issuperset(types)


def _loses_head(sides: tuple[Checkpoint, Checkpoint], tied: Sequence[bool]) -> bool:
    """Whether tuned's tied model has no room for base's own head; an untied one has for base's embedding."""
    base = sides[0]
    if tied[0] or not tied[1]:
        return False
    matrices = base.matrices.values()
    heads = [base.tensor(matrix.tensor) for matrix in matrices if matrix.part == "head"]
    embeddings = [base.tensor(matrix.tensor) for matrix in matrices if matrix.component == "embed"]
    return any(not any(_same(head, embedding) for embedding in embeddings) for head in heads)


def _same(head: Tensor, embedding: Tensor) -> bool:
    return head.shape == embedding.shape and head.dtype == embedding.dtype and same_bytes(head, embedding)


def _stray(model_type: str, name: str) -> bool:
    """Whether a field is none of the model's configuration, and no code that runs the model reads it."""
    config_class = _config_class(model_type)
    if config_class is None or hasattr(config_class, name) or name in config_class.__dataclass_fields__:
        return False
    return not any(name in _words(code) for code in (_code(model_type, "*.py"), _shared_code()))


def _words(code: str) -> set[str]:
    return set(re.findall(r"\w+", code))


def _config_class(model_type: str) -> Any:
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:  # whose `get` does not import
        return None
    return transformers.CONFIG_MAPPING[model_type]


@lru_cache(maxsize=8)
def _code(model_type: str, files: str) -> str:
    """The files of transformers that configure and run models of a type."""
    config_class = _config_class(model_type)
    if config_class is None:
        return ""
    directory = Path(inspect.getfile(config_class)).parent
    return "".join(path.read_text(encoding="utf-8") for path in sorted(directory.glob(files)))


@lru_cache(maxsize=1)
def _shared_code() -> str:
    """The files of transformers that models of all types share."""
    from transformers import masking_utils, modeling_layers, modeling_rope_utils, modeling_utils

    modules = (masking_utils, modeling_layers, modeling_rope_utils, modeling_utils)
    return "".join(inspect.getsource(module) for module in modules)
