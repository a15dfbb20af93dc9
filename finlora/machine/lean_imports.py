"""Imports of large libraries without torch's compiler, and without garbage collections meanwhile.

torch imports its compiler, which takes longer than all that a short command needs, when a library passes a function to
torch.compile or marks one to be left out of what others compile. Here torch compiles nothing, so while such a library is imported
these marks do nothing. Collections that find nothing take a fifth of the time: an import makes objects that all stay.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.Lock()
_depth = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Import libraries inside; in several threads at once the last one to leave restores all."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            if gc.isenabled():
                gc.disable()
                _undo.callback(gc.enable)
            _unmark()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _undo.close()


def _unmark() -> None:
    import torch

    # The last one is torch's own; a version of torch without it needs nothing there.
    for module, name in ((torch, "compile"), (torch.compiler, "disable"), (torch, "_disable_dynamo")):
        if hasattr(module, name):
            _undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, _leave_as_it_is)


def _leave_as_it_is(function: Callable[..., Any] | None = None, *_arguments: object, **_settings: object) -> Any:
    """Return a function unchanged, or a decorator that does so where only settings are given."""
    return _leave_as_it_is if function is None else function
