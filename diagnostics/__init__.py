"""What is concluded from models: one module an analysis, and the audit that runs them.

`diagnostics.audit.audit` runs them all; each can be called alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.analysis import Result as Result
    from diagnostics.analysis import analyses as analyses
    from diagnostics.callback import AuditCallback as AuditCallback
    from diagnostics.detector import LikelihoodRatioDetector as LikelihoodRatioDetector
    from diagnostics.drift import representation_drift as representation_drift
    from diagnostics.dynamics import training_dynamics as training_dynamics
    from diagnostics.intruders import intruder_dimensions as intruder_dimensions
    from diagnostics.mitigation import judged_mitigation as judged_mitigation
    from diagnostics.ood import likelihood_ratio_ood as likelihood_ratio_ood
    from diagnostics.path import interpolation_path as interpolation_path
    from diagnostics.pathways import grokking_pathways as grokking_pathways
    from diagnostics.policy import Finding as Finding
    from diagnostics.policy import Policy as Policy
    from diagnostics.policy import default_policy as default_policy
    from diagnostics.policy import load_policy as load_policy
    from diagnostics.sharpness import layer_sharpness as layer_sharpness
    from diagnostics.skills import skill_localization as skill_localization
    from diagnostics.sparsification import abrupt_sparsification as abrupt_sparsification
    from diagnostics.sparsity import essential_sparsity as essential_sparsity
    from diagnostics.store import Audit as Audit
    from diagnostics.store import load as load
    from diagnostics.trajectory import training_trajectory as training_trajectory

# Loaded when asked for: the command line imports this package and must not wait for torch.
EXPORTS = {
    "Audit": "diagnostics.store",
    "AuditCallback": "diagnostics.callback",
    "Finding": "diagnostics.policy",
    "LikelihoodRatioDetector": "diagnostics.detector",
    "Policy": "diagnostics.policy",
    "Result": "diagnostics.analysis",
    "analyses": "diagnostics.analysis",
    "default_policy": "diagnostics.policy",
    "grokking_pathways": "diagnostics.pathways",
    "interpolation_path": "diagnostics.path",
    "essential_sparsity": "diagnostics.sparsity",
    "intruder_dimensions": "diagnostics.intruders",
    "judged_mitigation": "diagnostics.mitigation",
    "layer_sharpness": "diagnostics.sharpness",
    "likelihood_ratio_ood": "diagnostics.ood",
    "load": "diagnostics.store",
    "load_policy": "diagnostics.policy",
    "representation_drift": "diagnostics.drift",
    "skill_localization": "diagnostics.skills",
    "abrupt_sparsification": "diagnostics.sparsification",
    "training_dynamics": "diagnostics.dynamics",
    "training_trajectory": "diagnostics.trajectory",
}
__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'diagnostics' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(EXPORTS)
