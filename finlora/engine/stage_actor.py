"""One stage in a process of its own, and the messages that pass from stage to stage."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finlora.config import Bits, ModelConfig
from finlora.engine.microbatch import MicroBatch, Output
from finlora.engine.semaphores import remove_left_semaphores
from finlora.errors import AdapterError, FinloraError
from finlora.onednn import bound_kernel_cache

if TYPE_CHECKING:
    from finlora.engine.transport import Neighbours


@dataclass(frozen=True, slots=True)
class Change:
    """Load an adapter, or unload it (folder None)."""

    name: str
    folder: str | None


@dataclass(frozen=True, slots=True)
class Message:
    """What passes from stage to stage."""

    work: MicroBatch | Change | None
    state: Any = None
    """Hidden states as an array, the hash of an adapter, an error of a stage before, or from the last stage what the work asked
    for."""
    seconds: tuple[float, ...] = ()
    """How long each stage so far worked on it."""
    peaks_gib: tuple[float, ...] = ()
    """The most memory that each stage so far has taken since it was loaded."""


class StageActor:
    """Loads a span of layers and works on messages; Ray runs it.

    Args:
        model: a ModelConfig as a dict.
        span: first layer, and the one behind the last.
        device: `cuda` or `cpu`.
        cache_rows: tokens that its KV cache holds.
        keep_unpacked: hold 4-bit weights unpacked.
    """

    def __init__(
        self,
        model: dict[str, Any],
        bits: Bits,
        span: tuple[int, int],
        seed: int,
        *,
        device: str,
        cache_rows: int,
        keep_unpacked: bool,
    ) -> None:
        import torch

        from finlora.engine.stage import Stage
        from finlora.engine.transport import Letters
        from finlora.engine.waiting import wait_with_pauses
        from finlora.model.base import load_base, quiet_bitsandbytes

        remove_left_semaphores()
        bound_kernel_cache()
        wait_with_pauses(device)
        # For as long as the process lives: to change levels of loggers for each micro-batch took a fifth of a short one's time.
        self._quiet = quiet_bitsandbytes()
        self._quiet.__enter__()
        source, layers = ModelConfig(**model), range(*span)
        self.device = torch.device("cuda:0" if device == "cuda" else "cpu")
        self.neighbours: Neighbours | None = None
        base = load_base(source, bits, self.device, seed, layers)
        dtype = torch.bfloat16 if source.compute_dtype == "bfloat16" else torch.float32
        self.stage = Stage(base.model, layers, cache_rows, dtype, keep_unpacked=keep_unpacked)
        self.letters = Letters(dtype, self.device)
        self.weights_gib = base.weights_gib

    def join(self, transport: Literal["nccl", "gloo"], stage: int, num_stages: int, address: str) -> None:
        """Connect to the stages beside this one."""
        from finlora.engine.transport import Neighbours

        hidden_size = self.stage.net.config.hidden_size
        self.neighbours = Neighbours(transport, stage, num_stages, address, hidden_size, self.stage.dtype, self.device)

    def start_afresh(self) -> None:
        """Leave the stages beside this one, of which some are dead, and empty the cache; weights and adapters stay."""
        if self.neighbours is not None:
            self.neighbours.close()
            self.neighbours = None
        self.stage.clear_cache()

    def describe(self) -> dict[str, float]:
        """Return what the stage holds, which also says that it is loaded."""
        return {"weights_gib": self.weights_gib, "cache_gib": self.stage.cache_bytes / 2**30}

    def load_adapter(self, name: str, folder: str, known: str | None) -> str:
        """Load an adapter and return the hash of its files.

        Args:
            known: hash of what the other stages have under that name; None: they have not said.

        Raises:
            AdapterError: the folder holds no adapter that fits, or another one than the other stages have.
        """
        from finlora.engine.adapters import hash_adapter

        found = hash_adapter(Path(folder))
        if known not in (None, found):
            raise AdapterError(
                f"{folder} holds another adapter than a moment ago ({found}, expected {known}): copy each adapter into a "
                "folder of its own, finlora.yaml last."
            )
        self.stage.load_adapter(name, Path(folder))
        return found

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter where it is there."""
        self.stage.unload_adapter(name)

    def run(self, message: Message) -> Message:
        """Work on a message from the stage before, and give it to the next."""
        if isinstance(message.state, FinloraError):
            return message
        started = time.perf_counter()
        work: MicroBatch | Change | None = message.work
        try:
            state = self._work(work, message.state)
        except FinloraError as error:
            state = error
        work = None if isinstance(state, Output) else work
        seconds = (*message.seconds, time.perf_counter() - started)
        return Message(work, state, seconds, (*message.peaks_gib, self.stage.peak_memory_gib()))

    def _work(self, work: MicroBatch | Change | None, state: Any) -> Any:
        import torch

        if isinstance(work, Change):
            if work.folder is not None:
                return self.load_adapter(work.name, work.folder, state)
            self.unload_adapter(work.name)
            return None
        assert work is not None
        if not self.stage.is_first:
            beside = self.neighbours
            state = beside.receive(work.num_rows) if beside else self.letters.unpack(state)
        result = self.stage.run(work, state)
        if isinstance(result, Output):
            return result
        if self.neighbours is None:
            return self.letters.pack(result)
        self.neighbours.send(result)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # until then its seconds are not over
        return None
