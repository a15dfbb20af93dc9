"""Verbs that let a base or an adapter answer: a whole test split with its scores, or one question."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
from finlora.errors import ConfigError
from finlora.machine.lean_imports import lean_imports
from finlora.machine.start_clock import StartClock, describe_phase, describe_start, find_process_start
from finlora.terminal import open_bars

_LOADING = "loading the base"


@app.command(
    epilog="Examples:\n\n  finlora evaluate --config jobs/configs/llama-8b-4bit-r4-fpb.yaml --base\n\n"
    "  finlora evaluate --config ... --adapter ~/finlora/runs/llama-8b-4bit-r4-fpb/adapter eval.bits=8"
)
def evaluate(
    config: ConfigPath = None,
    overrides: Overrides = None,
    adapter: AdapterPath = None,
    base: BaseAlone = False,
    ray: Annotated[bool, typer.Option("--ray", help="Run as a Ray task that reserves eval.num_gpus.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Score the base or an adapter on the test splits: accuracy, strict accuracy, weighted F1, with 95 % intervals."""
    from finlora.results import append_result
    from finlora.train.run.run_folder import RunFolder

    start = StartClock("imports", find_process_start())
    settings = load_settings(config, overrides)
    chosen, folder = choose_adapter(settings, adapter, base), RunFolder(Path(settings.output_dir) / settings.name)
    with lean_imports():
        from finlora.evaluate.evaluation import check_evaluation, run_evaluation
        from finlora.model.base_files import read_base_files

    resolved = read_base_files(settings.model)
    say(check_evaluation(settings, resolved, chosen))
    if dry_run:
        return
    from finlora.doctor.examine import require_output_folder

    require_output_folder(settings)
    is_spread = settings.eval.num_stages > 1
    if ray or is_spread:
        from finlora.cluster import connect

        start.enter("Ray")
        connect.connect(log_to_driver=ray)
    if ray:
        # Stages have GPUs of their own.
        gpus = settings.eval.num_gpus if settings.eval.device == "cuda" and not is_spread else 0.0
        results = connect.call(
            _evaluate_as_task,
            *(settings, chosen, folder.answers),
            num_cpus=1.0,
            num_gpus=gpus,
            wait_s=settings.max_wait_s,
            announce=say,
            title=f"the evaluation of {settings.name}",
        )
    else:
        start.enter("data")
        with open_bars(console, _LOADING) as bars:
            start.on_phase = lambda name: bars.do(describe_phase(name))
            results = run_evaluation(settings, chosen, bars.update, _print_reading, resolved, folder.answers, start)
        say(describe_start(results[0].start_seconds))
    from finlora.report.write import list_base_scores, show_results

    shown = [*(list_base_scores(folder.results, results) if chosen is not None else ()), *results]
    try:
        for result in results:
            append_result(folder.results, result)
    finally:  # on a full disk the scores are at least shown
        show_results(shown, console)
    say(f"Appended to {folder.results}")
    if chosen is not None:
        from finlora.card.hub_readme import refresh_scores
        from finlora.evaluate.reference import refresh_reference

        for refresh in (refresh_scores, refresh_reference):
            if said := refresh(chosen, folder.results):
                say(said)
    from finlora.train.tracking.following import track_results

    track_results(settings, folder, say)


@app.command(
    epilog="Examples:\n\n  finlora ask 'Profit rose 12 %' --task fpb --config jobs/configs/llama-8b-4bit-r4-fpb.yaml\n\n"
    "  finlora ask 'Profit rose 12 %' --task fpb --server http://127.0.0.1:8000 --model llama-8b:fpb\n\n"
    "  finlora ask @filing.xml --task xbrl_values --about 'What is the value of Revenues?' --config ... --stages 4"
)
def ask(
    text: Annotated[str, typer.Argument(help="Text to ask about. @FILE reads a file.")],
    overrides: Overrides = None,
    config: ConfigPath = None,
    task: Annotated[
        str | None, typer.Option(help="Task whose prompt to use. Default: the text alone is the prompt.")
    ] = None,
    about: Annotated[
        str | None,
        typer.Option(help="What the task asks about the text: an entity, a headline question or an XBRL question."),
    ] = None,
    adapter: AdapterPath = None,
    base: BaseAlone = False,
    stages: Annotated[
        int | None, typer.Option(help="Pipeline stages, each a Ray actor. Default: eval.num_stages.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the most probable text; higher: more varied.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling: the same seed writes the same text.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of a server to ask instead, with the key in FINLORA_API_KEY.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model on the server, such as base:adapter.")] = None,
) -> None:
    """Ask the base or an adapter one question. Shows the probability of each label, or the text while it is written."""
    from finlora.data.question import read_content
    from finlora.data.sets.catalog import is_quoted, make_question

    if server is not None or model is not None:
        if server is None or model is None or overrides or config or adapter or base or stages:
            raise ConfigError(
                "--server and --model go together, without settings and other options of the model: the server has its own."
            )
        _ask_server(server, model, task, read_content(text), about, temperature, seed)
        return
    with lean_imports():
        from finlora.engine.request import Sampling
        from finlora.inference.ask import ask as ask_engine
        from finlora.inference.ask import list_own_forms
        from finlora.model.base_files import read_base_files
        from finlora.model.contract import read_contract
        from finlora.terminal import show_reply

    settings = load_settings(config, overrides)
    chosen = choose_adapter(settings, adapter, base)
    resolved = read_base_files(settings.model)
    own = list_own_forms(task, chosen, Path(settings.data.dir), resolved)
    question = make_question(task, read_content(text), about, own)
    sampling = Sampling(max_tokens=settings.eval.max_new_tokens, temperature=temperature, seed=seed)
    num_stages = settings.eval.num_stages if stages is None else stages
    if num_stages > 1:
        from finlora.cluster import connect

        if chosen is not None:
            resolved.check_adapter(chosen, read_contract(chosen))
        connect.connect(log_to_driver=False)
    # To standard error, since the answer may be piped on.
    with open_bars(Console(stderr=True), _LOADING) as bars:

        def show(piece: str) -> None:
            bars.do(None)
            console.out(piece, end="")

        reply = ask_engine(settings, chosen, question, sampling, num_stages, show, resolved)
    show_reply(reply.probabilities, reply.quote, console, is_quoted=is_quoted(task, own))
    if reply.template_date:
        say(f"Date in the chat template: {reply.template_date}")
    if reply.unknown:
        Console(stderr=True).print(reply.unknown, highlight=False, markup=False, soft_wrap=True)


def _ask_server(
    server: str, model: str, task: str | None, text: str, about: str | None, temperature: float, seed: int | None
) -> None:
    from finlora.serve.accounts.keys import KEY_VARIABLE
    from finlora.serve.http.client import TIMEOUT_S, ask_server
    from finlora.terminal import saying_later, show_reply

    words = f"Waiting for an answer of {server}, {TIMEOUT_S:.0f} s at most."
    with saying_later(words):
        reply = ask_server(
            *(server, os.environ.get(KEY_VARIABLE, ""), model, task, text, about),
            temperature=temperature,
            seed=seed,
            on_text=lambda piece: console.out(piece, end=""),
        )
    show_reply(reply.probabilities, reply.quote, console, is_quoted=reply.is_quoted)


def _print_reading(reading: Any) -> None:
    sys.stdout.write(reading.describe() + "\n")
    sys.stdout.flush()


def _evaluate_as_task(settings: Any, chosen: Path | None, answers: Path) -> Any:
    """Evaluate in a Ray task, whose output Ray shows in the driver's log."""
    from finlora.evaluate.evaluation import run_evaluation

    with open_bars(console, _LOADING) as bars:
        return run_evaluation(settings, chosen, bars.update, _print_reading, None, answers)
