"""The audit of a pair or a series: run the analyses, judge them, keep the results."""

from diagnostics.audit.run import audit as audit
