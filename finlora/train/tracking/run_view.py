"""View of a run's folder as a tracking system sees it: settings, curves, scores with their intervals, tags and files.

All of it is a function of the folder, so that an export after the run logs the same as tracking during the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finlora.config import RunConfig
from finlora.configfile import config_from_tree, config_to_tree, load_config
from finlora.durable import read_lines, try_lock
from finlora.errors import ResultError
from finlora.results import Result
from finlora.train.run.attempts import read_attempts
from finlora.train.run.progress import read_progress
from finlora.train.run.run_folder import RunFolder
from finlora.train.tracking.tracker import Card, Parent, Point, RunState

CURVES = ("loss", "learning_rate", "epoch", "tokens_per_second", "examples_per_second", "memory_gib")
"""Numbers of a progress record that are logged, as `train/NAME`."""
_COSTS = (
    *("wall_seconds", "waited_seconds", "attempts", "gpu_hours", "peak_memory_gib", "adapter_mib"),
    *("num_examples", "tokens_per_second", "seconds_per_example"),
)
_HASHES = ("base_hash", "adapter_hash", "data_hash", "variant", "task")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """What a tracker is to hold of a run."""

    card: Card
    curves: Mapping[str, Sequence[Point]]
    """Source of points -> its points in the order of their steps."""
    scores: Mapping[str, Point]
    """Key of a measurement -> its numbers, in the order in which they were measured."""
    tags: Mapping[str, str]
    files: Sequence[Path]
    state: RunState

    @property
    def ended_ms(self) -> int:
        """Time of the last number, in milliseconds since 1970."""
        last = [points[-1].at_ms for points in self.curves.values() if points]
        return max([self.card.started_ms, *last, *(point.at_ms for point in self.scores.values())])


def read_view(folder: RunFolder, *, split: str = "test", parent: Parent | None = None) -> RunView:
    """Read a run's folder.

    Args:
        split: name of the examples that the run's evaluations scored: `held_out` for a trial.
        parent: the search of a trial.

    Raises:
        ResultError: the folder holds neither a config nor a result.
        ConfigError: its config is of another version.
    """
    results, config = _read_results(folder), read_config(folder)
    started_ms = _find_start(folder, results)
    curve = _read_curve(folder, config, started_ms)
    last_step = curve[-1].step if curve else 0
    training = next((result for result in reversed(results) if result.kind == "training"), None)
    texts = (folder.config, folder.plan, folder.results)
    adapter = [folder.adapter] if config.tracking.adapter and training and folder.adapter.is_dir() else []
    return RunView(
        card=Card(
            name=config.name,
            folder=folder.root,
            params=list_params(config_to_tree(config)),
            started_ms=started_ms,
            parent=parent,
        ),
        curves={"train": curve},
        scores={
            f"result {index}": Point(
                step=last_step, at_ms=to_ms(result.created), values=_name_scores(result, config, split)
            )
            for index, result in enumerate(results)
        },
        tags={"finlora.folder": str(folder.root), **(_describe(training or results[-1]) if results else {})},
        files=[*(path for path in texts if path.is_file()), *adapter],
        state=_find_state(folder, is_trained=training is not None or not curve),
    )


def list_params(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as texts by their keys, without the section `tracking`: `{"lora.rank": "4", ...}`."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= list_params(value, f"{prefix}{key}.") if key != "tracking" else {}
        else:
            found[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return found


def to_ms(iso: str) -> int:
    """Return a UTC time such as 2026-11-30T12:00:00+00:00 in milliseconds since 1970."""
    return round(datetime.fromisoformat(iso).timestamp() * 1000)


def _read_results(folder: RunFolder) -> list[Result]:
    """Return the results that can be read: a line that another process writes now is there the next time."""
    found = []
    for line in read_lines(folder.results):
        try:
            found.append(Result(**line))
        except TypeError:  # of another version
            continue
    return found


def read_config(folder: RunFolder) -> RunConfig:
    """Return the settings of a run; of an evaluation without a training, those of its first result.

    Raises:
        ResultError: the folder holds neither.
    """
    if folder.config.is_file():
        return load_config(folder.config)
    results = _read_results(folder)
    if not results:
        raise ResultError(
            f"{folder.root} holds no run: expected config.yaml or results.jsonl, as `finlora train` writes."
        )
    return config_from_tree(results[0].config)


def _find_start(folder: RunFolder, results: Sequence[Result]) -> int:
    attempts = read_attempts(folder)
    if attempts and attempts[0].started:
        return to_ms(attempts[0].started)
    if attempts:  # a run of an older version
        return round(1000 * (folder.progress.stat().st_mtime - sum(attempt.seconds for attempt in attempts)))
    if results:
        return to_ms(results[0].created)
    return round(1000 * folder.config.stat().st_mtime)


def _read_curve(folder: RunFolder, config: RunConfig, started_ms: int) -> list[Point]:
    """Return a point for each progress record. Its time is the start of the run plus the time of all steps until then."""
    points, seconds, before = [], 0.0, 0
    for record in read_progress(folder):
        seconds += (record.step - before) * config.train.global_batch_size / record.examples_per_second
        before = record.step
        values = {f"train/{name}": float(getattr(record, name)) for name in CURVES}
        points.append(Point(step=record.step, at_ms=started_ms + round(1000 * seconds), values=values))
    return points


def _name_scores(result: Result, config: RunConfig, split: str) -> dict[str, float]:
    """Return a result's numbers by name: `run/...` of the training, `test/TASK/...`, `base/TASK/...` of evaluations."""
    costs = {name: float(value) for name in _COSTS if (value := getattr(result, name)) is not None}
    if result.kind == "training":
        wire = {"bytes_sent": sum(worker["bytes_sent"] for worker in result.wire)} if result.wire else {}
        return {f"run/{name}": value for name, value in {**result.metrics, **costs, **wire}.items()}
    if result.adapter is None:
        place = "base"
    elif result.run == config.name:
        place = split
    else:  # another run's adapter, scored into this folder
        place = f"adapter {result.run}"
    return {f"{place}/{result.task}/{name}": value for name, value in {**result.metrics, **costs}.items()}


def _describe(result: Result) -> dict[str, str]:
    hashes = {f"finlora.{name}": str(value) for name in _HASHES if (value := getattr(result, name)) is not None}
    return hashes | {f"finlora.{name}": value for name, value in result.environment.items()}


def _find_state(folder: RunFolder, *, is_trained: bool) -> RunState:
    """Return the state of a run that this process does not train itself."""
    if is_trained:
        return RunState.FINISHED
    if folder.lock.is_file():
        with folder.lock.open("a+", encoding="utf-8") as stream:
            if not try_lock(stream):
                return RunState.RUNNING
    return RunState.STOPPED
