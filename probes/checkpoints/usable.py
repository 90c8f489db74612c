"""What makes a checkpoint unusable, as far as its headers tell.

transformers itself is asked: it loads the headers, without weights, into the model of the config.json.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from probes.adapters.adapter import Adapter
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError, library_error
from probes.files.layout import Header
from probes.files.untrusted import plain
from probes.naming.align import natural_key, without_wrappers

EXPERT = re.compile(r"(?P<stack>.+\.experts\.)(?P<expert>\d{1,9})(?P<rest>\..+)")
KINDS = 2  # of problems in a line
GATHER = (
    "ZeRO-3 leaves them where it does not gather the weights: set stage3_gather_16bit_weights_on_model_save, "
    "or run the zero_to_fp32.py in its checkpoint"
)


@dataclass(frozen=True)
class Problem:
    """Why a model cannot be loaded: `what` is wrong with a tensor, or without one with the checkpoint."""

    tensor: str | None
    what: str

    def __str__(self) -> str:
        return self.what if self.tensor is None else f"{self.tensor} is {self.what}"


def problems(checkpoint: Checkpoint) -> tuple[Problem, ...]:
    """What makes a checkpoint unusable: tensors missing, of size 0, or of another shape than its config says.

    Reads headers alone. What is required is what transformers would report when it loads the checkpoint; of
    architectures that it does not know, and of models in memory, only tensors of size 0 are seen.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_checkpoint
    >>> base = open_checkpoint(BUNDLED / "base")
    >>> problems(base), problems(base.described_by({**base.config, "vocab_size": 8}))[0].what
    ((), '1536x128, and 8x128 by its config.json')
    """
    if isinstance(checkpoint.source, Adapter):
        assert checkpoint.base is not None
        return problems(checkpoint.base)  # an adapter with tensors of size 0 is not opened
    loaded = _loaded(checkpoint) if checkpoint.module is None else None
    return tuple(_empty(checkpoint.headers) if loaded is None else loaded)


def refuse_empty(checkpoint: Checkpoint) -> None:
    """Raise InputError if tensors of size 0 make a checkpoint unusable; only then transformers is asked."""
    if _empty(checkpoint.headers):
        _refuse(checkpoint.ref, problems(checkpoint))


def refuse_empty_factors(ref: str, factors: Mapping[str, Header]) -> None:
    """Raise InputError if an adapter holds tensors of size 0."""
    _refuse(ref, _empty(factors))


def _refuse(ref: str, unusable: Sequence[Problem]) -> None:
    if unusable:
        raise InputError(plain(f"{ref}: cannot be used: {in_a_line(unusable)}; {GATHER}"))


def not_finite(checkpoint: Checkpoint) -> tuple[Problem, ...]:
    """The tensors that hold NaN or infinite values; reads every tensor once.

    >>> from probes import open_checkpoint
    >>> up, norm = torch.eye(2), torch.tensor([1.0, float("nan")])
    >>> not_finite(open_checkpoint({"layers.0.mlp.up_proj.weight": up, "norm.weight": norm}))
    (Problem(tensor='norm.weight', what='NaN or infinite'),)
    """
    source = checkpoint.source
    stored = source.weights if isinstance(source, Adapter) else source

    def holds_some(name: str) -> bool:
        tensor = stored.read(name)
        if tensor.numel() == 0 or not tensor.is_floating_point():
            return False
        # A NaN becomes both extremes, an infinity one of them.
        return not all(extreme.isfinite() for extreme in torch.aminmax(tensor))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        flags = pool.map(holds_some, stored.headers)
        names = [name for name, flag in zip(stored.headers, flags, strict=True) if flag]
    of_base = () if checkpoint.base is None else not_finite(checkpoint.base)
    return (*of_base, *(Problem(name, "NaN or infinite") for name in sorted(names, key=natural_key)))


def in_a_line(unusable: Sequence[Problem]) -> str:
    """Problems of the first kinds, counted, each with its first tensor.

    >>> in_a_line([Problem("a", "missing"), Problem("b", "missing"), Problem("c", "of size 0")])
    '2 tensors are missing, such as a; c is of size 0'
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in unusable:
        kinds.setdefault(problem.what, []).append(problem)
    parts = [
        f"{len(kind)} tensors are {what}, such as {kind[0].tensor}" if kind[1:] else str(kind[0])
        for what, kind in list(kinds.items())[:KINDS]
    ]
    others = sum(map(len, list(kinds.values())[KINDS:]))
    return "; ".join(parts) + (f"; and {others} more" if others else "")


def _empty(headers: Mapping[str, Header]) -> list[Problem]:
    empty = [name for name, h in headers.items() if h.entries == 0 and h.dtype.is_floating_point]
    return [Problem(name, "of size 0") for name in sorted(empty, key=natural_key)]


def _loaded(checkpoint: Checkpoint) -> list[Problem] | None:
    """What transformers misses when it loads the headers; None if it does not know the architecture."""
    import transformers

    # An infinity is written as an object, because JSON has no such number.
    stored = json.loads(json.dumps(dict(checkpoint.config)), object_hook=_number)
    if stored.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    headers = {without_wrappers(name): header for name, header in checkpoint.headers.items()}
    meta = {n: torch.empty(h.shape, dtype=h.dtype, device="meta") for n, h in headers.items()}
    try:
        with silent_transformers():
            config = transformers.CONFIG_MAPPING[stored["model_type"]].from_dict(stored)
            model, report = _model_class(stored, config).from_pretrained(
                None, config=config, state_dict=meta, device_map={"": "meta"}, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # whatever a malformed config makes a library hit
        # A stack of experts that lacks some cannot be put together.
        reason = f"transformers cannot load it by its config.json ({library_error(error)})"
        return [*_empty(headers), *_lacking_experts(headers)] or [Problem(None, reason)]
    # Of buffers that count or index, transformers makes those that a file lacks.
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    # A bare model's file lacks the prefix that the model with a head has.
    prefix = f"{model.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in headers)
    wrong = {name: "missing" for name in report["missing_keys"] if name in floating}
    wrong |= {name: _misshapen(shape, expected) for name, shape, expected in report["mismatched_keys"]}
    stored_name = {name: name.removeprefix(prefix) if bare else name for name in wrong}
    return [Problem(stored_name[name], wrong[name]) for name in sorted(wrong, key=natural_key)]


def _lacking_experts(headers: Mapping[str, Header]) -> list[Problem]:
    """Tensors that one expert of a layer lacks and another has."""
    experts: dict[str, dict[int, set[str]]] = {}
    for name in headers:
        if match := EXPERT.fullmatch(name):
            experts.setdefault(match["stack"], {}).setdefault(int(match["expert"]), set()).add(match["rest"])
    return [
        Problem(f"{stack}{expert}{rest}", "missing")
        for stack, of_stack in experts.items()
        for expert, rests in of_stack.items()
        for rest in sorted(set().union(*of_stack.values()) - rests)
    ]


def _model_class(stored: Mapping[str, Any], config: Any) -> Any:
    """The class that a config.json names, or the bare model where it names none of transformers'."""
    import transformers

    for name in stored.get("architectures") or ():
        model_class = getattr(transformers, str(name), None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
    return transformers.MODEL_MAPPING[type(config)]


def _misshapen(shape: Sequence[int], expected: Sequence[int]) -> str:
    if 0 in shape:
        return "of size 0"
    stored, wanted = ("x".join(map(str, axes)) or "a scalar" for axes in (shape, expected))
    return f"{stored}, and {wanted} by its config.json"


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Without transformers' progress bars, reports and warnings; our own errors name missing weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _number(value: dict[str, Any]) -> Any:
    """The number that transformers writes as {"__float__": "Infinity"}; other objects are returned as is."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
