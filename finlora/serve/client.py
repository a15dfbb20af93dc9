"""Ask a served model from a terminal: what `finlora ask --server` does. The standard library alone, so it starts at once."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from finlora.errors import ConfigError, ResourceError
from finlora.serve.keys import KEY_VARIABLE

_TIMEOUT_S = 330.0
_RETRIABLE = (408, 429)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedReply:
    """An answer as a user reads it."""

    probabilities: dict[str, float]
    """Label -> probability, likeliest first; empty for free text."""
    quote: tuple[int, int] | None
    """Where generated text stands in the text asked about, from and to which character; None: nowhere."""


def ask_server(
    address: str,
    key: str,
    model: str,
    task: str | None,
    text: str,
    about: str | None,
    *,
    temperature: float,
    seed: int | None,
    on_text: Callable[[str], None],
) -> ServedReply:
    """Ask one question over HTTP.

    Args:
        address: as `http://127.0.0.1:8000`.
        task: None: the text is the whole prompt.
        on_text: gets generated text, as it comes where the task is None.

    Raises:
        ConfigError: the server refuses the question or the key; says why.
        ResourceError: no server answers, or it cannot just now.
    """
    if not key:
        raise ConfigError(f"{KEY_VARIABLE} is not set: set it to a key of the server at {address}.")
    body: dict[str, Any]
    if task is None:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
        with _open(address, "/v1/chat/completions", key, body | {"temperature": temperature, "seed": seed}) as reply:
            for event in _read_events(reply, address):
                for choice in event["choices"]:
                    on_text(choice["delta"].get("content") or "")
        return ServedReply(probabilities={}, quote=None)
    if task.startswith("xbrl"):
        body = {"model": model, "task": task, "context": text, "question": about or ""}
        with _open(address, "/v1/extract", key, body) as reply:
            answer = json.load(reply)
        on_text(answer["answer"])
        quote = answer["quote"]
        return ServedReply(probabilities={}, quote=(quote["start"], quote["end"]) if quote else None)
    body = {"model": model, "task": task, "text": text} | ({"about": about} if about else {})
    with _open(address, "/v1/classify", key, body) as reply:
        (result,) = json.load(reply)["results"]
    return ServedReply(probabilities=result["probabilities"], quote=None)


@contextmanager
def _open(address: str, path: str, key: str, body: dict[str, Any]) -> Iterator[Any]:
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"found the server {address!r}: expected an address such as http://127.0.0.1:8000.")
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(address.rstrip("/") + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            yield reply
    except urllib.error.HTTPError as error:
        with error:
            message = _read_message(error.read().decode(errors="replace"))
        kind = ResourceError if error.code >= 500 or error.code in _RETRIABLE else ConfigError
        raise kind(f"the server answers {error.code}: {message}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ResourceError(
            f"no server answers at {address} ({reason}): start one with `finlora serve`, or mend --server."
        ) from error


def _read_message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _read_events(reply: Any, address: str) -> Iterator[dict[str, Any]]:
    for raw in reply:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ResourceError(f"the answer broke off: {event['error']['message']}")
            yield event
    raise ResourceError(f"the line to {address} was cut before the answer was whole: ask again.")
