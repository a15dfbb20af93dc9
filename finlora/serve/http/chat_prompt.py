"""Conversations as token ids. A single user message is rendered as in training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from finlora.data.encode import encode_prompt, encode_turns
from finlora.errors import ConfigError
from finlora.serve.protocol import Message
from finlora.serve.served_model import ServedBase


def encode_messages(messages: Sequence[Message], base: ServedBase, date: str | None) -> tuple[int, ...]:
    """Render a conversation up to the start of the assistant's next turn.

    Text that looks like a special token is encoded as plain characters, so that no message can end or open a turn.

    Args:
        date: date that the chat template writes: the adapter's, or the base's own.

    Raises:
        ConfigError: the base has no chat template and gets more than one user message, or its template refuses the turns.
    """
    is_prompt = len(messages) == 1 and messages[0].role == "user"
    if base.template == "raw" and not is_prompt:
        found = ", ".join(message.role for message in messages)
        raise ConfigError(
            f"messages hold {len(messages)} turns ({found}) and this base is served without turns (template raw): send one "
            "user message, which is then the whole prompt, as in training."
        )
    roles = {"developer": "system"}
    turns = [(roles.get(message.role, message.role), message.text) for message in messages]
    return encode_turns(turns, base.tokenizer, base.template, date)


def encode_plain(text: str, base: ServedBase) -> tuple[int, ...]:
    """Return the token ids of a text, without special tokens."""
    return encode_prompt(text, base.tokenizer, "raw")[1:]
