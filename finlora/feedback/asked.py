"""Text and question of a rendered prompt, read back by the task's form: the audit log and prepared sets hold prompts alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from finlora.data.question import Form
from finlora.data.taskfile.turns import Turn
from finlora.serve.accounts.audit import AuditEntry, hash_text

_TEXT, _ABOUT = "\ue000", "\ue001"
"""Characters of the private use area, which mark text and question in a rendered prompt."""
_NAMES = {_TEXT: "text", _ABOUT: "about"}
_COMPLETION = re.compile(r".*?\nInput: (.*)\nAnswer: ", re.DOTALL)


class Asked(NamedTuple):
    text: str
    about: str
    """Empty: the task needs only the text."""
    turns: tuple[Turn, ...] = ()
    """Kind chat: the conversation up to the answer, in place of `text`."""


def read_logged(entry: AuditEntry) -> str | list[dict[str, str]]:
    """Return what an entry's request asked: a prompt, or the messages of a conversation of more than one user message."""
    prompt = entry.prompt or ""
    if not entry.path.endswith("/chat/completions"):
        return prompt
    turns = json.loads(prompt)
    if [role for role, _ in turns] == ["user"]:
        return str(turns[0][1])
    return [{"role": role, "content": content} for role, content in turns]


def hash_asked(prompt: str, turns: Sequence[Turn]) -> set[str]:
    """Return the hashes under which the audit log can have a question: of its prompt, and of the messages that ask it.

    Args:
        turns: of a conversation; empty: the prompt is one user message. The task's system message, which training puts before
            each conversation, need not have been sent.
    """
    sent = list(turns) or [("user", prompt)]
    ways, rest = [sent], sent
    if sent[0][0] == "system":
        rest = sent[1:]
        ways += [rest, [("developer", sent[0][1]), *rest]]
    found = {hash_text(_write_messages(each)) for each in ways}
    if [role for role, _ in rest] == ["user"]:
        found.add(hash_text(rest[0][1]))
    return found


def _write_messages(turns: Sequence[Turn]) -> str:
    """Return messages as `/v1/chat/completions` writes them into the audit log."""
    return json.dumps([list(turn) for turn in turns], ensure_ascii=False)


class PromptReader:
    """Reader of the prompts of one form."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._patterns = list(_list_patterns(form))

    def read(self, prompt: str) -> Asked | None:
        """Return what was asked; None: the prompt is not of this form."""
        for about, pattern in self._patterns:
            if found := pattern.fullmatch(prompt):
                asked = Asked(found["text"], about or found.groupdict().get("about", ""))
                if self._form.render(asked.text, asked.about) == prompt:
                    return asked
        return None

    def read_text(self, prompt: str) -> str:
        """Return the text of a prompt, also of one that a data set words otherwise; the whole prompt if there is none."""
        found = next((match for _, pattern in self._patterns if (match := pattern.fullmatch(prompt))), None)
        if found is not None:
            return found["text"]
        return other[1] if (other := _COMPLETION.fullmatch(prompt)) else prompt


def _list_patterns(form: Form) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield `about`, where its values are known, with a pattern of the form's prompts: the exact ones first."""
    values = form.about_values or ("" if form.about == "none" else _ABOUT,)
    for is_loose in (False, True):
        for value in values:
            yield "" if value == _ABOUT else value, _make_pattern(form.render(_TEXT, value), is_loose)


def _make_pattern(rendered: str, is_loose: bool) -> re.Pattern[str]:
    """Return the pattern of a rendered prompt.

    Args:
        is_loose: lines between text and question may differ: NER shuffles its options.
    """
    pattern = ""
    for part in re.split(f"([{_TEXT}{_ABOUT}])", rendered):
        if part in _NAMES:
            name = _NAMES[part]
            pattern += f"(?P={name})" if f"<{name}>" in pattern else f"(?P<{name}>.+?)"
        elif is_loose and part.count("\n") > 1:
            pattern += re.escape(part.partition("\n")[0]) + r"\n.*?\n" + re.escape(part.rpartition("\n")[2])
        else:
            pattern += re.escape(part)
    return re.compile(pattern, re.DOTALL)
