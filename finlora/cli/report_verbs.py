"""Verbs that show what was measured, here or in a tracking system."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finlora.cli.app import app, console, say
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


@app.command(
    epilog="Examples:\n\n  finlora export mlflow ~/finlora/runs/llama-8b-4bit-r4-fpb\n\n"
    "  finlora export mlflow ~/finlora/runs/search-fpb --to sqlite:////mnt/mlflow.db\n\n"
    "  finlora export wandb ~/finlora/runs/llama-8b-4bit-r4-fpb"
)
def export(
    system: Annotated[Literal["mlflow", "wandb"], typer.Argument(metavar="SYSTEM", help="Tracking system.")],
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a search.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="sqlite:///PATH, `offline` for W&B, or a server's address. Default: that of the run's settings, else mlflow.db "
            "beside the run, or `offline`."
        ),
    ] = None,
) -> None:
    """Log a run to MLflow or W&B that was not tracked there, or what is missing there: settings, loss, scores, files."""
    from finlora.train.search.track_search import export_folder

    store, run_id = export_folder(run.expanduser().absolute(), system, to)
    say(f"{store.title}: run {run_id} of {store.project}")
