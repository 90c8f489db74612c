"""Routes of a mixture of experts: how much of a sample's tokens each router sends to each expert.

A sample's routing is the mean over its tokens of the router's weights, layer by layer; padding never counts.
Source: "Grokking in LLM Pretraining?", arXiv:2506.21551, which leaves open whether the weights are the whole
distribution or those of the chosen experts: both are given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Weights: TypeAlias = Literal["full", "top"]


class NoRoutersError(ValueError):
    """A model without experts to choose among."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """What the routers of a model did with each sample.

    Attributes:
        full: mean over a sample's tokens of all that a router weighs: the softmax over all experts, or the
            sigmoid of each; NaN where the model weighs none but those it chose.
        top: mean of the weights with which the chosen experts are combined, 0 of the others; without scaling
            factors common to all experts. They need not sum to 1.
        tokens: how many tokens of each sample count; where it is 0, `full` and `top` are NaN.
        layers: the block of each router, from 0, rising.
        top_k: experts chosen for a token.
        via: how they were captured: hooks of TransformerLens' bridge, or of the model's own modules.
    """

    full: Float[np.ndarray, "samples layers experts"]
    top: Float[np.ndarray, "samples layers experts"]
    tokens: Int[np.ndarray, " samples"]
    layers: tuple[int, ...]
    top_k: int
    via: Literal["bridge", "modules"] = "modules"

    def select(self, kind: Weights) -> Float[np.ndarray, "samples layers experts"]:
        """The weights of a kind.

        Raises:
            ValueError: there is no such kind, or the model has no weights of it.
        """
        if kind not in ("full", "top"):
            raise ValueError(f"weights are {kind!r}; give full or top")
        if kind == "full" and len(self.full) and np.isnan(self.full[self.tokens > 0]).any():
            raise ValueError(
                "this model weighs only the experts that it chose, so that there is no full distribution; "
                "give top"
            )
        return self.full if kind == "full" else self.top

    def record(self) -> dict[str, np.ndarray]:
        """All of it as plain arrays, which `of` reads."""
        return {
            "full": self.full,
            "top": self.top,
            "tokens": self.tokens,
            "layers": np.array(self.layers, dtype=np.int64),
            "top_k": np.array(self.top_k),
            "bridged": np.array(self.via == "bridge"),
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Routes":
        """Routes out of what `record` gave; other entries are passed over."""
        return cls(
            full=np.asarray(record["full"]),
            top=np.asarray(record["top"]),
            tokens=np.asarray(record["tokens"]),
            layers=tuple(int(layer) for layer in record["layers"]),
            top_k=int(record["top_k"]),
            via="bridge" if bool(record["bridged"]) else "modules",
        )
