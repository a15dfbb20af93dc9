"""HTTP client of `finlora ask --server`. It imports only the standard library, so it starts at once.

A reply is not trusted: its size is bounded, its types are checked and its control characters are replaced.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import ssl
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from finlora.configfile import show
from finlora.errors import ConfigError, ResourceError
from finlora.machine.host import require_listener
from finlora.serve.accounts.keys import KEY_VARIABLE

TIMEOUT_S = 330.0
_RETRIABLE = (408, 429)
_BLOCK_BYTES, _MAX_REPLY_BYTES, _MAX_MESSAGE = 2**16, 2**24, 1000

_Kind = TypeVar("_Kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedReply:
    """Answer of a server."""

    probabilities: dict[str, float]
    """Label -> probability, most probable first; empty for generated text."""
    quote: tuple[int, int] | None
    """First character of the answer in the given text, and the one after its last; None: it is not in the text."""
    is_quoted: bool = False
    """Whether the answer should occur there."""


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
        address: such as `http://127.0.0.1:8000`.
        task: None: the text is the whole prompt.
        on_text: gets generated text; piece by piece if the task is None.

    Raises:
        ConfigError: the server refuses the question or the key; says why.
        ResourceError: no server answers, or the server cannot answer now.
    """
    if not key:
        raise ConfigError(f"{KEY_VARIABLE} is not set: set it to a key of the server at {address}.")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{KEY_VARIABLE} holds characters that no key has: set it to a key of the server at {address}."
        )
    body: dict[str, Any]
    if task is None:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
        with _open(address, "/v1/chat/completions", key, body | {"temperature": temperature, "seed": seed}) as reply:
            for piece in read_pieces(_read_blocks(reply, address), address):
                on_text(piece)
        return ServedReply(probabilities={}, quote=None)
    has_labels, is_quoted = _describe_task(address, key, model, task)
    if not has_labels:
        body = {"model": model, "task": task, "context": text, "question": about or ""}
        with _open(address, "/v1/extract", key, body) as reply:
            answer, quote = read_extract(_read_whole(reply, address), address)
        on_text(answer)
        return ServedReply(probabilities={}, quote=quote, is_quoted=is_quoted)
    body = {"model": model, "task": task, "text": text} | ({"about": about} if about else {})
    with _open(address, "/v1/classify", key, body) as reply:
        return ServedReply(probabilities=read_probabilities(_read_whole(reply, address), address), quote=None)


def _describe_task(address: str, key: str, model: str, task: str) -> tuple[bool, bool]:
    """Return whether a task has labels, and whether a free answer is quoted from the text. The server knows its adapters' own."""
    from finlora.data.sets.catalog import FORMS

    if task in FORMS:
        return bool(FORMS[task].choices), FORMS[task].is_quoted
    with _open(address, "/v1/tasks", key, None) as reply:
        known = _take(_parse(_read_whole(reply, address), address), "data", list, address)
    for facts in known:
        if _take(facts, "name", str, address) == task and model.partition("@")[0] in _take(
            facts, "models", list, address
        ):
            return bool(_take(facts, "labels", list, address)), facts.get("quoted") is True
    return True, False  # the server says which tasks it has


def read_pieces(blocks: Iterable[bytes], address: str) -> Iterator[str]:
    """Yield the texts of a streamed answer, however its bytes are cut into blocks.

    Raises:
        ResourceError: the server reports an error, the connection was cut, or the reply is not a stream of a FinLoRA server.
    """
    until = time.monotonic() + TIMEOUT_S
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _MAX_REPLY_BYTES or time.monotonic() > until:
            raise _strange(address, "a stream without an end")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # an empty line between two events, a comment or another field
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = _parse(data, address)
            if "error" in event:
                raise ResourceError(f"the answer is incomplete: {_message_of(event) or 'the server does not say why'}")
            for choice in _take(event, "choices", list, address):
                delta = _take(choice, "delta", dict, address)
                if delta.get("content") is not None:
                    yield _plain(_take(delta, "content", str, address))
    raise ResourceError(f"the connection to {address} was cut before the answer was complete: ask again.")


def read_extract(raw: bytes, address: str) -> tuple[str, tuple[int, int] | None]:
    """Return an answer and its position in the text. Raises ResourceError if the reply is not an extraction."""
    answer = _parse(raw, address)
    quote = answer.get("quote")
    if quote is None:
        return _plain(_take(answer, "answer", str, address)), None
    start, end = (_take(quote, name, int, address) for name in ("start", "end"))
    return _plain(_take(answer, "answer", str, address)), (start, end)


def read_probabilities(raw: bytes, address: str) -> dict[str, float]:
    """Return the probability of each label. Raises ResourceError if the reply is not a classification of one text."""
    results = _take(_parse(raw, address), "results", list, address)
    if len(results) != 1:
        raise _strange(address, f"{len(results)} results for one text")
    pairs = _take(results[0], "probabilities", dict, address)
    for value in pairs.values():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise _strange(address, f"a probability of {show(value)}")
    return {_plain(label): float(value) for label, value in pairs.items()}


def _parse(raw: bytes, address: str) -> dict[str, Any]:
    if len(raw) > _MAX_REPLY_BYTES:
        raise _strange(address, f"more than {_MAX_REPLY_BYTES:,} bytes")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise _strange(address, f"{show(raw[:60])}")
    return values


def _take(values: Any, name: str, kind: type[_Kind], address: str) -> _Kind:
    value = values.get(name) if isinstance(values, dict) else None
    if not isinstance(value, kind):
        raise _strange(address, f"{name}={show(value)}")
    return value


def _strange(address: str, found: str) -> ResourceError:
    return ResourceError(f"{address} answers with {found}, which is not FinLoRA's format: correct --server.")


def _plain(text: str) -> str:
    """Return a text whose control characters are replaced: they could move a terminal's cursor or change its title."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") else "\ufffd"
        for character in text
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refusal of redirects, which would send the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@contextmanager
def _open(address: str, path: str, key: str, body: dict[str, Any] | None) -> Iterator[Any]:
    host, port = _read_address(address)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    proxies = choose_proxies(address)
    if not proxies:
        _require_listener(address, host, port)
    with _failures_named(address, proxies):
        request = urllib.request.Request(
            address.rstrip("/") + path, None if body is None else json.dumps(body).encode(), headers
        )
        opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler(proxies))
        try:
            reply = opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                message = _read_message(error.read(_BLOCK_BYTES))
            kind = ResourceError if error.code >= 500 or error.code in _RETRIABLE else ConfigError
            if message is None:
                raise kind(
                    f"the server at {address} answers {error.code} without FinLoRA's error format: ask again, or correct "
                    "--server if it is another server."
                ) from None
            raise kind(f"the server answers {error.code}: {message}") from None
    with reply:
        yield reply


def choose_proxies(address: str) -> dict[str, str]:
    """Return the proxies of a request by scheme, without any that could read the key.

    A proxy for plain HTTP can read what it forwards, so only https goes through a proxy, in a tunnel. This machine, private
    addresses and those in NO_PROXY are reached directly.
    """
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get("https")
    if parts.scheme != "https" or proxy is None or _is_near(host) or urllib.request.proxy_bypass(host):
        return {}
    return {"https": proxy}


def _is_near(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    return found.is_loopback or found.is_private or found.is_link_local


def _read_address(address: str) -> tuple[str, int]:
    try:
        parts = urllib.parse.urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not parts.hostname or parts.username is not None:
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(f"found the server {address!r}: expected an address such as http://127.0.0.1:8000.") from None
    return parts.hostname, port


def _require_listener(address: str, host: str, port: int) -> None:
    try:
        require_listener(host, port)
    except OSError as error:
        known = urllib.request.getproxies()
        is_direct = address.startswith("http://") and "http" in known and not _is_near(host)
        note = ". http_proxy is not used, since it would read the key: https goes through https_proxy" * is_direct
        raise ResourceError(
            f"no server answers at {address} ({error.strerror}): start one with `finlora serve`, or correct --server{note}."
        ) from error


@contextmanager
def _failures_named(address: str, proxies: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    try:
        yield
    except (http.client.HTTPException, OSError, ValueError) as error:  # URLError and TimeoutError are OSErrors
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            what = f"its certificate is not trusted, {reason.verify_message}): set SSL_CERT_FILE to the authority's certificate"
        elif isinstance(reason, ssl.SSLError):
            what = f"it does not speak TLS, {reason.reason}): use http:// if the server has no certificate"
        elif isinstance(error, http.client.HTTPException | ConnectionResetError) and address.startswith("http://"):
            what = f"it closes the connection, {type(error).__name__}): use https:// if the server has a certificate"
        else:
            what = f"{reason}): start one with `finlora serve`, or correct --server"
        through = f" through the proxy {_shorten_proxy(proxies)}" if proxies else ""
        raise ResourceError(f"no server answers at {address}{through} ({what}.") from error


def _shorten_proxy(proxies: Mapping[str, str]) -> str:
    """Return host and port of a proxy without its user name and password."""
    return next(iter(proxies.values())).rpartition("@")[2].rpartition("/")[2]


def _read_blocks(reply: Any, address: str) -> Iterator[bytes]:
    while True:
        with _failures_named(address):
            block = reply.read1(_BLOCK_BYTES)
        if not block:
            return
        yield block


def _read_whole(reply: Any, address: str) -> bytes:
    with _failures_named(address):
        raw: bytes = reply.read(_MAX_REPLY_BYTES + 1)
    return raw


def _read_message(raw: bytes) -> str | None:
    try:
        return _message_of(json.loads(raw))
    except (ValueError, RecursionError):
        return None


def _message_of(values: Any) -> str | None:
    error = values.get("error") if isinstance(values, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return _plain(message[:_MAX_MESSAGE]) if isinstance(message, str) else None
