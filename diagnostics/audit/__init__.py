"""The audit: the analyses of a pair or a series, run, judged and kept."""

from diagnostics.audit.run import audit as audit
