"""Protocols of the links between stages.

Hidden states go from a stage to the next by a HiddenStateLink, sampled tokens from the last stage back to the first by a
TokenLink. Each transport is a class that implements one of them; a stage has one object of it. transports.py chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finlora.engine.messages import Message
    from finlora.engine.micro_batch import Output


class StageInfo(NamedTuple):
    """Facts of a stage that its links need."""

    number: int
    """From 0."""
    num_stages: int
    hidden_size: int
    dtype: torch.dtype
    """Of hidden states."""
    device: torch.device
    host: str
    """Address of its machine that the other stages reach."""

    @property
    def is_first(self) -> bool:
        return self.number == 0


class Stamps(Protocol):
    """Times at which stages began and ended, written on a GPU in its order of work."""

    numbers: Tensor
    """(2 K,) int64, begin and end of each of K stages in nanoseconds."""

    def begin(self, stage: int) -> None:
        """Queue the time at which a stage's work begins."""
        ...

    def end(self, stage: int) -> None:
        """Queue the time at which a stage's work ends."""
        ...

    def copy(self, first: int, last: int) -> Callable[[], tuple[float, ...]]:
        """Queue a copy to the host; the function returned waits for it and returns the seconds of stages `first` to `last`."""
        ...


class HiddenStateLink(Protocol):
    """A stage's ends of one transport of hidden states: to the stage before, to the next, or both. T rows, H hidden.

    Stages that join one link are consecutive. The first of them makes an offer, then all join with it, at the same time.
    """

    runs_ahead: bool
    """Whether a message is sent before the GPU has computed its hidden states; stages then write their times on the GPU."""

    @property
    def held_gib(self) -> float:
        """GPU memory that the link holds."""
        ...

    def offer(self, ticket: int) -> Any:
        """Return what the stages of the link need to join it.

        Args:
            ticket: less than those of all messages to come.
        """
        ...

    def join(self, offer: Any, rank: int, size: int) -> None:
        """Connect.

        Args:
            offer: of the link's first stage.
            rank: of this stage among those of the link.
            size: number of stages of the link.

        Raises:
            RuntimeError: this transport does not connect these stages.
        """
        ...

    def receive(self, message: Message) -> tuple[Tensor, Stamps | None]:
        """Return the hidden states (T, H) of a message, valid for work queued behind `wait`, and the times that came along."""
        ...

    def wait(self, message: Message) -> None:
        """Make work that is queued from now on wait for the hidden states of a message.

        Raises:
            RuntimeError: `stop` was called.
        """
        ...

    def reserve(self, message: Message, stamps: Stamps | None) -> Stamps | None:
        """Reserve memory for the hidden states that the stage sends next.

        Args:
            stamps: those that `receive` returned.

        Returns:
            Where the stage writes its times. None: it measures its time on the host.

        Raises:
            ResourceError: the GPU's memory is full.
        """
        ...

    def send(self, message: Message, hidden: Tensor) -> Any:
        """Send hidden states (T, H) to the next stage; returns the `state` of its message."""
        ...

    def stop(self) -> None:
        """End all waits, from any thread; what they waited for is void."""
        ...

    def close(self) -> None:
        """Disconnect, also from stages that are dead. The link can be joined again."""
        ...


class TokenLink(Protocol):
    """One end of a transport of sampled tokens; with one stage, both. N tokens of a micro-batch.

    Both ends make an offer, then each joins with the other's, at the same time.
    """

    runs_ahead: bool
    """Whether the first stage's GPU waits for the tokens, and no host does."""

    @property
    def held_gib(self) -> float:
        """GPU memory that the link holds."""
        ...

    def offer(self) -> Any:
        """Return what the other end needs to join."""
        ...

    def join(self, offer: Any) -> None:
        """Connect.

        Args:
            offer: of the other end.

        Raises:
            RuntimeError: this transport does not connect these stages.
            ResourceError: the other end cannot be reached.
        """
        ...

    def drain(self) -> None:
        """At the first stage: read what has arrived, so that the last stage never blocks."""
        ...

    def receive(self, ticket: int) -> Tensor:
        """At the first stage: return the tokens (N or more,) int64 of a micro-batch on its device, for work queued from now on.

        Raises:
            RuntimeError: they will not come.
        """
        ...

    def send_sampled(self, ticket: int, tokens: Tensor) -> None:
        """At the last stage: return tokens (N,) int64 on its device, which the host has not read.

        Raises:
            ResourceError: they are too many.
        """
        ...

    def send_read(self, ticket: int, output: Output | None) -> None:
        """At the last stage: return the tokens of an output that the host has read; None: the micro-batch has failed."""
        ...

    def stop(self) -> None:
        """End all waits, from any thread; what they waited for is void."""
        ...

    def close(self) -> None:
        """Disconnect, also from a stage that is dead. The link can be joined again."""
        ...
