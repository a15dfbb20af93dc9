"""Quotes found in XBRL fragments: whole tags and numbers, equal where strict accuracy has them equal."""

from __future__ import annotations

import re

import pytest

from finlora.data.grounding import find_quote
from finlora.data.task import Request
from finlora.data.tasks.synthetic import read_synthetic_xbrl
from finlora.data.tasks.xbrl import read_xbrl_tags, read_xbrl_values
from finlora.evaluate.metrics import normalise_free_text

# The first lines are those of a published prompt, with its cut closing tags and its spaces.
FRAGMENT = """<us-gaap:LeaseExtensibleList >http://www.amazon.com/20231231#LeaseLiabilityNoncurrent</>
<us-gaap:DebtExtensibleList >http://fasb.org/us-gaap/2023#LongTermDebtCurrent</>
<us-gaap:AccountsPayableAndAccruedLiabilitiesCurrent >23453000000</>
<us-gaap:AccountsPayableCurrent >23453000</>
<us-gaap:ForeignTax >-6932000000</>
<us-gaap:ParValuePerShare >1.00</>
<nvda:Bookings >7</>
Sales of $1,234,000 on 2023-12-31, up 12 % from 1.1 million; "Net Revenues" are audited."""


def quote(answer, context=FRAGMENT):
    span = find_quote(answer, context)
    return None if span is None else context[slice(*span)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("us-gaap:AccountsPayableCurrent", "us-gaap:AccountsPayableCurrent"),
        ("AccountsPayableCurrent", "us-gaap:AccountsPayableCurrent"),
        (" US-GAAP:accountspayablecurrent.\n", "us-gaap:AccountsPayableCurrent"),
        ("us-gaap:AccountsPayable", None),
        ("PayableCurrent", None),
        ("us-gaap", None),
        # the taxonomy's address is its prefix; a company's address or prefix is not
        ("us-gaap:LongTermDebtCurrent", "LongTermDebtCurrent"),
        ("us-gaap:LeaseLiabilityNoncurrent", None),
        ("us-gaap:Bookings", None),
        ("net  revenues", "Net Revenues"),
    ],
)
def test_tag_occurs_as_a_whole_in_any_case(answer, expected):
    assert quote(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("23453000", "23453000"),
        ("$23,453,000.00", "23453000"),
        ("23453000.", "23453000"),
        ("2345300", None),
        ("-6,932,000,000", "-6932000000"),
        ("6932000000", None),
        ("1", "1.00"),
        ("1.000", "1.00"),
        ("1234000", "$1,234,000"),
        ("234", None),
        # parts of addresses, dates and of numbers with a unit
        ("2023", None),
        ("20231231", None),
        ("31", None),
        ("12", None),
        ("12%", "12 %"),
        ("1.1", None),
        ("$1.10 Million", "1.1 million"),
        ("1100000", None),
    ],
)
def test_number_occurs_as_a_whole_with_sign_and_unit(answer, expected):
    assert quote(answer) == expected


@pytest.mark.parametrize(
    ("answer", "context", "expected"),
    [
        ("5", "5.5", None),
        ("5", "15 or 5,000 or .5 or 5k or 5-6 or 10:5 or 5/6 or x5 or 5% or 5 billion", None),
        ("5", "it rose to 5, then fell", "5"),
        ("5", "it rose to 5.", "5"),
        (".5", "it is 0.50", "0.50"),
        ("-$5", "it is $-5", "$-5"),
        ("-5", "it is −5", "−5"),
        ("5bn", "it is 5 bn", "5 bn"),
        ("0", "it is -0.0", "-0.0"),
        ("2023-12-31", "on 2023-12-31.", "2023-12-31"),
    ],
)
def test_borders_of_numbers(answer, context, expected):
    assert quote(answer, context) == expected


@pytest.mark.parametrize("answer", ["", " ", ".", "us-gaap:", "$", "-", "nothing of the kind", "(.*"])
def test_answer_that_is_not_in_the_context_has_no_quote(answer):
    assert find_quote(answer, FRAGMENT) is None
    assert find_quote(answer, "") is None


def test_element_comes_before_other_occurrences():
    context = '<us-gaap:A decimals="7">6</><us-gaap:B > 7 </> Assets <us-gaap:Assets>8</>'
    assert find_quote("7", context) == (context.index("> 7 <") + 2, context.index("> 7 <") + 3)
    assert quote("assets", context) == "us-gaap:Assets"


def test_positions_are_those_of_the_context_before_lower_casing():
    """Lower case İ has two characters."""
    assert "İ".lower() != "i"
    assert quote("us-gaap:Assets", "İİİ <us-gaap:Assets>") == "us-gaap:Assets"


def read_fragment(prompt):
    (fragment,) = re.findall("```xml(.*?)```", prompt, re.DOTALL)
    return fragment


def assert_found(examples):
    for example in examples:
        found = quote(example.answer, read_fragment(example.prompt))
        assert found is not None, example.id
        assert normalise_free_text(found) == normalise_free_text(example.answer), example.id


def test_every_generated_answer_is_found_and_normalises_to_the_same():
    splits = read_synthetic_xbrl(Request(source=None, variant="as_published", splits="all"))
    assert_found(splits.test)


@pytest.mark.shared_data
@pytest.mark.parametrize("read", [read_xbrl_tags, read_xbrl_values])
def test_every_published_answer_is_found_and_normalises_to_the_same(shared_data, read):
    splits = read(Request(source=shared_data / "xbrl", variant="as_published", splits="all"))
    assert len(splits.train) + len(splits.test) > 150
    assert_found((*splits.train, *splits.test))


def test_answer_of_another_filing_is_not_found():
    """Values of the synthetic filings have three or four digits, so an absent one is told by its digits alone."""
    splits = read_synthetic_xbrl(Request(source=None, variant="as_published", splits="all"))
    for example, other in zip(splits.test[1::2], splits.test[3::2], strict=False):
        fragment = read_fragment(example.prompt)
        assert (quote(other.answer, fragment) is not None) == (f">{other.answer}<" in fragment)
