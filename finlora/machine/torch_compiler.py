"""Imports of libraries without torch's compiler, which takes longer to import than all that a short command needs.

torch imports it when a library passes a function to torch.compile, or marks one to be left out of what others compile. Here
nothing is compiled by torch, so while such a library is imported these marks do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Let torch's marks leave functions as they are, for imports inside."""
    import torch

    # The last one is torch's own; a version of torch without it needs nothing there.
    marks = ((torch, "compile"), (torch.compiler, "disable"), (torch, "_disable_dynamo"))
    before = [(module, name, getattr(module, name)) for module, name in marks if hasattr(module, name)]
    for module, name, _ in before:
        setattr(module, name, _leave_as_it_is)
    try:
        yield
    finally:
        for module, name, mark in before:
            setattr(module, name, mark)


def _leave_as_it_is(function: Callable[..., Any] | None = None, *_arguments: object, **_settings: object) -> Any:
    """Return a function unchanged, or a decorator that does so where only settings are given."""
    return _leave_as_it_is if function is None else function
