"""What the engine's thread and the rest of a server tell each other of the stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finlora.engine.engine import EngineCore


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """What one stage holds."""

    first_layer: int
    last_layer: int
    weights_gib: float
    cache_gib: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenCore:
    """A core whose stages stand."""

    core: EngineCore
    stages: tuple[StageFacts, ...]
    check: Callable[[], None]
    """Raises when a stage is dead."""
    close: Callable[[], None]
    repair: Callable[[], OpenCore] | None = None
    """Starts dead stages alone and returns a fresh core over all; raises where only opening anew helps. None: it cannot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """How the engine stood a moment ago."""

    queue: int = 0
    active: int = 0
    kv_used: int = 0
    kv_total: int = 0
    busy: tuple[float, ...] = ()
    """Share of the time since the snapshot before that each stage computed; 0 on an idle server."""
    bubble: float = 0.0
    """Share of the stages' time with work since then that was idle; 0 on an idle server."""
    adapters: tuple[str, ...] = ()
    num_losses: int = 0
    """How often stages were lost."""
    num_repairs: int = 0
    """How often only the dead ones had to be started for it."""
    recovery_s: float | None = None
    """Seconds from the last loss until the stages stood again."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as the engine knows it; another content is another name."""

    name: str
    folder: Path
