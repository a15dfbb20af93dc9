"""Profile of a card: which sections a rule book asks for, the measured parts in each, and the fields that people fill in.

A profile is a YAML file. Shipped ones are in `profiles/`; a bank writes its own and names it by its path. Answers to fields are
kept in `fields.yaml` beside the card, which FinLoRA only ever extends.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from finlora.configfile import settings_from_tree, show
from finlora.durable import write_whole
from finlora.errors import ConfigError
from finlora.yamltext import parse_yaml, read_yaml

PartName = Literal[
    "adapter",
    "data",
    "leaks",
    "licences",
    "scores",
    "confusion",
    "calibration",
    "segments",
    "parity",
    "abstention",
    "cutoff",
    "prompt",
    "training",
    "environment",
    "lineage",
    "approvals",
    "config",
]
"""What FinLoRA measures or records itself."""
FIELDS_FILE = "fields.yaml"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null")
"""Keys that YAML reads as something else than texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """Question that only people can answer."""

    name: str
    """Key in fields.yaml: a to z, 0 to 9 and _, first a letter."""
    ask: str
    """Question."""
    required: bool = True
    """Whether the card lists it as open while it is empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilePart:
    """Measured part of a section."""

    name: PartName
    required: bool = True
    """Whether the card lists what is unknown in it as open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileSection:
    """Section of the card."""

    title: str
    refers: str = ""
    """Point of the rule book that it answers."""
    fields: tuple[Field, ...] = ()
    parts: tuple[ProfilePart, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Rule book, as far as a card answers it."""

    name: str
    title: str
    source: str
    """Where the rule book is published."""
    note: str = ""
    """What a reader should know of it, such as whom it concerns."""
    sections: tuple[ProfileSection, ...]

    def __post_init__(self) -> None:
        fields = [field.name for section in self.sections for field in section.fields]
        parts = [part.name for section in self.sections for part in section.parts]
        faults = [
            f"field {show(name)}: expected a name of a to z, 0 to 9 and _"
            for name in fields
            if not _NAME.fullmatch(name) or name in _YAML_WORDS
        ]
        faults += [
            f"field {name} stands twice: expected once" for name in sorted(set(fields)) if fields.count(name) > 1
        ]
        faults += [f"part {name} stands twice: expected once" for name in sorted(set(parts)) if parts.count(name) > 1]
        if not self.sections:
            faults.append("sections is empty: expected at least one")
        if faults:
            raise ConfigError(faults)

    @property
    def fields(self) -> list[Field]:
        return [field for section in self.sections for field in section.fields]


def list_profiles() -> list[str]:
    """Return the names of the shipped profiles."""
    folder = resources.files("finlora.card").joinpath("profiles")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_profile(name: str) -> Profile:
    """Read a profile.

    Args:
        name: of a shipped one, or the path of a YAML file.

    Raises:
        ConfigError: there is none; or every unknown key and wrong type of it, all in one error.
    """
    if name in list_profiles():
        tree = parse_yaml(resources.files("finlora.card").joinpath(f"profiles/{name}.yaml").read_text(encoding="utf-8"))
    else:
        tree = _read_mapping(
            Path(name).expanduser(), f"profile {name}", f"one of {', '.join(list_profiles())}, or a file"
        )
    try:
        return settings_from_tree(Profile, tree)
    except ConfigError as error:
        raise ConfigError([f"profile {name}: {fault}" for fault in error.faults]) from error


def read_fields(folder: Path) -> dict[str, str]:
    """Return the answers of a card's folder: field -> text, stripped; empty answers are left out.

    Raises:
        ConfigError: the file is not YAML, or a value is no text.
    """
    path = folder / FIELDS_FILE
    if not path.is_file():
        return {}
    tree = _read_mapping(path, str(path), "keys with texts")
    faults = [
        f"{path}: {show(name)} is {show(value)}, expected a text"
        for name, value in tree.items()
        # YAML reads 2023-12-31 as a day.
        if not isinstance(name, str) or not (value is None or isinstance(value, str | int | float | datetime.date))
    ]
    if faults:
        raise ConfigError(faults)
    return {name: text for name, value in tree.items() if value is not None and (text := str(value).strip())}


def extend_fields(folder: Path, fields: Sequence[Field]) -> list[str]:
    """Append the fields that are missing in a card's folder, each with its question; returns their names.

    What stands in the file stays as it is.

    Raises:
        OSError: it cannot be written.
        ConfigError: as `read_fields`.
    """
    path = folder / FIELDS_FILE
    there = _read_mapping(path, str(path), "keys with texts") if path.is_file() else {}
    missing = [field for field in fields if field.name not in there]
    if missing:
        text = path.read_text(encoding="utf-8") if path.is_file() else _HEAD
        lines = [f"\n# {' '.join(field.ask.split())}\n{field.name}:\n" for field in missing]
        write_whole(path, text + ("" if text.endswith("\n") else "\n") + "".join(lines))
    return [field.name for field in missing]


_HEAD = """\
# What only people can answer for a model card. Write each answer behind its colon; a long one like this:
#   purpose: |
#     First line.
#     Second line.
# `finlora card` reads this file, adds questions that are missing, and changes nothing else in it.
"""


def _read_mapping(path: Path, what: str, expected: str) -> dict[Any, Any]:
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{what} does not exist: expected {expected}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} cannot be read ({error}): expected {expected} in YAML.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{what} holds {show(tree)}: expected {expected} in YAML.")
    return tree
