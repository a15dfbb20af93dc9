"""Drawn tokens on their way from the last stage back to the first, where the next micro-batch begins with them.

Ray's compiled graphs know no way back, and through the driver it takes milliseconds. So the two stages have a TCP connection of
their own, from machine to machine if need be. One frame goes back for each micro-batch that draws. Where the first reaches the
last one's GPU memory, they go through that instead (finlora/pipeline/sampled_tokens_gpu.py).

The first stage reads when it begins a micro-batch, and only then: no more frames than there are micro-batches under way wait
for it, so the last stage never does.
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
from typing import NamedTuple

from finlora.errors import ResourceError

_HEAD = struct.Struct("!qq")
"""Ticket of the micro-batch, and how many tokens; _FAILED where it has none."""
_FAILED = -1
_KEPT = 64
"""Micro-batches whose tokens are kept: many more than can be under way."""
_KEY_BYTES = 32
_JOIN_S = 30.0


class Address(NamedTuple):
    """Where the first stage waits for the last one."""

    host: str
    port: int
    key: bytes
    """By which the first stage knows it."""


class _Came:
    """Tokens that have come, by the ticket of their micro-batch."""

    def __init__(self) -> None:
        self.tokens: dict[int, Sequence[int] | None] = {}

    def add(self, ticket: int, tokens: Sequence[int] | None) -> None:
        self.tokens[ticket] = tokens
        if len(self.tokens) > _KEPT:
            del self.tokens[next(iter(self.tokens))]

    def find(self, ticket: int) -> list[int]:
        tokens = self.tokens[ticket]
        if tokens is None:
            raise RuntimeError("a micro-batch has failed: the tokens that the next one follows will not come")
        return list(tokens)


class FirstEnd:
    """The first stage's end; `accept` comes before all else.

    Args:
        host: address of this machine that the last stage reaches.
    """

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0), backlog=1)
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_bytes(_KEY_BYTES))
        self._socket: socket.socket | None = None
        self._read = bytearray()
        self._came = _Came()

    def accept(self) -> None:
        """Wait for the last stage; whoever does not know the key is sent away.

        Raises:
            ResourceError: it has not come in time.
        """
        until = time.monotonic() + _JOIN_S
        with self._listener as listener:
            while (left_s := until - time.monotonic()) > 0:
                listener.settimeout(left_s)
                try:
                    found, _ = listener.accept()
                except TimeoutError:
                    break
                if self._knows_key(found):
                    self._socket = found
                    return
                found.close()
        raise ResourceError(
            f"the last stage did not reach the first at {self.address.host}:{self.address.port} in {_JOIN_S:.0f} s: let the "
            "cluster's machines connect to each other by TCP on any port."
        )

    def drain(self) -> None:
        """Read what has come, so that the last stage never waits for it."""
        assert self._socket is not None, "accept comes first"
        while select.select([self._socket], [], [], 0)[0]:
            self._receive(self._socket)

    def wait(self, ticket: int) -> list[int]:
        """Return the tokens of a micro-batch once they are drawn.

        Raises:
            RuntimeError: they will not come.
        """
        assert self._socket is not None, "accept comes first"
        while ticket not in self._came.tokens:
            self._receive(self._socket)
        return self._came.find(ticket)

    def stop(self) -> None:
        """Let nobody wait any longer; any thread may call it."""
        if self._socket is not None:
            with suppress(OSError):  # the other end is gone
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()

    def _knows_key(self, connection: socket.socket) -> bool:
        connection.settimeout(1.0)
        try:
            key = connection.recv(_KEY_BYTES, socket.MSG_WAITALL)
        except OSError:
            return False
        connection.settimeout(None)
        return hmac.compare_digest(key, self.address.key)

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            raise RuntimeError(
                "the last stage is not there, or was told to stop: tokens that this stage follows will not come"
            )
        self._read += data
        while len(self._read) >= _HEAD.size:
            ticket, count = _HEAD.unpack_from(self._read)
            size = _HEAD.size + 8 * max(0, count)
            if len(self._read) < size:
                break
            tokens = struct.unpack_from(f"!{max(0, count)}q", self._read, _HEAD.size)
            self._came.add(ticket, None if count == _FAILED else tokens)
            del self._read[:size]


class LastEnd:
    """The last stage's end.

    Raises:
        ResourceError: the first stage cannot be reached.
    """

    def __init__(self, address: Address) -> None:
        try:
            self._socket = socket.create_connection((address.host, address.port), _JOIN_S)
        except OSError as error:
            raise ResourceError(
                f"the first stage cannot be reached at {address.host}:{address.port} ({error}): let the cluster's machines "
                "connect to each other by TCP on any port."
            ) from error
        self._socket.settimeout(None)
        # Nothing comes the other way that would carry an acknowledgement; without this a frame waits 40 ms for it.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(address.key)

    def send(self, ticket: int, tokens: Sequence[int] | None) -> None:
        """Give the tokens of a micro-batch back; None: it has failed."""
        count = _FAILED if tokens is None else len(tokens)
        with suppress(OSError):  # without a first stage nobody needs them, and the driver learns of it by itself
            self._socket.sendall(_HEAD.pack(ticket, count) + struct.pack(f"!{max(0, count)}q", *(tokens or ())))

    def close(self) -> None:
        self._socket.close()


class Loop:
    """Both ends in one, where the first stage is the last one too."""

    def __init__(self) -> None:
        self._came = _Came()

    def wait(self, ticket: int) -> list[int]:
        return self._came.find(ticket)

    def send(self, ticket: int, tokens: Sequence[int] | None) -> None:
        self._came.add(ticket, tokens)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass
