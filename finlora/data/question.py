"""One question of a user in the prompt form of a task, as training and evaluation render it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finlora.data.prompts import (
    ENTITY_TYPES,
    HEADLINE_QUESTIONS,
    SENTIMENTS,
    SEVEN_SENTIMENTS,
    YES_NO,
    entity_prompt,
    headline_prompt,
    sentiment_prompt,
    seven_sentiment_prompt,
    xbrl_prompt,
)
from finlora.errors import DatasetError

QUESTION_TASKS = ("fpb", "fiqa", "tfns", "nwgi", "headline", "ner", "xbrl_tags", "xbrl_values")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, and what may be answered."""

    prompt: str
    choices: tuple[str, ...]
    """Empty: free text."""
    context: str
    """The text that was asked about."""


def read_content(text: str) -> str:
    """Return a text as given, or after `@` the content of the file named.

    Raises:
        DatasetError: the file is missing or not UTF-8.
    """
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{text[1:]} cannot be read ({error}): expected a text file in UTF-8 behind @.") from error


def make_question(task: str | None, text: str, about: str | None) -> Question:
    """Render a question.

    Args:
        task: one of QUESTION_TASKS; None: the text is the whole prompt.
        text: the sentence, post, headline or XBRL fragment.
        about: headline: a key of HEADLINE_QUESTIONS; ner: the entity; xbrl: the question itself. Else None.

    Raises:
        DatasetError: the text is empty, the task is not known, or `about` is missing, not wanted or not in the text.
    """
    if not text.strip():
        raise DatasetError("found an empty text: expected the sentence, headline or fragment to ask about.")
    if task is not None and task not in QUESTION_TASKS:
        raise DatasetError(f"task {task!r} cannot be asked: expected one of {', '.join(QUESTION_TASKS)}, or none.")
    wants = {"headline": "a question", "ner": "an entity", "xbrl_tags": "a question", "xbrl_values": "a question"}
    if task in wants and not about:
        keys = f": one of {', '.join(HEADLINE_QUESTIONS)}" if task == "headline" else ""
        raise DatasetError(f"task {task} asks {wants[task]} about the text: name it with --about{keys}.")
    about = about or ""
    if about and task not in wants:
        raise DatasetError(f"found --about {about!r}, which {task or 'a plain prompt'} does not ask: leave it out.")
    if task in ("xbrl_tags", "xbrl_values"):
        return Question(prompt=xbrl_prompt(text, about), choices=(), context=text)
    if task == "ner":
        if about not in text:
            raise DatasetError(f"the entity {about!r} does not stand in the text: name it as the text writes it.")
        return Question(prompt=entity_prompt(text, about, 0), choices=ENTITY_TYPES, context=text)
    if task == "headline":
        if about not in HEADLINE_QUESTIONS:
            raise DatasetError(
                f"headline question {about!r} is not known: expected one of {', '.join(HEADLINE_QUESTIONS)}."
            )
        return Question(prompt=headline_prompt(text, about), choices=YES_NO, context=text)
    if task == "nwgi":
        return Question(prompt=seven_sentiment_prompt(text), choices=SEVEN_SENTIMENTS, context=text)
    if task is None:
        return Question(prompt=text, choices=(), context=text)
    return Question(
        prompt=sentiment_prompt(text, "tweet" if task == "tfns" else "news"), choices=SENTIMENTS, context=text
    )
