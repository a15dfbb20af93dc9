"""The error tree in the docstring of finlora/errors.py equals the classes."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from finlora import errors
from finlora.errors import ConfigError, FinloraError

CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, FinloraError)}


def read_drawn_tree() -> dict[str, tuple[str | None, int | None]]:
    """Return class name -> (parent's name, exit code or None) from the tree in the module's docstring."""
    drawn: dict[str, tuple[str | None, int | None]] = {}
    parents: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^(?P<indent>[ │├└─]*)(?P<name>\w+Error)\b\s*(?:\((?P<code>\d)\))?", line)
        if not match:
            continue
        column = len(match["indent"])
        while parents and parents[-1][0] >= column:
            parents.pop()
        drawn[match["name"]] = (parents[-1][1] if parents else None, int(match["code"]) if match["code"] else None)
        parents.append((column, match["name"]))
    return drawn


def test_drawn_tree_equals_classes():
    drawn = read_drawn_tree()
    assert drawn.keys() == CLASSES.keys()
    for name, (parent, code) in drawn.items():
        assert CLASSES[name].__base__ is (CLASSES[parent] if parent else Exception), name
        assert code is None or CLASSES[name].exit_code == code, name


def test_exit_codes_differ_between_branches():
    codes = [cls.exit_code for cls in CLASSES.values() if cls.__base__ is FinloraError] + [FinloraError.exit_code]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", [cls for name, cls in CLASSES.items() if name != "ConfigError"])
def test_error_survives_pickling(cls):
    copy = pickle.loads(pickle.dumps(cls("found, expected, do")))
    assert type(copy) is cls
    assert str(copy) == "found, expected, do"


@pytest.mark.parametrize("faults", [["one"], ["one", "two"]])
def test_config_error_survives_pickling_twice(faults):
    error = ConfigError(faults)
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert copy.faults == faults
    assert str(copy) == str(error)


def test_config_error_lists_every_fault():
    assert str(ConfigError("alone")) == "alone"
    assert str(ConfigError(["a", "b"])) == "2 settings are wrong:\n  - a\n  - b"
