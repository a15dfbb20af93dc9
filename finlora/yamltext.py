"""YAML reader for settings that is safe with any text: no code, no aliases, bounded nesting and numbers.

PyYAML's own safe loader runs no code, but it expands nested aliases exponentially, and raises errors of other types than
its own (a date of month 13, a number of a million digits).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20
"""Largest settings file; it takes about ten seconds to read."""
_MAX_DEPTH = 50
_MAX_DIGITS = 100  # reading a number in base 60 takes quadratic time

_IS_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+$|.*:")


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, with bounded nesting and integers."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _fault("found an alias (*name): write the value out", event.start_mark)
        if self._depth == _MAX_DEPTH:
            raise _fault(f"found more than {_MAX_DEPTH} levels", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:  # YAML forbids it, PyYAML takes the last
                    raise _fault(f"found the key {key.value[:60]!r} twice: write it once", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
            raise _fault(f"found a number of more than {_MAX_DIGITS} characters", node.start_mark)
        if node.tag.endswith((":int", ":float")) and _IS_OTHER_BASE.match(node.value):
            # YAML 1.1 reads 010 as 8 and 1:30 as 90.
            raise _fault("found a number in base 8 or 60: write it without the leading zero or colon", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
            raise _fault(f"found a text that is not a valid {node.tag.rpartition(':')[2]}", node.start_mark) from None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _fault("found an integer of more than 64 bits", node.start_mark)
        return value


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text: dicts, lists and scalars.

    Raises:
        yaml.YAMLError: names the problem and the line, but does not quote the text, which may be confidential.
    """
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _fault(error.problem or error.context or "it is not valid", mark) from None
    except yaml.reader.ReaderError as error:
        raise yaml.YAMLError(f"found the character {error.character!r}, which YAML does not allow") from None
    except RecursionError:
        raise yaml.YAMLError(f"found more than {_MAX_DEPTH} levels") from None


def read_yaml(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a YAML file.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        yaml.YAMLError: it is not YAML, or larger than `max_bytes`.
    """
    with path.open("rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise yaml.YAMLError(f"found more than {max_bytes:,} bytes")
    return parse_yaml(raw.decode("utf-8"))


def _fault(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.YAMLError(f"{problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else problem)
