"""Translation of foreign errors that end a command (libraries, system) into one line of ours.

Modules handle the errors that they expect. This catches the rest, so that no user sees a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import tempfile
import traceback

from finlora.errors import ConfigError, FinloraError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "(os error 27)", "inline_container.cc")
"""Words of errors of safetensors, Arrow and torch (its writer of archives), which replace the system's error."""
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_MAX_WORDS = 300


def explain(error: Exception) -> FinloraError:
    """Return our error for a foreign one: in one line, what happened and what to do."""
    if isinstance(error, FinloraError):
        return error
    cause = getattr(error, "cause", None)  # RayTaskError: the error that the task raised
    if isinstance(cause, Exception) and cause is not error:
        return explain(cause)
    if is_disk_full(error):
        where = f"{name}: " if (name := getattr(error, "filename", None)) else ""
        said = getattr(error, "strerror", None) or shorten(error)
        return ResourceError(
            f"{where}no disk space is left ({said}): free disk or quota, then run the same command again. `df -h` shows which "
            "disk is full."
        )
    if isinstance(error, OSError) and (known := _explain_system(error)):
        return known
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ResourceError(
            f"memory ran out ({shorten(error)}): end other programs, or use smaller batches or fewer bits. `finlora "
            "plan` forecasts a training's memory."
        )
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "finlora":
        return ResourceError(
            f"the Python module {error.name} is not installed beside {sys.executable}: `make setup` installs all that FinLoRA "
            "needs, as `pip install -r requirements/packages.lock` does in an environment of your own."
        )
    kind = ResourceError if type(error).__module__.split(".")[0] == "ray" else FinloraError
    return kind(f"unexpected error: {shorten(error)}. {_keep_traceback(error)}")


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error of the system or of a library says that a disk, a quota or a file's limit is full."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


def shorten(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    words = " ".join(str(error).split())
    words = words if len(words) <= _MAX_WORDS else f"{words[:_MAX_WORDS]}..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _explain_system(error: OSError) -> FinloraError | None:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _FORBIDDEN:
        return ConfigError(
            f"{where}access is denied ({error.strerror}): give another file or folder, or change its owner or mode."
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(
            f"too many files are open ({error.strerror}): raise the limit, for example `ulimit -n 65536`."
        )
    if error.filename:
        return ConfigError(f"{where}{error.strerror}: give another file or folder.")
    return None


def _keep_traceback(error: Exception) -> str:
    """Write the traceback, which may quote data, to a file that only its owner can read; return a sentence that names it."""
    text = "".join(traceback.format_exception(error))
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile(
            "w", prefix="finlora-error-", suffix=".txt", encoding="utf-8", errors="backslashreplace", delete=False
        ) as stream,
    ):
        stream.write(text)
        return f"Its traceback is in {stream.name}: report it with the command that led to it."
    return f"Report it with the command that led to it:\n{text}"
