"""Activations of a running model: residual stream, attention patterns, expert routes, one batch at a time.

They are captured through TransformerLens' `TransformerBridge`, under its names, in a copy that shares the
model's weights; its logits are compared with the model's before use. Where the bridge has no adapter for an
architecture, or gives other logits, plain hooks on the blocks give the residual stream.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from probes.checkpoints.checkpoint import nearest
from probes.errors import InputError, UnknownNameError
from probes.models.body import blocks, evaluating, full_pass, inputs, run, shadow, unwrapped
from probes.passes.scores import mean_over_tokens
from probes.text.batches import Batch, halving

NamesFilter: TypeAlias = str | Sequence[str] | Callable[[str], bool]
Keep: TypeAlias = Callable[[str, Tensor, Batch], Any]

# The residual stream before and after a block, and the bridge's other names for both.
RESIDUALS = {"hook_resid_pre": 0, "hook_in": 0, "hook_resid_post": 1, "hook_out": 1}
OUTSIDE = {"embed", "pos_embed", "token_type_embed", "embed_ln", "rotary_emb", "ln_final", "unembed"}
# Largest deviation of logits that counts as round-off, as a share of the largest logit: in float32, and in
# half precision, where two implementations of attention differ by more. Both are ours.
ROUND_OFF, ROUND_OFF_HALF = 1e-4, 0.1


@dataclass(eq=False)
class Capture:
    """A model with hooks that capture activations; `capture` makes one.

    Attributes:
        route: "bridge" or "modules": where the hooks are.
        model: the hooked model: a copy that shares the weights, or the model itself.
        names: of the activations, as the bridge calls them: `blocks.{layer}.hook_resid_post`.
        reason: why the bridge is not used; None if it is.
    """

    route: Literal["bridge", "modules"]
    model: nn.Module
    names: Sequence[str]
    keep: Keep | None
    reason: str | None = None
    unchanged: Callable[[], bool] = lambda: True
    _batch: Batch | None = field(default=None, init=False)
    _values: dict[str, Any] = field(default_factory=dict, init=False)
    _fired: set[str] = field(default_factory=set, init=False)

    def activations(self, batch: Batch | Mapping[str, Any]) -> dict[str, Any]:
        """Run a batch, or a tokenizer's output; its activations by name, as `keep` returns them.

        Residuals are (batch, length, width) and patterns (batch, head, query, key), padding included. Expert
        routes are (batch, length, expert); at padding an index is -1 and a weight 0.

        Raises:
            UnknownNameError: a name that was asked for is not computed.
            RuntimeError: an adapter was switched since `capture` was entered.
        """
        in_blocks = all(_layer(name) >= 0 for name in self.names)
        return self.measured(batch, run if in_blocks else _all_logits)[1]

    def measured(
        self, batch: Batch | Mapping[str, Any], measure: Callable[[nn.Module, Batch], Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The result of `measure(model, batch)`, such as `token_scores`, and the activations during it."""
        if not self.unchanged():
            raise RuntimeError("an adapter was switched on or off; enter capture inside of base() or tuned()")
        batch = Batch.of(batch)
        self._batch, self._values = batch, {}
        try:
            result, values = measure(self.model, batch), self._values
        finally:
            self._batch, self._values = None, {}
        missing = [name for name in self.names if name not in values]
        if missing:
            raise UnknownNameError(f"{type(unwrapped(self.model)).__name__}: {missing[0]} is not computed")
        return result, {name: values[name] for name in self.names}

    def stream(self, batches: Iterable[Batch | Mapping[str, Any]]) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Each batch with its activations; a batch too large for memory is halved."""
        return halving(self.activations, map(Batch.of, batches))

    def see(self, name: str, value: Any) -> None:
        """Take an activation; called by the hooks."""
        value = value[0] if isinstance(value, tuple) else value
        if not isinstance(value, Tensor):
            return
        self._fired.add(name)
        if self._batch is None:
            return
        value, shape = value.detach(), self._batch.ids.shape
        if _inside(name) in RESIDUALS and value.shape[:2] != shape:
            kind, sizes = type(unwrapped(self.model)).__name__, "x".join(map(str, value.shape))
            raise InputError(f"{kind}: {name} is {sizes}, not {shape[0]} rows of {shape[1]} tokens")
        value = _routed(name, value, self._batch)
        self._values[name] = self.keep(name, value, self._batch) if self.keep else value


@contextmanager
def capture(
    model: nn.Module,
    names_filter: NamesFilter,
    *,
    layers: Iterable[int] | None = None,
    keep: Keep | None = None,
) -> Iterator[Capture]:
    """Capture activations of a transformers model or PeftModel, which stays bit for bit as it is.

    Weights may be changed in place inside; an adapter stays on or off as at the start.

    Args:
        names_filter: hook names of TransformerLens, `blocks.3.attn.hook_pattern`, or without the block for
            all layers that have it: `hook_resid_pre`, `hook_resid_post`, `attn.hook_pattern`,
            `mlp.hook_expert_indices`, `mlp.hook_expert_weights`; or a function, asked of every name.
        layers: only these blocks, from 0.
        keep: `keep(name, activation, batch)` is called with each activation at once, and only its result is
            kept, as `pooled` does. Without it all activations of a batch are held.

    Raises:
        UnknownNameError: names or layers that this model does not have; the message tells the nearest.
        InputError: neither the bridge nor plain hooks give these activations; the message says why.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes import open_model
    >>> base = open_model(BUNDLED / "base")
    >>> with capture(base.model, "hook_resid_post", layers=[0]) as captured:
    ...     captured.activations(base.tokenizer(["some text"]))["blocks.0.hook_resid_post"].shape[-1]
    128
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        count = len(blocks(model))
        chosen = list(range(count)) if layers is None else sorted(set(layers))
        if any(layer not in range(count) for layer in chosen):
            raise UnknownNameError(f"layers {chosen}: the model has {count}, counted from 0")
        try:
            captured = _bridged(model, names_filter, chosen, keep)
        except _NoBridgeError as error:
            captured = _plain(model, names_filter, chosen, keep, str(error), stack)
        yield captured


def pooled(name: str, value: Tensor, batch: Batch) -> Tensor:
    """For `keep`: the mean over a row's tokens of (batch, length, width), in float32 on the CPU."""
    return mean_over_tokens(value, batch).cpu()


def expanded(
    names_filter: NamesFilter, layers: Sequence[int], hooks: Collection[str], where: str
) -> list[str]:
    """The hooks that a filter means, layer by layer; raises UnknownNameError if none, or one is missing."""
    chosen: list[str] = []
    if callable(names_filter):
        chosen = [name for name in hooks if names_filter(name)]
    else:
        for name in [names_filter] if isinstance(names_filter, str) else names_filter:
            matches = [name] if name in hooks else [hook for hook in hooks if _inside(hook) == name]
            if not matches:
                raise UnknownNameError(f"{where}: has no {name}; {nearest(name, hooks)}")
            chosen += matches
    inside = [name for name in dict.fromkeys(chosen) if _layer(name) in (-1, *layers)]
    if not inside:
        raise UnknownNameError(f"{where}: none of these names is in the layers {list(layers)}")
    return sorted(inside, key=_layer)


def _parts(names: Iterable[str]) -> set[str] | None:
    """The components of blocks that names need; None if they need the whole bridge."""
    parts: set[str] = set()
    for name in names:
        inside = _inside(name)
        part, dot, _ = inside.partition(".")
        if inside in RESIDUALS:
            continue
        if not dot or part in OUTSIDE:  # an alias of a place inside, or no place in a block
            return None
        parts.add(part)
    return parts


def _inside(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def _layer(name: str) -> int:
    """The block that a name is in; -1 outside of the blocks."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


class _NoBridgeError(Exception):
    """Why the bridge cannot be used; never leaves this module."""


def _bridged(
    model: nn.Module, names_filter: NamesFilter, layers: Sequence[int], keep: Keep | None
) -> Capture:
    """Capture through the bridge, built into a shadow of the model."""
    where, asked = type(unwrapped(model)).__name__, callable(names_filter)
    if callable(names_filter):  # chooses among all names of a whole bridge; only its choice is installed
        names_filter = expanded(names_filter, layers, _bridge(unwrapped(shadow(model)), None)[1], where)
    filters = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    hooked = shadow(model)
    bridge, hooks = _bridge(unwrapped(hooked), _parts(filters))
    names = expanded(filters, layers, hooks, where)
    adapters = _adapters(model)
    captured = Capture("bridge", hooked, names, keep=keep, unchanged=lambda: _adapters(model) == adapters)
    for name in names:
        try:
            bridge.add_hook(name, lambda value, hook, name=name: captured.see(name, value))
        except ValueError as error:  # computed on request only
            if not asked:
                raise InputError(f"{where}: {name} is not captured ({error})") from error
    _same_logits(model, hooked)
    silent = [name for name in names if name not in captured._fired]
    if asked:
        captured.names = [name for name in names if name not in silent]
    elif silent:
        raise _NoBridgeError(f"the bridge does not compute {silent[0]}")
    return captured


def _bridge(inner: Any, parts: set[str] | None) -> tuple[Any, list[str]]:
    """A bridge put into a model, around these components of its blocks alone; and the names of its hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of aliases to parts that are left out
        from transformer_lens.model_bridge.generalized_components import MoEBridge
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        # The bridge's own computations use the weights of the base alone.
        own_code = _NoBridgeError("the bridge would pass over the adapter; merge it into its base")

        def prune(adapter: Any) -> None:
            block = adapter.component_mapping["blocks"]
            adapter.component_mapping = {"blocks": block}
            for name in [name for name in block.submodules if name not in (parts or ())]:
                del block.submodules[name]
                block._modules.pop(name, None)
            if _adapters(inner) and not all(
                isinstance(part, MoEBridge) for part in block.submodules.values()
            ):
                raise own_code

        if parts is None and _adapters(inner):
            raise own_code
        attention = inner.config._attn_implementation
        try:
            hook = None if parts is None else prune
            bridge = build_bridge_from_module(
                inner, type(inner).__name__, hf_config=inner.config, post_adapter_hook=hook
            )
            # Only eager attention gives the patterns; some adapters set it in any case.
            patterns = parts is None or parts - {"mlp"}
            inner.set_attn_implementation("eager" if patterns else attention)
            return bridge, list(bridge.hook_dict)
        except _NoBridgeError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise _NoBridgeError(f"the bridge does not take it ({reason})") from error


def _same_logits(model: nn.Module, hooked: nn.Module) -> None:
    """Compare the logits of bridge and model on a few tokens, the second row padded."""
    vocabulary = unwrapped(model).get_input_embeddings().weight.shape[0]
    ids = (torch.arange(12).view(2, 6) * 7919 + 5) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    probe = Batch.of({"input_ids": ids, "attention_mask": mask})
    expected, bridged = (_all_logits(side, probe).logits for side in (model, hooked))
    if expected.shape[:2] == mask.shape:
        expected, bridged = expected[mask.bool().to(expected.device)], bridged[mask.bool().to(bridged.device)]
    limit = ROUND_OFF if expected.dtype in (torch.float32, torch.float64) else ROUND_OFF_HALF
    expected, bridged = expected.float(), bridged.float().to(expected.device)
    # NaN and infinities of a broken model are left to the readers of its activations.
    size = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    if not torch.allclose(bridged, expected, rtol=0, atol=limit * size, equal_nan=True):
        far = float((bridged - expected).abs().max())
        raise _NoBridgeError(f"the bridge gives other logits, by up to {far:.2g}")


def _all_logits(model: nn.Module, batch: Batch) -> Any:
    """A full forward pass with all logits."""
    inner = unwrapped(model)
    with torch.no_grad():
        if inner.get_output_embeddings() is None:
            return full_pass(inner, batch)  # a classifier finds the last token by a padding id
        return inner(**inputs(inner, batch))


def _adapters(model: nn.Module) -> list[Any]:
    """The active adapters of each layer that has some."""
    return [
        (bool(getattr(module, "disable_adapters", False)), str(module.active_adapter))
        for module in model.modules()
        if hasattr(module, "base_layer") and hasattr(module, "active_adapter")
    ]


def _routed(name: str, value: Tensor, batch: Batch) -> Tensor:
    """An activation as (row, position, …), without routes at padding."""
    if ".mlp." not in name:
        return value
    mask = batch.attention_mask.to(value.device).bool()
    if value.ndim == 2 and len(value) == mask.numel():  # experts get the tokens of all rows in one list
        value = value.unflatten(0, mask.shape)
    at_padding = {"hook_expert_indices": -1, "hook_expert_weights": 0}.get(name.rpartition(".")[2])
    return value if at_padding is None else value.masked_fill(~mask[..., None], at_padding)


def _plain(
    model: nn.Module,
    names_filter: NamesFilter,
    layers: Sequence[int],
    keep: Keep | None,
    reason: str,
    stack: ExitStack,
) -> Capture:
    """Capture the residual stream with hooks on the model's own blocks."""
    where, modules = type(unwrapped(model)).__name__, blocks(model)
    hooks = [f"blocks.{layer}.{name}" for layer in range(len(modules)) for name in RESIDUALS]
    try:
        names = expanded(names_filter, layers, hooks, where)
    except LookupError as error:
        raise InputError(f"{where}: only the residual stream can be captured, as {reason}") from error
    captured = Capture("modules", model, names, keep=keep, reason=reason)
    for name in names:
        hook = _residual_hook(captured, name, RESIDUALS[_inside(name)])
        stack.callback(modules[_layer(name)].register_forward_hook(hook, with_kwargs=True).remove)
    return captured


def _residual_hook(captured: Capture, name: str, after: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple | list) else output
        captured.see(name, out if after else before)

    return hook
