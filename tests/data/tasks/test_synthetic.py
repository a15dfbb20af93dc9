"""The generated set: the same each time, balanced, split by names, and its pretraining texts without labels."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from finlora.data import prompts
from finlora.data.pretraining.generated_texts import pretraining_texts
from finlora.data.sets.catalog import TASKS
from finlora.data.tasks import synthetic
from finlora.data.tasks import synthetic_words as words

NAMES = [name for name in TASKS if name.startswith("synthetic_")]
FREE_TEXT = ("synthetic_xbrl", "synthetic_formulas")


@pytest.fixture(scope="module")
def made():
    request = synthetic.Request(source=None, variant="as_published", splits="all")
    return {name: TASKS[name].read(request) for name in (*NAMES, "synthetic")}


@pytest.mark.parametrize("name", NAMES)
def test_set_is_deterministic_distinct_and_disjoint(made, ask, name):
    splits = made[name]
    assert splits == TASKS[name].read(ask(None))
    assert (len(splits.train), len(splits.test)) == (2400, 600)
    assert len({item.prompt for item in (*splits.train, *splits.test)}) == 3000
    assert not {item.group for item in splits.train} & {item.group for item in splits.test}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FREE_TEXT])
def test_labels_are_balanced(made, name):
    for examples in (made[name].train, made[name].test):
        assert len(set(Counter(item.label for item in examples).values())) == 1
        assert {item.label for item in examples} == set(TASKS[name].choices)


def test_xbrl_answers_stand_once_in_a_short_context(made):
    for item in made["synthetic_xbrl"].train:
        fragment = item.prompt.partition("Question:")[0]
        assert fragment.count(f":{item.answer.removeprefix('us-gaap:')}>") + fragment.count(f">{item.answer}<") == 1
        assert len(item.prompt) < 600


def test_formula_answers_follow_from_the_figures_of_the_fragment(made):
    """Recomputed from the prompt alone, with Python's arithmetic."""
    for item in (*made["synthetic_formulas"].train[:200], *made["synthetic_formulas"].test[:200]):
        values = {tag: int(value) for tag, value in re.findall(r"<us-gaap:(\w+)>(-?\d+)</>", item.prompt)}
        formula, _, rest = item.prompt.partition("by the formula ")[2].partition(", rounded to ")
        digits = 0 if rest.startswith("a whole number?") else int(rest[0])
        value = eval(formula, {"__builtins__": {}}, values)
        assert abs(float(item.answer) - value) <= 0.5 * 10**-digits + 1e-9
        assert len(item.answer.partition(".")[2]) == digits
        assert len(values) == 5
        assert len(item.prompt) < 600


def test_each_formula_is_asked_as_often_as_any_other(made):
    names = [item.prompt.partition("What is the ")[2].partition(" of ")[0] for item in made["synthetic_formulas"].test]
    assert set(Counter(names).values()) == {60}
    assert len(set(names)) == len(synthetic.FORMULAS) == 10


def test_no_word_decides_the_sentiment(made):
    """Good and bad news share nouns and verbs: `rose` must occur under both labels."""
    labels = Counter(item.label for item in made["synthetic_sentiment"].train if " rose " in item.prompt)
    assert min(labels["positive"], labels["negative"]) > 20


def test_mix_takes_the_four_tasks_by_turns(made):
    assert [item.task for item in made["synthetic"].test[:4]] == [
        name for name in NAMES if name != "synthetic_formulas"
    ]
    assert len(made["synthetic"].train) == 9600
    assert len({item.id for item in made["synthetic"].train}) == 9600


def test_pretraining_texts_repeat_and_hold_no_labelled_prompt(made):
    texts = pretraining_texts(7, 3000)
    assert texts == pretraining_texts(7, 3000)
    assert texts != pretraining_texts(8, 3000)
    instructions = (
        "What is the sentiment",
        "Does the news headline",
        "entity type",
        "What is the US GAAP",
        "What is the value",
        "by the formula",
    )
    assert not any(words in text for text in texts for words in instructions)
    assert not any(paraphrase.split("'")[0] in text for text in texts for paraphrase in prompts.ENTITY_PARAPHRASES[1:3])


def test_pretraining_texts_show_which_words_are_alike_and_never_the_pair():
    """A rise of a loss is bad news: that is the task's to teach."""
    texts = pretraining_texts(7, 3000)
    beside = {*words.PLEASED, *words.WORRIED, *words.HIGHER, *words.LOWER}
    plain = [text for text in texts if not text.startswith("Instruction: ")]
    worded = [sentence for text in plain for sentence in text.split(" . ") if beside & set(sentence.split())]
    assert len(worded) > 500
    for sentence in worded:
        has_noun = any(f"The {noun} " in sentence for noun in words.GOOD_NOUNS + words.BAD_NOUNS)
        has_verb = any(f" {verb} " in sentence for verb in words.UP_VERBS + words.DOWN_VERBS)
        assert has_noun != has_verb, sentence


def test_pretraining_asks_for_words_of_a_change_that_occur_in_the_input():
    asked = [text for text in pretraining_texts(7, 3000) if "Repeat what changed" in text or "of a change" in text]
    assert len(asked) > 200
    for text in asked:
        _, _, rest = text.partition("\nInput: ")
        sentence, _, answer = rest.partition("\nAnswer: ")
        assert answer in sentence
        assert answer.lower() in (*words.GOOD_NOUNS, *words.BAD_NOUNS, *words.UP_VERBS, *words.DOWN_VERBS)


def test_pretraining_asks_for_the_kind_of_the_verb_or_of_the_noun_and_never_for_both():
    """Each answer follows from one word alone, so that the sentiment, which hangs on both, stays the task's to teach."""
    kinds = {
        "Which way does the change": {"higher": words.UP_VERBS, "lower": words.DOWN_VERBS},
        "What does the thing that changed": {"pleased": words.GOOD_NOUNS, "worried": words.BAD_NOUNS},
    }
    texts = pretraining_texts(7, 3000)
    for question, kind in kinds.items():
        asked = [text for text in texts if question in text]
        assert len(asked) > 150
        told = Counter()
        for text in asked:
            sentence, _, answer = text.partition("\nInput: ")[2].partition("\nAnswer: ")
            assert any(word in sentence.lower() for word in kind[answer])
            told[answer] += 1
        assert told.keys() == kind.keys()


def test_pretraining_texts_name_no_test_company(made):
    companies = {item.group for item in made["synthetic_sentiment"].test}
    text = "\n".join(pretraining_texts(7, 3000))
    assert not any(company in text for company in companies)
