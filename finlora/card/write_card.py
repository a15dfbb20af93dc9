"""Card of an adapter as one HTML file and as Markdown: verdict, open points, then the sections of a profile.

The same evidence gives the same bytes: the card holds no date of its own, so that its hash can be approved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from finlora.card import data_parts, origin_parts, outcome_parts
from finlora.card.evidence import Evidence
from finlora.card.part import Code, Part, Picture
from finlora.card.profile import Field, PartName, Profile
from finlora.card.verdict import write_verdict
from finlora.durable import write_whole
from finlora.report.tables import TextTable
from finlora.report.webpage import embed, render_template
from finlora.report.write import list_markdown_rows

PARTS: Mapping[PartName, Callable[[Evidence], Part]] = MappingProxyType(
    {
        "adapter": origin_parts.describe_adapter,
        "data": data_parts.describe_data,
        "leaks": data_parts.describe_leaks,
        "licences": data_parts.describe_licences,
        "scores": outcome_parts.describe_scores,
        "confusion": outcome_parts.describe_confusion,
        "calibration": outcome_parts.describe_calibration,
        "segments": outcome_parts.describe_segments,
        "parity": outcome_parts.describe_parity,
        "abstention": outcome_parts.describe_abstention,
        "cutoff": outcome_parts.describe_cutoff,
        "prompt": data_parts.describe_prompt,
        "training": origin_parts.describe_training,
        "environment": origin_parts.describe_environment,
        "lineage": origin_parts.describe_lineage,
        "approvals": origin_parts.describe_approvals,
        "config": origin_parts.describe_config,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """Field of the profile with the answer of fields.yaml."""

    field: Field
    answer: str | None
    """None: it is empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Section of the document."""

    title: str
    refers: str
    fields: tuple[Answered, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Document before it is written."""

    title: str
    subtitle: str
    verdict: tuple[str, ...]
    unknown: tuple[str, ...]
    """What is unknown in required parts."""
    unanswered: tuple[str, ...]
    """Required fields that are empty."""
    profile: Profile
    sections: tuple[Section, ...]

    @property
    def open_points(self) -> tuple[str, ...]:
        return self.unknown + self.unanswered


def build_card(evidence: Evidence, profile: Profile, *, has_texts: bool = True) -> Card:
    """Return the document.

    Args:
        has_texts: whether it may quote an example of the data.
    """

    def build(name: PartName) -> Part:
        return data_parts.describe_prompt(evidence, has_texts=has_texts) if name == "prompt" else PARTS[name](evidence)

    unknown: list[str] = []
    unanswered: list[str] = []
    sections = []
    for section in profile.sections:
        fields = tuple(Answered(field=field, answer=evidence.fields.get(field.name)) for field in section.fields)
        unanswered += [
            f"{section.title}: {each.field.ask} ({each.field.name})"
            for each in fields
            if each.field.required and each.answer is None
        ]
        parts = tuple(build(part.name) for part in section.parts)
        for part, wanted in zip(parts, section.parts, strict=True):
            if wanted.required:
                unknown += [f"{part.title}: {gap}" for gap in part.gaps]
        sections.append(Section(title=section.title, refers=section.refers, fields=fields, parts=parts))
    asked = {part.name for section in profile.sections for part in section.parts}
    if rest := [name for name in PARTS if name not in asked]:
        parts = tuple(build(name) for name in rest)
        sections.append(Section(title="Further figures", refers="not asked for by the profile", fields=(), parts=parts))
    return Card(
        title=f"{profile.title}: {evidence.name}",
        subtitle=f"Adapter {evidence.adapter_hash[:16]}, {evidence.contract.variant} on {evidence.contract.base}",
        verdict=tuple(write_verdict(evidence)),
        unknown=tuple(dict.fromkeys(unknown)),
        unanswered=tuple(unanswered),
        profile=profile,
        sections=tuple(sections),
    )


def write_card(card: Card, folder: Path) -> list[Path]:
    """Write card.html, card.md and the plots that it names; returns their paths.

    Raises:
        OSError: the folder cannot be written.
    """
    from finlora.report.plots import save_figure

    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[int, Path] = {}
    for part, picture in _list_pictures(card):
        path = (
            folder
            / f"{part.name}-{sum(part.name == other.stem.rpartition('-')[0] for other in pictures.values()) + 1}.png"
        )
        save_figure(picture.figure, path)
        pictures[id(picture)] = path
    write_whole(folder / "card.md", render_markdown(card, {key: path.name for key, path in pictures.items()}))
    write_whole(folder / "card.html", render_html(card))
    return [folder / "card.html", folder / "card.md", *pictures.values()]


def render_html(card: Card) -> str:
    """Return one HTML file that loads nothing. Names and texts are shown as they are, never read as markup."""
    images = {id(picture): embed(picture.figure, picture.caption) for _, picture in _list_pictures(card)}
    kinds = {str: "text", TextTable: "table", Picture: "picture", Code: "code"}
    return render_template(
        "finlora.card", "card.html", card=card, images=images, kind_of=lambda block: kinds[type(block)], identity=id
    )


def render_markdown(card: Card, pictures: Mapping[int, str]) -> str:
    """Return the document as Markdown.

    Args:
        pictures: id of each Picture -> name of its file.
    """
    lines = [f"# {card.title}", "", card.subtitle, "", "## Verdict", ""]
    lines += [f"- {sentence}" for sentence in card.verdict]
    lines += ["", f"## Open points ({len(card.open_points)})", ""]
    for title, points in (("Unknown figures", card.unknown), ("Questions without an answer", card.unanswered)):
        lines += [f"{title}: {len(points)}.", "", *(f"- {_on_one_line(point)}" for point in points), ""]
    lines += [f"Profile: {card.profile.name}. {card.profile.source}.", ""]
    lines += [card.profile.note, ""] if card.profile.note else []
    for section in card.sections:
        lines += [f"## {section.title}", ""]
        lines += [f"Refers to: {section.refers}", ""] if section.refers else []
        for each in section.fields:
            state = "open" if each.field.required else "not answered"
            lines += [f"**{each.field.ask}** (`{each.field.name}`)", "", each.answer or f"_{state}_", ""]
        for part in section.parts:
            lines += [f"### {part.title}", "", *_write_part(part, pictures)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _write_part(part: Part, pictures: Mapping[int, str]) -> Iterator[str]:
    for block in part.blocks:
        if isinstance(block, TextTable):
            yield from (f"**{block.title}**", "") if block.title else ()
            yield from (*list_markdown_rows(block), "")
            yield from (line for note in block.notes for line in (note.replace("*", "\\*"), ""))
        elif isinstance(block, Picture):
            yield from (f"![{block.caption}]({pictures[id(block)]})", "")
        elif isinstance(block, Code):
            fence = "`" * max(3, _longest_run(block.text) + 1)
            yield from (f"{block.caption}:", "", f"{fence}text", block.text.rstrip("\n"), fence, "")
        else:
            yield from (block, "")
    for gap in part.gaps:
        yield from (f"Unknown: {_on_one_line(gap)}", "")
    if part.sources:
        yield from (f"Source: {', '.join(f'`{source}`' for source in part.sources)}", "")


def _longest_run(text: str) -> int:
    """Return the longest run of backticks, which a fence must exceed."""
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest


def _list_pictures(card: Card) -> Iterator[tuple[Part, Picture]]:
    for section in card.sections:
        for part in section.parts:
            yield from ((part, block) for block in part.blocks if isinstance(block, Picture))


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
