"""The pathway of a sample through a mixture of experts: which experts, layer by layer, carry most of it.

In each layer experts are ranked by the sample's mean router weight, and the fewest of them are kept that
together hold a share tau of it; the pathway is what is kept, layer after layer. Two samples differ by the
edits that turn one pathway into the other, and one sample's pathway is smooth where consecutive layers send
it to experts whose router rows point the same way.
Source: "Grokking in LLM Pretraining?", arXiv:2506.21551v4. It does not say what the symbols are, nor that
lengths matter: distances are therefore also given as a share of the longer pathway.
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
# Symbols are characters from here on; what lies between the surrogates' ends is none.
FIRST, SURROGATES, BEHIND = 0x4000, 0xD800, 0xE000
# Shares nearer than this are equal: float32 means of one routing differ by less, in whatever batches.
ROUNDING = 1e-6
# Cosines of which none is above are too small to divide by.
TOO_SMALL = 0.05
# Entries of embeddings held at once: 128 MB.
AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class Pathways:
    """The experts that carry each sample.

    Attributes:
        order: experts of each layer by falling weight; of equal ones the lower id first.
        kept: how many of these the pathway has, at least 1.
    """

    order: Int[np.ndarray, "samples layers experts"]
    kept: Int[np.ndarray, "samples layers"]

    def words(self, alphabet: Alphabet = "tagged", layer: int | None = None) -> list[str]:
        """Each sample's pathway as a text whose characters are its symbols.

        Args:
            alphabet: `tagged` has a symbol for each expert of each layer; `shared` one for each id, so that
                expert 3 of one layer equals expert 3 of the next; `chars` is the paper's string itself, ids
                with commas and layers with hyphens between, which renumbering experts changes.
            layer: only this router's, counted from 0.
        """
        samples, layers, experts = self.order.shape
        chosen = range(layers) if layer is None else range(layer, layer + 1)
        if alphabet == "chars":
            return [
                "-".join(",".join(map(str, ranked[at, : count[at]])) for at in chosen)
                for ranked, count in zip(self.order, self.kept, strict=True)
            ]
        first = experts * np.arange(layers) if alphabet == "tagged" else np.zeros(layers, dtype=int)
        codes = FIRST + self.order + first[:, None]
        codes = np.where(codes < SURROGATES, codes, codes + BEHIND - SURROGATES).astype("<u4")
        here = np.arange(experts) < self.kept[..., None]
        at = list(chosen)
        return [codes[row, at][here[row, at]].tobytes().decode("utf-32-le") for row in range(samples)]


def pathways(weights: Weights, tau: float = 0.7) -> Pathways:
    """The shortest prefixes of the ranked experts that reach a share tau of each layer's weight.

    Args:
        weights: of each sample; they need not sum to 1.
        tau: in (0, 1]; the paper's 0.7, beside which it tries 0.5 to 0.8.

    Raises:
        InputError: tau is out of range, or weights are negative, not numbers or all 0 in some layer.
    """
    if not 0 < tau <= 1:
        raise InputError(f"tau is {tau:g}; it is a share of the weight, above 0 and at most 1")
    bad = ~(weights >= 0).all(axis=2) | ~(weights.sum(axis=2) > 0)
    if bad.any():
        sample, layer = (int(place) for place in np.argwhere(bad)[0])
        raise InputError(
            f"sample {sample}: its weights in layer {layer} are negative, not numbers or all 0, so that no "
            "expert carries it; leave it out"
        )
    order = np.argsort(-weights, axis=2, kind="stable")
    shares = np.cumsum(np.take_along_axis(weights, order, axis=2), axis=2, dtype=np.float64)
    shares /= shares[..., -1:]
    kept = 1 + (shares < tau - ROUNDING).sum(axis=2)
    return Pathways(order=order, kept=kept)


def lengths(words: Sequence[str]) -> Int[np.ndarray, " samples"]:
    """Symbols of each pathway."""
    return np.array([len(word) for word in words], dtype=np.int64)


def distances(words: Sequence[str], *, workers: int = 1) -> Int[np.ndarray, "samples samples"]:
    """Fewest insertions, deletions and substitutions between all pairs of pathways.

    Args:
        workers: threads; -1: all.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    # Of one and the same list it computes half of the matrix.
    found = cdist(words, words, scorer=Levenshtein.distance, workers=workers, dtype=np.uint32)
    return np.asarray(found).astype(np.int64)  # unsigned ones cannot be subtracted


def moved(before: Sequence[str], after: Sequence[str]) -> Int[np.ndarray, " samples"]:
    """The distance between two pathways of each sample."""
    from rapidfuzz.distance import Levenshtein

    return np.array(
        [Levenshtein.distance(one, other) for one, other in zip(before, after, strict=True)], dtype=np.int64
    )


def longer(
    one: Int[np.ndarray, " samples"], other: Int[np.ndarray, " others"]
) -> Int[np.ndarray, "samples others"]:
    """Length of the longer of each pair: distances over it are 0 for the same, 1 for nothing in common."""
    return np.maximum.outer(one, other)


def cosines(
    weights: Weights, routers: Float[np.ndarray, "layers experts width"]
) -> Float[np.ndarray, "samples steps"]:
    """Cosine between a sample's routing embeddings in each router's layer and in the next router's.

    The embedding is the sum of the router's rows, which stand for its experts, by the sample's weights.
    Consecutive are layers that have experts, whatever lies between. NaN where an embedding is 0.
    """
    found = np.empty((weights.shape[0], max(weights.shape[1] - 1, 0)))
    chunk = max(1, AT_ONCE // max(1, routers.shape[0] * routers.shape[2]))
    rows = np.asarray(routers, dtype=np.float64)
    for start in range(0, len(weights), chunk):
        at = slice(start, start + chunk)
        embedded = np.einsum("nle,led->nld", weights[at].astype(np.float64), rows, optimize=True)
        norms = np.linalg.norm(embedded, axis=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            embedded /= norms[..., None]
        found[at] = np.einsum("nld,nld->nl", embedded[:, :-1], embedded[:, 1:])
    return found


def smoothness(cosine: Float[np.ndarray, "samples steps"]) -> Float[np.ndarray, " samples"]:
    """Mean cosine of consecutive layers: 1 is a straight way, 0 unrelated layers.

    Raises:
        InputError: there is no consecutive layer.
    """
    if not cosine.shape[1]:
        raise InputError("smoothness compares consecutive layers with experts, and there is one of these")
    return cosine.mean(axis=1)


def gp_inconsistency(cosine: Float[np.ndarray, "samples steps"]) -> Float[np.ndarray, " samples"]:
    """The paper's C = 1 − mean(c) / (max(c) + 1e-8) over the cosines c of consecutive layers.

    As written it grows as routes get erratic, though the paper's table calls it consistency. NaN where the
    largest cosine is not above 0.05, since the ratio then explodes.

    Raises:
        InputError: fewer than 3 layers, of which 2 give 0 whatever the routes.
    """
    if cosine.shape[1] < 2:
        raise InputError(
            f"the paper's consistency divides the cosines of consecutive layers by their largest, and needs "
            f"at least 3 layers with experts; there are {cosine.shape[1] + 1}"
        )
    largest = cosine.max(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 1 - cosine.mean(axis=1) / (largest + 1e-8)
    return np.where(largest > TOO_SMALL, found, np.nan)


def entropies(weights: Weights) -> Float[np.ndarray, "samples layers"]:
    """Entropy in nats of a sample's weights in each layer: 0 one expert, log(experts) all alike."""
    shares = weights.astype(np.float64)
    shares /= shares.sum(axis=2, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=2)


def effective_dimension(
    weights: Float[np.ndarray, "samples experts"], regularisation: float | None = None
) -> float:
    """Tr(H (H + λI)⁻¹) of one layer, H = G Gᵀ of the samples' weights G: between 0 and min(samples, experts).

    A proxy of ours for the paper's, which has a kernel for each expert: these are taken to be 1.

    Args:
        regularisation: λ; None is 1e-3 · Tr(H) / samples (ours: the paper gives none).
    """
    gram = weights.astype(np.float64).T @ weights.astype(np.float64)
    if regularisation is None:
        regularisation = 1e-3 * float(np.trace(gram)) / max(1, len(weights))
    if regularisation <= 0:
        return 0.0
    squared = np.clip(np.linalg.eigvalsh(gram), 0, None)
    return float((squared / (squared + regularisation)).sum())
