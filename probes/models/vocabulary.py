"""A head that gives the logits of base's vocabulary alone, where tuned's has grown.

One running model of both has tuned's rows. Base itself has no logits for tokens that it does not know, and
must give them no probability.
"""

from typing import Any

from torch import Tensor

from probes.checkpoints.pair import CheckpointPair
from probes.models.body import unwrapped


class BaseVocabulary:
    """Cuts the logits of a running model of tuned's shape to base's vocabulary while `cut` is set.

    Attributes:
        rows: length of base's vocabulary; None if it is not the shorter one.
        cut: whether the model is base.
    """

    def __init__(self, pair: CheckpointPair, model: Any):
        grown = [base for base, tuned in pair.resized.values() if base < tuned]
        self.rows = min(grown, default=None)
        self.cut = False
        head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
        if self.rows is not None and head is not None:
            head.register_forward_hook(self._cut)

    def _cut(self, module: Any, inputs: Any, logits: Tensor) -> Tensor:
        return logits[..., : self.rows] if self.cut else logits
