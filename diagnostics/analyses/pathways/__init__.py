"""Grokking pathways: does routing still reorganise after the training rows are memorised, or only drift?"""

from diagnostics.analyses.pathways.analysis import grokking_pathways as grokking_pathways
