"""Reachability of the model hub, checked once within seconds, and the meaning of its client's errors.

Where a firewall drops packets, the hub's client retries for minutes without a message.
"""

from __future__ import annotations

import http.client
import os
import ssl
from urllib.parse import urlsplit

from finlora.machine.host import require_listener

_ANSWER_S = 6.0
_ON = ("1", "ON", "YES", "TRUE")
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
_MEANINGS = {
    "GatedRepoError": "its terms are not accepted by the account that is logged in: accept them on its page, and `hf auth login`",
    "RepositoryNotFoundError": "no model of that name, or it is private: check the spelling, or `hf auth login`",
    "RevisionNotFoundError": "it has no such revision: check model.revision, or leave it out",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: mirror it where the hub is reachable (`finlora prefetch`), and set model.base"
    " to its folder",
}


def is_offline() -> bool:
    """Return whether the user has set HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _ON


def is_behind_proxy() -> bool:
    """Return whether https goes through a proxy: then a direct connection proves nothing."""
    return any(os.environ.get(name) for name in _PROXIES)


def hub_host() -> str:
    """Return the host of HF_ENDPOINT, or the public hub's."""
    return _address()[0]


def find_hub_problem() -> str | None:
    """Return within 14 s why the hub cannot be reached; None if it can, or if it is not to be tried."""
    if is_offline() or is_behind_proxy():
        return None
    host, port, is_secure = _address()
    try:
        require_listener(host, port)
        _require_answer(host, port, is_secure)
    except TimeoutError as error:
        return f"{host} does not answer: {error.strerror or f'it is silent for {_ANSWER_S:g} s'}"
    except OSError as error:
        return f"{host} does not answer: {error.strerror or error}"
    return None


def explain_hub(error: BaseException) -> str:
    """Return what an error of the hub's client means and what to do."""
    seen: BaseException | None = error
    while seen is not None:
        for kind in type(seen).__mro__:
            if kind.__name__ in _MEANINGS:
                return _MEANINGS[kind.__name__]
        seen = seen.__cause__ or seen.__context__
    return (
        f"{type(error).__name__}: copy the model to this machine and give its folder, or `hf auth login` if it is gated"
    )


def _address() -> tuple[str, int, bool]:
    parts = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    is_secure = parts.scheme != "http"
    return parts.hostname or "huggingface.co", parts.port or (443 if is_secure else 80), is_secure


def _require_answer(host: str, port: int, is_secure: bool) -> None:
    """Send a request and take any HTTP answer. Raises OSError if none comes in time."""
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
    if is_secure:
        # The hub's client checks certificates; here any answer counts.
        anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_S, context=anyone)
    try:
        connection.request("HEAD", "/")
        connection.getresponse()
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__} instead of HTTP") from error
    finally:
        connection.close()
