"""Arithmetic in a search space, such as `lr <= 0.004 * batch_size`. simpleeval evaluates it; eval is never used.

An expression may use numbers, strings, `+ - * / // % **`, comparisons, `and or not`, `a if b else c` and `FUNCTIONS`. Its
length is limited, and so is the size of each value on the way to its result: each operation takes microseconds, and there
are fewer operations than characters.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

MAX_LENGTH = 200  # characters; also limits the evaluator's recursion
MAX_INT_POWER = 1000  # a larger base or exponent is computed in floats
MAX_BITS = 2048  # of an integer; the largest float has 1024
MAX_TEXT = 1000  # characters of a string
MAX_DIGITS = 400  # to which a number is rounded, on either side of the point


def _round(number: Any, digits: int | None = None) -> Any:
    """Round as Python does, which computes 10 ** -digits."""
    if digits is not None and abs(digits) > MAX_DIGITS:
        raise ValueError(f"round to more than {MAX_DIGITS} digits")
    return round(number, digits)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": _round,
    "int": int,
    "float": float,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "floor": math.floor,
    "ceil": math.ceil,
}
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd,
    ast.Eq, ast.NotEq, ast.Gt, ast.Lt, ast.GtE, ast.LtE, ast.And, ast.Or, ast.Not,
)  # fmt: skip
_NODES = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.Name, ast.Load)


class ExpressionError(ValueError):
    """An expression that cannot be parsed or evaluated; the message says why."""


class Expression:
    """A parsed expression that uses only what is allowed.

    Attributes:
        text: the source.
        names: the names of the values that it needs.
        is_condition: whether it is a comparison, or comparisons joined by and, or, not.
        size: the number of its operations, names and literals.

    Raises:
        ExpressionError: it is too long, not an expression, or uses something that is not allowed.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._tree = _parse(text)
        self.size = sum(isinstance(node, ast.expr) for node in ast.walk(self._tree))
        called = {node.func.id for node in ast.walk(self._tree) if isinstance(node, ast.Call)}  # type: ignore[attr-defined]
        used = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}
        self.names = frozenset(used - called)
        self.is_condition = isinstance(self._tree, ast.Compare | ast.BoolOp) or (
            isinstance(self._tree, ast.UnaryOp) and isinstance(self._tree.op, ast.Not)
        )

    def evaluate(self, values: Mapping[str, Any]) -> bool | int | float | str:
        """Return the value of the expression.

        Raises:
            ExpressionError: it has no finite value for these values, such as 1 / 0.
        """
        from simpleeval import InvalidExpression

        self._evaluator.names = dict(values)
        try:
            for name in self.names & values.keys():
                _limited(values[name])
            result = self._evaluator.eval(self.text, previously_parsed=self._tree)
        except (InvalidExpression, ArithmeticError, ValueError, TypeError, RecursionError) as error:
            raise ExpressionError(f"{self.text} cannot be computed: {error}") from None
        if not isinstance(result, bool | int | float | str) or (
            isinstance(result, float) and not math.isfinite(result)
        ):
            raise ExpressionError(f"{self.text} is {result}, which is not a finite number")
        return result

    @cached_property
    def _evaluator(self) -> Any:
        from simpleeval import DEFAULT_OPERATORS, SimpleEval

        operators = {kind: DEFAULT_OPERATORS[kind] for kind in _OPERATORS if kind in DEFAULT_OPERATORS}
        operators |= {ast.Pow: _power, ast.Mod: _modulo}
        return SimpleEval(
            operators={kind: _with_limit(operator) for kind, operator in operators.items()},
            functions={name: _with_limit(function) for name, function in FUNCTIONS.items()},
            names={},
        )


class Formulas:
    """The constraints and the derived values of a space.

    A formula that needs an inactive parameter does not apply: the constraint is met, the derived value is absent.

    Args:
        constraints: comparisons.
        derived: {name: expression}; an expression may use other derived values.
        max_epochs: a value that every expression may use.

    Raises:
        ExpressionError: one of them is not an expression.
        CycleError: the derived values depend on each other in a cycle.
    """

    def __init__(self, constraints: Sequence[str], derived: Mapping[str, str], max_epochs: int) -> None:
        self._constraints = [Expression(text) for text in constraints]
        expressions = {name: Expression(text) for name, text in derived.items()}
        order = topological_order({name: expression.names for name, expression in expressions.items()})
        self._derived = {name: expressions[name] for name in order}
        self._constants = {"max_epochs": max_epochs}

    @property
    def size(self) -> int:
        """The number of operations, names and literals that one configuration needs."""
        return sum(expression.size for expression in [*self._constraints, *self._derived.values()])

    def derive(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the derived values of a configuration.

        Raises:
            ExpressionError: one of them cannot be evaluated.
        """
        known = self._constants | dict(params)
        derived: dict[str, Any] = {}
        for name, expression in self._derived.items():
            if expression.names <= known.keys():
                known[name] = derived[name] = expression.evaluate(known)
        return derived

    def violations(self, params: Mapping[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
        """Return (key path, text) of each constraint that a configuration violates, or that cannot be evaluated."""
        try:
            known = self._constants | dict(params) | self.derive(params)
        except ExpressionError as error:
            return [(("derived",), str(error))]
        found: list[tuple[tuple[str | int, ...], str]] = []
        for i, constraint in enumerate(self._constraints):
            try:
                if constraint.names <= known.keys() and not constraint.evaluate(known):
                    found.append((("constraints", i), constraint.text))
            except ExpressionError as error:
                found.append((("constraints", i), str(error)))
        return found


def topological_order(dependencies: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the names so that each follows the names it depends on. Otherwise the given order is kept.

    Raises:
        CycleError: there is a cycle; `args[1]` holds it.
    """
    TopologicalSorter({name: list(others) for name, others in dependencies.items()}).prepare()  # raises CycleError
    ordered: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in ordered:
            for other in dependencies.get(name, ()):
                visit(other)
            ordered[name] = None

    for name in dependencies:
        visit(name)
    return [name for name in ordered if name in dependencies]


def find_cycle(dependencies: Mapping[str, Iterable[str]]) -> list[str]:
    """Return a cycle of dependencies, with the first name repeated at the end; empty if there is none."""
    try:
        topological_order(dependencies)
    except CycleError as error:
        return list(error.args[1])[::-1]
    return []


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression has at most {MAX_LENGTH} characters, this one has {len(text)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python only warns of `1if x else 2`
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError, Warning) as error:
        why = error.msg if isinstance(error, SyntaxError) else error
        raise ExpressionError(f"{text!r} is not an expression: {why}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            is_known = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
            if not is_known:
                name = ast.unparse(node.func)
                raise ExpressionError(f"{text!r}: there is no function {name!r}, allowed: {', '.join(FUNCTIONS)}")
        is_literal = isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str)
        if not is_literal and not isinstance(node, _NODES + _OPERATORS):
            raise ExpressionError(f"{text!r}: only arithmetic, comparisons and {', '.join(FUNCTIONS)} are allowed")
    return tree


def _with_limit(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function or operator with a limited result. Its arguments are limited: they are results, or were checked."""

    def limited(*arguments: Any) -> Any:
        return _limited(compute(*arguments))

    return limited


def _limited(value: Any) -> Any:
    """Return a value.

    Raises:
        ValueError: it is an integer or a string with which an operation could take long.
    """
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"an integer of more than {MAX_BITS} bits")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"a text of more than {MAX_TEXT} characters")
    return value


def _power(base: Any, exponent: Any) -> Any:
    if max(abs(base), abs(exponent)) > MAX_INT_POWER:
        base = float(base)
    return base**exponent


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):  # string formatting could allocate gigabytes: "%9999999999d" % 1
        raise TypeError("% needs numbers")
    return operator.mod(left, right)
