"""One stage in a process of its own: it works on messages from the stage before, and gives them to the next."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finlora.config import Bits, ModelConfig
from finlora.engine.messages import Change, Message, Parcel
from finlora.engine.micro_batch import MicroBatch, Output
from finlora.errors import AdapterError, FinloraError
from finlora.machine.cpu import set_environment
from finlora.pipeline.late_read import Queued, Reader
from finlora.pipeline.ray_workarounds import remove_left_semaphores
from finlora.pipeline.sampled_tokens import FirstEnd, LastEnd, Loop

if TYPE_CHECKING:
    from torch import Tensor

    from finlora.pipeline.hidden_states import Neighbours
    from finlora.pipeline.hidden_states_gpu import Receiver, Sender
    from finlora.pipeline.sampled_tokens_gpu import FirstBoard, LastBoard


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
        set_environment()
        import torch

        from finlora.model.base import load_base, quiet_bitsandbytes
        from finlora.pipeline.hidden_states import Letters
        from finlora.pipeline.ray_workarounds import wait_with_pauses
        from finlora.stage.stage import Stage

        remove_left_semaphores()
        wait_with_pauses(device)
        # For as long as the process lives: to change levels of loggers for each micro-batch took a fifth of a short one's time.
        self._quiet = quiet_bitsandbytes()
        self._quiet.__enter__()
        source, layers = ModelConfig(**model), range(*span)
        self.device = torch.device("cuda:0" if device == "cuda" else "cpu")
        self.neighbours: Neighbours | None = None
        self._is_at_work = False
        self.reader = Reader()
        self.coming: FirstEnd | FirstBoard | Loop | None = None
        """Of the first stage: the way by which drawn tokens come back from the last (finlora/pipeline/graph.py)."""
        self.going: LastEnd | LastBoard | Loop | None = None
        """Of the last stage: the same way's other end."""
        self.board: LastBoard | None = None
        """Kept: the first stage may have its memory mapped."""
        self.number, self.num_stages = 0, 1
        self.sender: Sender | None = None
        self.receiver: Receiver | None = None
        self.hands_over = False
        """Whether the next stage finds hidden states on the GPU."""
        base = load_base(source, bits, self.device, seed, layers)
        self.stage = Stage(base.model, layers, cache_rows, base.dtype, keep_unpacked=keep_unpacked)
        self.letters = Letters(base.dtype, self.device)
        self.weights_gib = base.weights_gib

    def join(self, transport: Literal["nccl", "gloo"], stage: int, num_stages: int, address: str) -> None:
        """Connect to the stages beside this one."""
        from finlora.pipeline.hidden_states import Neighbours

        hidden_size = self.stage.shape.hidden_size
        self.neighbours = Neighbours(transport, stage, num_stages, address, hidden_size, self.stage.dtype, self.device)

    def take_number(self, number: int, num_stages: int) -> str | None:
        """Learn which stage this is; returns a name of the machine whose GPU it has, None on CPU."""
        self.number, self.num_stages = number, num_stages
        if self.device.type == "cpu":
            return None
        # The same in all containers of a machine.
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def offer(self, ticket: int) -> Parcel:
        """Hand hidden states over on the GPU from now on; returns a first parcel, for the next stage to try."""
        from finlora.pipeline.hidden_states_gpu import Sender

        hidden_size = self.stage.shape.hidden_size
        if self.sender is None:
            self.sender = Sender(self.number, self.num_stages, hidden_size, self.stage.dtype, self.device)
        self.hands_over = True
        return self.sender.send_trial(ticket)

    def accept(self, parcel: Parcel, ticket: int) -> None:
        """Try the first parcel of the stage before.

        Raises:
            RuntimeError: this process cannot have the other's memory.
        """
        from finlora.pipeline.hidden_states_gpu import Receiver

        if self.receiver is None:
            hidden_size = self.stage.shape.hidden_size
            self.receiver = Receiver(self.num_stages, hidden_size, self.stage.dtype, self.device)
        self.receiver.take_trial(parcel, ticket)

    def use_messages(self) -> None:
        """Put hidden states into messages, since the next stage cannot have this one's memory."""
        self.hands_over = False

    def stop_waiting(self) -> None:
        """Wait no longer for tokens and hidden states, which may not come any more."""
        for end in (self.coming, self.receiver):
            if end is not None:
                end.stop()

    def start_afresh(self) -> None:
        """Leave the stages beside this one, of which some are dead, and empty the cache; weights and adapters stay."""
        if self.neighbours is not None:
            self.neighbours.close()
            self.neighbours = None
        if self.receiver is not None:
            self.receiver.close()
        if self.coming is not None:
            self.coming.close()
        if isinstance(self.going, LastEnd):
            self.going.close()
        self.coming = self.going = None
        self.hands_over = False
        self.reader.forget()
        self.stage.clear_cache()

    def describe(self) -> dict[str, float]:
        """Return what the stage holds, which also says that it is loaded."""
        return {"weights_gib": self.weights_gib, "cache_gib": self.stage.cache_bytes / 2**30}

    def peak_memory_gib(self) -> float:
        """Return the most memory that the stage has taken since it was loaded."""
        return self.stage.peak_memory_gib() + sum(getattr(each, "held_gib", 0.0) for each in (self.sender, self.board))

    def load_adapter(self, name: str, folder: str, known: str | None) -> str:
        """Load an adapter and return the hash of its files.

        Args:
            known: hash of what the other stages have under that name; None: they have not said.

        Raises:
            AdapterError: the folder holds no adapter that fits, or another one than the other stages have.
        """
        from finlora.stage.adapter_weights import hash_adapter

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
        self._is_at_work = True
        answer = None
        try:
            answer = self.reader.take(self._answer(message))
            return answer
        finally:
            self._is_at_work = False
            self._give_back(message, answer.state if answer else None)

    def is_at_work(self) -> bool:
        """Return whether the stage computes; otherwise it waits for a message, or for one to be taken."""
        return self._is_at_work

    def _give_back(self, message: Message, state: Any) -> None:
        """Give the first stage what was drawn, or word that nothing was, where it does not find that on their GPU."""
        if not isinstance(self.going, LastEnd | Loop) or not isinstance(message.work, MicroBatch):
            return
        drawn = [token for token, _ in state.tokens] if isinstance(state, Output) else None
        if drawn is None or drawn:
            self.going.send(message.ticket, drawn)

    def _answer(self, message: Message) -> Message:
        seconds, state = message.seconds, message.state
        if message.is_empty or isinstance(state, FinloraError):
            return message
        try:
            if isinstance(message.work, Change):
                state = self._change(message.work, state)
            else:
                state, own_seconds = self._compute(message)
                seconds += own_seconds
        except FinloraError as error:
            state = error
        work = None if isinstance(state, Output | Queued) else message.work
        return dataclasses.replace(message, work=work, state=state, seconds=seconds)

    def _change(self, change: Change, known: str | None) -> str | None:
        if change.folder is not None:
            return self.load_adapter(change.name, change.folder, known)
        self.unload_adapter(change.name)
        return None

    def _compute(self, message: Message) -> tuple[Any, tuple[float, ...]]:
        """Return the state for the next stage, and the seconds that are known now of this stage and of those before it."""
        import torch

        from finlora.stage.upload import upload

        started, waited, batch, state, stamps = time.perf_counter(), 0.0, message.work, message.state, None
        assert isinstance(batch, MicroBatch)
        receiver = self.receiver if isinstance(state, Parcel) else None
        sender = self.sender if self.hands_over else None
        if receiver is not None:
            hidden, stamps = receiver.receive(state)
        elif self.stage.is_first:
            hidden = None
        else:
            hidden = self.neighbours.receive(batch.num_rows) if self.neighbours else self.letters.unpack(state)

        if isinstance(self.coming, FirstEnd):
            self.coming.drain()

        def begin() -> Tensor | None:
            nonlocal waited
            drawn: Tensor | None = None
            if self.coming is not None and message.follows is not None:
                before = time.perf_counter()
                found = self.coming.wait(message.follows)
                waited = time.perf_counter() - before
                drawn = found if isinstance(found, torch.Tensor) else upload(found, self.device)
            if receiver is not None:
                receiver.wait(state, message.ticket)
            if sender is not None:
                sender.begin(message.place, batch.num_rows, stamps)
            elif stamps is not None:
                stamps.begin(self.number)
            return drawn

        result = self.stage.run(batch, hidden, begin)
        if sender is not None:
            assert isinstance(result, torch.Tensor), "the last stage hands nothing over"
            return sender.send(message.place, message.ticket, result), ()
        if not isinstance(result, torch.Tensor) and not isinstance(self.going, LastEnd | Loop | None):
            self.going.write(message.ticket, result.tokens)
        read_seconds = None
        if stamps is not None:
            stamps.end(self.number)
            read_seconds = stamps.copy(len(message.seconds), self.number)
        if isinstance(result, torch.Tensor):
            state = self._send(result)
        elif read_seconds is not None:
            return Queued(result, read_seconds), ()
        else:
            state = result.read()
        return state, read_seconds() if read_seconds else (time.perf_counter() - started - waited,)

    def _send(self, hidden: Tensor) -> Any:
        """Give states (T, H) to the next stage; returns what of them travels within the message."""
        import torch

        if self.neighbours is None:
            return self.letters.pack(hidden)
        self.neighbours.send(hidden)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # until then its seconds are not over
        return None
