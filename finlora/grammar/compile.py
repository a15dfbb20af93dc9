"""Grammars of answers: JSON, a regular expression, choices or tool calls, in llguidance's form, checked and bounded.

A grammar is one text. The door checks it before a request is queued; the last stage compiles it again (the compiled form cannot
be sent) and masks by it.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md and json_schema.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finlora.errors import ConfigError
from finlora.grammar.schema import check_length, prepare_schema
from finlora.grammar.vocabulary import Vocabulary

MAX_BYTES = 65_536
"""Longest grammar."""
_TRIED_TOKENS = 4
"""Tokens after which a check ends: a grammar that is too large mostly fails at its first ones."""
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
"""JSON as Python's json.dumps writes it: where white space is free, small models go on for ever. Unknown keywords are errors."""
CALL_START, CALL_NAMED, CALL_END = '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"
"""Texts around the name and the arguments of a tool call: the form of Hermes and Qwen."""
CALL_MARK = "<tool_call>"
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_TOO_LARGE = ("Unable to determine", "too many", "Too many", "too complex", "fuel", "max is", "limit", "too large")
_MAX_ERROR = 300


def json_object() -> str:
    """Return the grammar of any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Mapping[str, Any]) -> str:
    """Return the grammar of the JSON texts that a JSON Schema (draft 2020-12) accepts.

    Raises:
        ConfigError: it is nested too deeply, or holds a text that is too long.
    """
    return json.dumps({"grammars": [{"json_schema": prepare_schema(schema) | {"x-guidance": _FORM}}]})


def regex(pattern: str) -> str:
    """Return the grammar of the texts that a regular expression matches as a whole (Rust's syntax, without look-around)."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def choice(texts: Sequence[str]) -> str:
    """Return the grammar of some texts.

    Raises:
        ConfigError: one is too long.
    """
    for text in texts:
        check_length(text)
    return json.dumps({"grammars": [{"lark_grammar": f"start: {' | '.join(map(_quote, texts))}"}]})


def tool_calls(
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    is_optional: bool,
    is_single: bool,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """Return the grammar of calls of tools.

    Args:
        tools: name, and JSON Schema of the arguments, of each.
        is_optional: any text may stand before the calls or in their place.
        is_single: at most one call.
        answer: JSON Schema of the text in place of optional calls; none then stands before them. None: any text.

    Raises:
        ConfigError: as `json_schema`.
    """
    lines, schemas = [], []
    for number, (name, schema) in enumerate(tools):
        start = _quote(CALL_START.removeprefix(CALL_MARK) + name + CALL_NAMED)
        lines.append(f"rest_{number}: {start} @tool_{number} {_quote(CALL_END)}")
        schemas.append({"name": f"tool_{number}", "json_schema": prepare_schema(schema) | {"x-guidance": _FORM}})
    more = "" if is_single else f' ("\\n" {_quote(CALL_MARK)} rest)*'
    first = f"{_quote(CALL_MARK)} rest{more}"
    if answer is not None and is_optional:
        lines.append(f"start: {first} | @answer")
        schemas.append({"name": "answer", "json_schema": prepare_schema(answer) | {"x-guidance": _FORM}})
    elif is_optional:
        # The mark ends the text as soon as it is written: a lazy lexeme matches as few bytes as possible.
        lines += ["start: text | begin rest" + more, "text: TEXT", f"begin[lazy]: TEXT {_quote(CALL_MARK)}"]
        lines.append(r"TEXT: /(.|\n)*/")
    else:
        lines.append(f"start: {first}")
    lines.append("rest: " + " | ".join(f"rest_{number}" for number in range(len(tools))))
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *schemas]})


def check_grammar(grammar: str, vocabulary: Vocabulary) -> None:
    """Compile a grammar, and follow it for a few tokens.

    Raises:
        ConfigError: it is too long or too complex, uses what is not supported, or no text fits it. Says which.
    """
    if len(grammar.encode()) > MAX_BYTES:
        raise ConfigError(f"it has {len(grammar.encode()):,} bytes: expected at most {MAX_BYTES:,}")
    matcher, end = vocabulary.start(grammar), vocabulary.end_token_id
    for _ in range(_TRIED_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & ~(1 << end) if not matcher.is_error() else 0
        if matcher.is_error():
            raise ConfigError(_explain(matcher.get_error()))
        if not mask:
            return  # the text is complete
        matcher.consume_token((mask & -mask).bit_length() - 1)  # the smallest that is allowed


def _explain(error: str) -> str:
    """Return llguidance's error in plain words where it is a known one, without its copy of the grammar."""
    if found := re.search(r"Unimplemented keys: \[(.*)\]", error):
        keys = found[1].replace('"', "")
        return f"keywords that are not supported: {keys}. Leave them out, and check what they ask for in your program"
    if found := re.search(r"Unknown format: (.*)", error):
        return f"the format {found[1].strip()!r} is not supported: expected one of {', '.join(_FORMATS)}, or a pattern"
    if found := re.search(r"Unsatisfiable schema: (.*)", error):
        return f"no text fits it ({found[1].strip()})"
    if found := re.search(r"Resource '(.*?)' is not present", error):
        return f"the reference {found[1]!r} leads outside the schema: copy what it names into $defs"
    if "oneOf constraints" in error:
        return "oneOf whose parts may both accept a value is not supported: use anyOf"
    if "look-around" in error or "lookarounds" in error:
        return (
            "look-around and word boundaries in a regular expression are not supported: write the pattern without them"
        )
    if found := re.search(r"regex parse error:.*error: ([^\n]*)", error, re.DOTALL):
        return f"a regular expression in it cannot be read ({found[1].strip()})"
    if any(word in error for word in _TOO_LARGE):
        return "it is too complex to follow: expected fewer optional properties, shorter repetitions, or no endless recursion"
    if "NoExtension" in error or not error.strip():
        return "no text fits it"
    return " ".join(error.replace("<non-verbose/>", "").split())[:_MAX_ERROR]


def _quote(text: str) -> str:
    """Return a Lark string. Its lexer takes no DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
