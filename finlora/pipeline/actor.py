"""Stage in a process of its own: works on messages from the stage before, and returns them for the next."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finlora.cluster.connect import find_node_address
from finlora.config import Bits, ModelConfig
from finlora.data.encode import end_token_id
from finlora.engine.messages import Change, Message
from finlora.engine.micro_batch import MicroBatch, Output
from finlora.errors import AdapterError, FinloraError
from finlora.grammar.vocabulary import Vocabulary
from finlora.machine.cpu import set_environment
from finlora.pipeline.late_read import Queued, Reader
from finlora.pipeline.links import HiddenStateLink, StageInfo, TokenLink
from finlora.pipeline.ray_workarounds import remove_left_semaphores
from finlora.pipeline.transports import (
    HiddenStateTransport,
    TokenTransport,
    make_hidden_state_link,
    make_token_link,
)

if TYPE_CHECKING:
    from torch import Tensor


class StageActor:
    """Ray actor that loads a span of layers and computes messages; finlora/pipeline/graph.py joins it to the other stages.

    Args:
        model: a ModelConfig as a dict.
        span: first layer, and the one behind the last.
        device: `cuda` or `cpu`.
        cache_rows: tokens of its KV cache.
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
        from finlora.pipeline.ray_workarounds import wait_with_pauses
        from finlora.stage.stage import Stage

        remove_left_semaphores()
        wait_with_pauses(device)
        # For the life of the process: changing log levels for each micro-batch took a fifth of a short one's time.
        self._quiet = quiet_bitsandbytes()
        self._quiet.__enter__()
        source, layers = ModelConfig(**model), range(*span)
        self.device = torch.device("cuda:0" if device == "cuda" else "cpu")
        self._is_computing = False
        self.reader = Reader()
        self.incoming: HiddenStateLink | None = None
        """From the stage before; None at the first stage."""
        self.outgoing: HiddenStateLink | None = None
        """To the next stage; None at the last one."""
        self.sampled_in: TokenLink | None = None
        """Of the first stage, by which it gets sampled tokens from the last."""
        self.sampled_out: TokenLink | None = None
        """Of the last stage; with one stage, the same."""
        self._hidden_state_links: dict[HiddenStateTransport, HiddenStateLink] = {}
        """Kept when closed: another stage may have the memory of one mapped."""
        self._token_links: dict[TokenTransport, TokenLink] = {}
        self.info: StageInfo | None = None
        base = load_base(source, bits, self.device, seed, layers, is_bare=True)
        self._vocabulary = Vocabulary(base.tokenizer, end_token_id(base.tokenizer, source.template))
        self.stage = Stage(
            base.model, layers, cache_rows, base.dtype, keep_unpacked=keep_unpacked, vocabulary=self._vocabulary
        )
        self.weights_gib = base.weights_gib

    def take_number(self, number: int, num_stages: int) -> str | None:
        """Learn which stage this is; returns a name of the machine whose GPU it has, None on CPU."""
        hidden_size = self.stage.shape.hidden_size
        self.info = StageInfo(number, num_stages, hidden_size, self.stage.dtype, self.device, find_node_address())
        if self.device.type == "cpu":
            return None
        # The same in all containers of a machine.
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def offer_hidden_states(self, transport: HiddenStateTransport, ticket: int) -> Any:
        """Return what the stages of a link need to join it."""
        return self._find_hidden_state_link(transport).offer(ticket)

    def join_hidden_states(self, transport: HiddenStateTransport, offer: Any, rank: int, size: int) -> bool:
        """Join a link to the stages beside this one; returns whether messages run ahead on it.

        Raises:
            RuntimeError: the transport does not connect them.
        """
        link = self._find_hidden_state_link(transport)
        link.join(offer, rank, size)
        if rank > 0:
            self.incoming = link
        if rank < size - 1:
            self.outgoing = link
        return link.runs_ahead

    def offer_tokens(self, transport: TokenTransport) -> Any:
        """Return what the other end of a token link needs to join it."""
        return self._find_token_link(transport).offer()

    def join_tokens(self, transport: TokenTransport, offer: Any) -> bool:
        """Join a token link to the first or last stage; returns whether its GPU waits for the tokens, and no host.

        Raises:
            RuntimeError: the transport does not connect them.
            ResourceError: the other stage cannot be reached.
        """
        assert self.info is not None, "take_number comes first"
        link = self._find_token_link(transport)
        link.join(offer)
        if self.info.is_first:
            self.sampled_in = link
        if self.stage.is_last:
            self.sampled_out = link
        return link.runs_ahead

    def _find_hidden_state_link(self, transport: HiddenStateTransport) -> HiddenStateLink:
        if transport not in self._hidden_state_links:
            assert self.info is not None, "take_number comes first"
            self._hidden_state_links[transport] = make_hidden_state_link(transport, self.info)
        return self._hidden_state_links[transport]

    def _find_token_link(self, transport: TokenTransport) -> TokenLink:
        if transport not in self._token_links:
            assert self.info is not None, "take_number comes first"
            self._token_links[transport] = make_token_link(transport, self.info)
        return self._token_links[transport]

    @property
    def _links(self) -> list[HiddenStateLink | TokenLink]:
        return [*self._hidden_state_links.values(), *self._token_links.values()]

    def read_late(self) -> None:
        """Read answers of the last stage behind the next message from now on (finlora/pipeline/late_read.py)."""
        self.reader.is_late = True

    def stop_waiting(self) -> None:
        """End waits for tokens and hidden states, which may not come any more."""
        for link in self._links:
            link.stop()

    def reset(self) -> None:
        """Disconnect from the stages beside this one, of which some are dead, and clear the cache; weights and adapters stay."""
        for link in self._links:
            link.close()
        self.incoming = self.outgoing = self.sampled_in = self.sampled_out = None
        self.reader.forget()
        self.stage.forget_requests()

    def describe(self) -> dict[str, float]:
        """Return the sizes of weights and KV cache; an answer also shows that the stage is loaded."""
        return {"weights_gib": self.weights_gib, "cache_gib": self.stage.cache_bytes / 2**30}

    def prepare_grammars(self) -> None:
        """Start to build the vocabulary of grammars, which the first request with one would wait for."""
        threading.Thread(target=self._vocabulary.open, name="vocabulary", daemon=True).start()

    def peak_memory_gib(self) -> float:
        """Return the stage's peak memory since it was loaded."""
        return self.stage.peak_memory_gib() + sum(link.held_gib for link in self._links)

    def load_adapter(self, name: str, folder: str, known: str | None) -> str:
        """Load an adapter and return the hash of its files.

        Args:
            known: hash of the adapter that other stages loaded; None: this is the first stage.

        Raises:
            AdapterError: the folder holds no adapter that fits, or another one than the other stages loaded.
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
        """Unload an adapter, if it is loaded."""
        self.stage.unload_adapter(name)

    def run(self, message: Message) -> Message:
        """Compute a message of the stage before; returns the one for the next."""
        self._is_computing = True
        answer = None
        try:
            answer = self.reader.take(self._answer(message))
            return answer
        finally:
            self._is_computing = False
            if self.sampled_out is not None and isinstance(message.work, MicroBatch):
                state = answer.state if answer else None
                self.sampled_out.send_read(message.ticket, state if isinstance(state, Output) else None)

    def is_computing(self) -> bool:
        """Return whether the stage computes; otherwise it waits to receive or to send a message."""
        return self._is_computing

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
        """Return the state for the next stage, and those seconds of this stage and earlier ones that are known now."""
        import torch

        started, waited, batch = time.perf_counter(), 0.0, message.work
        assert isinstance(batch, MicroBatch)
        assert self.info is not None, "take_number comes first"
        number, incoming, outgoing = self.info.number, self.incoming, self.outgoing
        hidden, stamps = (None, None) if incoming is None else incoming.receive(message)
        if self.sampled_in is not None:
            self.sampled_in.drain()

        def begin() -> Tensor | None:
            nonlocal waited, stamps
            sampled: Tensor | None = None
            if self.sampled_in is not None and message.follows is not None:
                before = time.perf_counter()
                sampled = self.sampled_in.receive(message.follows)
                waited = time.perf_counter() - before
            if incoming is not None:
                incoming.wait(message)
            if outgoing is not None:
                stamps = outgoing.reserve(message, stamps)
            if stamps is not None:
                stamps.begin(number)
            return sampled

        result = self.stage.run(batch, hidden, begin)
        if outgoing is not None and outgoing.runs_ahead:
            assert isinstance(result, torch.Tensor), "the last stage has no next one"
            return outgoing.send(message, result), ()
        if self.sampled_out is not None and not isinstance(result, torch.Tensor):
            self.sampled_out.send_sampled(message.ticket, result.tokens)
        read_seconds = None
        if stamps is not None:
            stamps.end(number)
            read_seconds = stamps.copy(len(message.seconds), number)
        if isinstance(result, torch.Tensor):
            assert outgoing is not None, "join_hidden_states comes first"
            state = outgoing.send(message, result)
        elif read_seconds is not None:
            return Queued(result, read_seconds), ()
        else:
            state = result.read()
        return state, read_seconds() if read_seconds else (time.perf_counter() - started - waited,)
