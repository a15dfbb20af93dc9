"""Progress display of a running training or search, read from the files of its workers. No Ray here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finlora.machine.start_clock import describe_phase
from finlora.train.run.progress import last_progress, read_step
from finlora.train.run.run_folder import RunFolder
from finlora.train.run.start_note import read_note
from finlora.train.search.search_folder import RECORD, Mark, SearchFolder
from finlora.train.search.space import Trial


class Follower:
    """Display of a run, called repeatedly: shows the plan once, then the last progress record.

    Args:
        name: of the run.
        update: shows done, total and a note under a name.
        announce: shows a line.
        describe: formats seconds as hours and minutes.
        do: names the current work where no step is done yet.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        update: Callable[[str, int, int, str], None],
        announce: Callable[[str], None],
        describe: Callable[[float], str],
        do: Callable[[str], None] = lambda _doing: None,
    ) -> None:
        self.folder, self.name = folder, name
        self.update, self.announce, self.describe, self.do = update, announce, describe, do
        self._phase: str | None = None
        self._is_plan_shown = False

    def __call__(self) -> None:
        last, mark = last_progress(self.folder), read_step(self.folder)
        if mark is None:
            self._show_phase()
        if last is None and mark is None:
            return
        if not self._is_plan_shown and self.folder.plan.is_file():
            self._is_plan_shown = True
            self.announce(self.folder.plan.read_text(encoding="utf-8").strip())
        if last is None:
            assert mark is not None
            self.update(self.name, *mark, "")
            return
        note = (
            f"loss {last.loss:.4f}  {last.tokens_per_second:,.0f} tokens/s  {last.memory_gib:.1f} GiB  "
            f"{self.describe(last.seconds_left)} left"
        )
        self.update(self.name, max(last.step, mark[0] if mark else 0), last.total_steps, note)

    def _show_phase(self) -> None:
        note = read_note(self.folder)
        if note is not None and note.phase is not None and note.phase != self._phase:
            self._phase = note.phase
            self.do(describe_phase(note.phase))


class SearchFollower:
    """Display of a search, called repeatedly: shows how many trials have ended, and the steps of those that run.

    Args:
        name: of the search.
        update: shows done, total and a note under a name.
    """

    def __init__(
        self,
        folder: SearchFolder,
        trials: Sequence[Trial],
        name: str,
        update: Callable[[str, int, int, str], None],
    ) -> None:
        self.folder, self.trials, self.name, self.update = folder, trials, name, update

    def __call__(self) -> None:
        ended, running = 0, []
        for trial in self.trials:
            run = self.folder.run_of(trial)
            if (run.root / RECORD).is_file():
                ended += 1
            elif (run.root / Mark.BUSY).is_file():
                last = last_progress(run)
                running.append(f"{trial.name} {f'{last.step}/{last.total_steps}' if last else 'starting'}")
        if ended or running:
            self.update(self.name, ended, len(self.trials), f"trials ended  {', '.join(running)}".rstrip())
