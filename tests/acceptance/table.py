"""Table of an acceptance walk: on the terminal, as Markdown and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from acceptance.checks import Row

_HEADER = ("step", "command", "checked", "expected", "found", "s", "state")


def describe_row(row: Row) -> str:
    """Return the terminal's line for a check."""
    expected = f" (expected {row.expected})" if row.expected else ""
    return f"{row.state:7}  {row.step:18}  {row.what}: {row.found}{expected}"


def summarise(rows: Sequence[Row], seconds: float) -> str:
    """Return one line: the number of checks by state, and the total time."""
    counts = {state: sum(row.state == state for row in rows) for state in ("ok", "failed", "skipped")}
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    minutes, rest = divmod(round(seconds), 60)
    return f"{len(rows)} checks in {len({row.step for row in rows})} steps: {told}. {minutes}:{rest:02} in all."


def render_markdown(rows: Sequence[Row], steps: Mapping[str, float], title: str, seconds: float) -> str:
    """Return the page: a summary, the failed checks, all checks, and the seconds of each step."""
    lines = [f"# Acceptance: {title}", "", summarise(rows, seconds), ""]
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        lines += ["## Failed", "", *_table(failed), ""]
    lines += ["## All checks", "", *_table(rows), "", "## Seconds a step", "", "| step | s |", "| --- | --- |"]
    lines += [f"| {name} | {value:.0f} |" for name, value in steps.items()]
    return "\n".join(lines) + "\n"


def write_table(folder: Path, rows: Sequence[Row], steps: Mapping[str, float], title: str, seconds: float) -> None:
    """Write acceptance.md and acceptance.jsonl."""
    (folder / "acceptance.md").write_text(render_markdown(rows, steps, title, seconds), encoding="utf-8")
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    (folder / "acceptance.jsonl").write_text(lines, encoding="utf-8")


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [f"| {' | '.join(_HEADER)} |", f"|{' --- |' * len(_HEADER)}"]
    command = None
    for row in rows:
        # A command with several checks is shown once.
        shown = "″" if row.command == command and command else f"`{_cell(row.command)}`" if row.command else ""
        command = row.command
        cells = (row.step, shown, *map(_cell, (row.what, row.expected, row.found)), f"{row.seconds:.0f}", row.state)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
