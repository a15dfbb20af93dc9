"""How processes that answer HTTP speak to the one that drives the engine: batches of messages over a Unix socket.

Messages are pickled objects, so both ends must be the server's own: the socket lies in a folder that only its user can enter.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

_MOST_UNREAD_BYTES = 2**28
_HEAD = struct.Struct("!Q")

Message = tuple[Any, ...]
"""Its kind, and what belongs to it."""


class Link:
    """One end of a connection, for the event loop that it was made in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._outbox: list[Message] = []

    def put(self, *message: Any) -> None:
        """Send a message; those of one turn of the loop travel together."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        if self._writer.is_closing():
            return  # whoever reads learns that the other end is gone
        try:
            frame = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
        except Exception:
            self.abort()  # else whoever waits for one of them would do so in vain
            raise
        self._writer.write(_HEAD.pack(len(frame)) + frame)
        if self._writer.transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
            self.abort()  # the other end reads nothing any more

    async def receive(self) -> AsyncIterator[Message]:
        """Yield messages until the other end closes."""
        try:
            while True:
                (size,) = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
                for message in pickle.loads(await self._reader.readexactly(size)):
                    yield message
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def abort(self) -> None:
        """Close this end at once, whatever is still to be sent; a second time does nothing."""
        self._writer.transport.abort()


async def connect(path: Path) -> Link:
    """Return a link to the process that listens at a socket.

    Raises:
        OSError: none does.
    """
    return Link(*await asyncio.open_unix_connection(path))


def listen(path: Path) -> socket.socket:
    """Return a socket at which links can be opened, by this user alone."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)  # before anybody can connect: asyncio calls listen() later
    return listener
