"""The `finlora` command's application, console and shared options; the verbs register themselves here, a module a group."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finlora.errors import ConfigError
from finlora.machine.foreign_errors import explain
from finlora.machine.host import drop_empty_size, fill_streams
from finlora.machine.signals import StoppedByError, leave_output
from finlora.terminal import OutputConsole

# The verbs in the order of the work, which is the order of the help whatever module defines them.
ORDER = (
    "doctor",
    "prefetch",
    "new-task",
    "prepare",
    "pretrain",
    "plan",
    "warm",
    "train",
    "tune",
    "evaluate",
    "ask",
    "score",
    "adopt",
    "merge",
    "parity",
    "serve",
    "key",
    "audit",
    "feedback",
    "reproduce",
    "report",
    "card",
    "approve",
    "export",
)


OTHER_WORDS = {
    **dict.fromkeys(("fit", "finetune", "fine-tune"), "train"),
    **dict.fromkeys(("eval", "test"), "evaluate"),
    **dict.fromkeys(("infer", "predict", "generate", "chat", "classify"), "ask"),
    **dict.fromkeys(("deploy", "server", "start"), "serve"),
    **dict.fromkeys(("download", "mirror", "fetch"), "prefetch"),
    **dict.fromkeys(("search", "sweep"), "tune"),
    **dict.fromkeys(("import",), "adopt"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
}
"""What other programs call a verb."""
_LEAST_COLUMNS = 60
"""Width from which help is drawn in frames; below it they cut the options' names."""


class _OrderOfWork(TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """Find the verb, or name the one that is meant."""
        if (verb := OTHER_WORDS.get(args[0].lower())) and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {verb!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a verb; terminal.exit_with reports what Typer would end silently.

        Typer would end with 130 and no message after Ctrl-C, with `Aborted!` after an EOFError, and with 1 when the reader of the
        output has gone.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedByError(signal.SIGINT) from error
        except EOFError as error:
            raise explain(error) from error
        except BrokenPipeError:
            leave_output()
            sys.exit(128 + signal.SIGPIPE)


fill_streams()
drop_empty_size()
app = typer.Typer(
    name="finlora",
    cls=_OrderOfWork,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= _LEAST_COLUMNS else None,
    pretty_exceptions_enable=False,
    help="Fine-tune quantised language models on financial tasks on your own GPUs, and measure what it brings.\n\n"
    "The usual order: `prepare` the data, `train` an adapter, `evaluate` base and adapter, `report` the results.",
)
# A job log has no width of its own; the 80 columns that Rich assumes there break every table.
console = OutputConsole(width=None if sys.stdout.isatty() else 140)

OVERRIDES = "[KEY=VALUE]..."
"""How an argument of settings is shown."""
ConfigPath = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; see jobs/configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar=OVERRIDES, help="Settings that win over the YAML, such as train.epochs=2.")
]
AdapterPath = Annotated[
    Path | None, typer.Option("--adapter", help="Adapter folder. Default: that of the config's run.")
]
BaseAlone = Annotated[bool, typer.Option("--base", help="Use the base model without an adapter.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, change nothing.")]


def say(line: str) -> None:
    """Print one line as it is, however long: a log is searched by its whole lines."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def load_settings(config: Path | None, overrides: Sequence[str] | None) -> Any:
    """Return the RunConfig of a YAML and the `key=value` after it, with absolute paths."""
    from finlora.configfile import load_config
    from finlora.train.run.run_folder import resolve_paths

    return resolve_paths(load_config(config, overrides or []))


def resolve_run(settings: Any) -> Any:
    """Return the RunConfig with the types that training would compute in here, and say where the processor chose them."""
    from finlora.precision import describe_choice, resolve_training

    resolved = resolve_training(settings, Path(settings.output_dir) / settings.name / "config.yaml")
    if said := describe_choice(settings, resolved):
        say(said)
    return resolved


def choose_adapter(settings: Any, adapter: Path | None, base: bool) -> Path | None:
    """Return the adapter folder that was named, else that of the config's run; None with `--base`.

    Raises:
        ConfigError: both were asked for.
    """
    if base and adapter:
        raise ConfigError("--base and --adapter exclude each other: give one of them.")
    own = Path(settings.output_dir) / settings.name / "adapter"
    return None if base else (adapter.expanduser().absolute() if adapter else own)
