"""Settings from YAML and `key=value` overrides, built and checked by their classes' type hints; all faults together.

The checks are by hand since pydantic's TypeAdapter (2.14) runs no class's own checks beside a wrong type in it, stops at the
first ConfigError, and would double the 0.07 s that this module takes to import.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml

from finlora.config import RunConfig
from finlora.durable import write_whole
from finlora.errors import ConfigError
from finlora.yamltext import parse_yaml, read_yaml

_Settings = TypeVar("_Settings")
_NULLS = ("", "null", "Null", "NULL")
"""Texts that unset a text setting: YAML's nulls except `~`, which names a folder."""
_MAX_KEYS = 1000  # near names are searched for each
_SHOW = reprlib.Repr()
_SHOW.maxstring = _SHOW.maxother = 80
ADDED_LATER: Mapping[str, Any] = {
    "model.template_date": None,
    "lora.rslora": False,
    "lora.rank_pattern": {},
    "lora.alpha_pattern": {},
    "lora.init": "default",
    "lora.dora": False,
    "optim.lora_plus_ratio": 1.0,
}
"""Settings that RunConfig got after the first runs, each with the value under which a run computes what it did without it."""
_KIND_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Build the resolved config: class defaults < YAML file < overrides.

    Args:
        path: YAML file with the sections of RunConfig; None starts from the defaults.
        overrides: `section.key=value`: a text setting takes the value literally (`output_dir=my runs #1`),
            every other is read as YAML (`train.epochs=2`, `data.tasks=[fpb]`). `null` unsets what may be unset.

    Raises:
        ConfigError: every unknown key (with near names), wrong type and value out of range, all in one error.
    """
    return settings_from_tree(RunConfig, _read_yaml(path) if path is not None else {}, overrides)


def load_with_section(
    path: Path | None, overrides: Sequence[str], name: str, cls: type[_Settings]
) -> tuple[RunConfig, _Settings]:
    """Build a config, and the settings of one more section beside its own.

    Args:
        name: of the section, also in overrides: `name.key=value`.
        cls: of the section's settings.

    Raises:
        ConfigError: as `load_config`, the faults of both together.
    """
    tree = _read_yaml(path) if path is not None else {}
    config, section = _build_checked(RunConfig, tree, overrides, {name: cls})
    return cast(RunConfig, config), cast(_Settings, section)


def config_from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Rebuild a config from `config_to_tree`, checking it like a YAML file."""
    return settings_from_tree(RunConfig, tree)


def settings_from_tree(cls: type[_Settings], tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> _Settings:
    """Build any settings class, sections included, from plain dicts and `key=value` over them, with the same checks."""
    (built,) = _build_checked(cls, tree, overrides, {})
    return cast(_Settings, built)


def _build_checked(
    cls: type, tree: Mapping[str, Any], overrides: Sequence[str], more: Mapping[str, type]
) -> tuple[Any, ...]:
    """Build a settings class and the sections `more` beside its own, or raise all faults together."""
    faults: list[str] = []
    values = copy.deepcopy(dict(tree))
    for override in overrides:
        _apply_override(values, override, cls, more, faults)
    sections = {name: values.pop(name, None) or {} for name in more}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            faults.append(f"{name}={show(section)}: expected a section with keys")
            sections[name] = {}
    built = (
        _build(cls, values, "", faults),
        *(_build(more[name], section, f"{name}.", faults) for name, section in sections.items()),
    )
    if faults:
        raise ConfigError(faults)
    return built


def config_to_tree(config: RunConfig) -> dict[str, Any]:
    """Return plain dicts, lists and scalars, ready for YAML or JSON."""
    return cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def tree_for_hash(config: RunConfig) -> dict[str, Any]:
    """Return `config_to_tree` without settings that came later and do nothing here.

    A hash of it tells two runs apart by what they compute, and stays what it was when a setting is added to RunConfig.
    """
    tree = config_to_tree(config)
    for name, neutral in ADDED_LATER.items():
        section, key = name.split(".")
        if tree[section][key] == neutral:
            del tree[section][key]
    return tree


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML; `load_config` reads it back equal. A crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(config_to_tree(config), sort_keys=False))


def describes_server(tree: Any) -> bool:
    """Return whether what a YAML file holds is Ray Serve's, as in serve_configs/, and not a run's, as in jobs/configs/."""
    return isinstance(tree, Mapping) and "applications" in tree


def is_server_file(path: Path) -> bool:
    """Return whether a YAML file is Ray Serve's; False for one that cannot be read: reading it as a config then says why."""
    try:
        return describes_server(read_yaml(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist: see jobs/configs/, which has one YAML for each row of the paper."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read ({error}): expected a UTF-8 YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if tree is None:
        if path.stat().st_size == 0:  # one of comments alone is meant so
            raise ConfigError(
                f"config file {path} is empty, as after a copy that was cut off: expected sections like `model:` and `train:`."
            )
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file {path} holds a {type(tree).__name__}: expected sections like `model:` and `train:`."
        )
    if describes_server(tree):
        raise ConfigError(
            f"config file {path} describes a served model: expected a run's, as in jobs/configs/. "
            f"`finlora serve --config {path}` serves it."
        )
    return tree


def _apply_override(
    tree: dict[str, Any], override: str, cls: type, more: Mapping[str, type], faults: list[str]
) -> None:
    """Put one `section.key=value` into `tree`; `more` names sections that `cls` does not have."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        faults.append(f"override {show(override)}: expected section.key=value, for example train.epochs=2")
        return
    *sections, leaf = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        child = tree[section]
        if not isinstance(child, dict):
            faults.append(f"override {show(override)}: {section} is not a section")
            return
        tree = child
    value = _read_value(_hint_of(cls, more, [*sections, leaf]), text, key, faults)
    if value is not _WRONG:
        tree[leaf] = value


def _hint_of(cls: type, more: Mapping[str, type], names: Sequence[str]) -> Any:
    """Return the type of a setting, a section's class for a section, and None for a key that is not a setting."""
    hint: Any = cls
    for depth, name in enumerate(names):
        if depth == 0 and name in more:
            hint = more[name]
        else:
            hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint


def _read_value(hint: Any, text: str, key: str, faults: list[str]) -> Any:
    """Return the value of an override, read by the setting's type: in YAML, `#` would cut a path and 1e3 be a number."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if type(None) in args and text.strip() in _NULLS:
            return None
        return _read_value(next(arg for arg in args if arg is not type(None)), text, key, faults)
    if hint is str:
        if text and text == text.strip():
            return text
        found = "nothing" if not text else "white space at its start or end"
        faults.append(
            f"{key}={show(text)}: found {found}, expected a text. Write such a text into a YAML file, in quotes."
        )
        return _WRONG
    if typing.get_origin(hint) is Literal and all(isinstance(arg, str) for arg in args):
        return text.strip()
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        faults.append(f"override {show(f'{key}={text}')}: the value is not valid YAML ({error})")
        return _WRONG
    # A list's texts may hold the sign in quotes; behind the value it would hide the rest of the line.
    if "#" in text.rpartition("]")[2] and not isinstance(value, str):
        faults.append(f"override {show(f'{key}={text}')}: found `#`, expected a value without a comment")
        return _WRONG
    return value


def _keys_of(hint: Any) -> list[str]:
    """Return the keys of a section; none where the hint is that of a value."""
    return [key_of(each.name) for each in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []


def _build(cls: type, tree: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    hints = {key_of(name): hint for name, hint in typing.get_type_hints(cls).items()}
    names = [key_of(f.name) for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    if len(tree) > _MAX_KEYS:
        faults.append(f"{prefix.removesuffix('.') or 'the file'} holds {len(tree):,} keys: expected some of {names}")
        return _WRONG
    for key, raw in tree.items():
        if key not in names:
            shown = key if isinstance(key, str) and len(key) <= _SHOW.maxstring else show(key)
            inside = [f"{name}.{key}" for name, hint in hints.items() if key in _keys_of(hint)]
            near = inside or difflib.get_close_matches(str(shown), names, n=2, cutoff=0.5) or names
            faults.append(f"{prefix}{shown} is not a setting: did you mean {' or '.join(near)}?")
        elif dataclasses.is_dataclass(hints[key]):
            if raw is None:  # `lora:` with every line below it commented out
                continue
            if isinstance(raw, Mapping):
                values[key] = _build(cast(type, hints[key]), raw, f"{prefix}{key}.", faults)
            else:
                faults.append(f"{prefix}{key}={show(raw)}: expected a section with keys")
        else:
            values[key] = _convert(hints[key], raw, prefix + key, faults)
    # A wrong section is replaced by its default here, so that relations between the good ones are still checked.
    good = {key: value for key, value in values.items() if value is not _WRONG}
    fields = [f for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    required = [key_of(f.name) for f in fields]
    faults.extend(f"{prefix}{name} is missing" for name in required if name not in tree)
    if not good.keys() >= set(required):
        return _WRONG
    try:
        built = cls(**{f.name: good[key_of(f.name)] for f in dataclasses.fields(cls) if key_of(f.name) in good})
    except ConfigError as error:
        faults.extend(error.faults)
        return _WRONG
    return built


def key_of(field: str) -> str:
    """Return the YAML key of a field: `from_` is `from`, which Python keeps for itself."""
    return field.removesuffix("_")


class _Wrong:
    """Marks a value that already has its fault."""


_WRONG = _Wrong()


def _convert(hint: Any, raw: Any, name: str, faults: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(raw, Mapping):
            return _build(cast(type, hint), raw, f"{name}.", faults)
        faults.append(f"{name}={show(raw)}: expected a section with keys")
        return _WRONG
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), raw, name, faults)
    if origin is Literal:
        if raw in args and type(raw) in {type(arg) for arg in args}:
            return raw
        faults.append(f"{name}={show(raw)}: expected one of {', '.join(str(arg) for arg in args)}")
        return _WRONG
    if origin is dict:
        if not isinstance(raw, Mapping):
            faults.append(f"{name}={show(raw)}: expected keys with values")
            return _WRONG
        pairs = [
            (_convert(args[0], key, f"{name} key", faults), _convert(args[1], value, f"{name}[{show(key)}]", faults))
            for key, value in raw.items()
        ]
        return _WRONG if any(_WRONG in pair for pair in pairs) else dict(pairs)
    if origin in (tuple, list):
        if not isinstance(raw, list | tuple):
            words = "q_proj, k_proj" if "target" in name else "fpb, tfns"
            if dataclasses.is_dataclass(args[0]):
                words = ", ".join(f"{key_of(f.name)}: ..." for f in dataclasses.fields(args[0])).join("{}")
            faults.append(
                f"{name}={show(raw)}: expected a list such as [{'4, 8' if args[0] in (int, float) else words}]"
            )
            return _WRONG
        items = [_convert(args[0], item, f"{name}[{index}]", faults) for index, item in enumerate(raw)]
        return _WRONG if any(item is _WRONG for item in items) else origin(items)
    if hint is str and type(raw) is datetime.date:
        raw = raw.isoformat()  # YAML reads 2024-07-26 as a day
    if hint is float and isinstance(raw, str):
        with contextlib.suppress(ValueError):
            raw = float(raw)  # YAML 1.1 reads 1e-4 (no dot) as text
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw) if abs(raw) < 2**63 else math.inf
    if isinstance(raw, float) and hint is float and not math.isfinite(raw):
        faults.append(f"{name}={raw}: expected a finite number")
        return _WRONG
    if not isinstance(raw, hint) or (isinstance(raw, bool) and hint is not bool):
        faults.append(f"{name}={show(raw)}: expected {_KIND_NAMES[hint]}")
        return _WRONG
    if isinstance(raw, int) and not -(2**63) <= raw < 2**63:
        faults.append(f"{name} is an integer of more than 64 bits: expected one that a machine counts with")
        return _WRONG
    if isinstance(raw, str) and not raw.isprintable() and not _is_text(raw):
        faults.append(f"{name}={show(raw)}: expected a text without zero bytes and halves of characters")
        return _WRONG
    return raw


def _is_text(value: str) -> bool:
    """Return whether a text can be written to a file and name one."""
    return "\0" not in value and is_unicode(value)


def is_unicode(value: str) -> bool:
    """Return whether a text can be encoded: JSON and YAML can hold halves of surrogate pairs."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def show(value: object) -> str:
    """Return a value as it looks in a message, cut where it is long: it comes from outside."""
    try:
        return _SHOW.repr(value)
    except ValueError:
        return f"a {type(value).__name__} of too many digits"
