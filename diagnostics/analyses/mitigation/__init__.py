"""Mitigation judged: does damping intruders keep more than scaling the whole update does?"""

from diagnostics.analyses.mitigation.analysis import judged_mitigation as judged_mitigation
