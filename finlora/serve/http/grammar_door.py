"""Check of a request's grammar at the door: what it asks for, compiled once a process, refused before it is queued."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from finlora.errors import ConfigError
from finlora.grammar.compile import check_grammar, choice, json_object, json_schema, regex, tool_calls
from finlora.grammar.vocabulary import Vocabulary
from finlora.serve.failures import RefusedError
from finlora.serve.protocol import ChatRequest, GenerationRequest
from finlora.serve.served_model import ServedBase

_KEPT = 256
"""Verdicts on grammars that are kept."""


class _Wish(NamedTuple):
    field: str
    """Of the request."""
    make: Callable[[], str]
    """Returns the grammar."""


class GrammarDoor:
    """Grammars of requests to one base."""

    def __init__(self, base: ServedBase) -> None:
        self._vocabulary = Vocabulary(base.tokenizer, base.end_token_id)
        self._judge = functools.lru_cache(_KEPT)(self._find_fault)

    async def check(self, body: GenerationRequest) -> str:
        """Return the grammar that a request asks for; empty: none.

        Raises:
            RefusedError: it asks for two, or for one that cannot be followed.
        """
        wishes = list_wishes(body)
        if not wishes:
            return ""
        if len(wishes) > 1:
            fields = " and ".join(wish.field for wish in wishes)
            raise RefusedError(
                400, f"found {fields}: expected one of them in a request.", "invalid_value", wishes[1].field
            )
        (wish,) = wishes
        # In a thread: compiling a large one takes a tenth of a second, in which llguidance holds no lock of Python's.
        grammar, fault = await asyncio.to_thread(self._make, wish.make)
        if fault:
            raise RefusedError(400, f"Invalid schema for {wish.field}: {fault}.", "invalid_schema", wish.field)
        return grammar

    def _make(self, make: Callable[[], str]) -> tuple[str, str]:
        try:
            grammar = make()
        except ConfigError as error:
            return "", str(error)
        return grammar, self._judge(grammar)

    def _find_fault(self, grammar: str) -> str:
        try:
            check_grammar(grammar, self._vocabulary)
        except ConfigError as error:
            return str(error)
        return ""


def too_complex(fault: str) -> RefusedError:
    """Return the refusal of a request whose grammar grew too large while its answer was written."""
    return RefusedError(
        400,
        f"the grammar became too complex while the answer was written ({fault}): simplify it.",
        "grammar_too_complex",
    )


def list_wishes(body: GenerationRequest) -> list[_Wish]:
    """Return what a request asks for, one for each of its fields that asks for a grammar."""
    found: list[_Wish] = []
    format_, outputs = body.response_format, body.structured_outputs
    schema = format_.wanted if format_ is not None else None
    tools = body.offered_tools if isinstance(body, ChatRequest) else []
    if schema is not None and not tools:
        found.append(_Wish("response_format", functools.partial(json_schema, schema)))
    if outputs is not None:
        makers: list[Callable[[], str]] = []
        if outputs.json_object:
            makers.append(json_object)
        if outputs.schema_of_json is not None:
            makers.append(functools.partial(_from_text, outputs.schema_of_json))
        if outputs.regex is not None:
            makers.append(functools.partial(regex, outputs.regex))
        if outputs.choice is not None:
            makers.append(functools.partial(choice, outputs.choice))
        found += [_Wish("structured_outputs", make) for make in makers]
    if body.guided_json is not None:
        found.append(_Wish("guided_json", functools.partial(_from_text, body.guided_json)))
    if body.guided_regex is not None:
        found.append(_Wish("guided_regex", functools.partial(regex, body.guided_regex)))
    if body.guided_choice is not None:
        found.append(_Wish("guided_choice", functools.partial(choice, body.guided_choice)))
    if isinstance(body, ChatRequest) and tools:
        nothing: dict[str, Any] = {"type": "object", "properties": {}}
        make = functools.partial(
            tool_calls,
            [(tool.name, tool.parameters or nothing) for tool in tools],
            is_optional=body.tool_choice in (None, "auto"),
            is_single=body.named_tool is not None or body.parallel_tool_calls is False,
            answer=schema,  # as OpenAI: it is the form of an answer that calls nothing
        )
        found.append(_Wish("tools", make))
    return found


def _from_text(schema: Mapping[str, Any] | str) -> str:
    if not isinstance(schema, str):
        return json_schema(schema)
    try:
        read = json.loads(schema)
    except (json.JSONDecodeError, RecursionError):
        raise ConfigError("the text is not JSON: expected a JSON Schema") from None
    if not isinstance(read, dict):
        raise ConfigError("the text is not a JSON object: expected a JSON Schema")
    return json_schema(read)
