"""Verbs of an adapter's life: forecast a run, train it, fold it into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finlora.cli.app import (
    AdapterPath,
    ConfigPath,
    DryRun,
    Overrides,
    app,
    choose_adapter,
    console,
    load_settings,
    resolve_run,
    say,
)
from finlora.errors import ConfigError
from finlora.machine.host import require_output
from finlora.machine.lean_imports import lean_imports
from finlora.machine.start_clock import StartClock, find_process_start
from finlora.results import Result
from finlora.terminal import describe_duration, describe_times, open_bars, polling


@app.command(
    epilog="Examples:\n\n  finlora plan --config jobs/configs/llama-70b-4bit-r4-ner.yaml --gpu-memory 48 --gpus 4\n\n"
    "  finlora plan --config ... train.memory_gib=24"
)
def plan(
    config: ConfigPath = None,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="Memory of a GPU in GiB. Default: this machine's, or that of a 48 GB card."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of the cluster. Default: as many as the config asks for.")
    ] = None,
) -> None:
    """Forecast the memory of a run from its prepared data. Names the setting that makes it fit. Needs no GPU."""
    from finlora.train.plan import count_gpus, find_memory_gib, plan_run, print_plan

    settings = resolve_run(load_settings(config, overrides))
    memory = find_memory_gib(settings.train.device) if gpu_memory is None else gpu_memory
    with open_bars(console, "reading the data"):
        verdict = plan_run(settings, memory, count_gpus(settings) if gpus is None else gpus)
    print_plan(settings, verdict, console)
    verdict.require_fit()
    say(verdict.words)


@app.command(
    epilog="Examples:\n\n  finlora warm --config jobs/configs/llama-8b-4bit-r4-fpb.yaml\n\n"
    "  TRITON_CACHE_DIR=/opt/kernels finlora warm model.base=/models/llama-8b"
)
def warm(config: ConfigPath = None, overrides: Overrides = None) -> None:
    """Compile the GPU kernels of a base for this machine's GPU, so that no later command waits for them."""
    from finlora.inference.warm_kernels import list_facts, require_gpu, warm_base
    from finlora.machine.kernel_folder import VARIABLE, keep_kernels
    from finlora.model.base_files import read_base_files

    device = require_gpu()
    settings = load_settings(config, overrides)
    files = read_base_files(settings.model)
    with open_bars(console, "compiling"):
        warm_base(settings, files, lambda warmed: say(warmed.describe()))
    facts = ", ".join(f"{name} {value}" for name, value in list_facts(device).items())
    say(
        f"Kernels in {keep_kernels()}. A copy of this folder serves any machine with {facts}: name it in {VARIABLE} there."
    )


@app.command(
    epilog="Examples:\n\n  finlora train --config jobs/configs/llama-8b-4bit-r4-fpb.yaml train.num_workers=4\n\n"
    "  ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/train.py --config jobs/configs/NAME.yaml"
)
def train(config: ConfigPath = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train an adapter on the Ray cluster. Resumes the run of that name from its last checkpoint."""
    from finlora.train.run.run_folder import examine_run, load_training_set
    from finlora.train.run.summary import find_finished
    from finlora.train.search.follow import Follower

    settings = load_settings(config, overrides)
    if dry_run:
        from finlora.train.run.run_folder import describe_run

        settings = resolve_run(settings)
        say(describe_run(settings, load_training_set(settings)))
        return
    folder = examine_run(settings)
    if finished := find_finished(folder):
        say(
            f"{_describe_trained(finished)}. The run is finished: nothing was started. Choose another `name` to train again."
        )
        return
    from finlora.cluster import connect
    from finlora.doctor.examine import start_inputs

    start = StartClock("imports", find_process_start())
    connect.prepare()
    inputs = start_inputs(settings, splits=("train",))
    start.enter("Ray")
    connect.connect(log_to_driver=False)
    start.enter("imports")
    base = inputs.result()
    with lean_imports():
        from finlora.train.worker import run_training  # imports Ray, which must come after the connection's settings

    with (
        open_bars(console, "starting workers") as bars,
        polling(Follower(folder, settings.name, bars.update, say, describe_duration, bars.do)),
    ):
        result = run_training(settings, say, base=base, start=start)
    say(_describe_trained(result))


def _describe_trained(result: Result) -> str:
    took = describe_times(result.wall_seconds or 0, result.waited_seconds or 0, result.attempts or 1)
    first, last = result.metrics["loss_first"], result.metrics["loss_last"]
    # A run shorter than train.log_every_steps has one point, from which nothing can be said of its course.
    losses = f"{first:.4f} -> {last:.4f}" if len(result.loss_curve) != 1 else f"{last:.4f} (one point)"
    return f"Adapter {result.adapter} ({result.adapter_mib:.2f} MiB): loss {losses} in {took}"


@app.command(
    epilog="Examples:\n\n  finlora merge --config jobs/configs/NAME.yaml --output ~/finlora/merged --allow-other-bits\n\n"
    "  finlora merge --adapter ~/finlora/runs/NAME/adapter --output ~/finlora/merged --onto dequantised"
)
def merge(
    output: Annotated[Path, typer.Option(help="Folder of the merged model. It must not exist yet.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of the run. Default: the adapter's config.yaml.")
    ] = None,
    adapter: AdapterPath = None,
    allow_other_bits: Annotated[
        bool,
        typer.Option(
            "--allow-other-bits",
            help="Merge an adapter trained at 8 or 4 bit onto the 16-bit base, by which some of its answers change.",
        ),
    ] = False,
    onto: Annotated[
        Literal["base", "dequantised"],
        typer.Option(
            help="Weights to merge onto: the base's own, or the 8- or 4-bit ones of the training, read back to 16 bit."
        ),
    ] = "base",
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Device that holds the 16-bit base.")] = "cpu",
) -> None:
    """Merge an adapter into its base at 16 bit. Writes a plain Hugging Face folder in bfloat16."""
    if config is None and adapter is None:
        raise ConfigError("no adapter is named: give --config YAML for that of its run, or --adapter FOLDER.")
    target = require_output("--output ", output, is_new=True)
    if config is None:
        from finlora.model.contract import read_contract

        own = Path(adapter or "").expanduser().absolute()
        read_contract(own)  # says what was found instead of an adapter
        config = own / "config.yaml"
    import torch

    from finlora.model.merge import export_merged

    settings = load_settings(config, overrides)
    folder = choose_adapter(settings, adapter, base=False)
    assert folder is not None  # without --base there is one
    with open_bars(console, "merging"):
        merged = export_merged(
            settings.model, folder, target, torch.device(device), allow_other_bits=allow_other_bits, onto=onto
        )
    say(f"Merged model {merged.folder} ({merged.gib:.2f} GiB, {merged.num_tensors} weights changed)")
    if merged.unknown:
        say(merged.unknown)
    if onto == "dequantised":
        say(f"Its weights are the {merged.trained_bits}-bit ones of the training, read back to 16 bit, and the update.")
    elif merged.trained_bits != 16:
        say(
            f"Trained at {merged.trained_bits or 'an unknown number of'} bit: evaluate the merged model before you use it."
        )
