"""Layer-wise sharpness on the path from base to tuned."""

from diagnostics.analyses.sharpness.analysis import layer_sharpness as layer_sharpness
