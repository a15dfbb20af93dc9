"""Tracked run: a run's folder beside its run in a tracking system, joined by a file in the folder's `tracking/`.

The file of a store holds the id of the run there, the last step that was logged and the measurements that were. So a resumed run
goes on in the same run there, and no number is logged twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finlora.durable import seal, unseal, write_whole
from finlora.errors import ResultError
from finlora.train.run.run_folder import RunFolder
from finlora.train.tracking.run_view import RunView
from finlora.train.tracking.stores import Store
from finlora.train.tracking.tracker import RunState, Tracker


@dataclass(kw_only=True, slots=True)
class Logged:
    """What one store holds of a run."""

    store: Store
    run_id: str
    steps: dict[str, int] = field(default_factory=dict)
    """Source of points -> the last step that was logged."""
    scores: list[str] = field(default_factory=list)
    """Keys of the measurements that were logged."""


def read_logged(folder: RunFolder, store: Store) -> Logged | None:
    """Return what a store holds of a run; None where it was never logged there.

    Raises:
        ResultError: the file is damaged.
    """
    path = _path_of(folder, store)
    if not path.is_file():
        return None
    try:
        values = unseal(json.loads(path.read_text(encoding="utf-8")))
        return Logged(**{**values, "store": Store(**values["store"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(
            f"{path} is damaged ({error}): delete it, and the run is logged again as a new one."
        ) from error


class TrackedRun:
    """Run of one folder in one store. One process at a time may use it.

    Args:
        read: reads the folder anew.
    """

    def __init__(self, folder: RunFolder, store: Store, read: Callable[[], RunView]) -> None:
        self.store = store
        self.run_id: str | None = None
        """Id of the run in the store; None before the first `update`."""
        self._folder, self._read = folder, read
        self._tracker: Tracker | None = None
        self._seen: tuple[int, ...] = ()

    def update(self) -> None:
        """Log what the folder holds and the store does not, if the folder has changed.

        Raises:
            FinloraError: the folder cannot be read, or the store's library is missing.
            Exception: of any kind, of the store's library. What was logged until then is not logged again.
        """
        seen = self._look()
        if self._tracker is None or seen != self._seen:
            self._bring_up_to_date()
            self._seen = seen

    def end(self, state: RunState | None) -> None:
        """Log the rest and close the run.

        Args:
            state: None: the one that the folder shows.
        """
        view, tracker = self._bring_up_to_date()
        self._tracker = None
        tracker.end(state or view.state, view.ended_ms)

    def drop(self) -> None:
        """Forget the open tracker after an error: the next update opens the run again."""
        self._tracker = None

    def _bring_up_to_date(self) -> tuple[RunView, Tracker]:
        view, logged = self._read(), read_logged(self._folder, self.store)
        if self._tracker is None:
            self._tracker = self.store.open(view.card, logged.run_id if logged else None)
            self.run_id = self._tracker.run_id
        if logged is None:
            logged = Logged(store=self.store, run_id=self._tracker.run_id)
            self._save(logged)
        before = dataclasses.asdict(logged)
        try:
            _log(self._tracker, view, logged)
        finally:
            if dataclasses.asdict(logged) != before:
                self._save(logged)
        return view, self._tracker

    def _look(self) -> tuple[int, ...]:
        """Return the sizes of the files that grow, to see whether the folder has changed."""
        paths = [self._folder.root / name for name in ("progress.jsonl", "results.jsonl", "held_out.jsonl")]
        return tuple(path.stat().st_size if path.is_file() else -1 for path in paths)

    def _save(self, logged: Logged) -> None:
        path = _path_of(self._folder, self.store)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(seal(dataclasses.asdict(logged)), indent=1))


def _log(tracker: Tracker, view: RunView, logged: Logged) -> None:
    """Log what is new, and note it."""
    for source, points in view.curves.items():
        new = [point for point in points if point.step > logged.steps.get(source, 0)]
        if new:
            tracker.log_points(new)
            logged.steps[source] = new[-1].step
    scores = {key: point for key, point in view.scores.items() if key not in logged.scores}
    if scores:
        tracker.log_points(list(scores.values()))
        tracker.log_tags(view.tags)
        tracker.log_files(view.files)
        logged.scores += scores


def _path_of(folder: RunFolder, store: Store) -> Path:
    """Return the file of a store: `mlflow-1a2b3c4d.json`."""
    name = hashlib.sha256(f"{store.address}\n{store.project}".encode()).hexdigest()[:8]
    return folder.tracking / f"{store.kind}-{name}.json"
