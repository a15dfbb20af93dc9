"""Every error that FinLoRA raises on purpose.

    FinloraError                  exit code 1, or the code named below
    ├── ConfigError         (2)   settings, options or arguments are wrong; lists all of them
    ├── DatasetError        (3)   raw data, a prepared set or an example does not fit its task; names file, line, column
    ├── ModelError          (4)   a base model, its tokenizer or its weights cannot be used as asked
    │   └── AdapterError          an adapter folder is missing, incomplete or belongs to another base
    │       └── ApprovalError     an adapter is not approved as it is now, on a server that requires it
    ├── ResourceError       (5)   GPUs, memory, disk or a port that the command needs are not there
    │   ├── NoRoomError           others held the GPUs or cores for longer than max_wait_s; can succeed later
    │   ├── QueueFullError        the server's queue is full; can succeed later
    │   ├── QuotaError            a key has reached its limit for this minute
    │   └── StageLostError        a stage of the model crashed or is starting; can succeed later
    ├── CheckpointError     (6)   a checkpoint is missing, incomplete or of another run
    ├── ResultError         (7)   a results file cannot be read
    └── StoppedError              a signal ended a run at a checkpoint: 128 + the signal's number, as shells count

A message has three parts: what was found, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """Return a number and its noun as a message says them: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class FinloraError(Exception):
    """Root of all errors that FinLoRA raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        # A message may quote what was found, and that may hold halves of characters, which no terminal or reply can show.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class ConfigError(FinloraError):
    """One or more settings, options or arguments are wrong. The message lists all of them (`faults`)."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        if len(self.faults) == 1:
            message = self.faults[0]
        else:
            message = f"{len(self.faults)} settings are wrong:\n" + "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(message)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        # Ray pickles errors across processes; the default would pass the joined message back as one fault.
        return (type(self), (self.faults,))


class DatasetError(FinloraError):
    """Raw data, a prepared set or an example does not fit its task."""

    exit_code = 3


class ModelError(FinloraError):
    """A base model, its tokenizer or its weights cannot be used as asked."""

    exit_code = 4


class AdapterError(ModelError):
    """An adapter folder is missing, incomplete or belongs to another base, tokenizer or template."""


class ApprovalError(AdapterError):
    """An adapter is not approved as it is now, and the server serves approved adapters alone."""


class ResourceError(FinloraError):
    """The machine or cluster lacks GPUs, memory, disk or a port that the command needs."""

    exit_code = 5


class NoRoomError(ResourceError):
    """Others held the GPUs or cores for longer than `max_wait_s`. The same command can succeed later."""


class QueueFullError(ResourceError):
    """The server's queue is full. The same request can succeed later."""


class QuotaError(ResourceError):
    """A key has reached its limit of requests or tokens for this minute. Ask again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1, kind: str = "requests") -> None:
        super().__init__(message)
        self.retry_after_s, self.kind = retry_after_s, kind

    def __reduce__(self) -> tuple[type[QuotaError], tuple[str, int, str]]:
        return (type(self), (str(self), self.retry_after_s, self.kind))


class StageLostError(ResourceError):
    """A stage of the model crashed or is still starting. The same request can succeed later."""


class CheckpointError(FinloraError):
    """A checkpoint is missing, incomplete or belongs to another run."""

    exit_code = 6


class ResultError(FinloraError):
    """A results file cannot be read back."""

    exit_code = 7


class StoppedError(FinloraError):
    """A signal stopped a run, which wrote a checkpoint first: 129 after SIGHUP, 130 after SIGINT, 143 after SIGTERM."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code
