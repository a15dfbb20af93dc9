"""Messages from the driver through all stages and back. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from finlora.engine.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Change:
    """Request to load an adapter, or to unload it (folder None)."""

    name: str
    folder: str | None


class Parcel(NamedTuple):
    """Handle of hidden states in GPU memory that the next stage maps (finlora/pipeline/hidden_states_gpu.py)."""

    memory: bytes
    """CUDA's IPC handle of the memory that holds them."""
    num_bytes: int
    """Of the memory."""
    num_rows: int


@dataclass(frozen=True, slots=True)
class Message:
    """One unit of work, with what the stages so far have computed for it."""

    work: MicroBatch | Change | None
    state: Any = None
    """Hidden states as their link carries them, the hash of an adapter, the error of a stage, or the last stage's output."""
    seconds: tuple[float, ...] = ()
    """Computing time of each stage so far; where messages run ahead, it is not known yet (finlora/pipeline/links.py)."""
    buffer: int = 0
    """Index of the memory in which a stage sends its hidden states; no other message in flight has the same."""
    ticket: int = 0
    """Number greater than those of all messages before; marks hidden states and tokens as this message's."""
    follows: int | None = None
    """Ticket of the micro-batch that this message's follows."""

    @property
    def is_empty(self) -> bool:
        """Whether it carries neither work nor a result (finlora/pipeline/late_read.py)."""
        return self.work is None and self.state is None
