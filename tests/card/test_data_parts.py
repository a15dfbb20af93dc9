"""Leaks that a card counts: nearly equal texts, only where a row's text is known by itself."""

from __future__ import annotations

import dataclasses

from finlora.card.data_parts import count_alike
from finlora.data.example import Example
from finlora.data.question import Form

SENTENCE = "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn in the second quarter of the year ."
OTHER = "The company opened an office in Rotterdam and will hire a dozen engineers before autumn ."
FORM = Form(render=lambda text, about: f"Is it good? {about}{text}", choices=("yes", "no"))


def make_examples(*texts: str, prefix: str = "") -> list[Example]:
    plain = {"id": "t-0", "task": "t", "answer": "yes", "label": "yes", "choices": ("yes", "no"), "source": "f:1"}
    return [Example(prompt=FORM.render(text, prefix), group=text, **plain) for text in texts]


def test_nearly_equal_text_counts_as_seen():
    train = make_examples(SENTENCE)
    assert count_alike(train, make_examples(SENTENCE.replace("13.1", "14.2"), OTHER), FORM) == 1
    assert count_alike(train, make_examples(OTHER), FORM) == 0


def test_question_beside_the_text_is_one_of_the_forms_values():
    form = Form(render=FORM.render, choices=FORM.choices, about="question", about_values=("up? ", "down? "))
    assert count_alike(make_examples(SENTENCE, prefix="up? "), make_examples(SENTENCE, prefix="down? "), form) == 1
    assert count_alike(make_examples(SENTENCE, prefix="why? "), make_examples(SENTENCE, prefix="up? "), form) is None


def test_group_that_is_not_the_text_is_not_compared():
    """The generated set groups by company: its names are no texts."""
    (example,) = make_examples(SENTENCE)
    company = dataclasses.replace(example, group="Operating")
    assert count_alike([company], [company], FORM) is None
    assert count_alike([example], [example], None) is None
