"""Unlabelled pretraining texts: inputs and questions about their words, never a label of the task."""

from __future__ import annotations

import re

import pytest

from finlora.data.pretraining.unlabelled import GAP, NUM_QUESTIONS, input_of, unlabelled_texts
from finlora.data.prompts import ENTITY_TYPES, SENTIMENTS, YES_NO, completion, xbrl_prompt
from finlora.data.sets.prepare import prepare_task
from finlora.data.sets.prepared import read_prepared

INPUTS = [
    "Profit rose at Brunholt because demand grew",
    "Sales fell at Brunholt before the summer",
    "Orders rose slowly although prices fell",
    "Profit fell",
    "$BRN 7 %",
]


def parts_of(text):
    """Instruction, words of the input and answer of a question."""
    instruction, rest = text.removeprefix("Instruction: ").split("\nInput: ")
    own, answer = rest.split("\nAnswer: ")
    return instruction, own.split(), answer


def options_of(instruction):
    found = re.search(r"\{(.+)\}", instruction)
    return found.group(1).split("/") if found else []


def questions(seed=1):
    return [parts_of(text) for text in unlabelled_texts(INPUTS, seed) if text.startswith("Instruction: ")]


def test_input_is_the_text_of_a_completion_prompt():
    assert input_of(completion("What is the sentiment?", "Profit rose\nInput: by 3 %")) == "Profit rose\nInput: by 3 %"
    prompt = xbrl_prompt("<us-gaap:Cash>3</>", "What is the value?")
    assert input_of(prompt) == prompt


def test_each_input_occurs_plain_and_in_its_questions():
    texts = unlabelled_texts([*INPUTS, "", " "], seed=1)
    assert [texts.count(text) for text in INPUTS] == [1] * len(INPUTS)
    asked = [" ".join(own) for _, own, _ in questions()]
    assert sum(GAP not in text and text == INPUTS[0] for text in asked) == NUM_QUESTIONS - 1
    assert sum(GAP in text and text.startswith("Profit") for text in asked) >= 1


@pytest.mark.parametrize("seed", range(20))
def test_every_answer_is_right_and_among_its_options(seed):
    for instruction, own, answer in questions(seed):
        options = options_of(instruction)
        assert len(set(options)) == len(options)
        assert not options or answer in options
        if "missing word" in instruction:
            assert " ".join(answer if word == GAP else word for word in own) in INPUTS
        elif "stands in this input" in instruction:
            assert [word for word in options if word in own] == [answer]
        elif "earlier word" in instruction:
            assert answer == min(options, key=own.index)
        elif "Does the word" in instruction:
            asked = re.search(r"Does the word (\S+) stand", instruction).group(1)
            assert answer == ("Yes" if asked in own else "No")
        elif "word after" in instruction:
            asked = re.search(r"the word after (\S+) in", instruction).group(1)
            assert answer == own[own.index(asked) + 1]
        elif "Repeat" in instruction:
            assert own == [answer]
        else:
            assert answer == own[0 if "first word" in instruction else -1]


def test_all_kinds_of_question_occur():
    kinds = {
        re.sub(r" [{].*|(?<=word) \S+ stand|(?<=after) \S+", "", q[0]) for seed in range(9) for q in questions(seed)
    }
    assert len(kinds) == 8  # six questions, of which one asks for the first or the last word, and the repetition


def test_gap_is_offered_words_that_follow_its_neighbour_elsewhere():
    inputs = [f"Profit {word} again" for word in ("rose", "fell", "grew")] + ["Summer came early this time"]
    asked = [parts_of(text) for seed in range(9) for text in unlabelled_texts(inputs, seed) if f"Profit {GAP}" in text]
    assert asked
    assert all(sorted(options_of(instruction)) == ["fell", "grew", "rose"] for instruction, _, _ in asked)


def test_no_text_of_a_task_meets_its_label(tmp_path):
    """Closed answers of the tasks occur as an answer only where the word itself stands in the prompt to be copied."""
    prepare_task("synthetic_sentiment", None, tmp_path, None, "all", False, False)
    examples = read_prepared(tmp_path, "synthetic_sentiment", "train").examples[:400]
    inputs = sorted({input_of(example.prompt) for example in examples})
    texts = unlabelled_texts(inputs, seed=0)
    assert not any("sentiment" in text.split("\nInput: ")[0] for text in texts if text.startswith("Instruction: "))
    for text in texts:
        if text.startswith("Instruction: "):
            instruction, own, answer = parts_of(text)
            if answer in (*SENTIMENTS, *ENTITY_TYPES):
                assert answer in own or GAP in own
            if answer in YES_NO and "Repeat" in instruction:
                assert own == [answer]


def test_order_and_questions_follow_the_seed():
    inputs = [f"Company {number} sold goods" for number in range(9)]
    assert unlabelled_texts(inputs, 1) == unlabelled_texts(inputs, 1) != unlabelled_texts(inputs, 2)
