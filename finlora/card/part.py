"""Part of a card: tables, texts and pictures on one question, the files they come from, and by name what is unknown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.card.profile import PartName
from finlora.report.tables import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Picture:
    """Plot with its caption."""

    caption: str
    figure: Figure


@dataclass(frozen=True, slots=True)
class Code:
    """Text that is shown as it is."""

    caption: str
    text: str


Block = str | TextTable | Picture | Code


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What FinLoRA measured or recorded on one question."""

    name: PartName
    title: str
    blocks: tuple[Block, ...]
    sources: tuple[str, ...]
    """Files that the figures come from."""
    gaps: tuple[str, ...] = ()
    """What is unknown, and why."""


def list_facts(rows: Iterable[tuple[str, object, object]], title: str = "") -> TextTable:
    """Return a table of facts: name, value and source of each; None is `unknown`."""
    return TextTable(
        title=title,
        header=("fact", "value", "source"),
        rows=tuple((name, UNKNOWN if value is None else str(value), str(source)) for name, value, source in rows),
    )


def make_part(
    name: PartName, title: str, blocks: Sequence[Block], sources: Sequence[Path | None], gaps: Sequence[str]
) -> Part:
    """Return a part; each source once, without those that are missing."""
    shown = dict.fromkeys(str(source) for source in sources if source is not None)
    return Part(name=name, title=title, blocks=tuple(blocks), sources=tuple(shown), gaps=tuple(gaps))
