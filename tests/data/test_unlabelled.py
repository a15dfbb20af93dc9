"""Unlabelled pretraining texts: inputs and questions about their words, never a label of the task."""

from __future__ import annotations

import re

from finlora.data.prompts import completion, xbrl_prompt
from finlora.data.unlabelled import input_of, unlabelled_texts


def test_input_is_the_text_of_a_completion_prompt():
    assert input_of(completion("What is the sentiment?", "Profit rose\nInput: by 3 %")) == "Profit rose\nInput: by 3 %"
    prompt = xbrl_prompt("<us-gaap:Cash>3</>", "What is the value?")
    assert input_of(prompt) == prompt


def test_each_input_stands_thrice_and_every_answer_is_right():
    inputs = ["Profit rose at Brunholt", "Sales fell", ""]
    texts = unlabelled_texts(inputs, seed=1)
    assert len(texts) == 6
    assert {"Profit rose at Brunholt", "Sales fell"} <= set(texts)
    for text in set(texts) - set(inputs):
        words = input_of(text.rsplit("Answer: ", 1)[0] + "Answer: ").split()
        answer = text.rsplit("Answer: ", 1)[1]
        if "What is the" in text:
            assert answer == words[0 if "first word" in text else -1]
        else:
            asked = re.search(r"Does the word (\S+) stand", text).group(1)
            assert answer == ("Yes" if asked in words else "No")


def test_order_and_questions_follow_the_seed():
    inputs = [f"Company {number} sold goods" for number in range(9)]
    assert unlabelled_texts(inputs, 1) == unlabelled_texts(inputs, 1) != unlabelled_texts(inputs, 2)
