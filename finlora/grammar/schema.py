"""JSON Schemas before they are compiled: neutral keywords dropped, and objects closed that leave other properties open.

A schema as pydantic writes it lists properties and forbids no others, and a small model then adds some until it is cut off. What
a closed object accepts the open one accepts too. Objects stay open where a schema combines several parts, since one part would
forbid what another lists.

Source: https://json-schema.org/draft/2020-12/json-schema-core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finlora.errors import ConfigError

_MAX_DEPTH, _MAX_TEXT = 60, 4096
"""Levels of a schema; characters of a text that it spells out: the time of a mask grows with the text that is bound to follow."""
_SAYING = ("title", "description", "$comment")
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names to schemas."""
_OF_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_OF_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_COMBINING = ("anyOf", "oneOf", "allOf", "$ref")
_OF_OBJECTS = ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties")
_OPEN = ("patternProperties", "additionalProperties", "unevaluatedProperties", "minProperties", *_COMBINING)


def prepare_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that accepts what `schema` does, or, where an object leaves other properties open, only those it lists.

    Raises:
        ConfigError: it is nested too deeply, or a text in it is too long.
    """
    _check_size(schema)
    has_parts = any(_is_combined(part) for part in _list_parts(schema))
    found = _prepare(dict(schema), closes=not has_parts)
    assert isinstance(found, dict)
    return found


def check_length(text: str) -> None:
    """Raise ConfigError if a text that a grammar spells out is too long."""
    if len(text) > _MAX_TEXT:
        raise ConfigError(f"it spells out a text of {len(text):,} characters: expected at most {_MAX_TEXT:,}")


def _check_size(schema: Any) -> None:
    level: list[Any] = [schema]
    for _ in range(2 * _MAX_DEPTH):  # a level is mostly a keyword and a name
        below: list[Any] = []
        for part in level:
            if isinstance(part, str):
                check_length(part)
            elif isinstance(part, Mapping):
                below += part.keys()
                below += (value for key, value in part.items() if key not in _SAYING or not isinstance(value, str))
            elif isinstance(part, list):
                below += part
        if not below:
            return
        level = below
    raise ConfigError(f"it is nested deeper than {_MAX_DEPTH} levels")


def _is_combined(schema: Mapping[str, Any]) -> bool:
    """Return whether several parts of a schema describe one object."""
    parts = [key for key in _COMBINING if key in schema]
    several = len(parts) > 1 or len(schema["allOf"] if isinstance(schema.get("allOf"), list) else []) > 1
    return several or (bool(parts) and any(key in schema for key in _OF_OBJECTS))


def _list_parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key, value in schema.items():
        if key in _OF_NAMES and isinstance(value, Mapping):
            for part in value.values():
                yield from _list_parts(part)
        elif key in _OF_MANY and isinstance(value, list):
            for part in value:
                yield from _list_parts(part)
        elif key in _OF_ONE:
            yield from _list_parts(value)


def _prepare(schema: Any, *, closes: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "uniqueItems" and value is False:
            continue
        if key in _OF_NAMES and isinstance(value, Mapping):
            found[key] = {name: _prepare(part, closes=closes) for name, part in value.items()}
        elif key in _OF_MANY and isinstance(value, list):
            found[key] = [_prepare(part, closes=closes) for part in value]
        elif key in _OF_ONE:
            found[key] = _prepare(value, closes=closes)
        else:
            found[key] = value
    properties, required = found.get("properties"), found.get("required", [])
    is_open = isinstance(properties, dict) and not any(key in found for key in _OPEN)
    if closes and is_open and isinstance(required, list) and set(map(str, required)) <= set(properties or ()):
        found["additionalProperties"] = False
    return found
