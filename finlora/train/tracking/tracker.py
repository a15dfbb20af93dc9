"""Tracker: one run in MLflow, W&B or TensorBoard, and what is logged to it. No tracking library is imported here.

A run's folder is the record; a tracker only copies it. So a tracker that was away logs later what is missing, and a run that was
never tracked is exported in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

OFFLINE = "offline"


class RunState(StrEnum):
    """State of a run in a tracking system."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    """By a signal, by ASHA or by a crash of its driver; it may be resumed."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Parent:
    """Search above a trial."""

    run_id: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What is known of a run when its tracker is opened."""

    name: str
    folder: Path
    params: Mapping[str, str]
    """Settings by their keys in a config: `lora.rank` -> `4`."""
    started_ms: int
    """Start of the run, in milliseconds since 1970."""
    parent: Parent | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Numbers after an optimiser step."""

    step: int
    at_ms: int
    """Milliseconds since 1970. A function of the run's folder, so that a point logged twice is the same point."""
    values: Mapping[str, float]


class Tracker(Protocol):
    """One run in a tracking system. Each method may raise any error of the system's library."""

    @property
    def run_id(self) -> str:
        """The system's id of the run, by which the next process opens it again."""

    def log_points(self, points: Sequence[Point]) -> None:
        """Log numbers, in the order of their steps."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set texts that describe the run; a later value of a key replaces the earlier one."""

    def log_files(self, files: Sequence[Path]) -> None:
        """Copy files and folders. A later copy of a name replaces the earlier one."""

    def end(self, state: RunState, at_ms: int) -> None:
        """Close the run in this state; with RUNNING, only this process's access to it."""
