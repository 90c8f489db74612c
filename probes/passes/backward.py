"""Gradients of one micro-batch, added completely or not at all, without ever holding all of its logits.

The head is differentiated a chunk of positions at a time, then the body once with the gradients of all.
A weight gets its gradient once for each micro-batch, even if body and head share it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from probes.models.body import full_pass, run
from probes.passes.batched import require_finite
from probes.passes.scores import at_once
from probes.text.batches import Batch


class GradientAccumulator:
    """Adds gradients to the weights of a model that require them; a context manager.

    Each of the three losses returns its sum over a micro-batch in nats, and adds `weight` times its gradient.
    For logits that are NaN or infinite they raise NonFiniteError and add nothing.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._accumulated: set[nn.Parameter] = set()  # weights with their gradient of this micro-batch
        self._stack = ExitStack()

    def __enter__(self) -> "GradientAccumulator":
        for weight in self._weights:
            # After the user's hooks: a gradient counts once all of them have run.
            self._stack.callback(weight.register_post_accumulate_grad_hook(self._accumulated.add).remove)
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def classes(self, batch: Batch, classes: Int[Tensor, " rows"], weight: float) -> float:
        """Of a sequence classifier: minus the log-probability of each row's class."""
        with torch.enable_grad():
            logits = widened(full_pass(self._model, batch).logits)
            require_finite(self._model, batch, logits.isfinite().all(dim=1))
            nats = cross_entropy(logits, classes.to(logits.device), reduction="sum")
            self._add([nats * weight], [None])
        return nats.item()

    def tokens(
        self, batch: Batch, targets: Int[Tensor, " scored"], weight: float, *, masked: bool = False
    ) -> float:
        """Of a language model: minus the log-likelihood of the scored tokens, the targets, row by row.

        Args:
            masked: the model predicts a token at its own position, not at the one before.
        """
        return self._language(batch, targets, weight, masked, lambda logs: -logs.double().sum(), linear=True)

    def choices(
        self,
        batch: Batch,
        targets: Int[Tensor, " scored"],
        weight: float,
        owner: Int[Tensor, "sequences 2"],
        answers: Int[Tensor, " wholes"],
        *,
        masked: bool = False,
    ) -> float:
        """Of a language model: minus the log-probability of the right choice of each row, the answers.

        Args:
            owner: of each sequence, its row of choices and its choice.
        """
        scored = batch.scored.nonzero()[:, 0]
        shape = (len(answers), int(owner[:, 1].max()) + 1)
        # Rows may have fewer choices than others.
        exists = torch.zeros(shape, dtype=torch.bool).index_put(tuple(owner.T), torch.tensor(True))

        def nats(logs: Float[Tensor, " scored"]) -> Float[Tensor, ""]:
            sums = torch.zeros(shape, dtype=torch.float64, device=logs.device)
            at = tuple(owner[scored].T.to(logs.device))
            sums = sums.index_put(at, logs.double(), accumulate=True)
            sums = sums.masked_fill(~exists.to(logs.device), -torch.inf)
            return cross_entropy(sums, answers.to(logs.device), reduction="sum")

        return self._language(batch, targets, weight, masked, nats, linear=False)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Inside, weights that have the gradient of a failed micro-batch require none: its halves follow."""
        frozen = [weight for weight in self._weights if weight in self._accumulated]
        self._accumulated.clear()
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

    def _language(
        self,
        batch: Batch,
        targets: Int[Tensor, " scored"],
        weight: float,
        masked: bool,
        loss: Callable[[Tensor], Tensor],
        *,
        linear: bool,
    ) -> float:
        """A loss of the log-likelihoods of the scored tokens; `linear` if it is minus their sum."""
        rows, positions = batch.scored.nonzero(as_tuple=True)
        predicted_at = rows * batch.ids.shape[1] + positions - int(not masked)
        with torch.enable_grad():
            passed = run(self._model, batch, differentiable=True)
            if passed.hidden is None or passed.head is None:
                logs = log_likelihoods(passed.logits(predicted_at), targets)
                require_finite(self._model, batch, logs.isfinite(), rows)
                nats = loss(logs)
                self._add([nats * weight], [None])
                return nats.item()
            hidden, head = passed.hidden, passed.head
            states = hidden.detach().flatten(0, 1)[predicted_at.to(hidden.device)]
            size = at_once(self._model)
            chunks = list(zip(states.split(size), targets.split(size), strict=True))
            slopes: Tensor | None = None
            if not linear:
                # The weight of each token depends on all of them: a first pass without gradients.
                first = torch.cat([log_likelihoods(head(some), at).detach() for some, at in chunks])
                require_finite(self._model, batch, first.isfinite(), rows)
                (slopes,) = torch.autograd.grad(loss(first.requires_grad_()), first)
            back = HeadGradients(hidden, [weight for weight in self._weights if weight.requires_grad])
            chunk_logs: list[Tensor] = []
            for index, (some, at) in enumerate(chunks):
                leaf = some.requires_grad_(hidden.requires_grad)
                logs = log_likelihoods(head(leaf), at)
                slope = -torch.ones_like(logs) if slopes is None else slopes.split(size)[index]
                back.add(leaf, (logs * slope).sum() * weight)
                chunk_logs.append(logs.detach())
            logs = torch.cat(chunk_logs)
            require_finite(self._model, batch, logs.isfinite(), rows)
            self._add(*back.ends(predicted_at))
            return loss(logs).item()

    def _add(self, ends: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Backpropagate from the ends of a graph; each weight gets its gradient once."""
        without = [weight for weight in self._weights if weight.grad is None]
        self._accumulated.clear()
        try:
            if any(end.requires_grad for end in ends):
                torch.autograd.backward(ends, gradients)
        except BaseException:
            # A gradient whose hook failed is not accumulated.
            for weight in without:
                if weight not in self._accumulated:
                    weight.grad = None
            raise
        self._accumulated.clear()


class HeadGradients:
    """Gradients of a head that is differentiated in chunks, in its hidden states and its weights."""

    def __init__(self, hidden: Tensor, weights: list[nn.Parameter]):
        self.hidden, self.weights = hidden, weights
        self.states: list[Tensor] = []
        self.weight_gradients: list[Tensor] = []

    def add(self, states: Tensor, loss: Tensor) -> None:
        """Add the gradient of a chunk's loss."""
        if not loss.requires_grad:
            return
        towards = [states] * states.requires_grad
        gradients = torch.autograd.grad(loss, [*towards, *self.weights], allow_unused=True)
        if towards:
            self.states.append(gradients[0])
        of_weights = gradients[len(towards) :]
        if self.weight_gradients:
            totals = zip(self.weight_gradients, of_weights, strict=True)
            self.weight_gradients = [total + gradient for total, gradient in totals]
        else:  # the first chunk tells which weights are the head's
            used = [gradient is not None for gradient in of_weights]
            self.weights = list(compress(self.weights, used))
            self.weight_gradients = list(compress(of_weights, used))

    def ends(self, positions: Int[Tensor, " positions"]) -> tuple[list[Any], list[Any]]:
        """The tensors from which backpropagation goes on, with their gradients, by the chunks' positions."""
        ends: list[Any] = list(self.weights) if self.weight_gradients else []
        if not self.states:
            return ends, self.weight_gradients
        gradient = torch.zeros_like(self.hidden)
        gradient.flatten(0, 1)[positions.to(gradient.device)] = torch.cat(self.states)
        return [self.hidden, *ends], [gradient, *self.weight_gradients]


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_likelihoods(
    logits: Float[Tensor, "positions vocabulary"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, " positions"]:
    """The log-likelihood of a token at each position."""
    return widened(logits).log_softmax(dim=1).gather(1, targets.to(logits.device)[:, None])[:, 0]
