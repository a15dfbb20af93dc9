"""How processes that answer HTTP speak to the one that drives the engine: batches of messages over a Unix socket.

Only processes of the same user can open the socket, and all that do are the server's own: messages are pickled objects.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

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
        frame = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
        self._writer.write(_HEAD.pack(len(frame)) + frame)

    async def receive(self) -> AsyncIterator[Message]:
        """Yield messages until the other end closes."""
        try:
            while True:
                (size,) = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
                for message in pickle.loads(await self._reader.readexactly(size)):
                    yield message
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def close(self) -> None:
        """Close this end; a second time does nothing."""
        self._writer.close()


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
