"""Message link between the HTTP processes and the engine's process: batches of pickled messages over a Unix socket.

Unpickling runs code, so both ends must be the server's own: only the server's user can enter the socket's folder.
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
"""Kind of the message, then its contents."""


class Link:
    """One end of a connection, bound to the event loop that creates it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._outbox: list[Message] = []

    def put(self, *message: Any) -> None:
        """Send a message. Messages of one event loop iteration go out in one frame."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        if self._writer.is_closing():
            return  # `receive` tells its reader that the other end is gone
        try:
            frame = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
        except Exception:
            self.abort()  # otherwise the receivers would wait forever
            raise
        self._writer.write(_HEAD.pack(len(frame)) + frame)
        if self._writer.transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
            self.abort()  # the other end has stopped reading

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
        """Close this end at once and drop unsent messages. A second call does nothing."""
        self._writer.transport.abort()


async def connect(path: Path) -> Link:
    """Return a link to the process that listens at a socket.

    Raises:
        OSError: no process listens there.
    """
    return Link(*await asyncio.open_unix_connection(path))


def listen(path: Path) -> socket.socket:
    """Return a bound socket that only this user can connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)  # nobody can connect yet: asyncio calls listen() later
    return listener
