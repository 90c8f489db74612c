"""Abrupt sparsification: does the share of negligible weights jump during a run?"""

from diagnostics.analyses.sparsification.analysis import abrupt_sparsification as abrupt_sparsification
