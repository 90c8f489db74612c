"""The weights of routers: what each expert is chosen by, as a checkpoint's file has them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.checkpoints.checkpoint import Checkpoint, nearest
from probes.errors import InputError, UnknownNameError
from probes.experts.routers import NoRoutersError
from probes.files.layout import Matrix
from probes.naming.families import GAIN_FROM_ONE, NORM_BEFORE_EXPERTS, NORM_BEHIND_EXPERTS


def router_matrices(
    checkpoint: Checkpoint, *, fold_gain: bool = False, routers: Sequence[str] | None = None
) -> Float[np.ndarray, "layers experts width"]:
    """The weights of a checkpoint's routers as its file has them, layer by layer, a row an expert; float32.

    Layers that the model does not run, such as those for predicting several tokens, are left out.

    Args:
        fold_gain: times the gain of the norm before the experts: what a row weighs in the normalised stream.
        routers: modules that are its routers, first to last; without them the names of the file tell.

    Raises:
        NoRoutersError: it has no routers.
        UnknownNameError: it has no router of that name.
        InputError: layers with unlike numbers of experts, or no gain that is known.
    """
    if routers is not None:
        chosen = [_named(checkpoint, name) for name in routers]
    else:
        count = checkpoint.config.get("num_hidden_layers")
        chosen = [
            matrix
            for matrix in checkpoint.matrices.values()
            if matrix.component == "router" and matrix.layer is not None and matrix.rows > 1
            and not (isinstance(count, int) and matrix.layer >= count)
        ]  # fmt: skip
        chosen.sort(key=lambda matrix: matrix.layer or 0)
    if not chosen:
        raise NoRoutersError(f"{checkpoint.ref}: {checkpoint.architecture} has no router among its weights")
    for one, other in pairwise(chosen):
        if routers is None and one.layer == other.layer:
            raise InputError(
                f"{checkpoint.ref}: {one.name} and {other.name} are in one block; name those to be read"
            )
        if (one.rows, one.columns) != (other.rows, other.columns):
            raise InputError(
                f"{checkpoint.ref}: {one.name} is {one.rows}x{one.columns}, {other.name} "
                f"{other.rows}x{other.columns}; only layers with as many experts go together"
            )
    found = []
    for matrix in chosen:
        weight = checkpoint.matrix(matrix.name).float()
        found.append(weight * _gain(checkpoint, matrix) if fold_gain else weight)
    return torch.stack(found).numpy()


def _named(checkpoint: Checkpoint, name: str) -> Matrix:
    """The matrix of a router that was named."""
    found = checkpoint.matrices.get(f"{name}.weight") or checkpoint.matrices.get(name)
    if found is None:
        raise UnknownNameError(
            f"{checkpoint.ref}: has no {name}.weight; {nearest(name, checkpoint.matrices)}"
        )
    return found


def _gain(checkpoint: Checkpoint, matrix: Matrix) -> Float[Tensor, " width"]:
    """The gain of the norm whose output a router is given."""
    start, number, _ = matrix.name.partition(f".{matrix.layer}.")
    for norm in NORM_BEFORE_EXPERTS:
        name = f"{start}{number}{norm}.weight"
        header = checkpoint.headers.get(name)
        if header is None or header.shape != (matrix.columns,):
            continue
        if (
            norm == NORM_BEFORE_EXPERTS[-1]
            and f"{start}{number}{NORM_BEHIND_EXPERTS}.weight" in checkpoint.headers
        ):
            break
        gain = checkpoint.tensor(name).float()
        return gain + 1 if checkpoint.config.get("model_type") in GAIN_FROM_ONE else gain
    raise InputError(
        f"{checkpoint.ref}: no norm is known that stands before {matrix.name}; leave fold_gain out"
    )
