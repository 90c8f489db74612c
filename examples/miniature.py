"""A tiny decoder and its synthetic text, for the miniatures of the papers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

SYMBOLS, CONTEXT, WIDTH, HEADS, LAYERS = 32, 32, 128, 4, 2


class Block(nn.Module):
    """Attention and feed-forward, as six separate linear layers without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.fc_in = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.fc_out = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One block of the residual stream (batch, time, width)."""
        h = self.attention_norm(x)
        q, k, v = (
            f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.fc_out(nn.functional.gelu(self.fc_in(self.feed_norm(x))))


class Decoder(nn.Module):
    """A decoder-only transformer over the symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(SYMBOLS, WIDTH)
        self.embed_positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, SYMBOLS, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits of the next symbol (batch, time, symbols)."""
        x = self.embed_tokens(symbols) + self.embed_positions.weight[: symbols.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Source:
    """An order-2 Markov source: the next symbol's logits given the two before."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    @classmethod
    def drawn(cls, generator: torch.Generator, sharpness: float = 1.5) -> "Source":
        """Normal logits; their standard deviation is ours, the entropy about 2.6 nats."""
        return cls(sharpness * torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator))

    def mixed(self, other: "Source", share: float) -> "Source":
        """The log-mixture with `share` of the other."""
        return Source((1 - share) * self.logits + share * other.logits)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sequences (count, CONTEXT + 1): inputs and their successors."""
        symbols = torch.randint(SYMBOLS, (count, CONTEXT + 1), generator=generator)
        chances = self.logits.softmax(-1)
        for t in range(2, CONTEXT + 1):
            now = chances[symbols[:, t - 2], symbols[:, t - 1]]
            symbols[:, t] = torch.multinomial(now, 1, generator=generator)[:, 0]
        return symbols


@dataclass(frozen=True)
class Text:
    """Held-out sequences with the source's probabilities, for losses without sampling noise."""

    symbols: Tensor
    chances: Tensor

    @classmethod
    def of(cls, source: Source, count: int, generator: torch.Generator) -> "Text":
        """Sample `count` sequences; the first symbol of each has too little context and is not scored."""
        symbols = source.sample(count, generator)
        return cls(symbols, source.logits[symbols[:, :-2], symbols[:, 1:-1]].softmax(-1))

    @property
    def entropy(self) -> float:
        """The loss of the source itself, in nats: the lower bound for any model."""
        return float(torch.special.entr(self.chances).sum(-1).mean())

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Expected loss of the model in nats per symbol."""
        logits = model(self.symbols[:, :-1])[:, 1:]
        return float(-(self.chances * logits.log_softmax(-1)).sum(-1).mean())


def batches(source: Source, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches: inputs, successors."""
    while True:
        symbols = source.sample(32, generator)
        yield symbols[:, :-1], symbols[:, 1:]
