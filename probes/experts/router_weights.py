"""The weights of routers, as a checkpoint's file has them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint, nearest
from probes.errors import InputError, UnknownNameError
from probes.experts.routers import NoRoutersError, require_one_a_block
from probes.files.layout import Matrix
from probes.naming.families import GAIN_FROM_ONE, NORM_BEFORE_EXPERTS, NORM_BEHIND_EXPERTS


def router_matrices(
    checkpoint: Checkpoint, *, fold_gain: bool = False, routers: Sequence[str] | None = None
) -> Float[np.ndarray, "layers experts width"]:
    """The weights of a checkpoint's routers, layer by layer, a row for each expert; float32.

    Layers that the model does not run, such as those for multi-token prediction, are left out.

    Args:
        fold_gain: multiply by the gain of the norm before the experts, for weights in the normalised stream.
        routers: modules that are its routers, first to last; by default found by name.

    Raises:
        NoRoutersError, UnknownNameError: it has no routers, or none of that name.
        InputError: layers with unlike numbers of experts, or no gain that is known.
    """
    if routers is not None:
        chosen = [_named(checkpoint, name) for name in routers]
    else:
        count = checkpoint.config.get("num_hidden_layers")
        chosen = [
            matrix for matrix in checkpoint.matrices.values()
            if matrix.component == "router" and matrix.layer is not None and matrix.rows > 1
            and not (isinstance(count, int) and matrix.layer >= count)
        ]  # fmt: skip
        chosen.sort(key=lambda matrix: matrix.layer or 0)
    if not chosen:
        raise NoRoutersError(f"{checkpoint.ref}: {checkpoint.architecture} has no router among its weights")
    if routers is None:
        require_one_a_block(checkpoint.ref, chosen)
    for matrix, other in pairwise(chosen):
        if (matrix.rows, matrix.columns) != (other.rows, other.columns):
            raise InputError(
                f"{checkpoint.ref}: {matrix.name} is {matrix.rows}x{matrix.columns}, {other.name} "
                f"{other.rows}x{other.columns}; only layers with equally many experts go together"
            )
    weights = [checkpoint.matrix(matrix.name).float() for matrix in chosen]
    if fold_gain:
        weights = [weight * _gain(checkpoint, matrix) for weight, matrix in zip(weights, chosen, strict=True)]
    return torch.stack(weights).numpy()


def _named(checkpoint: Checkpoint, name: str) -> Matrix:
    matrix = checkpoint.matrices.get(f"{name}.weight") or checkpoint.matrices.get(name)
    if matrix is None:
        names = nearest(name, checkpoint.matrices)
        raise UnknownNameError(f"{checkpoint.ref}: has no {name}.weight; {names}")
    return matrix


def _gain(checkpoint: Checkpoint, matrix: Matrix) -> Float[Tensor, " width"]:
    """The gain of the norm before a router."""
    start, number, _ = matrix.name.partition(f".{matrix.layer}.")
    for norm in NORM_BEFORE_EXPERTS:
        name = f"{start}{number}{norm}.weight"
        header = checkpoint.headers.get(name)
        if header is None or header.shape != (matrix.columns,):
            continue
        behind = f"{start}{number}{NORM_BEHIND_EXPERTS}.weight"
        if norm == NORM_BEFORE_EXPERTS[-1] and behind in checkpoint.headers:
            break
        gain = checkpoint.tensor(name).float()
        return gain + 1 if checkpoint.config.get("model_type") in GAIN_FROM_ONE else gain
    what = f"the norm before {matrix.name} is not recognised; leave fold_gain out"
    raise InputError(f"{checkpoint.ref}: {what}")
