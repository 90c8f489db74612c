"""Gradients of one micro-batch, added whole or not at all, without ever holding all of its logits.

The head is differentiated a chunk of positions at a time, as it is run elsewhere; what it passes back goes
through the body at once. A weight gets its gradient once a micro-batch, also one that body and head share.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from probes.models.body import inputs, padding_known, run, unwrapped
from probes.passes.batched import not_finite
from probes.passes.scores import at_once
from probes.text.batches import Batch


class GradientAccumulator:
    """Adds gradients to the weights of a model that require them, while it is entered.

    Each of the three losses gives its sum over a micro-batch in nats, and adds `weight` times its gradient.
    They raise NonFiniteError for logits that are NaN or infinite, and then have added nothing.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._given: set[nn.Parameter] = set()  # what has its gradient of the present micro-batch
        self._stack = ExitStack()

    def __enter__(self) -> "GradientAccumulator":
        for weight in self._weights:
            # Behind the hooks that are there: what these have not finished does not count as given.
            self._stack.callback(weight.register_post_accumulate_grad_hook(self._given.add).remove)
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def classes(self, batch: Batch, classes: Int[Tensor, " rows"], weight: float) -> float:
        """A sequence classifier: minus the log-probability of each row's class."""
        inner = unwrapped(self._model)
        given = inputs(inner, batch)
        with torch.enable_grad():
            with padding_known(inner, given):
                logits = widened(inner(**given).logits)
            self._require(logits.isfinite().all(dim=1), torch.arange(len(classes)), batch)
            nats = cross_entropy(logits, classes.to(logits.device), reduction="sum")
            self._add([nats * weight], [None])
        return nats.item()

    def tokens(
        self, batch: Batch, targets: Int[Tensor, " scored"], weight: float, *, masked: bool = False
    ) -> float:
        """A language model: minus the log-likelihood of the tokens that are scored.

        Args:
            targets: these tokens, row by row.
            masked: the model sees a place when it is asked what is there, and not the place before.
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
        """A language model: minus the log-probability of the right one among choices.

        Args:
            targets, masked: as in `tokens`.
            owner: of each sequence, which row of choices it belongs to, and to which choice.
            answers: of each row of choices, the right one.
        """
        scored = batch.scored.nonzero()[:, 0]
        shape = (len(answers), int(owner[:, 1].max()) + 1)
        # Rows may have fewer choices than others.
        there = torch.zeros(shape, dtype=torch.bool).index_put(tuple(owner.T), torch.tensor(True))

        def nats(logs: Float[Tensor, " scored"]) -> Float[Tensor, ""]:
            sums = torch.zeros(shape, dtype=torch.float64, device=logs.device)
            at = tuple(owner[scored].T.to(logs.device))
            sums = sums.index_put(at, logs.double(), accumulate=True)
            sums = sums.masked_fill(~there.to(logs.device), -torch.inf)
            return cross_entropy(sums, answers.to(logs.device), reduction="sum")

        return self._language(batch, targets, weight, masked, nats, linear=False)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Inside, what a micro-batch that failed has given its gradient to requires none: halves follow."""
        frozen = [weight for weight in self._weights if weight in self._given]
        self._given.clear()
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
        """A loss of the log-likelihoods of the tokens that are scored.

        Args:
            linear: the loss is minus their sum.
        """
        rows, places = batch.scored.nonzero(as_tuple=True)
        seen = rows * batch.ids.shape[1] + places - int(not masked)
        with torch.enable_grad():
            passed = run(self._model, batch, differentiable=True)
            if passed.hidden is None or passed.head is None:
                logs = log_likelihoods(passed.logits(seen), targets)
                self._require(logs.isfinite(), rows, batch)
                nats = loss(logs)
                self._add([nats * weight], [None])
                return nats.item()
            hidden, head = passed.hidden, passed.head
            states = hidden.detach().flatten(0, 1)[seen.to(hidden.device)]
            size = at_once(self._model)
            chunks = list(zip(states.split(size), targets.split(size), strict=True))
            slopes: Tensor | None = None
            if not linear:
                # How much each token counts, which is known only when all have been seen.
                first = torch.cat([log_likelihoods(head(some), at).detach() for some, at in chunks])
                self._require(first.isfinite(), rows, batch)
                (slopes,) = torch.autograd.grad(loss(first.requires_grad_()), first)
            back = HeadGradients(hidden, [weight for weight in self._weights if weight.requires_grad])
            found: list[Tensor] = []
            for place, (some, at) in enumerate(chunks):
                leaf = some.requires_grad_(hidden.requires_grad)
                logs = log_likelihoods(head(leaf), at)
                slope = -torch.ones_like(logs) if slopes is None else slopes.split(size)[place]
                back.add(leaf, (logs * slope).sum() * weight)
                found.append(logs.detach())
            logs = torch.cat(found)
            self._require(logs.isfinite(), rows, batch)
            self._add(*back.ends(seen))
            return loss(logs).item()

    def _require(self, finite: Tensor, rows: Int[Tensor, " checked"], batch: Batch) -> None:
        """Nothing, if all is finite."""
        if not finite.all():
            raise not_finite(self._model, batch, int(rows[int((~finite).nonzero()[0, 0])]))

    def _add(self, ends: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Add the gradients of all weights behind the ends of a graph, to each of them once."""
        without = [weight for weight in self._weights if weight.grad is None]
        self._given.clear()
        try:
            if any(end.requires_grad for end in ends):
                torch.autograd.backward(ends, gradients)
        except BaseException:
            # A hook that failed has not taken its gradient.
            for weight in without:
                if weight not in self._given:
                    weight.grad = None
            raise
        self._given.clear()


class HeadGradients:
    """What a head that is differentiated in chunks passes back: to the hidden states, and to its weights."""

    def __init__(self, hidden: Tensor, weights: list[nn.Parameter]):
        self.hidden, self.weights = hidden, weights
        self.states: list[Tensor] = []
        self.own: list[Tensor] = []

    def add(self, states: Tensor, loss: Tensor) -> None:
        """Take the gradient of a chunk's loss."""
        if not loss.requires_grad:
            return
        towards = [states] * states.requires_grad
        found = torch.autograd.grad(loss, [*towards, *self.weights], allow_unused=True)
        if towards:
            self.states.append(found[0])
        own = found[len(towards) :]
        if not self.own:  # which of the weights are the head's is seen now
            self.weights = [
                weight for weight, each in zip(self.weights, own, strict=True) if each is not None
            ]
            self.own = [each for each in own if each is not None]
        else:
            self.own = [total + each for total, each in zip(self.own, own, strict=True)]

    def ends(self, seen: Int[Tensor, " positions"]) -> tuple[list[Any], list[Any]]:
        """Where the body and the head begin, going backward, with the gradients there.

        Args:
            seen: where the hidden states of the chunks stand among all.
        """
        ends: list[Any] = list(self.weights) if self.own else []
        if not self.states:
            return ends, self.own
        gradient = torch.zeros_like(self.hidden)
        gradient.flatten(0, 1)[seen.to(gradient.device)] = torch.cat(self.states)
        return [self.hidden, *ends], [gradient, *self.own]


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_likelihoods(
    logits: Float[Tensor, "positions vocabulary"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, " positions"]:
    """Of a token at each position."""
    return widened(logits).log_softmax(dim=1).gather(1, targets.to(logits.device)[:, None])[:, 0]
