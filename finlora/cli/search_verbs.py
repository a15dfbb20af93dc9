"""Verbs that start many runs: a search for good settings, and the paper's whole table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from finlora.cli.app import ConfigPath, DryRun, Overrides, app, console, resolve_run, say
from finlora.errors import ConfigError, FinloraError, counted
from finlora.machine.host import require_output
from finlora.machine.working_dir import resolve_output
from finlora.terminal import describe_duration, open_bars, polling


@app.command(
    epilog="Examples:\n\n  finlora tune --config jobs/configs/llama-8b-4bit-r4-fpb.yaml name=search-fpb search.num_trials=24\n\n"
    "  finlora tune --config ... train.num_workers=1 train.gpus_per_worker=0.5 search.rank=[4,8,16] search.bits=[4,8]"
)
def tune(config: ConfigPath = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Search rank, bits, learning rate and more with Ray Tune and ASHA. Resumes the search of that name."""
    from finlora.train.run.run_folder import resolve_paths
    from finlora.train.search.space import load_search, sample_trials

    settings, search = load_search(config, overrides or [])
    settings = resolve_paths(settings)
    trials = sample_trials(settings, search)
    if dry_run:
        from finlora.train.run.run_folder import describe_run, load_training_set

        say(describe_run(resolve_run(settings), load_training_set(settings)))
        for trial in trials:
            say(f"{trial.name}: alpha {trial.alpha:g} on {', '.join(trial.target_modules)}")
        return
    from finlora.cluster import connect
    from finlora.doctor.examine import require_inputs
    from finlora.train.search.pareto import write_summary
    from finlora.train.search.search_folder import examine_search, read_ended

    folder = examine_search(settings, search)
    if ended := read_ended(folder, search, trials):
        for path in write_summary(settings, search, folder, ended, console):
            say(f"Written: {path}")
        say(
            f"All {len(trials)} trials have ended: nothing was started. More trials go on from here with a larger "
            "search.num_trials; another search needs another `name`."
        )
        return
    connect.prepare()
    base = require_inputs(settings, splits=("train",))
    connect.connect(log_to_driver=False)
    from finlora.train.search.follow import SearchFollower
    from finlora.train.search.search import run_search  # imports Ray, which must come after the connection's settings
    from finlora.train.search.track_search import track_search

    def tell(record: Any) -> None:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in record.scores.items())
        say(f"{record.trial.name}: {record.state} after {describe_duration(record.seconds)}. {scores or record.cause}")

    with (
        open_bars(console, "starting the search") as bars,
        polling(SearchFollower(folder, trials, settings.name, bars.update)),
    ):
        records = run_search(settings, search, say, tell, base)
    with track_search(settings, search, folder, say):
        for path in write_summary(settings, search, folder, records, console):
            say(f"Written: {path}")


@app.command(
    epilog="Examples:\n\n  finlora reproduce --output /mnt/reproduce --dry-run\n\n"
    "  finlora reproduce --output /mnt/reproduce --only '*8b*' data.dir=/mnt/data train.num_workers=1\n\n"
    "  finlora reproduce --output /mnt/reproduce --base-135m .demo/real-base --seeds 0,1,2 --at-once 8 --minutes 50"
)
def reproduce(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder of the reproduction.")] = Path("~/finlora/reproduce"),
    configs: Annotated[Path, typer.Option(help="Folder with one YAML for each row of the paper.")] = Path(
        "jobs/configs"
    ),
    only: Annotated[str, typer.Option(help="Pattern of step names, such as '*8b*ner*'.")] = "*",
    base_135m: Annotated[
        str | None,
        typer.Option(
            "--base-135m",
            help="Folder of SmolLM2-135M-Instruct (jobs/bases/real_base.py). Plans the rows of this public base, and those of a "
            "Llama only with its own option.",
        ),
    ] = None,
    base_8b: Annotated[
        str | None, typer.Option("--base-8b", help="Folder of the 8B base. Default: the hub's model.")
    ] = None,
    base_70b: Annotated[
        str | None, typer.Option("--base-70b", help="Folder of the 70B base. Default: the hub's model.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of each adapter row, such as 0,1,2: a run for each. Default: one, the config's."),
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, help="Most steps that run at the same time; they share the GPUs evenly.")
    ] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="Stop after so many minutes, trainings at a checkpoint, with exit code 75. Default: no limit."
        ),
    ] = None,
    drop_weights: Annotated[
        bool, typer.Option("--drop-weights", help="Delete adapters and checkpoints once they are scored.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Run every row of the paper's tables that is not done yet, and report. Says why a row cannot run here."""
    from finlora.report.write import draw_table, render_report
    from finlora.reproduce.outcomes import StepState, delete_weights, foresee, outcome_table, read_outcomes
    from finlora.reproduce.paper_rows import make_plan
    from finlora.results import read_results

    started = time.monotonic()
    folder = (resolve_output if dry_run else require_output)("--output ", output)
    named = {"135m": base_135m, "8b": base_8b, "70b": base_70b}
    bases = {size: base for size, base in named.items() if base is not None}
    steps = make_plan(configs.expanduser(), folder, overrides or [], only, bases, _read_seeds(seeds))
    if dry_run:
        draw_table(outcome_table(foresee(steps, folder)), console)
        return
    outcomes = list(read_outcomes(folder, steps).values())
    stop = None
    if any(outcome.state != StepState.DONE for outcome in outcomes):
        outcomes, stop = _run_steps(steps, folder, at_once, None if minutes is None else started + 60 * minutes)
    if drop_weights:
        delete_weights(steps, {outcome.name: outcome for outcome in outcomes})
    steps_table = outcome_table(outcomes)
    if stop is not None:
        draw_table(steps_table, console)
        raise stop
    if any(outcome.state == StepState.DONE for outcome in outcomes):
        render_report(read_results(folder / "runs"), folder / "report", console, [steps_table])
    else:
        draw_table(steps_table, console)
    failed = [outcome.name for outcome in outcomes if outcome.state == StepState.FAILED]
    if failed:
        raise FinloraError(
            f"{counted(len(failed), 'step')} failed ({', '.join(failed[:3])}): the table says why. The same command goes on."
        )


def _run_steps(steps: Any, folder: Path, at_once: int, deadline: float | None) -> tuple[list[Any], Any]:
    """Run the plan on the cluster; return the outcomes, and the error of a stop or None."""
    from finlora.cluster import connect
    from finlora.reproduce.step import share_gpus

    connect.connect(log_to_driver=False)
    from finlora.reproduce.at_once import run_plan

    with open_bars(console, "starting") as bars:
        ended = run_plan(
            share_gpus(steps, at_once, connect.count_gpus()),
            folder,
            say,
            at_once=at_once,
            deadline=deadline,
            on_progress=lambda done, total, note: bars.update("steps", done, total, note),
        )
    return ended.outcomes, ended.stop


def _read_seeds(text: str | None) -> tuple[int, ...]:
    """Return the seeds of an option such as 0,1,2.

    Raises:
        ConfigError: it is no list of different whole numbers.
    """
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise ConfigError(f"--seeds {text}: expected different whole numbers with commas between them, such as 0,1,2.")
    return tuple(int(part) for part in parts)
