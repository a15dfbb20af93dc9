"""Question of a user to a task: the prompt as training and evaluation render it, and the allowed answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finlora.errors import DatasetError

About = Literal["none", "entity", "question"]
"""What the user must name beside the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and its allowed answers."""

    prompt: str
    choices: tuple[str, ...]
    """Empty: free text."""
    context: str
    """The text asked about."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and content of each message of a conversation. Empty: the prompt is one user message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Prompt form of a task, shared by the command line, the server and the web page."""

    render: Callable[[str, str], str]
    """Text and `about` -> prompt; `about` is empty if the task needs only the text."""
    choices: tuple[str, ...]
    """Allowed answers in the order in which scores are compared; empty: free text, quoted from the text."""
    about: About = "none"
    about_values: tuple[str, ...] = ()
    """Allowed values of `about`; empty: any text."""
    is_quoted: bool = True
    """Whether a free answer should occur in the text, as a tag or number does; False: it is written for it."""
    system: str | None = None
    """System message before the prompt, which is then a user's turn. None: the prompt alone."""

    def ask(self, task: str, text: str, about: str) -> Question:
        """Render a question.

        Args:
            task: name for messages.
            text: the sentence, post, headline or XBRL fragment; not empty.
            about: what the user names beside the text; empty: nothing.

        Raises:
            DatasetError: `about` is missing, not wanted, not allowed or, for an entity, not in the text.
        """
        if self.about != "none" and not about:
            article = "an" if self.about == "entity" else "a"
            values = f": one of {', '.join(self.about_values)}" if self.about_values else ""
            raise DatasetError(f"task {task} asks {article} {self.about} about the text: name it with --about{values}.")
        if self.about == "none" and about:
            raise DatasetError(f"found --about {about!r}, which {task} does not ask: leave it out.")
        if self.about == "entity" and about not in text:
            raise DatasetError(f"the entity {about!r} is not in the text: name it as the text writes it.")
        if self.about_values and about not in self.about_values:
            raise DatasetError(
                f"{task} question {about!r} is not known: expected one of {', '.join(self.about_values)}."
            )
        prompt = self.render(text, about)
        turns = () if self.system is None else (("system", self.system), ("user", prompt))
        return Question(prompt=prompt, choices=self.choices, context=text, turns=turns)


PLAIN = Form(render=lambda text, _about: text, choices=(), is_quoted=False)
"""The text as the whole prompt."""


def read_content(text: str) -> str:
    """Return a text as given, or for `@FILE` the file's content.

    Raises:
        DatasetError: the file is missing or not UTF-8.
    """
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{text[1:]} cannot be read ({error}): expected the name of a UTF-8 text file after @."
        ) from error
