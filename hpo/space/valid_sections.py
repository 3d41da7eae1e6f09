"""The valid sections of a search space, which the rules between sections read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpo.space.expressions import find_cycle
from hpo.space.messages import Problem
from hpo.space.parameters import Parameter, sampling_order
from hpo.space.values import find_when_problems


class InvalidSectionError(Exception):
    """A rule needs a section that is invalid."""


@dataclass(frozen=True)
class ValidSections:
    """The valid sections of a search space that may be invalid as a whole.

    Attributes:
        values: {section: value}, values as in `Space`. Of `parameters`, the valid ones.
        data: {section: value} as in the file, to know which keys are present.
    """

    values: Mapping[str, Any]
    data: Mapping[str, Any]

    def __getitem__(self, section: str) -> Any:
        if section not in self.values:
            raise InvalidSectionError
        return self.values[section]

    def names(self, section: str = "parameters") -> list[str]:
        """Return the names in `parameters` or `derived`, including invalid ones."""
        names = self.data.get(section)
        return list(names) if isinstance(names, Mapping) else []

    def all_parameters(self) -> dict[str, Parameter]:
        """Return all parameters in sampling order. Every one must be valid."""
        parameters: dict[str, Parameter] = self["parameters"]
        if set(self.names()) != set(parameters) or any(conditions_are_consistent(self)):
            raise InvalidSectionError
        return {name: parameters[name] for name in sampling_order(parameters)}


Rule = Callable[[ValidSections], Iterator[Problem]]


def conditions_are_consistent(sections: ValidSections) -> Iterator[Problem]:
    """Each `when` names parameters and values that exist, and no parameter depends on itself."""
    parameters, names = sections["parameters"], sections.names()
    yield from ((("parameters", *path), text) for path, text in find_when_problems(parameters, names))
    cycle = find_cycle({name: parameter.when or () for name, parameter in parameters.items()})
    if cycle:
        yield ("parameters", cycle[0], "when"), f"the conditions form a cycle: {' -> '.join(cycle)}"
