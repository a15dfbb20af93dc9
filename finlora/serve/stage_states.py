"""Records that the engine thread and the HTTP side of a server exchange: stages, snapshots, adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finlora.engine.engine import EngineCore


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """Layers and memory of one stage."""

    first_layer: int
    last_layer: int
    weights_gib: float
    cache_gib: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenCore:
    """Engine core whose stages run."""

    core: EngineCore
    stages: tuple[StageFacts, ...]
    check: Callable[[], None]
    """Health check; raises if a stage has crashed."""
    close: Callable[[], None]
    repair: Callable[[], OpenCore] | None = None
    """Restarts only the crashed stages and returns a new core over all; raises if all must restart. None: not supported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """State of the engine at one moment."""

    queue: int = 0
    active: int = 0
    kv_used: int = 0
    kv_total: int = 0
    busy: tuple[float, ...] = ()
    """Share of the time since the last snapshot in which each stage computed; 0 on an idle server."""
    bubble: float = 0.0
    """Share of that time in which stages waited although there was work; 0 on an idle server."""
    adapters: tuple[str, ...] = ()
    num_losses: int = 0
    """Crashes of stages since the start."""
    num_repairs: int = 0
    """Crashes after which only the crashed stages restarted."""
    recovery_s: float | None = None
    """Seconds from the last crash until all stages ran again."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Adapter in the engine. Its name contains a hash of the weights, so other weights have another name."""

    name: str
    folder: Path
