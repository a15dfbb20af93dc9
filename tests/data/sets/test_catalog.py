"""A user's question in the very prompt that training renders."""

from __future__ import annotations

import pytest

from finlora.data.prompts import entity_prompt, headline_prompt, sentiment_prompt, xbrl_prompt
from finlora.data.question import read_content
from finlora.data.sets.catalog import FORMS, TASKS, make_question
from finlora.data.task import Request
from finlora.data.tasks.synthetic import read_synthetic_sentiment
from finlora.errors import DatasetError

TEXT = "Profit at Brunholt rose 12 %"


def test_prompts_are_those_of_training():
    assert make_question("fpb", TEXT, None).prompt == sentiment_prompt(TEXT, "news")
    assert make_question("tfns", TEXT, None).prompt == sentiment_prompt(TEXT, "tweet")
    assert make_question("headline", TEXT, "price up").prompt == headline_prompt(TEXT, "price up")
    assert make_question("ner", TEXT, "Brunholt").prompt == entity_prompt(TEXT, "Brunholt", 0)
    assert make_question("xbrl_tags", "<xbrl/>", "Which tag?").prompt == xbrl_prompt("<xbrl/>", "Which tag?")
    example = next(iter(read_synthetic_sentiment(Request(source=None, variant="as_published", splits="all")).test))
    text = example.prompt.partition("\nInput: ")[2].removesuffix("\nAnswer: ")
    assert make_question("fpb", text, None).choices == example.choices


def test_plain_text_is_the_prompt_and_free():
    question = make_question(None, TEXT, None)
    assert (question.prompt, question.choices) == (TEXT, ())


@pytest.mark.parametrize("task", FORMS)
def test_closed_tasks_have_choices_and_xbrl_is_free(task):
    about = {"headline": "price", "ner": "Brunholt", "xbrl_tags": "?", "xbrl_values": "?"}.get(task)
    assert bool(make_question(task, TEXT, about).choices) != task.startswith("xbrl")


@pytest.mark.parametrize(
    ("task", "text", "about", "words"),
    [
        ("fpb", " ", None, "found an empty text"),
        ("fbp", TEXT, None, "task 'fbp' cannot be asked: expected one of fpb, fiqa"),
        ("ner", TEXT, None, "asks an entity about the text: name it with --about"),
        ("ner", TEXT, "Nokia", "the entity 'Nokia' is not in the text"),
        ("headline", TEXT, "weather", "headline question 'weather' is not known: expected one of price"),
        ("headline", TEXT, None, "name it with --about: one of price, price up"),
        ("fpb", TEXT, "Brunholt", "which fpb does not ask: leave it out"),
        (None, TEXT, "Brunholt", "which a plain prompt does not ask"),
    ],
)
def test_question_that_cannot_be_asked_is_refused_with_a_message(task, text, about, words):
    with pytest.raises(DatasetError, match=words):
        make_question(task, text, about)


def test_text_behind_an_at_sign_is_a_file(tmp_path):
    path = tmp_path / "filing.xml"
    path.write_text("\ufeff<xbrl/>", encoding="utf-8")
    assert read_content(f"@{path}") == "<xbrl/>"
    assert read_content("plain") == "plain"
    with pytest.raises(
        DatasetError, match=r"absent.xml cannot be read .*: expected the name of a UTF-8 text file after @"
    ):
        read_content(f"@{tmp_path / 'absent.xml'}")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match=r"expected the name of a UTF-8 text file"):
        read_content(f"@{path}")


def test_form_of_a_task_allows_what_its_examples_allow():
    for name, form in FORMS.items():
        assert (form.choices, not form.choices) == (TASKS[name].choices, TASKS[name].is_free_text)
