"""The pathway of a sample through a mixture of experts, edit distances and smoothness.

In each layer the fewest experts that hold a share tau of the sample's mean router weight form the pathway.
Source: "Grokking in LLM Pretraining?", arXiv:2506.21551v4. It specifies no symbols and does not discuss
lengths: distances are therefore also given as a share of the longer pathway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from probes.errors import InputError

Alphabet: TypeAlias = Literal["tagged", "shared", "chars"]
Weights: TypeAlias = Float[np.ndarray, "samples layers experts"]

ALPHABETS: tuple[Alphabet, ...] = ("tagged", "shared", "chars")
# Symbols are characters from FIRST on, without the surrogates.
FIRST, SURROGATES, BEHIND = 0x4000, 0xD800, 0xE000
# Shares closer than this are equal: float32 means of one routing differ by less between batch sizes.
ROUNDING = 1e-6
# The paper's consistency is undefined where no cosine is above this.
TOO_SMALL = 0.05
# Embedding entries held at once: 128 MB.
AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class Pathways:
    """Experts of each layer by descending weight (lower id first), and how many are on the pathway."""

    order: Int[np.ndarray, "samples layers experts"]
    kept: Int[np.ndarray, "samples layers"]

    def strings(self, alphabet: Alphabet = "tagged", layer: int | None = None) -> list[str]:
        """Each sample's pathway as a string with one character per symbol.

        Args:
            alphabet: `tagged` has one symbol for each expert of each layer; `shared` one for each id, so that
                expert 3 of one layer equals expert 3 of the next; `chars` is the paper's string, ids joined
                by commas and layers by hyphens, which depends on how experts are numbered.
            layer: restrict to one layer with experts, counted from 0.
        """
        samples, layers, experts = self.order.shape
        chosen = list(range(layers)) if layer is None else [layer]
        if alphabet == "chars":
            return [
                "-".join(",".join(map(str, ranked[at, : count[at]])) for at in chosen)
                for ranked, count in zip(self.order, self.kept, strict=True)
            ]
        first = experts * np.arange(layers) if alphabet == "tagged" else np.zeros(layers, dtype=int)
        codes = FIRST + self.order + first[:, None]
        codes = np.where(codes < SURROGATES, codes, codes + BEHIND - SURROGATES).astype("<u4")
        on_path = np.arange(experts) < self.kept[..., None]
        codes, on_path = codes[:, chosen], on_path[:, chosen]
        return [codes[row][on_path[row]].tobytes().decode("utf-32-le") for row in range(samples)]


def pathways(weights: Weights, tau: float = 0.7) -> Pathways:
    """The fewest top-ranked experts that hold a share tau of each layer's weight.

    Args:
        weights: of each sample; they need not sum to 1.
        tau: in (0, 1]; the paper's is 0.7 (it also tries 0.5 to 0.8).

    Raises:
        InputError: tau is out of range, or weights are negative, NaN or all 0 in some layer.

    >>> pathways(np.array([[[0.1, 0.6, 0.3]]]), tau=0.7).kept
    array([[2]])
    """
    if not 0 < tau <= 1:
        raise InputError(f"tau is {tau:g}; it is a share of the weight, above 0 and at most 1")
    bad = ~(weights >= 0).all(axis=2) | ~(weights.sum(axis=2) > 0)
    if bad.any():
        sample, layer = map(int, np.argwhere(bad)[0])
        raise InputError(
            f"sample {sample}: its weights in layer {layer} are negative, NaN or all 0; leave the sample out"
        )
    order = np.argsort(-weights, axis=2, kind="stable")
    shares = np.cumsum(np.take_along_axis(weights, order, axis=2), axis=2, dtype=np.float64)
    shares /= shares[..., -1:]
    kept = 1 + (shares < tau - ROUNDING).sum(axis=2)
    return Pathways(order=order, kept=kept)


def lengths(strings: Sequence[str]) -> Int[np.ndarray, " samples"]:
    """Number of symbols of each pathway."""
    return np.array([len(string) for string in strings], dtype=np.int64)


def distances(strings: Sequence[str], *, workers: int = 1) -> Int[np.ndarray, "samples samples"]:
    """Levenshtein distances between all pairs of pathways, on some threads (-1: all)."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    # cdist computes half of the matrix where both lists are the same object.
    edits = cdist(strings, strings, scorer=Levenshtein.distance, workers=workers, dtype=np.uint32)
    return np.asarray(edits).astype(np.int64)  # signed, to be subtracted


def moves(before: Sequence[str], after: Sequence[str]) -> Int[np.ndarray, " samples"]:
    """Levenshtein distance between two pathways of each sample."""
    from rapidfuzz.distance import Levenshtein

    return np.array([*map(Levenshtein.distance, before, after)], dtype=np.int64)


def longer(
    first: Int[np.ndarray, " samples"], second: Int[np.ndarray, " others"]
) -> Int[np.ndarray, "samples others"]:
    """Length of the longer of each pair: distance over it is 0 for equal pathways, 1 with nothing shared."""
    return np.maximum.outer(first, second)


def cosines(
    weights: Weights, routers: Float[np.ndarray, "layers experts width"]
) -> Float[np.ndarray, "samples steps"]:
    """Cosine between a sample's routing embeddings in each layer with experts and in the next one.

    The embedding is the sum of the router's rows (one per expert), weighted by the sample's router weights.
    Dense layers in between do not count. NaN where an embedding is 0.
    """
    cosine = np.empty((weights.shape[0], max(weights.shape[1] - 1, 0)))
    chunk = max(1, AT_ONCE // max(1, routers.shape[0] * routers.shape[2]))
    rows = np.asarray(routers, dtype=np.float64)
    for start in range(0, len(weights), chunk):
        at = slice(start, start + chunk)
        embedded = np.einsum("nle,led->nld", weights[at].astype(np.float64), rows, optimize=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            embedded /= np.linalg.norm(embedded, axis=2, keepdims=True)
        cosine[at] = np.einsum("nld,nld->nl", embedded[:, :-1], embedded[:, 1:])
    return cosine


def smoothness(cosine: Float[np.ndarray, "samples steps"]) -> Float[np.ndarray, " samples"]:
    """Mean cosine of consecutive layers: 1 the same direction, 0 unrelated layers."""
    if not cosine.shape[1]:
        raise InputError("smoothness compares consecutive layers with experts; there is only one")
    return cosine.mean(axis=1)


def gp_inconsistency(cosine: Float[np.ndarray, "samples steps"]) -> Float[np.ndarray, " samples"]:
    """The paper's C = 1 − mean(c) / (max(c) + 1e-8) over the cosines c of consecutive layers.

    As written it grows with erratic routes, though the paper calls it consistency. NaN where the largest
    cosine is at most 0.05, since the ratio then explodes. It needs 3 layers: 2 give 0 whatever the routes.
    """
    if cosine.shape[1] < 2:
        raise InputError(
            "the paper's consistency divides the cosines of consecutive layers by their largest; it needs at "
            f"least 3 layers with experts; there are {cosine.shape[1] + 1}"
        )
    largest = cosine.max(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        inconsistency = 1 - cosine.mean(axis=1) / (largest + 1e-8)
    return np.where(largest > TOO_SMALL, inconsistency, np.nan)


def entropies(weights: Weights) -> Float[np.ndarray, "samples layers"]:
    """Entropy in nats of a sample's weights in each layer: 0 for one expert, log(experts) for equal ones."""
    shares = weights.astype(np.float64)
    shares /= shares.sum(axis=2, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=2)


def effective_dimension(
    weights: Float[np.ndarray, "samples experts"], regularisation: float | None = None
) -> float:
    """Tr(H (H + λI)⁻¹) of one layer, H = G Gᵀ with the samples' weights G; at most min(samples, experts).

    A proxy of ours for the paper's, which has a kernel for each expert: here these kernels are 1. λ is
    1e-3 · Tr(H) / samples unless given (ours: the paper gives none).
    """
    gram = weights.astype(np.float64).T @ weights.astype(np.float64)
    if regularisation is None:
        regularisation = 1e-3 * float(np.trace(gram)) / max(1, len(weights))
    if regularisation <= 0:
        return 0.0
    squared = np.clip(np.linalg.eigvalsh(gram), 0, None)
    return float((squared / (squared + regularisation)).sum())
