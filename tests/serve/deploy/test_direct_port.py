"""Shared direct port: several processes listen, and a port that cannot be used is refused with a message."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from certificate import make_certificate

from finlora.errors import ConfigError, ResourceError
from finlora.serve.deploy.direct_port import check_certificate, listen_shared, require_free
from finlora.serve.settings import DirectConfig


def find_free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_processes_share_a_port_and_another_server_is_noticed():
    direct = DirectConfig(port=find_free_port())
    require_free(direct)
    with listen_shared(direct) as one, listen_shared(direct) as other:
        one.listen()
        other.listen()
        with pytest.raises(ResourceError, match=rf"direct.port={direct.port} at 127.0.0.1 cannot be .* already in use"):
            require_free(direct)
    require_free(direct)


def test_taken_port_and_foreign_address_are_refused():
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        with pytest.raises(ResourceError, match="already in use"):
            listen_shared(DirectConfig(port=port))
    with pytest.raises(ResourceError, match=r"at 203.0.113.9 cannot be opened .*take a free port of this machine"):
        listen_shared(DirectConfig(port=port, host="203.0.113.9"))


def test_certificate_is_checked(tmp_path):
    certificate = make_certificate(tmp_path)
    check_certificate(DirectConfig(port=1))
    check_certificate(DirectConfig(port=1, ssl_certfile=str(certificate), ssl_keyfile=str(tmp_path / "server.key")))
    for key in (certificate, Path("/absent.key")):
        with pytest.raises(ConfigError, match=r"direct.ssl_certfile=.* cannot be used .* without a password, both PEM"):
            check_certificate(DirectConfig(port=1, ssl_certfile=str(certificate), ssl_keyfile=str(key)))
