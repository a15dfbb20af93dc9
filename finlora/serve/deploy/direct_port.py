"""Shared port of a server's HTTP processes: the kernel balances connections between them (SO_REUSEPORT).

Source: socket(7).
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from finlora.errors import ConfigError, ResourceError
from finlora.serve.settings import DirectConfig

_HERE = "127.0.0.1"


def listen_shared(direct: DirectConfig) -> socket.socket:
    """Return a socket bound to the port; the caller calls listen().

    Raises:
        ResourceError: another user or a program without SO_REUSEPORT listens there, or the address is not this machine's.
    """
    return _bind(direct, is_shared=True)


def require_free(direct: DirectConfig) -> None:
    """Check that nobody listens at the port: another server of this user would take some of the requests.

    Raises:
        ResourceError: the port is taken, or the address is not this machine's.
    """
    _bind(direct, is_shared=False).close()


def check_certificate(direct: DirectConfig) -> None:
    """Check that the port's certificate and key can be loaded, if it has them.

    Raises:
        ConfigError: they cannot be loaded.
    """
    certificate, key = certificate_of(direct)
    if certificate is None or key is None:
        return
    try:  # an empty password, because OpenSSL would ask the terminal for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise ConfigError(
            f"direct.ssl_certfile={direct.ssl_certfile} and direct.ssl_keyfile={direct.ssl_keyfile} cannot be used ({error}): "
            "expected a certificate and its key without a password, both PEM."
        ) from error


def certificate_of(direct: DirectConfig) -> tuple[str | None, str | None]:
    """Return the paths of certificate and key; None: plain HTTP."""
    pair = direct.ssl_certfile, direct.ssl_keyfile
    certificate, key = (str(Path(file).expanduser()) if file is not None else None for file in pair)
    return certificate, key


def _bind(direct: DirectConfig, *, is_shared: bool) -> socket.socket:
    host = direct.host or _HERE
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, direct.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(is_shared))
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ResourceError(
            f"direct.port={direct.port} at {host} cannot be opened ({error.strerror}): take a free port of this machine."
        ) from error
    return listener
