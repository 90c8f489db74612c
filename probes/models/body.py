"""A transformers model taken apart into what running it needs: body, blocks, head and inputs.

A language model is run in two steps, so that logits need never be held for all positions at once: the body
gives the hidden states, and the head turns some of them into logits. The head is the model's own `forward`
around a body that returns what it is told to; logit softcaps and scales are therefore the architecture's own.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.errors import InputError
from probes.text.batches import Batch


@dataclass(frozen=True)
class Pass:
    """One forward pass of the body.

    Attributes:
        hidden: what the head is given (batch, length, width); None if the model does not let it be seen.
        logits: gives the logits of some positions, counted through the flattened batch, in the model's dtype.
        head: gives the logits of hidden states; None where these are not seen.
    """

    hidden: Float[Tensor, "rows length width"] | None
    logits: Callable[[Int[Tensor, " positions"]], Float[Tensor, "positions vocabulary"]]
    head: Callable[[Float[Tensor, "positions width"]], Float[Tensor, "positions vocabulary"]] | None


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel; another model is itself.

    Raises:
        InputError: an adapter that works through the prompt, and not inside the model.
    """
    wrapper: Any = model
    if not hasattr(wrapper, "get_base_model"):
        return model
    if getattr(wrapper.active_peft_config, "is_prompt_learning", False):
        kind = wrapper.active_peft_config.peft_type.value
        raise InputError(f"{kind}: prompt-learning adapters are not run; use LoRA or a full fine-tune")
    return wrapper.get_base_model()


def body(model: nn.Module) -> Any:
    """The part of a model before its head."""
    inner = unwrapped(model)
    part = getattr(inner, inner.base_model_prefix, None)
    if not isinstance(
        part, nn.Module
    ):  # a text model taken out of a larger one keeps the larger one's prefix
        part = getattr(inner, "model", inner)
    # Decoders of the BART family, OPT among them, are called past the model around them.
    return getattr(part, "decoder", part) if not hasattr(part, "encoder") else part


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks, first to last.

    Raises:
        InputError: none are found.
    """
    inner = unwrapped(model)
    count = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    # What transformers calls the decoder is, beside images, the text's.
    for root in (inner.get_decoder() if hasattr(inner, "get_decoder") else None, body(inner)):
        lists = [
            (name.count("."), module)
            for name, module in (root.named_modules() if isinstance(root, nn.Module) else ())
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if lists:
            return min(lists, key=lambda depth: depth[0])[1]
    raise InputError(f"{type(inner).__name__}: has no list of {count} blocks, so that none can be hooked")


def inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model's `forward` is given for a batch, on the device of its embeddings.

    Raises:
        InputError: token ids that the model does not have.
    """
    inner = unwrapped(model)
    known = inspect.signature(inner.forward).parameters
    embeddings = inner.get_input_embeddings().weight
    device, largest = embeddings.device, int(batch.ids.max())
    if largest >= len(embeddings):  # a GPU would only say that an assertion failed
        raise InputError(
            f"{type(inner).__name__}: has {len(embeddings)} tokens, and none with id {largest}; is this its "
            "tokenizer?"
        )
    ids, mask = batch.ids.to(device), batch.attention_mask.to(device)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    # RoBERTa and its kin count positions from the padding id on, and find padding by that id.
    padding = getattr(
        getattr(getattr(body(inner), "embeddings", None), "position_embeddings", None), "padding_idx", None
    )
    if padding is not None:
        given["input_ids"] = ids.masked_fill(mask == 0, padding)
    elif "position_ids" in known:
        given["position_ids"] = batch.position_ids.to(device)
    for switch in ("use_cache", "output_router_logits"):
        if switch in known:
            given[switch] = False
    return given


@contextmanager
def padding_known(inner: Any, given: dict[str, Any]) -> Iterator[None]:
    """Let a classifier that pools at the last token find it: it looks for the padding id, and may have none.

    Raises:
        InputError: it has none, and all ids are in use.
    """
    config, padding = inner.config.get_text_config(), given["attention_mask"] == 0
    own = config.pad_token_id
    if own is None:
        used = set(given["input_ids"][~padding].tolist())
        free = next((i for i in range(config.vocab_size) if i not in used), None)
        if free is None and padding.any():
            raise InputError(
                f"{type(inner).__name__}: set pad_token_id in its config.json, to find the last token"
            )
        config.pad_token_id = -1 if free is None else free
    given["input_ids"] = given["input_ids"].masked_fill(padding, config.pad_token_id)
    try:
        yield
    finally:
        config.pad_token_id = own


def run(model: nn.Module, batch: Batch, *, differentiable: bool = False) -> Pass:
    """Run the body of a language model on a batch.

    Args:
        differentiable: record what is computed, here and when the head is asked.
    """
    inner = unwrapped(model)
    part = body(inner)
    given = inputs(inner, batch)
    forward, headed = part.forward, inner.get_output_embeddings() is not None
    outputs: list[Any] = []

    def seen(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        outputs.append(output)
        # The head gets one position here, for nothing; a classifier's picks its own and costs little.
        return _with_hidden(output, output[0][:, :1]) if headed else output

    with torch.set_grad_enabled(differentiable):
        if part is not inner:
            with calling(part, seen):
                whole = inner(**given)
        if not outputs:
            whole = inner(**given)
            logits = whole.logits.flatten(0, 1)
            return Pass(None, lambda positions: logits[positions.to(logits.device)], None)
    hidden, stub = outputs[0][0], given["input_ids"][:1, :1]

    def head(states: Float[Tensor, "positions width"]) -> Float[Tensor, "positions vocabulary"]:
        told = _with_hidden(outputs[0], states[None])
        with calling(part, lambda *args, **kwargs: told), torch.set_grad_enabled(differentiable):
            return inner(input_ids=stub).logits[0]

    def logits_at(positions: Int[Tensor, " positions"]) -> Float[Tensor, "positions vocabulary"]:
        return head(hidden.flatten(0, 1)[positions.to(hidden.device)])

    return Pass(hidden, logits_at, head)


def shadow(model: nn.Module) -> Any:
    """A copy that shares the weights: what changes in the modules of one is not seen in the other.

    A weight changed in place changes in both; gradients, hooks, modes and configurations are the copy's own.
    """
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        # Other kinds, such as quantised ones, carry state of their own.
        plain = type(parameter) is nn.Parameter
        shared[id(parameter)] = (
            nn.Parameter(parameter.detach(), parameter.requires_grad) if plain else parameter
        )
    for buffer in model.buffers():
        shared[id(buffer)] = buffer.detach()
    for module in model.modules():
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if offloaded is not None:
            shared[id(offloaded)] = offloaded
    return copy.deepcopy(model, shared)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are off inside; each module has its own mode again outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` in place of a module's own."""
    own = module.__dict__.get("forward")  # accelerate puts one there
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """A body's output with other hidden states."""
    if isinstance(output, tuple):
        return hidden, *output[1:]
    return type(output)(**{**output, "last_hidden_state": hidden})
