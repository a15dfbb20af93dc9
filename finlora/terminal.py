"""Progress, errors and tables, on a terminal (Rich bars) and in a job log (plain lines)."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, NoReturn

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

from finlora.errors import FinloraError, StoppedError
from finlora.machine.foreign_errors import explain
from finlora.machine.signals import StoppedByError, leave_output
from finlora.printed_table import print_table

if TYPE_CHECKING:
    from finlora.data.sets.prepared import PreparedReport

_LOG_SECONDS = 10.0
"""Seconds between two lines of a log."""
_TICK_SECONDS = 1.0


class OutputConsole(Console):
    """A console whose reader may go away, as `head` does: the command ends with the shell's code of SIGPIPE, silently."""

    def on_broken_pipe(self) -> None:
        leave_output()
        sys.exit(128 + signal.SIGPIPE)


def show_error(error: FinloraError) -> None:
    """Print an error of ours to standard error: its kind, then its message."""
    kind = type(error).__name__.removesuffix("Error")
    Console(stderr=True, soft_wrap=True).print(f"[bold red]{kind} error:[/] {escape(str(error))}", highlight=False)


def exit_with(run: Callable[[], object]) -> NoReturn:
    """Run a command and leave the process: with 0, or after an error of ours with its message and exit code.

    An unexpected error of another library also becomes one line; its traceback goes to a file.
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
    """Progress by name: on a terminal a live bar each; in a log one line every _LOG_SECONDS, at any speed of the work.

    Until the first progress, as while a model loads, the lines name the current work.

    Args:
        doing: the work before the first progress, such as `loading the base`.
        clock: seconds that only grow.
    """

    def __init__(self, console: Console, doing: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self.live: Progress | None = None
        self._started = self._said = clock()
        self._doing: str | None = doing
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, _Shown] = {}
        """Of work in progress or just ended."""
        self._lock = threading.Lock()  # the polling thread repeats what has not changed

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """Show progress: the first, the last, and between them the newest every _LOG_SECONDS."""
        with self._lock:
            self._doing = None
            if self.live is not None:
                self._move_bar(self.live, name, done, total, note)
                return
            before, now = self._last.get(name), _Shown(done, total, note)
            self._last[name] = now
            is_end = done >= total and (before is None or (before.done, before.total) != (done, total))
            if before is None or is_end or self._is_time():
                self._say(name, now)

    def do(self, doing: str | None) -> None:
        """Name the current work where nothing can be counted; None: none, as when a server has started."""
        with self._lock:
            self._doing = doing
            self._last.clear()
            self._started = self._said = self._clock()
            if self.live is not None:
                self._show_doing(self.live)

    def tick(self) -> None:
        """Repeat in a log the progress of all current work after _LOG_SECONDS of silence. Called each second."""
        with self._lock:
            if self.live is not None or not self._is_time():
                return
            going = {name: shown for name, shown in self._last.items() if shown.done < shown.total}
            for name, shown in going.items():
                self._say(name, shown)
            if not going and self._doing is not None:
                self._print(f"{self._doing}: {self._elapsed()}")

    def show_live(self, live: Progress) -> None:
        """Draw bars instead of writing lines."""
        self.live = live
        self._show_doing(live)

    def _is_time(self) -> bool:
        return self._clock() - self._said >= _LOG_SECONDS

    def _say(self, name: str, shown: _Shown) -> None:
        note = f"{shown.note}  " if shown.note else ""
        self._print(f"{name}: {shown.done}/{shown.total}  {note}{self._elapsed()}")

    def _print(self, line: str) -> None:
        self._said = self._clock()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _elapsed(self) -> str:
        return describe_duration(self._clock() - self._started)

    def _show_doing(self, live: Progress) -> None:
        for name in [name for name in self._tasks if name not in self._last]:
            live.remove_task(self._tasks.pop(name))
        if self._doing is not None:
            self._tasks[self._doing] = live.add_task(self._doing, total=None, note="")

    def _move_bar(self, live: Progress, name: str, done: int, total: int, note: str) -> None:
        if name not in self._last:
            self._last[name] = _Shown(done, total, note)
            self._show_doing(live)
            self._tasks[name] = live.add_task(name, total=total, note="")
        live.update(self._tasks[name], completed=done, total=total, note=note)


class _Shown(NamedTuple):
    done: int
    total: int
    note: str


@contextmanager
def open_bars(console: Console, doing: str) -> Iterator[Bars]:
    """Show bars, or lines in a log, while inside."""
    bars = Bars(console, doing)
    if not console.is_terminal:
        with polling(bars.tick, _TICK_SECONDS):
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
    with Progress(*columns, console=console) as live:
        bars.show_live(live)
        yield bars


def show_tasks(console: Console) -> None:
    """List every task that `finlora prepare` knows."""
    from finlora.data.sets.catalog import TASKS

    rows = []
    for task in TASKS.values():
        answers = "free text" if task.is_free_text else "/".join(task.choices) or "of its parts"
        rows.append((task.name, task.title, answers, task.hub_id or "generated", task.licence))
    print_table(console, ("task", "data", "answers", "hub dataset", "licence"), rows)


def show_preparation(report: PreparedReport, console: Console, is_dry: bool) -> None:
    """Show counts, label distribution, duplicates and leaks of a prepared set, and the notes of its reader."""
    rows = []
    for split, count in report.counts.items():
        labels = ", ".join(f"{label} {number:,}" for label, number in report.labels[split].items()) or "free text"
        median, longest = report.prompt_chars[split]
        chars = f"{median:,.0f} / {longest:,}"
        rows.append((split, f"{count:,}", labels, f"{report.duplicates[split]:,}", chars, report.hashes[split][:12]))
    print_table(console, ("split", "examples", "labels", "duplicates", "prompt chars (median / max)", "sha256"), rows)
    console.print(
        f"Leaks from train into test: {report.prompt_leaks:,} equal prompts, {report.group_leaks:,} examples of a shared "
        "source (sentence, headline, entity with its sentence, or filing)",
        highlight=False,
    )
    for note in report.notes:
        words = f"[yellow]Warning:[/]{escape(note.removeprefix('Warning:'))}"
        console.print(words if note.startswith("Warning:") else f"Note: {escape(note)}", highlight=False)
    state = "Dry run: nothing was written" if is_dry else f"Written to {report.folder}"
    console.print(
        state if report.is_written or is_dry else f"{report.folder} already holds the same set", highlight=False
    )


def show_reply(
    probabilities: dict[str, float], quote: tuple[int, int] | None, console: Console, *, is_quoted: bool
) -> None:
    """Show each allowed answer with its probability as a bar; where there are none, end the line of a streamed text.

    Args:
        quote: span of the text, in characters, within the text asked about.
        is_quoted: whether it must occur there.
    """
    if not probabilities:
        console.out("")
        if is_quoted:
            where = f"at characters {quote[0]:,} to {quote[1]:,} of" if quote else "[bold red]not found[/] in"
            console.print(f"Answer {where} the text asked about.", highlight=False)
        return
    num_blocks = max(0, min(40, console.width - 40))
    rows = [(answer, f"{value:.1%}", "█" * round(num_blocks * value)) for answer, value in probabilities.items()]
    print_table(console, ("answer", "probability", ""), rows, right=[1])


@contextmanager
def saying_later(words: str, seconds: float = 10.0) -> Iterator[None]:
    """Print a line to standard error if the body takes longer than `seconds`."""
    later = threading.Timer(seconds, lambda: Console(stderr=True).print(words, highlight=False, soft_wrap=True))
    later.daemon = True
    later.start()
    try:
        yield
    finally:
        later.cancel()


@contextmanager
def polling(poll: Callable[[], None], seconds: float = 0.5) -> Iterator[None]:
    """Call `poll` from a thread each `seconds` while inside, and once more at the end."""
    stop = threading.Event()

    def run() -> None:
        # A failure here repeats at the end, where it is raised.
        with contextlib.suppress(Exception):
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


def describe_times(seconds: float, waited: float, attempts: int) -> str:
    """Return a run's working time over all attempts, and its waiting time: `2:03 in 2 attempts, ...`."""
    tries = f" in {attempts} attempts" if attempts > 1 else ""
    waits = f", and waited {describe_duration(waited)} for room" if waited >= 1 else ""
    return f"{describe_duration(seconds)}{tries}{waits}"


def describe_duration(seconds: float) -> str:
    """Return `1:02:03` or `2:03`; hours go on counting past a day."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
