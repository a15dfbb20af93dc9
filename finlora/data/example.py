"""Record of one training or test item before tokenization, made by the readers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt in the raw completion form and the expected answer.

    `answer` is what the model is trained to write. `label` is the class that metrics compare, after folding (NWGI
    answers "mildly positive", its label is "positive"); for a free-text task label equals answer. `choices` are the
    allowed answers of a closed-label task, empty for free text.
    """

    id: str
    """Equal in all runs and on all machines: `<task>-<split>-<running number>`."""
    task: str
    prompt: str
    answer: str
    label: str
    choices: tuple[str, ...]
    source: str
    """`file:line` of the raw row, so that a defect can be traced."""
    group: str
    """Group that must not be in both splits: the sentence, headline, (sentence, entity) pair or filing of the item."""
    time: str = ""
    """Date or time of the raw row in ISO 8601; empty: not known."""
    weight: float = 1.0
    """Factor of the example's loss in training."""
    segments: tuple[str, ...] = ()
    """Values of the task file's `columns.segments`, in their order."""
    turns: tuple[tuple[str, str], ...] = ()
    """A conversation up to the answer: role (system, user or assistant) and content. Empty: the prompt is one user message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Both splits of one task, with the notes of its reader."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...] = ()
    """Defects and choices for the user: one sentence each."""
