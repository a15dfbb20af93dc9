"""Detection of git-lfs pointers: text files of three lines that a clone without git-lfs has instead of large files."""

from __future__ import annotations

from pathlib import Path

from finlora.errors import ModelError

_MARK = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Refuse a git-lfs pointer.

    Raises:
        ModelError: the file is a pointer, not the content.
    """
    with path.open("rb") as stream:
        is_pointer = stream.read(len(_MARK)) == _MARK
    if is_pointer:
        raise ModelError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in {path.parent}, or download the model again."
        )
