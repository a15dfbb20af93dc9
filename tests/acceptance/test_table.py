"""Checks and their table."""

from __future__ import annotations

import json

from acceptance.checks import Checks
from acceptance.table import describe_row, render_markdown, summarise, write_table


def made_checks():
    rows = []
    checks = Checks("ask", rows.append)
    checks.about("finlora ask x", 3.2)
    checks.close("sum", 1.0, 0.999, 0.002)
    checks.at_least("accuracy", 0.6, 0.35)
    checks.about("", 0.0)
    checks.skip("job", "no | dashboard")
    return rows


def test_each_kind_of_check_tells_good_from_bad():
    checks = Checks("x", lambda _row: None)
    assert checks.equal("a", [1], [1])
    assert not checks.equal("a", 1, 2)
    assert checks.at_least("a", 0.5, 0.5)
    assert not checks.at_least("a", 0.5, 0.4999)
    assert not checks.at_least("a", 0.5, float("nan"))
    assert checks.at_most("a", 0.5, 0.5)
    assert not checks.at_most("a", 0.5, float("inf"))
    assert checks.close("a", 1.0, 1.02, 0.0200001)
    assert not checks.close("a", float("inf"), float("inf"), 0.1)
    assert not checks.close("a", 1.0, 1.03, 0.02)
    assert checks.contains("a", "last line", "one\n  the last\nline  ")
    assert not checks.contains("a", "two", "one")
    checks.fail("a", "this", "that")
    assert [row.state for row in checks.rows].count("failed") == 8


def test_summary_counts_states_and_steps():
    assert summarise(made_checks(), 125.4) == "3 checks in 1 steps: 1 ok, 1 failed, 1 skipped. 2:05 in all."


def test_terminal_line_says_state_step_check_and_both_values():
    assert describe_row(made_checks()[1]) == "failed   ask                 accuracy: 0.35 (expected at least 0.6)"


def test_markdown_shows_failures_first_and_a_command_once():
    page = render_markdown(made_checks(), {"ask": 12.6}, "cpu", 20.0)
    failed, everything = page.split("## All checks")
    assert "| ask | `finlora ask x` | accuracy | at least 0.6 | 0.35 | 3 | failed |" in failed
    assert everything.count("`finlora ask x`") == 1
    assert "| ask |  | job |  | no \\| dashboard | 0 | skipped |" in everything
    assert "| ask | 13 |" in everything


def test_files_hold_each_check(tmp_path):
    rows = made_checks()
    write_table(tmp_path, rows, {"ask": 1.0}, "cpu", 1.0)
    read = [json.loads(line) for line in (tmp_path / "acceptance.jsonl").read_text().splitlines()]
    assert [(row["what"], row["state"]) for row in read] == [(row.what, row.state) for row in rows]
    assert (tmp_path / "acceptance.md").read_text().startswith("# Acceptance: cpu\n")
