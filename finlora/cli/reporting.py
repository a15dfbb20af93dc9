"""Verbs that show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finlora.cli.app import app, console


@app.command(epilog="Example:\n\n  finlora report ~/finlora/runs --output report/")
def report(
    results: Annotated[Path, typer.Argument(help="A results.jsonl file, or a folder of runs.")],
    output: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and plots.")] = None,
) -> None:
    """Show results as one table beside the paper's numbers; write HTML, Markdown and plots."""
    from finlora.report import render_report
    from finlora.results import read_results

    render_report(read_results(results.expanduser()), output.expanduser() if output else None, console)
