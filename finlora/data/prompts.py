"""Texts of all prompts: pure functions from fields to text, shared by real and generated data.

The form is the paper's plain completion. Braces in an instruction are literal characters, not placeholders. Published XBRL
rows hold their prompt, which is kept verbatim; `xbrl_prompt` is for the generated set only.

Source: FinLoRA (Open-Finance-Lab/FinLoRA, commit 7e1cf82), data/test/*.jsonl, for the classification instructions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Literal

from finlora.errors import counted

SENTIMENTS = ("negative", "neutral", "positive")
SEVEN_SENTIMENTS = (
    "strong negative",
    "moderately negative",
    "mildly negative",
    "neutral",
    "mildly positive",
    "moderately positive",
    "strong positive",
)
YES_NO = ("Yes", "No")
ENTITY_TYPES = ("location", "organization", "person")

HEADLINE_QUESTIONS = {
    "price": "Does the news headline talk about price?",
    "price up": "Does the news headline talk about price going up?",
    "price constant": "Does the news headline talk about price staying constant?",
    "price down": "Does the news headline talk about price going down?",
    "past price": "Does the news headline talk about price in the past?",
    "future price": "Does the news headline talk about price in the future?",
    "past event": "Does the news headline talk about a general event (apart from prices) in the past?",
    "future event": "Does the news headline talk about a general event (apart from prices) in the future?",
    "asset comparison": "Does the news headline compare gold with any other asset?",
    # The six-question file does not separate prices from events, so its two questions about time are wider.
    "past": "Does the news headline talk about the past?",
    "future": "Does the news headline talk about the future?",
}

# The published builder asks 17 paraphrases a pair; the first two are the builder's, the others ours.
ENTITY_PARAPHRASES = (
    "What is the entity type of '{entity}' in the input sentence.",
    "With the input text as context, identify the entity type of '{entity}'.",
    "Name the type of the entity '{entity}' in the given sentence.",
    "Which kind of entity is '{entity}' in the text below?",
    "Decide which entity type '{entity}' has in the input.",
    "Read the input and say what type of entity '{entity}' is.",
    "Choose the entity type that fits '{entity}' in this sentence.",
    "In the sentence given, '{entity}' is an entity of which type?",
    "Classify the entity '{entity}' by the way the input uses it.",
    "Tell the entity type of '{entity}' as it stands in the input.",
    "Assign an entity type to '{entity}' from its place in the sentence.",
    "To which entity type does '{entity}' in the input belong?",
    "Using the sentence as evidence, state the type of the entity '{entity}'.",
    "Find '{entity}' in the input and give its entity type.",
    "Consider the input sentence: what type of entity does '{entity}' stand for?",
    "Pick the right entity type for '{entity}', given the input.",
    "From the input text, determine the entity category of '{entity}'.",
)


def completion(instruction: str, text: str) -> str:
    """Return the prompt of a classification task; the model continues after the last space."""
    return f"Instruction: {instruction}\nInput: {text}\nAnswer: "


def sentiment_prompt(text: str, kind: Literal["news", "tweet"]) -> str:
    """Ask for one of three sentiments of a news sentence or a post."""
    return completion(f"What is the sentiment of this {kind}? {choose(SENTIMENTS)}", text)


def seven_sentiment_prompt(text: str) -> str:
    """Ask for one of NWGI's seven grades of sentiment of a news text."""
    return completion(f"What is the sentiment of this news? {choose(SEVEN_SENTIMENTS)}", text)


def headline_prompt(headline: str, question: str) -> str:
    """Ask a Yes/No question about a headline.

    Args:
        headline: the news headline.
        question: a key of HEADLINE_QUESTIONS.
    """
    return completion(f"{HEADLINE_QUESTIONS[question]} {choose(YES_NO)}", headline)


def entity_prompt(sentence: str, entity: str, paraphrase: int) -> str:
    """Ask for the type of an entity; the order of the three options depends on the example alone.

    Args:
        sentence: the sentence that names the entity.
        entity: the entity as the sentence writes it.
        paraphrase: index into ENTITY_PARAPHRASES.
    """
    digest = hashlib.sha256(f"{paraphrase}\n{entity}\n{sentence}".encode()).digest()
    options = list(ENTITY_TYPES)
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(options)
    question = ENTITY_PARAPHRASES[paraphrase].format(entity=entity)
    return completion(f"{question}\nOptions: {', '.join(options)}", sentence)


def xbrl_prompt(fragment: str, question: str) -> str:
    """Ask about a generated XBRL fragment, in a shorter form of the published prompt."""
    return (
        "Answer the question from the XBRL file. Give only the answer.\n"
        f"XBRL file:\n```xml\n{fragment}\n```\nQuestion: {question}\nAnswer: "
    )


def xbrl_tag_question(line_item: str, company: str, year: int) -> str:
    """Ask which tag a filing uses for a line of its statements."""
    period = f"the Fiscal Year ending in FY {year}"
    return f"What is the US GAAP XBRL tag for {line_item} as reported by {company} for {period}?"


def xbrl_value_question(line_item: str, company: str, year: int) -> str:
    """Ask for the number that a filing reports."""
    return f"What is the value of {company}'s {line_item} for the Fiscal Year ending in FY {year}?"


def xbrl_formula_question(name: str, expression: str, num_decimals: int, company: str, year: int) -> str:
    """Ask for a figure that is computed from a filing.

    Args:
        name: the figure's name, with its unit.
        expression: formula over the filing's tags.
        num_decimals: decimals of the rounded answer.
    """
    rounding = "a whole number" if num_decimals == 0 else counted(num_decimals, "decimal")
    return (
        f"What is the {name} of {company} for the Fiscal Year ending in FY {year}, by the formula {expression}, rounded to "
        f"{rounding}?"
    )


def choose(choices: Sequence[str]) -> str:
    """Return the sentence that names the allowed answers; it ends an instruction."""
    return "Please choose an answer from {" + "/".join(choices) + "}."
