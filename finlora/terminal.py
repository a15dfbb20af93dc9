"""How long work looks on a terminal (Rich bars) and in a job log (plain lines)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finlora.errors import FinloraError


def show_error(error: FinloraError) -> None:
    """Print an error of ours to standard error: its kind, then its message."""
    kind = type(error).__name__.removesuffix("Error")
    Console(stderr=True, soft_wrap=True).print(f"[bold red]{kind} error:[/] {escape(str(error))}", highlight=False)


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
            if tenth > self.shown.get(name, -1) or done == total:
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
    """Return `1:02:03` or `2:03`."""
    text = time.strftime("%H:%M:%S", time.gmtime(seconds))
    return text.removeprefix("00:").removeprefix("0")
