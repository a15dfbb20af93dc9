"""The `finlora` command: one verb a step of the work, and the same verbs as Ray jobs (jobs/).

Heavy packages are imported inside the verbs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from finlora.errors import ConfigError
from finlora.terminal import describe_duration, exit_with, open_bars, polling

app = typer.Typer(
    name="finlora",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune quantised Llama models on financial tasks on your own GPUs, and know what it brought.\n\n"
    "The usual order: [bold]prepare[/] the data, [bold]train[/] an adapter, [bold]evaluate[/] base and adapter, "
    "[bold]report[/] the results.",
)
# A job log has no width of its own; the 80 columns that Rich assumes there break every table.
console = Console(width=None if sys.stdout.isatty() else 140)

ConfigPath = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; see jobs/configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the YAML, e.g. train.epochs=2.")
]
AdapterPath = Annotated[
    Path | None, typer.Option("--adapter", help="Adapter folder. Without it: the one of the config's run.")
]
BaseAlone = Annotated[bool, typer.Option("--base", help="Take the base model without any adapter.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, change nothing.")]


@app.command(
    epilog="Examples:\n\n  finlora prepare fpb --source /mnt/raw/fpb\n\n"
    "  finlora prepare ner --source /mnt/raw/ner --variant corrected --output /mnt/data\n\n  finlora prepare synthetic"
)
def prepare(
    task: Annotated[str, typer.Argument(help="Task to prepare; `list` shows all of them.")],
    source: Annotated[
        Path | None, typer.Option(help="Folder with the raw files. Without it: the hub's dataset.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of prepared tasks.")] = Path("~/finlora/data"),
    variant: Annotated[
        Literal["as_published", "corrected"] | None,
        typer.Option(help="Keep or mend known label defects, where both exist."),
    ] = None,
    splits: Annotated[Literal["all", "test"], typer.Option(help="`test`: only the test split.")] = "all",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a prepared set that differs.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Turn raw data into Parquet with a frozen, hashed split; shows counts, labels, duplicates and leaks."""
    from finlora.data.prepare import prepare_task
    from finlora.terminal import show_preparation, show_tasks

    if task == "list":
        show_tasks(console)
        return
    folder = source.expanduser() if source else None
    report = prepare_task(task, folder, output.expanduser(), variant, splits, overwrite, dry_run)
    show_preparation(report, console, is_dry=dry_run)


@app.command(
    epilog="Example:\n\n  finlora pretrain --tasks fpb,tfns --data ~/finlora/data --output ~/finlora/base-small"
)
def pretrain(
    output: Annotated[Path, typer.Option(help="Folder of the new base model.")],
    tasks: Annotated[str, typer.Option(help="Prepared tasks whose train inputs are the text; `synthetic`: generated.")],
    data: Annotated[Path, typer.Option(help="Folder of prepared tasks.")] = Path("~/finlora/data"),
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Never chosen for you.")] = "cuda",
    overrides: Overrides = None,
) -> None:
    """Pretrain a small Llama base with its own tokenizer on unlabelled training text (no hub needed)."""
    from finlora.configfile import build_settings
    from finlora.model.pretrain import PretrainConfig, run_pretraining

    settings = build_settings(PretrainConfig, overrides or [])
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with open_bars(console) as bars:
        summary = run_pretraining(settings, names, data.expanduser(), output.expanduser(), device, bars.update)
    _say(summary)


@app.command(
    epilog="Examples:\n\n  finlora plan --config jobs/configs/llama-70b-4bit-r4-ner.yaml --gpu-memory 48 --gpus 4\n\n"
    "  finlora plan --config ... train.memory_gib=24"
)
def plan(
    config: ConfigPath = None,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="GiB of a GPU. Without it: this machine's, or a 48 GB card's where it has none."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of the cluster. Without it: those the config asks for.")
    ] = None,
) -> None:
    """Forecast a run's memory on its prepared data; names the setting that would make it fit. Needs no GPU."""
    from finlora.train.plan import count_gpus, find_memory_gib, plan_run, render_plan

    settings = _load(config, overrides)
    memory = find_memory_gib(settings.train.device) if gpu_memory is None else gpu_memory
    verdict = plan_run(settings, memory, count_gpus(settings) if gpus is None else gpus)
    console.print(render_plan(settings, verdict))
    verdict.require_fit()
    _say(verdict.words)


@app.command(
    epilog="Examples:\n\n  finlora train --config jobs/configs/llama-8b-4bit-r4-fpb.yaml train.num_workers=4\n\n"
    "  ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/train.py --config jobs/configs/...yaml"
)
def train(config: ConfigPath = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train an adapter on the Ray cluster, or resume the run of that name from its last checkpoint."""
    from finlora.train.follow import Follower
    from finlora.train.run import RunFolder, load_training_set

    settings = _load(config, overrides)
    if dry_run:
        from finlora.train.run import describe_run

        _say(describe_run(settings, load_training_set(settings)))
        return
    from finlora import cluster

    cluster.connect(log_to_driver=False)
    from finlora.train.worker import run_training  # imports Ray, which must come after the connection's settings

    folder = RunFolder(Path(settings.output_dir) / settings.name)
    with open_bars(console) as bars, polling(Follower(folder, settings.name, bars.update, _say, describe_duration)):
        result = run_training(settings, _say)
    _say(
        f"Adapter {result.adapter} ({result.adapter_mib:.2f} MiB): loss {result.metrics['loss_first']:.4f} -> "
        f"{result.metrics['loss_last']:.4f} in {describe_duration(result.wall_seconds or 0)}"
    )


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
    """Score base or adapter on the test splits: accuracy, strict accuracy, weighted F1, with 95 % intervals."""
    from finlora.results import append_result
    from finlora.train.run import RunFolder

    settings = _load(config, overrides)
    chosen, folder = _choose_adapter(settings, adapter, base), RunFolder(Path(settings.output_dir) / settings.name)
    from finlora.evaluate.runner import check_evaluation, run_evaluation

    _say(check_evaluation(settings, chosen))
    if dry_run:
        return
    if ray:
        from finlora import cluster

        cluster.connect(log_to_driver=True)
        gpus = settings.eval.num_gpus if settings.eval.device == "cuda" else 0.0
        results = cluster.call(run_evaluation, settings, chosen, _print_progress, num_cpus=1.0, num_gpus=gpus)
    else:
        with open_bars(console) as bars:
            results = run_evaluation(settings, chosen, bars.update)
    for result in results:
        append_result(folder.results, result)
    from finlora.report import show_results

    show_results(results, console)
    _say(f"Appended to {folder.results}")


@app.command(
    epilog="Examples:\n\n  finlora ask 'Profit rose 12 %' --task fpb --config jobs/configs/llama-8b-4bit-r4-fpb.yaml\n\n"
    "  finlora ask @filing.xml --task xbrl_values --about 'What is the value of Revenues?' --config ... --stages 4"
)
def ask(
    text: Annotated[str, typer.Argument(help="What to ask about; @FILE reads a file.")],
    overrides: Overrides = None,
    config: ConfigPath = None,
    task: Annotated[str | None, typer.Option(help="Form of the prompt. Without it: the text alone.")] = None,
    about: Annotated[str | None, typer.Option(help="Entity, headline question or XBRL question.")] = None,
    adapter: AdapterPath = None,
    base: BaseAlone = False,
    stages: Annotated[int, typer.Option(help="Ray actors that the layers are spread over; 1: this process.")] = 1,
    temperature: Annotated[float, typer.Option(help="0: the likeliest text; higher: more varied.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a drawn text repeatable.")] = None,
) -> None:
    """Ask base or adapter one question: the probability of each allowed answer, or text as it is written."""
    from finlora.data.question import make_question, read_content
    from finlora.engine.ask import ask as ask_engine
    from finlora.engine.request import Sampling
    from finlora.terminal import show_reply

    settings = _load(config, overrides)
    chosen = _choose_adapter(settings, adapter, base)
    question = make_question(task, read_content(text), about)
    sampling = Sampling(max_tokens=settings.eval.max_new_tokens, temperature=temperature, seed=seed)
    if stages > 1:
        from finlora import cluster

        cluster.connect(log_to_driver=False)
    reply = ask_engine(settings, chosen, question, sampling, stages, lambda piece: console.out(piece, end=""))
    show_reply(reply.probabilities, reply.quote, console, is_quoted=task in ("xbrl_tags", "xbrl_values"))


@app.command(
    epilog="Example:\n\n  finlora merge --adapter ~/finlora/runs/NAME/adapter --output ~/finlora/merged --allow-other-bits"
)
def merge(
    adapter: Annotated[Path, typer.Option(help="Adapter folder that `finlora train` wrote.")],
    output: Annotated[Path, typer.Option(help="Folder of the merged model; must not exist yet.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Without it: the adapter's config.yaml.")
    ] = None,
    overrides: Overrides = None,
    allow_other_bits: Annotated[
        bool, typer.Option("--allow-other-bits", help="Merge one trained at 8 or 4 bit; its logits change a little.")
    ] = False,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Where the 16-bit base is held.")] = "cpu",
) -> None:
    """Fold an adapter into its 16-bit base; writes a plain Hugging Face folder."""
    import torch

    from finlora.model.merge import export_merged

    folder = adapter.expanduser().absolute()
    settings = _load(config or folder / "config.yaml", overrides)
    target = output.expanduser().absolute()
    merged = export_merged(settings.model, folder, target, torch.device(device), allow_other_bits=allow_other_bits)
    _say(f"Merged model {merged.folder} ({merged.gib:.2f} GiB, {merged.num_tensors} weights changed)")
    if merged.trained_bits != 16:
        _say(f"Trained at {merged.trained_bits} bit: evaluate the merged model before you use it.")


@app.command(epilog="Example:\n\n  finlora report ~/finlora/runs --output report/")
def report(
    results: Annotated[Path, typer.Argument(help="A results.jsonl file, or a folder of runs.")],
    output: Annotated[Path | None, typer.Option(help="Folder for report.md and its plots.")] = None,
) -> None:
    """Show results as one table beside the paper's numbers; write Markdown and plots."""
    from finlora.report import render_report
    from finlora.results import read_results

    render_report(read_results(results.expanduser()), output.expanduser() if output else None, console)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; our errors become one message and their exit code."""
    # Hub progress bars and tokenizer forks only add noise to job logs.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")  # see train/worker.py: shapes differ all the time
    exit_with(lambda: app(args=list(arguments) if arguments is not None else None, standalone_mode=True))


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _load(config: Path | None, overrides: Sequence[str] | None) -> Any:
    from finlora.configfile import load_config
    from finlora.train.run import resolve_paths

    return resolve_paths(load_config(config, overrides or []))


def _choose_adapter(settings: Any, adapter: Path | None, base: bool) -> Path | None:
    if base and adapter:
        raise ConfigError("--base and --adapter exclude each other: give one of them.")
    own = Path(settings.output_dir) / settings.name / "adapter"
    return None if base else (adapter.expanduser().absolute() if adapter else own)


def _print_progress(task: str, done: int, total: int) -> None:
    if done == total or done % 512 < 16:
        sys.stdout.write(f"{task}: {done}/{total}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
