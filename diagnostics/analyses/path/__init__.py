"""The straight line from base to tuned: is there a better model in between, or a hole?"""

from diagnostics.analyses.path.analysis import interpolation_path as interpolation_path
