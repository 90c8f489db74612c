"""Centred kernel alignment (CKA) of two kernels, and alignment of a kernel with labels.

Sources: Kornblith et al., arXiv:1905.00414 (CKA); Song et al. 2012 (the unbiased estimate); Kumar et al.,
arXiv:2310.06110 (kernel–task alignment, in its standard form: its own normalisation could not be checked).
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
    """The kernel of centred features."""
    return K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean()


def cka(K: Kernel, M: Kernel) -> float:
    """Centred kernel alignment: 1 for kernels that differ by a factor; NaN where one has no spread.

    Few rows in many dimensions give unrelated kernels a high value too: their diagonals agree.

    >>> round(cka(np.diag([1.0, 2.0, 3.0]), np.diag([2.0, 4.0, 6.0])), 6)
    1.0
    """
    return _cosine(centred(K), centred(M))


def debiased_cka(K: Kernel, M: Kernel) -> float:
    """CKA without the diagonals: 0 on average for unrelated kernels; NaN below 4 rows."""
    if len(K) < LEAST:
        return math.nan
    size = hsic(K, K) * hsic(M, M)
    return hsic(K, M) / math.sqrt(size) if size > 0 else math.nan


def alignment(K: Kernel, labels: Sequence[Hashable]) -> float:
    """Kernel–task alignment ⟨K, YYᵀ⟩ / (‖K‖ ‖YYᵀ‖), with one centred column of Y for each class.

    For two classes it is yᵀKy / (‖K‖ ‖y‖²), y being the centred label. NaN for a single class.
    """
    classes = list(dict.fromkeys(labels))
    Y = np.array([[label == kind for kind in classes] for label in labels], float)
    Y -= Y.mean(axis=0)
    return _cosine(K, Y @ Y.T)


def _cosine(K: Kernel, M: Kernel) -> float:
    size = float(np.linalg.norm(K) * np.linalg.norm(M))
    # Centring a kernel without spread leaves round-off.
    return float((K * M).sum()) / size if size > 1e-300 else math.nan
