"""Skill localization by grafting: which few entries of the update carry what tuning taught."""

from diagnostics.analyses.skills.analysis import skill_localization as skill_localization
