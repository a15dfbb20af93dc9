"""How long work looks on a terminal (Rich bars) and in a job log (plain lines)."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from finlora.errors import FinloraError, StoppedError
from finlora.foreign_errors import explain
from finlora.signals import StoppedByError, leave_output

if TYPE_CHECKING:
    from finlora.data.prepared import PreparedReport


def show_error(error: FinloraError) -> None:
    """Print an error of ours to standard error: its kind, then its message."""
    kind = type(error).__name__.removesuffix("Error")
    Console(stderr=True, soft_wrap=True).print(f"[bold red]{kind} error:[/] {escape(str(error))}", highlight=False)


def exit_with(run: Callable[[], object]) -> NoReturn:
    """Run a command and leave the process: with 0, or after an error of ours with its message and exit code.

    An error of another library that none of our modules has named is told in one line as well; its traceback goes to a file.
    """
    code = 0
    try:
        run()
    except StoppedError as stop:
        code = _show_stop(stop)
    except StoppedByError as stopped:
        code = _show_stop(stopped.explain())
    except FinloraError as error:
        show_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = _show_stop(StoppedByError(signal.SIGINT).explain())
    except BrokenPipeError:  # whoever read our output has gone, as in `finlora report ... | head`
        leave_output()
        code = 128 + signal.SIGPIPE
    except Exception as error:
        known = explain(error)
        show_error(known)
        code = known.exit_code
    sys.exit(code)


def _show_stop(stop: StoppedError) -> int:
    Console(stderr=True).print(str(stop), highlight=False, soft_wrap=True)
    return stop.exit_code


class Bars:
    """Progress by name. On a terminal a live bar each; elsewhere a line when a tenth more is done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.shown: dict[str, int] = {}

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        if self.live is None:
            tenth = 10 * done // max(total, 1)
            if tenth > self.shown.get(name, -1):
                self.shown[name] = tenth
                self.console.print(f"{name}: {done}/{total}  {note}".rstrip(), highlight=False)
            return
        if name not in self.tasks:
            self.tasks[name] = self.live.add_task(name, total=total, note="")
        self.live.update(self.tasks[name], completed=done, total=total, note=note)


@contextmanager
def open_bars(console: Console) -> Iterator[Bars]:
    """Show bars while inside."""
    bars = Bars(console)
    if not console.is_terminal:
        yield bars
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars.live:
        yield bars


def show_tasks(console: Console) -> None:
    """List every task that `finlora prepare` knows."""
    from finlora.data.catalog import TASKS

    table = Table("task", "data", "answers", "hub dataset", "licence", box=box.SIMPLE_HEAD)
    for task in TASKS.values():
        answers = "free text" if task.is_free_text else "/".join(task.choices) or "of its parts"
        table.add_row(task.name, task.title, answers, task.hub_id or "generated", task.licence)
    console.print(table)


def show_preparation(report: PreparedReport, console: Console, is_dry: bool) -> None:
    """Show counts, label distribution, duplicates and leaks of a prepared set, and the notes of its reader."""
    table = Table(
        "split", "examples", "labels", "duplicates", "prompt chars (median / max)", "sha256", box=box.SIMPLE_HEAD
    )
    for split, count in report.counts.items():
        labels = ", ".join(f"{label} {number:,}" for label, number in report.labels[split].items()) or "free text"
        median, longest = report.prompt_chars[split]
        chars = f"{median:,.0f} / {longest:,}"
        table.add_row(split, f"{count:,}", labels, f"{report.duplicates[split]:,}", chars, report.hashes[split][:12])
    console.print(table)
    console.print(
        f"Leaks from train into test: {report.prompt_leaks:,} equal prompts, {report.group_leaks:,} examples of a shared "
        "source (sentence, headline, pair or filing)",
        highlight=False,
    )
    for note in report.notes:
        console.print(f"Note: {escape(note)}", highlight=False)
    state = "Dry run: nothing was written" if is_dry else f"Written to {report.folder}"
    console.print(
        state if report.is_written or is_dry else f"{report.folder} holds this very set already", highlight=False
    )


def show_reply(
    probabilities: dict[str, float], quote: tuple[int, int] | None, console: Console, *, is_quoted: bool
) -> None:
    """Show each allowed answer with its probability as a bar; where there are none, end the line of a streamed text.

    Args:
        quote: where the text stands in what was asked about.
        is_quoted: whether it must stand there.
    """
    if not probabilities:
        console.out("")
        if is_quoted:
            where = (
                f"stands at characters {quote[0]:,} to {quote[1]:,}" if quote else "[bold red]does not stand[/] there"
            )
            console.print(f"In the text asked about, the answer {where}.", highlight=False)
        return
    table = Table("answer", "probability", "", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for answer, value in probabilities.items():
        table.add_row(escape(answer), f"{value:.1%}", "█" * round(40 * value))
    console.print(table)


@contextmanager
def polling(poll: Callable[[], None], seconds: float = 0.5) -> Iterator[None]:
    """Call `poll` from a thread each `seconds` while inside, and once more at the end."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            poll()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        poll()


def describe_duration(seconds: float) -> str:
    """Return `1:02:03` or `2:03`; hours go on counting past a day."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
