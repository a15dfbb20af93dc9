"""Tables on terminals of every width: no figure is cut, broken or left out."""

from __future__ import annotations

import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from finlora.printed_table import print_table

HEADER = ("task", "run", "accuracy", "s/example", "tokens/s")
ROWS = [
    ("synthetic_sentiment", "base\ntiny, 16 bit", "33.3 (29.5–37.0)", "0.0039", "25,156"),
    ("fpb", "demo-4bit-r4", "100.0 (99.1–100.0)", "not measured", "1,234,567"),
]


def printed(width, header, rows, **options):
    stream = io.StringIO()
    print_table(Console(file=stream, width=width), header, rows, **options)
    return stream.getvalue()


def words_of(texts):
    return sorted(word for text in texts for word in text.split() if any(map(str.isdigit, word)))


@pytest.mark.parametrize("width", [20, 28, 40, 60, 80, 100, 140])
def test_figures_stand_whole_at_every_width(width):
    text = printed(width, HEADER, ROWS, title="Cost", numbers=[3])
    assert words_of([text]) == words_of(cell for row in ROWS for cell in row)
    assert max(map(len, text.splitlines())) <= width
    assert text.startswith("Cost\n")


def test_rows_become_lines_of_their_keys_where_columns_do_not_fit():
    lines = [line.rstrip() for line in printed(30, HEADER, ROWS).splitlines()]
    assert lines[:6] == [
        "task: synthetic_sentiment",
        "run: base tiny, 16 bit",
        "accuracy: 33.3 (29.5–37.0)",
        "s/example: 0.0039",
        "tokens/s: 25,156",
        "",
    ]


def test_a_wide_terminal_shows_each_row_on_one_line():
    text = printed(140, ("name", "GiB"), [("weights", "0.50"), ("[peak]", "12.25")], right=[1])
    assert [line.split() for line in text.splitlines() if line.strip()][2:] == [
        ["weights", "0.50"],
        ["[peak]", "12.25"],
    ]
    ends = [line.rstrip() for line in text.splitlines() if "0.50" in line or "12.25" in line]
    assert len(ends[0]) == len(ends[1])


@settings(max_examples=60, deadline=None)
@example(30, [("", "", "", ""), ("", "", "", " 0.0000")])
@given(
    st.integers(20, 90),
    st.lists(st.tuples(*[st.from_regex(r"[a-z]{0,12}( [0-9]{1,6}\.[0-9]{1,4}){0,2}", fullmatch=True)] * 4), max_size=4),
)
def test_no_figure_is_lost_whatever_the_columns(width, rows):
    text = printed(width, ("name", "first one", "second", ""), rows)
    assert words_of([text]) == words_of(cell for row in rows for cell in row)
    assert all(len(line) <= width for line in text.splitlines())
