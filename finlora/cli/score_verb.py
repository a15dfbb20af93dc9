"""Command `finlora score`: labels or texts for each row of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finlora.cli.app import (
    AdapterPath,
    BaseAlone,
    ConfigPath,
    DryRun,
    Overrides,
    app,
    choose_adapter,
    console,
    load_settings,
    say,
)
from finlora.errors import counted
from finlora.machine.working_dir import resolve_output
from finlora.terminal import open_bars


@app.command(
    epilog="Examples:\n\n  finlora score letters.csv scored.csv --task fpb --text body --config jobs/configs/NAME.yaml\n\n"
    "  finlora score posts/ scored/ --task ner --text sentence --about company --threshold 0.8 --config ...\n\n"
    "  ray job submit --address http://HEAD:8265 --working-dir . -- "
    "python jobs/score.py /mnt/in.parquet /mnt/out.parquet --task fpb --config jobs/configs/NAME.yaml"
)
def score(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Table: .csv, .tsv, .jsonl, .parquet, or a folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File or folder to write, in the same format.")],
    overrides: Overrides = None,
    config: ConfigPath = None,
    task: Annotated[
        str | None, typer.Option(help="Task whose prompt to use. Default: the text alone is the prompt.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text. Default: `text`, or the only column.")] = None,
    about: Annotated[
        str | None, typer.Option(help="Column of the entity or question that the task asks about.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least probability of a label; below it the row abstains.")
    ] = None,
    adapter: AdapterPath = None,
    base: BaseAlone = False,
    engines: Annotated[
        int | None,
        typer.Option(min=1, help="Number of engines, each with the whole model. Default: one per GPU, on CPU one."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Score each row of a table: adds columns with label and probabilities, or text. The same command resumes after a crash."""
    from finlora.model.base_files import read_base_files
    from finlora.score.score_plan import describe_plan, make_plan
    from finlora.score.scored_table import check_output
    from finlora.score.table import PART_ROWS, open_table

    settings = load_settings(config, overrides)
    chosen = choose_adapter(settings, adapter, base)
    source, output = source.expanduser().absolute(), resolve_output("", output)
    check_output(source, output)
    resolved = read_base_files(settings.model)
    with open_bars(console, "reading the table") as bars:
        table = open_table(source, PART_ROWS[settings.eval.device])
        plan = make_plan(settings, resolved, chosen, table, task=task, text=text, about=about, threshold=threshold)
        bars.do(None)
    say(describe_plan(plan))
    say("Columns added: " + ", ".join(plan.columns))
    if dry_run:
        return
    from finlora.score.run import run_scoring

    with open_bars(console, "loading the base and scoring the first part") as bars:
        record = run_scoring(plan, resolved, output, engines, bars.update, say)
    if labels := record["labels"]:
        total = sum(labels.values())
        say("Labels: " + ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in labels.items()))
    if threshold is not None:
        say(f"Below {threshold:g}: {record['abstained']:,} rows abstain.")
    for reason, count in record["not_scored"].items():
        say(f"Not scored: {counted(count, 'row')}, {reason}")
    say(f"Rows: {record['rows']:,}, in {output}")
