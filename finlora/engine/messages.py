"""What passes from stage to stage, and from the last one to the driver. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from finlora.engine.microbatch import MicroBatch


@dataclass(frozen=True, slots=True)
class Change:
    """Load an adapter, or unload it (folder None)."""

    name: str
    folder: str | None


class Parcel(NamedTuple):
    """Hidden states that stay on the GPU which two stages share (finlora/engine/handover.py)."""

    memory: bytes
    """CUDA's handle of the memory that holds them."""
    event: bytes
    """CUDA's handle of the event that says when they are there."""
    num_bytes: int
    """Of the memory."""
    num_rows: int
    pid: int
    """Process that computes them."""


@dataclass(frozen=True, slots=True)
class Message:
    """What passes from stage to stage."""

    work: MicroBatch | Change | None
    state: Any = None
    """Hidden states as an array or a parcel, the hash of an adapter, an error of a stage before, or from the last stage what the
    work asked for."""
    seconds: tuple[float, ...] = ()
    """How long each stage so far worked on it, as far as that is known: stages that share a GPU pass it on before that."""
    place: int = 0
    """Number that no other message under way has: which memory carries its parcels."""
    ticket: int = 0
    """Number that no other message of the pipeline has: what stages write beside their parcels when they are done."""
