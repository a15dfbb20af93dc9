"""Turns of a conversation of kind chat: read, checked, and as the question before an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finlora.data.raw.rows import shorten
from finlora.data.taskfile.record import CHAT_PRESETS, TaskFile
from finlora.errors import DatasetError

Turn = tuple[str, str]
"""Role (system, user or assistant) and content."""


class TurnsBefore(NamedTuple):
    """What is asked before an answer."""

    prompt: str
    """The single user message; else the turns as text for a reader: a model gets them through its chat template."""
    turns: tuple[Turn, ...]
    """Empty: the prompt is one user message, which needs no chat template."""


def read_turns(task: TaskFile, raw: Any, source: str) -> tuple[Turn, ...]:
    """Return the turns of a row, the assistant's answer last.

    Raises:
        DatasetError: it is not a list of messages, has an unknown role, or does not end with the assistant.
    """
    names = ("from", "value") if task.preset == "sharegpt" else ("role", "content")
    turns = _parse(raw, f"column {task.columns.messages}", source, names, _roles_of(task), advises=True)
    if turns[-1][0] != "assistant":
        raise DatasetError(
            f"{source} ends with a {turns[-1][0]} turn: expected the assistant's answer last. Take the turn or the row out."
        )
    if not any(role == "user" for role, _ in turns):
        raise DatasetError(f"{source} has no user turn: expected one before the assistant's.")
    return _add_system(task, turns)


def read_asked_turns(task: TaskFile, raw: Any, source: str) -> tuple[Turn, ...]:
    """Return the turns up to an answer that is not among them: OpenAI's messages, whatever the task's preset.

    Raises:
        DatasetError: it is not a list of messages, has an unknown role, or does not end with a user turn.
    """
    roles = _roles_of(task) | {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
    turns = _parse(raw, "messages", source, ("role", "content"), roles, advises=False)
    if turns[-1][0] != "user":
        raise DatasetError(
            f"{source}: messages end with a turn of {turns[-1][0]}, expected the user's before the answer: take later turns out"
        )
    return _add_system(task, turns)


def ask_turns(before: Sequence[Turn]) -> TurnsBefore:
    """Return the question of a conversation up to its answer."""
    if [role for role, _ in before] == ["user"]:
        return TurnsBefore(before[0][1], ())
    return TurnsBefore("\n".join(f"{role}: {content}" for role, content in before), tuple(before))


def join_user_turns(turns: Sequence[Turn]) -> str:
    """Return what the user says, by which near duplicates are found."""
    return "\n".join(content for role, content in turns if role == "user")


def _roles_of(task: TaskFile) -> dict[str, str]:
    return {name: role for role in ("user", "assistant", "system") for name in getattr(task.roles, role)}


def _add_system(task: TaskFile, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    own = [("system", task.prompt.system)] if task.prompt.system and turns[0][0] != "system" else []
    return (*own, *turns)


def _parse(
    raw: Any, what: str, source: str, names: tuple[str, str], roles: Mapping[str, str], *, advises: bool
) -> list[Turn]:
    if not isinstance(raw, list | tuple) or not raw:
        raise DatasetError(f"{source}, {what}: found {shorten(raw)}, expected a list of messages.")
    turns: list[Turn] = []
    for number, message in enumerate(raw, start=1):
        if not isinstance(message, Mapping) or not set(names) <= set(message):
            keys = ", ".join(map(str, message)) if isinstance(message, Mapping) else shorten(message)
            hint = _advise_preset(message) if advises and isinstance(message, Mapping) else ""
            raise DatasetError(
                f"{source}, message {number}: found {keys}, expected an object with {' and '.join(names)}. {hint}".rstrip()
            )
        role, content = roles.get(str(message[names[0]])), message[names[1]]
        if role is None:
            hint = " Name it under `roles`." if advises else ""
            raise DatasetError(
                f"{source}, message {number}: found the role {shorten(message[names[0]])}, expected one of "
                f"{', '.join(roles)}.{hint}"
            )
        if not isinstance(content, str) or not content.strip():
            raise DatasetError(f"{source}, message {number}: found {shorten(content)}, expected a text.")
        turns.append((role, content))
    return turns


def _advise_preset(message: Mapping[str, Any]) -> str:
    if {"from", "value"} <= set(message):
        return "Keys from and value are those of preset: sharegpt."
    if {"role", "content"} <= set(message):
        return "Keys role and content are those of preset: openai, or of no preset."
    return f"Rename the keys, or choose a preset ({', '.join(CHAT_PRESETS)})."
