"""Likelihood-ratio OOD: the base of a tuned language model shows which texts tuning did not teach it."""

from diagnostics.analyses.ood.analysis import likelihood_ratio_ood as likelihood_ratio_ood
