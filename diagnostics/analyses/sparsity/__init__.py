"""Essential sparsity: how many of the smallest weights can be zeroed before the metric falls."""

from diagnostics.analyses.sparsity.analysis import essential_sparsity as essential_sparsity
