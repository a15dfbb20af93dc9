"""Verbs that show what was measured, here or in a tracking system."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finlora.cli.app import Overrides, app, console, load_settings, say
from finlora.errors import ConfigError
from finlora.machine.host import require_output
from finlora.terminal import open_bars


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
    "  finlora export wandb ~/finlora/runs/llama-8b-4bit-r4-fpb\n\n"
    "  finlora export vllm ~/finlora/runs/llama-8b-4bit-r4-fpb/adapter --bits 4 --output ~/finlora/vllm/fpb"
)
def export(
    system: Annotated[
        Literal["mlflow", "wandb", "vllm"],
        typer.Argument(metavar="SYSTEM", help="Tracking system, mlflow or wandb, or the inference server vllm."),
    ],
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a search; for vllm, of an adapter.")],
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="sqlite:///PATH, `offline` for W&B, or a server's address. Default: that of the run's settings, else mlflow.db "
            "beside the run, or `offline`."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="vllm: new folder of the model.")] = None,
    bits: Annotated[int, typer.Option(help="vllm: bits of its weights, 8 or 4, rounded to nearest.")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="vllm: test rows of each task on which it is checked.")] = 200,
    min_agreement: Annotated[
        float, typer.Option(help="vllm: least share of rows with the answer of the training; below it nothing is kept.")
    ] = 0.9,
) -> None:
    """Log a run to MLflow or W&B, or what is missing there; or write an adapter and its base as one model for vLLM."""
    if system == "vllm":
        if to is not None or output is None or bits not in (8, 4) or not 0 < min_agreement <= 1:
            raise ConfigError(
                "export vllm takes --output FOLDER, --bits 8 or 4 and --min-agreement above 0 and at most 1, and not --to."
            )
        _export_vllm(run.expanduser().absolute(), overrides, output, bits, limit, min_agreement)
        return
    if overrides or output is not None:
        raise ConfigError(f"export {system} takes no settings and no --output: --to names where it is logged.")
    from finlora.train.search.track_search import export_folder

    store, run_id = export_folder(run.expanduser().absolute(), system, to)
    say(f"{store.title}: run {run_id} of {store.project}")


def _export_vllm(
    adapter: Path, overrides: list[str] | None, output: Path, bits: Any, limit: int, min_agreement: float
) -> None:
    from finlora.model.contract import read_contract

    folder = require_output("--output ", output, is_new=True)
    read_contract(adapter)  # says what was found instead of an adapter
    settings = load_settings(adapter / "config.yaml", overrides)
    from finlora.evaluate.parity_report import PARITY_FILE, parity_table
    from finlora.exchange.vllm import export_vllm
    from finlora.report.write import draw_table

    with open_bars(console, "loading the base") as bars:
        found = export_vllm(
            *(settings, adapter, folder),
            bits=bits,
            limit=limit,
            min_agreement=min_agreement,
            on_progress=bars.update,
        )
    draw_table(parity_table(found), console)
    say(f"Model for `vllm serve` written to {folder}, and the check to its {PARITY_FILE}")
