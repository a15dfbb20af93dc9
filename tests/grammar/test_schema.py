"""Schemas before they are compiled: which objects are closed."""

from __future__ import annotations

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finlora.grammar.schema import prepare_schema

ONE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED = ONE | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (ONE, CLOSED),
        ({"type": "array", "items": ONE}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [ONE, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$defs": {"One": ONE}, "$ref": "#/$defs/One"}, {"$defs": {"One": CLOSED}, "$ref": "#/$defs/One"}),
        ({"type": "array", "uniqueItems": False}, {"type": "array"}),
    ],
)
def test_listed_properties_are_all(schema, expected):
    assert prepare_schema(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        ONE | {"additionalProperties": True},
        ONE | {"patternProperties": {"^x": {}}},
        ONE | {"required": ["a", "b"]},  # b is required and not listed
        ONE | {"minProperties": 2},
        {"type": "object"},
        {"allOf": [ONE, {"type": "object", "properties": {"b": {}}}]},  # each part would forbid the other's
        {"properties": {"b": {}}, "anyOf": [ONE, {"type": "object"}]},
        {"$defs": {"One": ONE}, "$ref": "#/$defs/One", "properties": {"b": {}}},
        {"enum": [{"properties": {}}], "default": {"properties": {}}},  # values, not schemas
    ],
)
def test_object_stays_open_where_others_are_wanted_or_parts_are_combined(schema):
    assert prepare_schema(schema) == schema


def test_property_may_have_the_name_of_a_keyword():
    schema = {"type": "object", "properties": {"properties": {"type": "string"}, "uniqueItems": {"const": False}}}
    assert prepare_schema(schema)["properties"] == schema["properties"]


values = st.recursive(
    st.one_of(st.integers(0, 2), st.just("x"), st.none()),
    lambda parts: st.one_of(st.lists(parts, max_size=2), st.dictionaries(st.sampled_from("abc"), parts, max_size=3)),
    max_leaves=5,
)
parts = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "string"}, {}, {"$ref": "#/$defs/d"}]),
    lambda inner: st.one_of(
        st.builds(
            lambda properties, more: {"type": "object", "properties": properties, **more},
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            st.sampled_from([{}, {"required": ["a"]}, {"additionalProperties": True}, {"minProperties": 1}]),
        ),
        st.builds(
            lambda kind, several: {kind: several},
            st.sampled_from(["anyOf", "allOf"]),
            st.lists(inner, min_size=1, max_size=2),
        ),
        inner.map(lambda one: {"items": one}),
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(schema=parts, shared=parts.filter(lambda part: "$ref" not in str(part)), value=values)
def test_what_the_prepared_schema_accepts_the_schema_accepts(schema, shared, value):
    whole = {"$defs": {"d": shared}, **schema}
    if jsonschema.Draft202012Validator(prepare_schema(whole)).is_valid(value):
        jsonschema.Draft202012Validator(whole).validate(value)
