"""Run a command of finlora in a process tree that can open no internet socket: the kernel refuses each with EPERM (seccomp).

    python without_network.py VERB ...

Child processes inherit the filter, also those that are not Python, such as W&B's.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SYS_SOCKET = {"x86_64": 41, "aarch64": 198}
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: ld [k]; jeq k, jt, jf; ret k
# Offsets in struct seccomp_data: the number of the call, and the low half of its first argument, the address family.
_NUMBER, _FAMILY = 0, 16


def refuse_internet_sockets(machine: str) -> None:
    """Refuse socket(AF_INET, ...) and socket(AF_INET6, ...) to this process and its children, for good."""
    program = [
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 4, _SYS_SOCKET[machine]),
        (_LOAD, 0, 0, _FAMILY),
        (_EQUAL, 1, 0, socket.AF_INET),
        (_EQUAL, 0, 1, socket.AF_INET6),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the kernel takes no filter")


if __name__ == "__main__":
    import platform

    refuse_internet_sockets(platform.machine())
    try:
        socket.socket()
        sys.exit("the filter lets a socket through")
    except PermissionError:
        pass
    from finlora.cli.main import main

    main(sys.argv[1:])
