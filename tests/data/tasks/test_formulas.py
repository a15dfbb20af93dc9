"""Formulas over tags: exact, rounded half away from zero, by the expression that the model reads."""

from __future__ import annotations

import pytest

from finlora.data.tasks.formulas import Formula


def make(expression, num_decimals):
    return Formula(name="x", expression=expression, num_decimals=num_decimals)


@pytest.mark.parametrize(
    ("expression", "num_decimals", "values", "answer"),
    [
        ("(Revenues - CostOfRevenue) / Revenues * 100", 1, {"Revenues": 5333, "CostOfRevenue": 3886}, "27.1"),
        ("A / B", 2, {"A": 1, "B": 8}, "0.13"),  # 0.125: half a unit away from zero
        ("A / B", 2, {"A": -1, "B": 8}, "-0.13"),
        ("A / B", 2, {"A": 5, "B": 2}, "2.50"),
        ("A - B", 0, {"A": 3973, "B": 4070}, "-97"),
        ("A / B * 100", 1, {"A": -1, "B": 9000}, "0.0"),  # no minus before a zero
        ("A + B * A", 0, {"A": 10**20, "B": 3}, "4" + 20 * "0"),
    ],
)
def test_answer_is_exact_and_rounded_as_stated(expression, num_decimals, values, answer):
    assert make(expression, num_decimals).answer(values | {"Other": 7}) == answer


def test_tags_come_once_in_the_order_of_the_expression():
    assert make("(Revenues - CostOfRevenue) / Revenues * 100", 1).tags == ("Revenues", "CostOfRevenue")


def test_tag_without_a_number_is_an_error():
    with pytest.raises(KeyError, match="B"):
        make("A / B", 1).answer({"A": 1})
