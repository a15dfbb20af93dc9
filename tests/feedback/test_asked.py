"""Text and question of a prompt read back, for every task that can be asked, built in or of a task file."""

from __future__ import annotations

import pytest
from letters import LETTERS

from finlora.data.prompts import entity_prompt
from finlora.data.sets.catalog import FORMS
from finlora.data.taskfile.asking import make_form
from finlora.data.taskfile.load import task_file_from_tree
from finlora.feedback.asked import Asked, PromptReader

TEXTS = (
    "Rome met Ines.",
    "Two\nlines of Rome, with\nInput: of its own",
    "(.*) $1 \\d Rome",
    "a Rome's 'quoted' question? Rome",
)
ABOUT = {"none": ("",), "entity": ("Rome", "a Rome's"), "question": ("What is it?", "What is\nthe value?")}

OWN = {
    "shot": {**LETTERS, "prompt": {"instruction": "Tone?", "example": {"text": "Hm.", "label": "bad"}}},
    "multi": {**LETTERS, "kind": "multi", "prompt": {"instruction": "Is it {label}, really {label}?"}},
    "number": {"name": "n", "kind": "number", "source": {"files": "n.csv"}, "columns": {"question": "q"}},
    "text": {"name": "t", "kind": "text", "source": {"files": "t.csv"}},
}
ALL = {**FORMS, **{name: make_form(task_file_from_tree(tree)) for name, tree in OWN.items()}}


@pytest.mark.parametrize("name", ALL)
def test_rendered_prompt_gives_back_text_and_question(name):
    form = ALL[name]
    reader = PromptReader(form)
    for text in TEXTS:
        for about in form.about_values or ABOUT[form.about]:
            if form.about == "entity" and about not in text:
                continue
            prompt = form.render(text, about)
            assert reader.read(prompt) == Asked(text, about)
            assert reader.read_text(prompt) == text
    if name != "text":
        assert reader.read("Tell me a story") is None


def test_text_of_a_prompt_that_a_data_set_words_otherwise_is_found():
    reader = PromptReader(FORMS["ner"])
    prompt = entity_prompt("Rome met Ines.", "Rome", 7)
    assert reader.read(prompt) is None
    assert reader.read_text(prompt) == "Rome met Ines."
    assert reader.read_text("Tell me a story") == "Tell me a story"
