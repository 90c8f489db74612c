"""What needs one model between base and tuned, where their configurations give two functions."""

from diagnostics.core.analysis import NotApplicableError
from probes import CheckpointPair
from probes.models.config_changes import differing, function_changes

APART = "ood, drift, sparsity and mitigation run each under its own config.json"


def refuse_two_functions(pair: CheckpointPair, *, instead: str = APART) -> None:
    """Raise NotApplicableError if equal weights give other logits under the two configurations.

    Args:
        instead: what can be done with such a pair.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> refuse_two_functions(CheckpointPair(BUNDLED / "base", BUNDLED / "full"))
    """
    changes = function_changes(pair.base, pair.tuned)
    if changes:
        raise NotApplicableError(f"{differing(changes)}, so no weights lead from one to the other; {instead}")


def apart_notes(pair: CheckpointPair) -> list[str]:
    """The note that each side ran under its own configuration; empty where both give one function."""
    changes = function_changes(pair.base, pair.tuned)
    return [f"Each side ran under its own config.json: {differing(changes)}."] if changes else []
