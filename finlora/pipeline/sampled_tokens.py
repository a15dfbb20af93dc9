"""Return of sampled tokens from the last stage to the first, where the next micro-batch starts from them, through the host.

Ray's compiled graphs have no edge back, and through the driver it takes milliseconds. So the two stages have a TCP connection of
their own, on one machine or between two. Each micro-batch that samples tokens sends one frame back. The first stage reads them
when it starts a micro-batch, and only then; no more than those of the micro-batches in flight are unread, so the last stage never
blocks.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finlora.engine.micro_batch import Output
from finlora.errors import ResourceError
from finlora.pipeline.links import StageInfo
from finlora.stage.upload import upload

_HEAD = struct.Struct("!qq")
"""Header of a frame: ticket of the micro-batch, and number of tokens or _FAILED."""
_FAILED = -1
_KEPT = 64
"""Micro-batches whose tokens are kept: many more than can be in flight."""
_KEY_BYTES = 32
_JOIN_S = 30.0


class Address(NamedTuple):
    """Where the first stage listens for the last one."""

    host: str
    port: int
    key: bytes
    """Secret that the last stage sends first."""


class _Arrived:
    """Tokens that have arrived, by the ticket of their micro-batch."""

    def __init__(self, device: torch.device) -> None:
        self.tokens: dict[int, Sequence[int] | None] = {}
        self._device = device

    def add(self, ticket: int, tokens: Sequence[int] | None) -> None:
        self.tokens[ticket] = tokens
        if len(self.tokens) > _KEPT:
            del self.tokens[next(iter(self.tokens))]

    def upload(self, ticket: int) -> Tensor:
        tokens = self.tokens[ticket]
        if tokens is None:
            raise RuntimeError("a micro-batch has failed: the tokens that the next one follows will not arrive")
        return upload(tokens, self._device)


class SocketTokenLink:
    """A TCP connection, on which the first stage listens."""

    runs_ahead = False
    held_gib = 0.0

    def __init__(self, stage: StageInfo) -> None:
        self._stage = stage
        self._listener: socket.socket | None = None
        self._address = Address("", 0, b"")
        self._socket: socket.socket | None = None
        self._read = bytearray()
        self._arrived = _Arrived(stage.device)

    def offer(self) -> Address | None:
        """Listen at the first stage, and return where; the last stage has nothing to offer."""
        if not self._stage.is_first:
            return None
        self._listener = socket.create_server((self._stage.host, 0), backlog=1)
        port = self._listener.getsockname()[1]
        self._address = Address(self._stage.host, port, secrets.token_bytes(_KEY_BYTES))
        return self._address

    def join(self, offer: Address | None) -> None:
        """Connect the last stage to the first.

        Raises:
            ResourceError: one does not reach the other in time.
        """
        self._socket = self._accept() if offer is None else _connect(offer)

    def drain(self) -> None:
        assert self._socket is not None, "join comes first"
        while select.select([self._socket], [], [], 0)[0]:
            self._receive(self._socket)

    def receive(self, ticket: int) -> Tensor:
        """Return the tokens (N,) of a micro-batch once they are sampled.

        Raises:
            RuntimeError: they will not come.
        """
        assert self._socket is not None, "join comes first"
        while ticket not in self._arrived.tokens:
            self._receive(self._socket)
        return self._arrived.upload(ticket)

    def send_sampled(self, ticket: int, tokens: Tensor) -> None:
        """Do nothing: the host has to read the tokens first."""

    def send_read(self, ticket: int, output: Output | None) -> None:
        """Send a frame; none for a micro-batch that samples no token."""
        assert self._socket is not None, "join comes first"
        frame = _pack(ticket, output)
        if frame:
            with suppress(OSError):  # the first stage is gone, which the driver detects
                self._socket.sendall(frame)

    def stop(self) -> None:
        if self._socket is not None and self._stage.is_first:
            with suppress(OSError):  # the other end is gone
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in (self._listener, self._socket):
            if end is not None:
                end.close()
        self._read.clear()
        self._arrived.tokens.clear()

    def _accept(self) -> socket.socket:
        """Wait for the last stage; a connection without the key is closed."""
        assert self._listener is not None, "offer comes first"
        until = time.monotonic() + _JOIN_S
        with self._listener as listener:
            while (left_s := until - time.monotonic()) > 0:
                listener.settimeout(left_s)
                try:
                    found, _ = listener.accept()
                except TimeoutError:
                    break
                if self._knows_key(found):
                    return found
                found.close()
        raise ResourceError(
            f"the last stage did not reach the first at {self._address.host}:{self._address.port} in {_JOIN_S:.0f} s: let the "
            "cluster's machines connect to each other by TCP on any port."
        )

    def _knows_key(self, connection: socket.socket) -> bool:
        connection.settimeout(1.0)
        try:
            key = connection.recv(_KEY_BYTES, socket.MSG_WAITALL)
        except OSError:
            return False
        connection.settimeout(None)
        return hmac.compare_digest(key, self._address.key)

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            raise RuntimeError(
                "the last stage has crashed, or this one was stopped: the tokens that it waits for will not arrive"
            )
        self._read += data
        while len(self._read) >= _HEAD.size:
            ticket, count = _HEAD.unpack_from(self._read)
            size = _HEAD.size + 8 * max(0, count)
            if len(self._read) < size:
                break
            tokens = struct.unpack_from(f"!{max(0, count)}q", self._read, _HEAD.size)
            self._arrived.add(ticket, None if count == _FAILED else tokens)
            del self._read[:size]


def _connect(address: Address) -> socket.socket:
    try:
        connection = socket.create_connection((address.host, address.port), _JOIN_S)
    except OSError as error:
        raise ResourceError(
            f"the first stage cannot be reached at {address.host}:{address.port} ({error}): let the cluster's machines "
            "connect to each other by TCP on any port."
        ) from error
    connection.settimeout(None)
    # No data goes the other way to carry an acknowledgement; without this a frame waits 40 ms for it.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(address.key)
    return connection


def _pack(ticket: int, output: Output | None) -> bytes:
    if output is None:
        return _HEAD.pack(ticket, _FAILED)
    tokens = [token for token, _ in output.tokens]
    return _HEAD.pack(ticket, len(tokens)) + struct.pack(f"!{len(tokens)}q", *tokens) if tokens else b""


class LocalTokenLink:
    """Both ends in one stage, the only one."""

    runs_ahead = False
    held_gib = 0.0

    def __init__(self, stage: StageInfo) -> None:
        self._arrived = _Arrived(stage.device)

    def offer(self) -> None:
        """Return nothing: there is no other end."""

    def join(self, offer: Any) -> None:
        pass

    def drain(self) -> None:
        pass

    def receive(self, ticket: int) -> Tensor:
        return self._arrived.upload(ticket)

    def send_sampled(self, ticket: int, tokens: Tensor) -> None:
        pass

    def send_read(self, ticket: int, output: Output | None) -> None:
        if output is None or output.tokens:
            self._arrived.add(ticket, None if output is None else [token for token, _ in output.tokens])

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self._arrived.tokens.clear()
