"""Integrity: is this the model that you think it is?"""

from diagnostics.analyses.integrity.analysis import checkpoint_integrity as checkpoint_integrity
