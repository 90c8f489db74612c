"""Checkpoints as models that run: one model, or base and tuned in turns.

A pair of a base and its adapter has one resident model, with the adapter switched on and off. Of any other
pair one side is resident at a time.
"""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch

from probes.adapters.adapter import Adapter
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.pair import CheckpointPair, Side
from probes.models import loading as load
from probes.models.config_changes import function_changes
from probes.models.loading import Kind, Loading, Runnable, device_of, dtype_of, kind_of, tokenizer_of


def open_model(
    ref: Any,
    *,
    base: Any = None,
    kind: Kind | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Runnable:
    """Load a checkpoint as a model that runs.

    Args:
        ref: what `open_checkpoint` takes; of models in memory those of transformers, and PeftModels.
        base: what an adapter is applied to; by default the base that its configuration names.
        kind: what its head predicts; by default as the configuration says.
        device: "auto" takes a GPU if there is one; None the CPU, or where a model in memory lies.
        dtype: such as "bfloat16"; None as stored.
        device_map: accelerate's, in place of `device`, for a model larger than one GPU: "auto" spreads it.
        trust_remote_code: run code that a repository brings.

    Raises:
        InputError: it is no checkpoint, it has no such head or not all of its weights, it needs its own code.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> open_model(BUNDLED / "lora-r8", base=BUNDLED / "base", dtype="float32").kind
    'causal'
    """
    checkpoint = open_checkpoint(ref, base=base)
    loading = Loading(device_of(device), dtype_of(dtype), device_map, trust_remote_code)
    return loading.model(checkpoint, kind or kind_of(checkpoint))


class RunnablePair:
    """Base and tuned as models that run, in turns.

    Attributes:
        pair: the checkpoints.
        shared: one resident model serves as both, with the adapter off or on.
        base_kind, kind: what the heads of base and tuned predict.
        loading: where and how they are loaded.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import CheckpointPair
    >>> with RunnablePair(CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8")) as runnable:
    ...     with runnable.tuned() as model:
    ...         print(type(model).__name__, runnable.shared)
    PeftModelForCausalLM True
    """

    def __init__(
        self,
        pair: CheckpointPair,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ):
        """Plan how to run a pair; weights are loaded when a side is first entered."""
        self.pair = pair
        self.kind = kind_of(pair.tuned)
        self.shared = _switchable(pair)
        self.base_kind = self.kind if self.shared else kind_of(pair.base)
        self.loading = Loading(device_of(device), dtype_of(dtype), device_map, trust_remote_code)
        self._resident: tuple[Side, Runnable] | None = None
        self._inside: Side | None = None
        # Of two adapters on one base; a single one is on or off, whatever it is called.
        self._names = ("base", "tuned") if self.shared and pair.base.base is not None else ()

    def __enter__(self) -> "RunnablePair":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def base(self) -> AbstractContextManager[Any]:
        """The base's torch model, in evaluation mode."""
        return self._side("base")

    def tuned(self) -> AbstractContextManager[Any]:
        """The tuned torch model, in evaluation mode."""
        return self._side("tuned")

    def close(self) -> None:
        """Free the resident model."""
        self._resident = None
        gc.collect()
        torch.cuda.empty_cache()

    @cached_property
    def tokenizer(self) -> Any:
        """The tuned side's tokenizer: its own, or the base's where an adapter brings none."""
        return tokenizer_of(self.pair.tuned, trust_remote_code=self.loading.trust_remote_code)

    @cached_property
    def base_tokenizer(self) -> Any:
        """The base's tokenizer."""
        return tokenizer_of(self.pair.base, trust_remote_code=self.loading.trust_remote_code)

    @cached_property
    def context(self) -> int | None:
        """Most tokens of a sequence on both sides; None if neither has a limit."""
        return common_context(self.pair, self.loading)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the tuned classifier's classes in order; () for language models."""
        return load.labels_of(self.loading.config(self.pair.tuned)) if self.kind == "classifier" else ()

    @contextmanager
    def _side(self, side: Side) -> Iterator[Any]:
        if self._inside is not None:
            raise RuntimeError(f"{self._inside} is in use, and the two take turns; leave its block first")
        self._inside = side
        try:
            model = self._runnable(side).model
            trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
            with ExitStack() as stack:
                stack.callback(lambda: [p.requires_grad_(flag) for p, flag in trainable.items()])
                if side in self._names:
                    model.set_adapter(side)
                elif self.shared and side == "base" and hasattr(model, "disable_adapter"):
                    stack.enter_context(model.disable_adapter())
                elif self.shared and side == "base":  # transformers' own way of holding an adapter
                    stack.callback(model.enable_adapters)
                    model.disable_adapters()
                yield model.eval()
                model.eval()
        finally:
            self._inside = None

    def _runnable(self, side: Side) -> Runnable:
        if self._resident is not None and (self.shared or self._resident[0] == side):
            return self._resident[1]
        self.close()  # the other side, before this one needs the room
        checkpoint = self.pair.tuned if side == "tuned" or self.shared else self.pair.base
        runnable = self.loading.model(checkpoint, self.kind if side == "tuned" else self.base_kind)
        if self.shared and self.pair.base.base is not None:
            load.inject(runnable.model, self.pair.base, name="base")
        self._resident = side, runnable
        return runnable


def common_context(pair: CheckpointPair, loading: Loading) -> int | None:
    """Most tokens of a sequence on both sides of a pair; None if neither has a limit."""
    sides = (pair.tuned,) if pair.base.config == pair.tuned.config else (pair.base, pair.tuned)
    lengths = [load.context_of(loading.config(side)) for side in sides]
    return min((length for length in lengths if length is not None), default=None)


def _switchable(pair: CheckpointPair) -> bool:
    """Whether switching adapters off and on gives both sides bit for bit."""
    if function_changes(pair.base, pair.tuned):
        return False
    if pair._child:
        return pair.base.base is None and _undone(pair.tuned)
    adapters = [side for side in (pair.base, pair.tuned) if side.base is not None]
    return pair._sibling and all(side.module is None and _undone(side) for side in adapters)


def _undone(checkpoint: Checkpoint) -> bool:
    """Whether PEFT undoes every change of an adapter when it switches the adapter off."""
    source, base = checkpoint.source, checkpoint.base
    assert isinstance(source, Adapter)
    assert base is not None
    # Biases are trained in place, and a vocabulary is resized in place; modules_to_save are copies.
    if source.config.get("bias", "none") != "none":
        return False
    for name, key in source.targets.in_place.items():
        if not torch.equal(base.tensor(name), source.weights.read(key)):
            return False
    copies = set(source.config.get("modules_to_save") or ())
    for name, header in load.brought_by(checkpoint).items():
        original = source.original(name)
        replaced = base.headers.get(original)
        if replaced is not None and replaced.shape != header.shape:
            return False
        copied = not copies.isdisjoint(name.split("."))
        if not copied and (replaced is None or not torch.equal(base.tensor(original), source.stored(name))):
            return False
    return True
