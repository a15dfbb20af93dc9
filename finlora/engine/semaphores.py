"""Named semaphores that Ray's compiled graphs leave in /dev/shm when a node is killed: two a channel, 32 bytes each, for good."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

_NAME = re.compile(r"sem\.(?:hdr|obj)(\d+)-\d+")
_YOUNG_S = 60.0
"""Age under which none is touched: where processes of several containers share the folder, their numbers say nothing here, and
a name is needed only until both ends of its channel have opened it."""


def remove_left_semaphores(folder: Path = Path("/dev/shm")) -> int:
    """Remove those whose node process is dead, and return their number; what others own stays."""
    num_removed = 0
    for path in folder.glob("sem.*"):
        match = _NAME.fullmatch(path.name)
        if match is None or Path("/proc", match[1]).exists():
            continue
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S:
                path.unlink()
                num_removed += 1
    return num_removed
