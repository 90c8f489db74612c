"""Kernels of rows compared: how alike two are, and how well one is aligned with labels.

Sources: Kornblith et al., arXiv:1905.00414 (CKA); Song et al. 2012 (the unbiased estimate); Kumar et al.,
arXiv:2310.06110 (kernel–task alignment, in its standard
form: its own normalisation could not be checked).
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

Kernel = Float[np.ndarray, "rows rows"]

# The unbiased estimate divides by n − 3.
LEAST = 4


def hsic(K: Kernel, M: Kernel) -> float:
    """Unbiased Hilbert–Schmidt independence criterion of two kernels of at least 4 rows."""
    n = len(K)
    K, M = (kernel - np.diag(np.diag(kernel)) for kernel in (K, M))
    k, m = K.sum(axis=0), M.sum(axis=0)
    value = (K * M).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m)
    return float(value / (n * (n - 3)))


def centred(K: Kernel) -> Kernel:
    """The kernel of features less their mean."""
    return K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean()


def cka(K: Kernel, M: Kernel) -> float:
    """Centred kernel alignment: 1 for kernels that differ by a factor; NaN where one has no spread.

    With few rows and features in many dimensions it is high for unrelated kernels too: their diagonals agree.
    """
    return _cosine(centred(K), centred(M))


def debiased_cka(K: Kernel, M: Kernel) -> float:
    """The same without the diagonals: 0 on average for unrelated kernels; NaN of fewer than 4 rows."""
    if len(K) < LEAST:
        return math.nan
    size = hsic(K, K) * hsic(M, M)
    return hsic(K, M) / math.sqrt(size) if size > 0 else math.nan


def alignment(K: Kernel, labels: Sequence[Hashable]) -> float:
    """Kernel–task alignment: ⟨K, YYᵀ⟩ / (‖K‖ ‖YYᵀ‖), Y one column a class, each centred.

    Of two classes it is yᵀKy / (‖K‖ ‖y‖²) with y the centred label. NaN of a single class.
    """
    classes = list(dict.fromkeys(labels))
    Y = np.array([[label == each for each in classes] for label in labels], float)
    Y -= Y.mean(axis=0)
    return _cosine(K, Y @ Y.T)


def _cosine(K: Kernel, M: Kernel) -> float:
    size = float(np.linalg.norm(K) * np.linalg.norm(M))
    # Centring a kernel without spread leaves round-off.
    return float((K * M).sum()) / size if size > 1e-300 else math.nan
