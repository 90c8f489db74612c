"""A transformers model as body, blocks, head and inputs.

A language model runs in two steps, so that logits are never held for all positions at once: the body computes
hidden states, and the head turns some of them into logits. The head is the model's own `forward` around a
body that returns given states, so that logit softcaps and scales are the architecture's own.
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
        hidden: the input of the head; None, as is `head`, if the model does not expose it.
        logits: from positions in the flattened batch to their logits, in the model's dtype.
    """

    hidden: Float[Tensor, "rows length width"] | None
    logits: Callable[[Int[Tensor, " positions"]], Float[Tensor, "positions vocabulary"]]
    head: Callable[[Float[Tensor, "positions width"]], Float[Tensor, "positions vocabulary"]] | None


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel; any other model unchanged.

    Raises:
        InputError: a prompt-learning adapter, which is not inside the model.
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
    if not isinstance(part, nn.Module):  # a text model from a larger one keeps the larger one's prefix
        part = getattr(inner, "model", inner)
    # Decoders of the BART family, such as OPT, are called directly, not through the model around them.
    return getattr(part, "decoder", part) if not hasattr(part, "encoder") else part


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks, first to last; raises InputError where none are found."""
    inner = unwrapped(model)
    count = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    # In multimodal models, transformers calls the text model the decoder.
    for root in (inner.get_decoder() if hasattr(inner, "get_decoder") else None, body(inner)):
        lists = [
            (name.count("."), module)
            for name, module in (root.named_modules() if isinstance(root, nn.Module) else ())
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if lists:
            return min(lists, key=lambda depth: depth[0])[1]
    raise InputError(f"{type(inner).__name__}: has no list of {count} blocks to hook")


def inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments of a model's `forward` for a batch; raises InputError for token ids that it lacks."""
    inner = unwrapped(model)
    accepted = inspect.signature(inner.forward).parameters
    embeddings = inner.get_input_embeddings().weight
    device, largest = embeddings.device, int(batch.ids.max())
    if largest >= len(embeddings):  # a GPU would only say that an assertion failed
        raise InputError(
            f"{type(inner).__name__}: has {len(embeddings)} tokens, and none with id {largest}; is this its "
            "tokenizer?"
        )
    ids, mask = batch.ids.to(device), batch.attention_mask.to(device)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    # The RoBERTa family counts positions from the padding id on, and finds padding by that id.
    padding = getattr(
        getattr(getattr(body(inner), "embeddings", None), "position_embeddings", None), "padding_idx", None
    )
    if padding is not None:
        arguments["input_ids"] = ids.masked_fill(mask == 0, padding)
    elif "position_ids" in accepted:
        arguments["position_ids"] = batch.position_ids.to(device)
    for switch in ("use_cache", "output_router_logits"):
        if switch in accepted:
            arguments[switch] = False
    return arguments


def full_pass(model: nn.Module, batch: Batch) -> Any:
    """The output of a complete forward pass, with all logits.

    A classifier that pools at the last token finds it by a padding id, if need be an unused one.

    Raises:
        InputError: it has no padding id, and all ids are in use.
    """
    inner = unwrapped(model)
    arguments, config = inputs(inner, batch), inner.config.get_text_config()
    padding, pad_token_id = arguments["attention_mask"] == 0, config.pad_token_id
    if pad_token_id is None:
        used = set(arguments["input_ids"][~padding].tolist())
        free = next((i for i in range(config.vocab_size) if i not in used), None)
        if free is None and padding.any():
            raise InputError(
                f"{type(inner).__name__}: set pad_token_id in its config.json, to find the last token"
            )
        config.pad_token_id = -1 if free is None else free
    try:
        arguments["input_ids"] = arguments["input_ids"].masked_fill(padding, config.pad_token_id)
        return inner(**arguments)
    finally:
        config.pad_token_id = pad_token_id


def run(model: nn.Module, batch: Batch, *, differentiable: bool = False) -> Pass:
    """Run the body of a language model; `differentiable` records this and what its head computes."""
    inner = unwrapped(model)
    part, arguments = body(inner), inputs(inner, batch)
    forward, headed = part.forward, inner.get_output_embeddings() is not None
    outputs: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        outputs.append(output)
        # The head gets one position, which is not used; a classifier's picks its own and costs little.
        return _with_hidden(output, output[0][:, :1]) if headed else output

    with torch.set_grad_enabled(differentiable):
        if part is not inner:
            with replaced_forward(part, record):
                # A classifier finds the last token by a padding id.
                inner(**arguments) if headed else full_pass(model, batch)
        if not outputs:
            logits = inner(**arguments).logits.flatten(0, 1)
            return Pass(None, lambda positions: logits[positions.to(logits.device)], None)
    hidden, stub = outputs[0][0], arguments["input_ids"][:1, :1]

    def head(states: Float[Tensor, "positions width"]) -> Float[Tensor, "positions vocabulary"]:
        output = _with_hidden(outputs[0], states[None])
        with replaced_forward(part, lambda *args, **kwargs: output), torch.set_grad_enabled(differentiable):
            return inner(input_ids=stub).logits[0]

    def logits_at(positions: Int[Tensor, " positions"]) -> Float[Tensor, "positions vocabulary"]:
        return head(hidden.flatten(0, 1)[positions.to(hidden.device)])

    return Pass(hidden, logits_at, head)


def shadow(model: nn.Module) -> Any:
    """A copy that shares the weights, with its own modules, gradients, hooks, modes and configuration.

    A weight changed in place changes in both.
    """
    shared: dict[int, Any] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for parameter in model.parameters():
        # Other kinds, such as quantised ones, carry their own state.
        shared[id(parameter)] = parameter
        if type(parameter) is nn.Parameter:
            shared[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for module in model.modules():
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if offloaded is not None:
            shared[id(offloaded)] = offloaded
        # Hooks such as those of pruning leave a computed weight there, which cannot be copied.
        computed = [value for value in vars(module).values() if isinstance(value, Tensor)]
        shared |= {id(value): value.detach() for value in computed}
        # PEFT keeps views of an embedding's factors beside the head that is tied to it; they are not copied.
        kept = getattr(module, "kwargs", None)
        views = kept.get("tied_adapter") if isinstance(kept, dict) else None
        shared |= {id(view): view.detach() for view in (views or {}).values()}
    return copy.deepcopy(model, shared)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The floating weights, all requiring gradients and without any; restored outside."""
    before = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    try:
        for weight, _, _ in before:
            weight.grad = None
            weight.requires_grad_(weight.is_floating_point())
        yield [weight for weight, _, _ in before if weight.is_floating_point()]
    finally:
        for weight, required, gradient in before:
            weight.requires_grad_(required)
            weight.grad = gradient


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module runs another `forward`."""
    previous = module.__dict__.get("forward")  # accelerate puts one there
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if previous is not None:
            module.__dict__["forward"] = previous


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return hidden, *output[1:]
    return type(output)(**{**output, "last_hidden_state": hidden})
