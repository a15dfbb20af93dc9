"""Grammars: which texts each kind accepts, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finlora.errors import ConfigError
from finlora.grammar.compile import (
    MAX_BYTES,
    check_grammar,
    choice,
    json_object,
    json_schema,
    regex,
    tool_calls,
)
from finlora.grammar.vocabulary import Vocabulary
from finlora.model.tokenizer import load_tokenizer

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
NOTHING = {"type": "object", "properties": {}}


@pytest.fixture(scope="module")
def vocabulary(tiny_base):
    tokenizer = load_tokenizer(Path(tiny_base))
    return Vocabulary(tokenizer, tokenizer.eos_token_id)


@pytest.fixture
def accepts(vocabulary):
    """Return whether a text is complete under a grammar, spelled in the tokenizer's own way."""

    def accept(grammar, text):
        check_grammar(grammar, vocabulary)
        matcher, words = vocabulary.start(grammar), vocabulary.open()
        tokens = words.tokenize_str(text)
        assert words.decode_str(tokens) == text
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return accept


@pytest.mark.parametrize("text", ["up", "\u00fcber", "\U0001f600", 'q"x', "a\\b", "two\nlines", "\x7f", "a/b", "#", ""])
def test_choice_is_taken_as_it_is(accepts, text):
    grammar = choice([text, "other"])
    assert accepts(grammar, text)
    assert accepts(grammar, "other")
    assert not accepts(grammar, text + "x")


def test_regex_matches_the_whole_text(accepts):
    grammar = regex(r"Q[1-4] \d{4}")
    assert accepts(grammar, "Q3 2024")
    assert not accepts(grammar, "Q5 2024")
    assert not accepts(grammar, "in Q3 2024")


def test_json_is_written_as_pythons_json_dumps_writes_it(accepts):
    value = {"a": [1, 2.5, None], "b": {"c": "x"}, "d": True}
    assert accepts(json_object(), json.dumps(value))
    assert not accepts(json_object(), json.dumps(value, indent=1))
    assert not accepts(json_object(), "[]")


def test_object_that_is_not_closed_gets_only_the_properties_that_it_lists(accepts):
    assert accepts(json_schema(NUMBER), '{"n": 1}')
    assert not accepts(json_schema(NUMBER), '{"n": 1, "m": 2}')
    assert accepts(json_schema(NUMBER | {"additionalProperties": True}), '{"n": 1, "m": 2}')


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_tool_calls_have_the_name_and_arguments_of_a_tool(accepts):
    tools = [("count", NUMBER), ("stop", NOTHING)]
    one = tool_calls(tools, is_optional=False, is_single=True)
    assert accepts(one, call("count", '{"n": 1}'))
    assert accepts(one, call("stop", "{}"))
    assert not accepts(one, call("stop", '{"n": 1}'))
    assert not accepts(one, call("other", "{}"))
    both = "\n".join([call("count", '{"n": 1}'), call("stop", "{}")])
    assert not accepts(one, both)
    assert not accepts(one, "text")
    assert accepts(tool_calls(tools, is_optional=False, is_single=False), both)


def test_answer_in_place_of_a_tool_call_may_have_a_schema(accepts):
    grammar = tool_calls([("stop", NOTHING)], is_optional=True, is_single=True, answer=NUMBER)
    assert accepts(grammar, call("stop", "{}"))
    assert accepts(grammar, '{"n": 1}')
    assert not accepts(grammar, "text")
    assert not accepts(grammar, '{"n": 1}' + call("stop", "{}"))


def test_optional_tool_call_may_follow_any_text_or_be_left_out(accepts):
    grammar = tool_calls([("stop", NOTHING)], is_optional=True, is_single=True)
    assert accepts(grammar, "Nothing to call: 1 < 2 and <tool is no call.")
    assert accepts(grammar, call("stop", "{}"))
    assert accepts(grammar, "I stop.\n" + call("stop", "{}"))
    assert not accepts(grammar, "I stop.\n<tool_call>\nnow")


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "keywords that are not supported: uniqueItems"),
        ({"if": {}, "then": {}}, "not supported: if, then"),
        ({"properties": {"a": {"not": {}}}}, "not supported: not"),
        ({"type": "string", "format": "color"}, "the format 'color' is not supported: expected one of date-time"),
        ({"type": "string", "pattern": "^(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "("}, "cannot be read"),
        ({"type": "strin"}, "strin"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "https://example.com/schema.json"}, "leads outside the schema: copy what it names into $defs"),
        ({"enum": ["x" * 5000]}, "a text of 5,000 characters: expected at most 4,096"),
        (nested(200), "nested deeper than 60 levels"),
        (nested(20_000), "nested deeper than 60 levels"),
        ({"type": "string", "pattern": "(a+)+(b+)+(c*)*" * 50, "maxLength": 100}, "too complex"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "no text fits it"),
        ({"enum": []}, "no text fits it"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "use anyOf"),
        ({"type": "object", "required": "a"}, "required"),
        ({"$defs": {"n": NUMBER | {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}, "too complex"),
        ({"type": "object", "properties": {f"k{n}": {"type": "null"} for n in range(1500)}}, "too complex"),
    ],
)
def test_schema_that_cannot_be_followed_is_refused_and_named(vocabulary, schema, words):
    with pytest.raises(ConfigError) as error:
        check_grammar(json_schema(schema), vocabulary)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "cannot be read (unclosed group)"),
        (r"\bx", "look-around and word boundaries"),
        ("((a{100}){100}){100}", "too complex"),
        (r"[^\x00-\U0010FFFF]", "no text fits it"),
        ("(" * 20_000 + ")" * 20_000, "nested parentheses"),
        ("a" * MAX_BYTES, "expected at most 65,536"),
    ],
)
def test_pattern_that_cannot_be_followed_is_refused(vocabulary, pattern, words):
    with pytest.raises(ConfigError) as error:
        check_grammar(regex(pattern), vocabulary)
    assert words in str(error.value)


def test_schema_may_be_deep_and_recursive(vocabulary):
    check_grammar(json_schema(nested(50)), vocabulary)
    tree = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    check_grammar(json_schema(tree), vocabulary)


def test_choice_may_not_be_long():
    with pytest.raises(ConfigError, match="a text of 4,097 characters"):
        choice(["x" * 4097])


def test_neutral_and_describing_keywords_are_allowed(vocabulary):
    words = {
        "title": "T",
        "description": "D" * 5000,
        "default": 1,
        "examples": [1],
        "deprecated": True,
        "uniqueItems": False,
    }
    check_grammar(json_schema({"type": "array", "items": {"type": "integer"}, **words}), vocabulary)
