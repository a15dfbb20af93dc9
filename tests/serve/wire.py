"""Plain HTTP requests for tests; errors are returned like any reply."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def body(self) -> dict:
        return json.loads(self.text)

    @property
    def error(self) -> dict:
        assert self.status >= 400
        return self.body["error"]


def send(
    address: str,
    path: str,
    key: str | None,
    body: object = None,
    raw: bytes | None = None,
    tls: ssl.SSLContext | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Send a request; the body is JSON, or the given bytes."""
    data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address + path, data=data, headers=headers or {})
    if data is not None:
        request.add_header("Content-Type", "application/json")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60, context=tls) as reply:
            return Reply(reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read().decode())
