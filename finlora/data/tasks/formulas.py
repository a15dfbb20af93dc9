"""Formulas over the tags of a filing, parsed, evaluated exactly and rounded as stated."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_OPERATIONS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Formula:
    """A named figure and its formula."""

    name: str
    """Name in the question, with the unit: `gross profit margin in per cent`."""
    expression: str
    """Tags, whole numbers, + - * / and parentheses; the model sees exactly this text."""
    num_decimals: int
    """Decimals of the answer; half a unit is rounded away from zero."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the expression, in its order."""
        names = (node for node in ast.walk(ast.parse(self.expression)) if isinstance(node, ast.Name))
        ordered = sorted(names, key=lambda node: node.col_offset)
        return tuple(dict.fromkeys(node.id for node in ordered))

    def answer(self, values: Mapping[str, int]) -> str:
        """Return the rounded figure.

        Args:
            values: number of each tag; extra tags are allowed.
        """
        exact = _evaluate(ast.parse(self.expression, mode="eval").body, values)
        scaled = exact * 10**self.num_decimals
        rounded = math.floor(abs(scaled) + Fraction(1, 2))
        value = Decimal(rounded if scaled > 0 else -rounded).scaleb(-self.num_decimals)
        return f"{value:.{self.num_decimals}f}"


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.Name):
        return Fraction(values[node.id])
    assert isinstance(node, ast.Constant), "formulas are ours: tags, whole numbers and four operations"
    assert isinstance(node.value, int), "formulas are ours: tags, whole numbers and four operations"
    return Fraction(node.value)
