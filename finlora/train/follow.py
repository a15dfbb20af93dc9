"""Show a running training to a user, from what its workers write into the run folder. No Ray here."""

from __future__ import annotations

from collections.abc import Callable

from finlora.train.progress import last_progress
from finlora.train.run import RunFolder


class Follower:
    """Called again and again: shows how the run trains, once, and then its last progress record.

    Args:
        name: of the run.
        update: shows done, total and a note under a name.
        announce: shows a line.
        describe: writes seconds as hours and minutes.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        update: Callable[[str, int, int, str], None],
        announce: Callable[[str], None],
        describe: Callable[[float], str],
    ) -> None:
        self.folder, self.name = folder, name
        self.update, self.announce, self.describe = update, announce, describe
        self._is_plan_shown = False

    def __call__(self) -> None:
        last = last_progress(self.folder)
        if last is None:
            return
        if not self._is_plan_shown and self.folder.plan.is_file():
            self._is_plan_shown = True
            self.announce(self.folder.plan.read_text(encoding="utf-8").strip())
        note = (
            f"loss {last.loss:.4f}  {last.tokens_per_second:,.0f} tokens/s  {last.memory_gib:.1f} GiB  "
            f"{self.describe(last.seconds_left)} left"
        )
        self.update(self.name, last.step, last.total_steps, note)
