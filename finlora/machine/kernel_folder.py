"""Folder of compiled GPU kernels, which all processes of this account on this machine share and keep between commands.

Triton writes its kernels there, and finlora/model/kernels/compile_cuda.py those of CUDA C++, in `nvrtc/`. Each file is named by a
hash of its source, its options, the GPU's compute capability and the compiler's version: what does not fit is not used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from finlora.machine.host import find_write_problem

VARIABLE = "TRITON_CACHE_DIR"
"""Triton's own variable."""
_FOLDER = "~/.cache/finlora/kernels"
_DIGEST_BYTES = 32
"""Of the SHA-256 before each binary."""
_logger = logging.getLogger(__name__)


def keep_kernels() -> Path:
    """Return the folder, and set VARIABLE to it where the user has not. Call it before the first kernel is compiled.

    Where the home folder cannot be written, kernels go to the temporary folder, after a warning.
    """
    # Triton 3.9 contracts a * b + c, warns that 3.10 will not unless told, and then sums would round differently.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if not os.environ.get(VARIABLE, "").strip():
        os.environ[VARIABLE] = str(_choose())
    return Path(os.environ[VARIABLE])


def keep_binary(name: str, facts: Sequence[str], make: Callable[[], bytes]) -> bytes:
    """Return a compiled binary from the folder, or make it and write it there. A damaged file is made again.

    Args:
        name: of its source file.
        facts: all that the binary depends on.
    """
    key = hashlib.sha256(json.dumps([name, *facts]).encode()).hexdigest()[:32]
    path = keep_kernels() / "nvrtc" / f"{name}-{key}.cubin"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        binary = kept[_DIGEST_BYTES:]
        if hashlib.sha256(binary).digest() == kept[:_DIGEST_BYTES]:
            return binary
    binary = make()
    with contextlib.suppress(OSError):  # on a full disk it is made again by the next process
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(hashlib.sha256(binary).digest() + binary)
        Path(fresh).replace(path)
    return binary


@functools.cache
def _choose() -> Path:
    folder = Path(_FOLDER).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = find_write_problem(folder)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is None:
        return folder
    other = _make_temporary()
    _logger.warning(
        "Compiled kernels cannot be kept in %s (%s), and go to %s: set %s to a folder that can be written and lasts.",
        *(folder, problem, other, VARIABLE),
    )
    return other


def _make_temporary() -> Path:
    """Return a folder that this account alone can write to: whoever writes a kernel there runs it in our processes."""
    folder = Path(tempfile.gettempdir()) / f"finlora-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if folder.is_dir() and not folder.is_symlink() and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="finlora-kernels-"))
