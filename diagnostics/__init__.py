"""Analyses of what fine-tuning did to a model, and the audit that runs them.

`diagnostics.audit.audit` runs them all; each can be called alone.
"""

from importlib import import_module
from importlib.metadata import distribution
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.analyses.drift import representation_drift as representation_drift
    from diagnostics.analyses.dynamics import training_dynamics as training_dynamics
    from diagnostics.analyses.integrity import checkpoint_integrity as checkpoint_integrity
    from diagnostics.analyses.intruders import intruder_dimensions as intruder_dimensions
    from diagnostics.analyses.mitigation import judged_mitigation as judged_mitigation
    from diagnostics.analyses.ood import likelihood_ratio_ood as likelihood_ratio_ood
    from diagnostics.analyses.ood.detector import LikelihoodRatioDetector as LikelihoodRatioDetector
    from diagnostics.analyses.path import interpolation_path as interpolation_path
    from diagnostics.analyses.pathways import grokking_pathways as grokking_pathways
    from diagnostics.analyses.sharpness import layer_sharpness as layer_sharpness
    from diagnostics.analyses.skills import skill_localization as skill_localization
    from diagnostics.analyses.sparsification import abrupt_sparsification as abrupt_sparsification
    from diagnostics.analyses.sparsity import essential_sparsity as essential_sparsity
    from diagnostics.analyses.trajectory import training_trajectory as training_trajectory
    from diagnostics.audit.callback import AuditCallback as AuditCallback
    from diagnostics.core.analysis import Result as Result
    from diagnostics.core.policy import Finding as Finding
    from diagnostics.core.policy import Policy as Policy
    from diagnostics.core.policy import default_policy as default_policy
    from diagnostics.core.policy_file import load_policy as load_policy
    from diagnostics.core.registry import installed_analyses as installed_analyses
    from diagnostics.store.audit_store import Audit as Audit
    from diagnostics.store.audit_store import load as load

# Loaded when asked for: the command line imports this package and must not wait for torch. The functions of
# analyses are exported too, as pyproject.toml announces them: `name = "diagnostics.analyses.name:function"`.
EXPORTS = {
    "Audit": "diagnostics.store.audit_store",
    "AuditCallback": "diagnostics.audit.callback",
    "Finding": "diagnostics.core.policy",
    "LikelihoodRatioDetector": "diagnostics.analyses.ood.detector",
    "Policy": "diagnostics.core.policy",
    "Result": "diagnostics.core.analysis",
    "default_policy": "diagnostics.core.policy",
    "installed_analyses": "diagnostics.core.registry",
    "load": "diagnostics.store.audit_store",
    "load_policy": "diagnostics.core.policy_file",
}
EXPORTS |= {
    entry.attr: entry.module
    for entry in distribution("tunescope").entry_points
    if entry.group == "tunescope.analyses"
}
__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'diagnostics' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(EXPORTS)
