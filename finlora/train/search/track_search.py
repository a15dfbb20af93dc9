"""Tracking of a search: one run for the search, and below it one for each trial with its settings, losses and scores.

The search's own process logs the trials from their folders. No Ray here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from finlora.config import RunConfig
from finlora.configfile import config_to_tree
from finlora.results import SEARCH_MARK
from finlora.train.held_out import HELD_OUT, read_held_out
from finlora.train.run.run_folder import RunFolder
from finlora.train.search.pareto import best_trial
from finlora.train.search.search_folder import (
    Mark,
    SearchFolder,
    TrialRecord,
    TrialState,
    read_record,
    read_settings,
)
from finlora.train.search.space import SearchConfig, Trial, sample_trials
from finlora.train.tracking.following import export, following
from finlora.train.tracking.run_view import RunView, list_params, read_config, read_view
from finlora.train.tracking.stores import Store, choose_store, list_stores
from finlora.train.tracking.tracked import TrackedRun, read_logged
from finlora.train.tracking.tracker import Card, Parent, Point, RunState

_STATES = {
    TrialState.FINISHED: RunState.FINISHED,
    TrialState.PRUNED: RunState.STOPPED,
    TrialState.FAILED: RunState.FAILED,
}


def track_search(
    config: RunConfig, search: SearchConfig, folder: SearchFolder, announce: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Log a search and its trials to the stores of its config while inside."""
    stores = list_stores(config, is_training=False)
    tracked = [TrackedSearch(config, search, folder, store) for store in stores]
    return following(RunFolder(folder.root), tracked, announce)


def export_folder(root: Path, kind: Literal["mlflow", "wandb"], address: str | None) -> tuple[Store, str]:
    """Log a run or a search from its folder, or what the store lacks of it.

    Args:
        root: folder of the run or of the search.
        address: of the store. None: that of the settings in the folder, else one on this machine.

    Returns:
        The store, and the id of the run there.

    Raises:
        ResultError: the folder holds neither a run nor a search.
        FinloraError: of any kind, also where the store does not take the run.
    """
    folder = RunFolder(root)
    tracked: TrackedRun | TrackedSearch
    if (root / SEARCH_MARK).is_file():
        config, search = read_settings(SearchFolder(root))
        tracked = TrackedSearch(config, search, SearchFolder(root), choose_store(config, root, kind, address))
    else:
        store = choose_store(read_config(folder), root, kind, address)
        tracked = TrackedRun(folder, store, lambda: read_view(folder))
    export(folder, tracked)
    return tracked.store, str(tracked.run_id)


class TrackedSearch:
    """A search and its trials in one store."""

    def __init__(self, config: RunConfig, search: SearchConfig, folder: SearchFolder, store: Store) -> None:
        self.store = store
        self._config, self._search, self._folder = config, search, folder
        self._trials = sample_trials(config, search)
        self._top = TrackedRun(RunFolder(folder.root), store, self._read)
        self._open: dict[str, TrackedRun] = {}
        self._ended: dict[str, TrialRecord] = {}

    @property
    def run_id(self) -> str | None:
        return self._top.run_id

    def update(self) -> None:
        """Log what is new of the search and of each trial that has begun; close the trials that have ended."""
        self._top.update()
        for trial in self._trials:
            run = self._folder.run_of(trial)
            record = read_record(self._folder, trial)
            has_begun = record is not None or (run.root / Mark.BUSY).is_file() or run.config.is_file()
            if not has_begun or (record is not None and self._is_logged(run, record)):
                continue
            tracked = self._open.get(trial.name)
            if tracked is None:
                tracked = self._open[trial.name] = TrackedRun(run, self.store, self._reader(trial))
            if record is None:
                tracked.update()
            else:
                tracked.end(_STATES[record.state])
                self._ended[trial.name] = record
                del self._open[trial.name]

    def end(self, state: RunState | None) -> None:
        """Log the rest. Trials that have not ended are stopped: the same command resumes them."""
        self.update()
        for tracked in self._open.values():
            tracked.end(RunState.STOPPED)
        self._open.clear()
        self._top.end(state)

    def drop(self) -> None:
        """Forget what is open after an error."""
        for tracked in (self._top, *self._open.values()):
            tracked.drop()

    def _is_logged(self, run: RunFolder, record: TrialRecord) -> bool:
        """Return whether the store holds the end of a trial, from this process or from an earlier start of the search."""
        if self._ended.get(record.trial.name) == record:
            return True
        logged = read_logged(run, self.store)
        return logged is not None and _key(record) in logged.scores

    def _read(self) -> RunView:
        """Read the search's folder; its scores are those of the best trial, once all have ended."""
        ended = [read_record(self._folder, trial) for trial in self._trials]
        records = [record for record in ended if record is not None]
        params = list_params(config_to_tree(self._config)) | list_params({"search": dataclasses.asdict(self._search)})
        started_ms = round(1000 * self._folder.data.stat().st_mtime)
        is_done = self._folder.best.is_file() and len(records) == len(self._trials)
        best = best_trial(records, self._search.objectives) if is_done else None
        files = [
            self._folder.config,
            self._folder.best,
            *(self._folder.root / f"front.{kind}" for kind in ("md", "png")),
        ]
        scores = {}
        if best is not None:
            at_ms = round(1000 * self._folder.best.stat().st_mtime)
            values = {f"best/{name}": value for name, value in best.scores.items()} | {
                f"trials/{state}": float(sum(record.state == state for record in records)) for state in TrialState
            }
            scores[f"{len(self._trials)} trials"] = Point(step=len(self._trials), at_ms=at_ms, values=values)
        return RunView(
            card=Card(name=self._config.name, folder=self._folder.root, params=params, started_ms=started_ms),
            curves={},
            scores=scores,
            tags={"finlora.folder": str(self._folder.root)} | ({"finlora.best_trial": best.trial.name} if best else {}),
            files=[path for path in files if path.is_file()],
            state=RunState.FINISHED if is_done else RunState.STOPPED,
        )

    def _reader(self, trial: Trial) -> Callable[[], RunView]:
        parent = Parent(run_id=self._top.run_id or "", name=self._config.name)
        return lambda: _read_trial(self._config, self._folder, trial, parent)


def _read_trial(config: RunConfig, folder: SearchFolder, trial: Trial, parent: Parent) -> RunView:
    """Read a trial's folder as a run's, with the losses on the held-out examples and the scores of its record."""
    run, record = folder.run_of(trial), read_record(folder, trial)
    params = list_params(config_to_tree(trial.apply(config))) | {"name": trial.name}
    if run.config.is_file():
        view = read_view(run, split="held_out", parent=parent)
    else:  # it failed before its training began, or is about to begin
        card = Card(name=trial.name, folder=run.root, params=params, started_ms=_mtime_ms(run), parent=parent)
        view = RunView(card=card, curves={}, scores={}, tags={}, files=[], state=RunState.STOPPED)
    times = {point.step: point.at_ms for point in view.curves.get("train", ())}
    held_out = [
        Point(
            step=int(report["step"]),
            at_ms=times.get(int(report["step"]), view.card.started_ms),
            values={f"held_out/{HELD_OUT}": report[HELD_OUT]},
        )
        for report in read_held_out(run)
    ]
    ended = {_key(record): _score(record, view)} if record else {}
    causes = {"finlora.cause": record.cause} if record and record.cause else {}
    return dataclasses.replace(
        view,
        card=dataclasses.replace(view.card, params=params),
        curves={**view.curves, "held_out": held_out},
        scores={**view.scores, **ended},
        files=[path for path in view.files if path.is_file()],  # the adapter of a trial is of no further use
        tags={**view.tags, **({"finlora.trial": str(record.state)} if record else {}), **causes},
    )


def _key(record: TrialRecord) -> str:
    return f"{record.state} at {record.step}"


def _score(record: TrialRecord, view: RunView) -> Point:
    values = {f"trial/{name}": value for name, value in record.scores.items()} | {"trial/seconds": record.seconds}
    if record.held_out_loss is not None:
        values[f"trial/{HELD_OUT}"] = record.held_out_loss
    return Point(step=record.step, at_ms=view.ended_ms, values=values)


def _mtime_ms(run: RunFolder) -> int:
    return round(1000 * run.root.stat().st_mtime)
