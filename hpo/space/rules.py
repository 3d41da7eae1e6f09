"""Rules between the sections of a search space.

A rule reads only valid sections. Where a section that it needs is invalid, the rule is skipped: the section's own problems
are reported instead. This way one error message has all problems of a file.
"""

from __future__ import annotations

from contextlib import suppress

from hpo.space import configuration_rules, search_rules, training_rules
from hpo.space.grid_size import grid_is_finite
from hpo.space.messages import Problem
from hpo.space.valid_sections import InvalidSectionError, ValidSections

RULES = (grid_is_finite, *search_rules.RULES, *training_rules.RULES, *configuration_rules.RULES)


def check_rules(sections: ValidSections) -> list[Problem]:
    """Return the problems between the sections of a space."""
    found: list[Problem] = []
    for rule in RULES:
        with suppress(InvalidSectionError):
            found += rule(sections)
    return found
