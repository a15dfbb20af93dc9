"""Verbs that start many runs: a search for good settings."""

from __future__ import annotations

from typing import Any

from finlora.cli.app import ConfigPath, DryRun, Overrides, app, console, say
from finlora.terminal import describe_duration


@app.command(
    epilog="Examples:\n\n  finlora tune --config jobs/configs/llama-8b-4bit-r4-fpb.yaml name=search-fpb search.num_trials=24\n\n"
    "  finlora tune --config ... train.num_workers=1 train.gpus_per_worker=0.5 search.rank=[4,8,16] search.bits=[4,8]"
)
def tune(config: ConfigPath = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Search rank, bits, learning rate and more with Ray Tune and ASHA, or go on with the search of that name."""
    from finlora.train.run import resolve_paths
    from finlora.train.space import load_search, sample_trials

    settings, search = load_search(config, overrides or [])
    settings = resolve_paths(settings)
    trials = sample_trials(settings, search)
    if dry_run:
        from finlora.train.run import describe_run, load_training_set

        say(describe_run(settings, load_training_set(settings)))
        for trial in trials:
            say(f"{trial.name}: alpha {trial.alpha:g} on {', '.join(trial.target_modules)}")
        return
    from finlora import cluster

    cluster.connect(log_to_driver=False)
    from finlora.train.front import write_summary
    from finlora.train.search import run_search  # imports Ray, which must come after the connection's settings
    from finlora.train.trials import search_folder

    def tell(record: Any) -> None:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in record.scores.items())
        say(f"{record.trial.name}: {record.state} after {describe_duration(record.seconds)}. {scores or record.cause}")

    records = run_search(settings, search, say, tell)
    for path in write_summary(settings, search, search_folder(settings), records, console):
        say(f"Written: {path}")
