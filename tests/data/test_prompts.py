"""The prompt words, letter by letter."""

from __future__ import annotations

import pytest

from finlora.data import prompts


def test_sentiment_prompt_has_literal_braces():
    assert prompts.sentiment_prompt("Fennick sold its mill .", "news") == (
        "Instruction: What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.\n"
        "Input: Fennick sold its mill .\nAnswer: "
    )
    assert "sentiment of this tweet?" in prompts.sentiment_prompt("to the moon", "tweet")


def test_seven_sentiment_prompt_lists_grades_in_order():
    low = "{strong negative/moderately negative/mildly negative/neutral"
    assert f"{low}/mildly positive/moderately positive/strong positive}}." in prompts.seven_sentiment_prompt("x")


def test_headline_prompt_asks_for_yes_or_no():
    assert prompts.headline_prompt("gold up", "price up").startswith(
        "Instruction: Does the news headline talk about price going up? Please choose an answer from {Yes/No}.\nInput: "
    )


def test_entity_paraphrases_are_seventeen_distinct_and_name_the_entity():
    asked = [prompts.entity_prompt("Ada works .", "Ada", index) for index in range(len(prompts.ENTITY_PARAPHRASES))]
    assert len(set(asked)) == 17
    assert all("'Ada'" in prompt and "\nOptions: " in prompt for prompt in asked)


def test_entity_options_are_shuffled_the_same_way_each_time():
    asked = [prompts.entity_prompt(f"Sentence {number} .", "Ada", 0) for number in range(60)]
    orders = {prompt.partition("Options: ")[2].partition("\n")[0] for prompt in asked}
    assert len(orders) == 6
    assert asked == [prompts.entity_prompt(f"Sentence {number} .", "Ada", 0) for number in range(60)]


def test_entity_with_braces_stays_literal():
    assert "'{Ada}'" in prompts.entity_prompt("{Ada} works .", "{Ada}", 0)


@pytest.mark.parametrize("question", prompts.HEADLINE_QUESTIONS)
def test_every_headline_question_ends_as_a_question(question):
    assert prompts.HEADLINE_QUESTIONS[question].endswith("?")


@pytest.mark.parametrize(("num_decimals", "words"), [(0, "a whole number"), (1, "1 decimal"), (2, "2 decimals")])
def test_formula_question_shows_the_formula_and_the_rounding(num_decimals, words):
    asked = prompts.xbrl_formula_question(
        "current ratio", "AssetsCurrent / LiabilitiesCurrent", num_decimals, "Fen plc", 2020
    )
    assert asked == (
        "What is the current ratio of Fen plc for the Fiscal Year ending in FY 2020, by the formula "
        f"AssetsCurrent / LiabilitiesCurrent, rounded to {words}?"
    )
