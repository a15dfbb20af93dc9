"""Conversations as token ids. A single user message is rendered as in training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from finlora.data.chat_template import render_turns
from finlora.data.encode import encode_prompt
from finlora.errors import ConfigError, ModelError
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
    if len(messages) == 1 and messages[0].role == "user":
        return encode_prompt(messages[0].text, base.tokenizer, base.template, date)
    if base.template == "raw":
        roles = ", ".join(message.role for message in messages)
        raise ConfigError(
            f"messages hold {len(messages)} turns ({roles}) and this base is served without turns (template raw): send one "
            "user message, which is then the whole prompt, as in training."
        )
    # The template renders placeholders: its own text is encoded with special tokens, the messages without.
    markers = [f"\ue000{index}\ue001" for index in range(len(messages))]
    roles_in_template = {"developer": "system"}
    turns = [
        {"role": roles_in_template.get(message.role, message.role), "content": marker}
        for message, marker in zip(messages, markers, strict=True)
    ]
    try:
        rest = render_turns(turns, base.tokenizer, date)
    except ModelError as error:
        raise ConfigError(f"{error}: expected system, user, assistant, user in turn.") from error
    ids: list[int] = []
    for message, marker in zip(messages, markers, strict=True):
        before, found, rest = rest.partition(marker)
        if not found:
            raise ConfigError(
                "the base's chat template leaves out some of these turns: expected system, user, assistant."
            )
        ids += base.tokenizer.encode(before, add_special_tokens=False)
        ids += encode_plain(message.text.strip(), base)
    ids += base.tokenizer.encode(rest, add_special_tokens=False)
    bos = base.tokenizer.bos_token_id
    return tuple(ids) if ids[0] == bos else (bos, *ids)


def encode_plain(text: str, base: ServedBase) -> tuple[int, ...]:
    """Return the token ids of a text, without special tokens."""
    return encode_prompt(text, base.tokenizer, "raw")[1:]
