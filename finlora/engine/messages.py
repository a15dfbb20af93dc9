"""What passes from stage to stage, and from the last one to the driver. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from finlora.engine.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Change:
    """Load an adapter, or unload it (folder None)."""

    name: str
    folder: str | None


class Parcel(NamedTuple):
    """Hidden states that stay on a GPU whose memory the next stage reaches (finlora/pipeline/hidden_states_gpu.py)."""

    memory: bytes
    """CUDA's handle of the memory that holds them."""
    num_bytes: int
    """Of the memory."""
    num_rows: int


@dataclass(frozen=True, slots=True)
class Message:
    """What passes from stage to stage."""

    work: MicroBatch | Change | None
    state: Any = None
    """Hidden states as an array or a parcel, the hash of an adapter, an error of a stage before, or from the last stage what the
    work asked for."""
    seconds: tuple[float, ...] = ()
    """How long each stage so far worked on it, as far as that is known: stages that hand over pass it on before that."""
    buffer: int = 0
    """Index of the memory in which a stage sends its hidden states; no other message in flight has the same."""
    ticket: int = 0
    """Number greater than those of all messages before: what a stage writes behind what it has computed for others."""
    follows: int | None = None
    """Ticket of the message with the micro-batch that this one's follows."""

    @property
    def is_empty(self) -> bool:
        """Whether it asks for nothing, or answers nothing (finlora/pipeline/late_read.py)."""
        return self.work is None and self.state is None
