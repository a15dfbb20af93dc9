"""Verbs that show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finlora.cli.app import app, console
from finlora.machine.host import require_output


@app.command(
    epilog="Examples:\n\n  finlora report ~/finlora/runs --output report/\n\n"
    "  ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/report.py /mnt/runs --output /mnt/report"
)
def report(
    results: Annotated[Path, typer.Argument(help="A results.jsonl file, or a folder of runs.")],
    output: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and plots.")] = None,
) -> None:
    """Show results in one table beside the paper's numbers. Writes HTML, Markdown and plots."""
    from finlora.report.write import render_report
    from finlora.results import list_searches, read_results

    folder = require_output("--output ", output) if output else None
    source = results.expanduser()
    render_report(read_results(source), folder, console, searches=list_searches(source))
