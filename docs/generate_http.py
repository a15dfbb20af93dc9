"""The page of HTTP endpoints, from the OpenAPI description that the server gives at `/openapi.json` itself."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from generate import clean, code, page, table

_SENT = (
    *(
        "Message",
        "TextPart",
        "SentCall",
        "SentFunction",
        "StreamOptions",
        "ResponseFormat",
        "SchemaFormat",
        "StructuredOutputs",
    ),
    *("Tool", "Function", "NamedTool", "FunctionName"),
)
"""Parts of requests, whose tables name defaults."""
_EXAMPLES = {
    "/v1/classify": '{"model": "llama-8b:sentiment", "task": "fpb", "texts": ["Profit rose 12 %"], "threshold": 0.6}',
    "/v1/extract": '{"model": "llama-8b", "task": "xbrl_values", "context": "<us-gaap:Revenues>48210000</us-gaap:Revenues>", '
    '"question": "What is the value of Revenues?"}',
    "/v1/chat/completions": '{"model": "llama-8b", "messages": [{"role": "user", "content": "What is a basis point?"}], '
    '"max_tokens": 16}',
    "/v1/completions": '{"model": "llama-8b", "prompt": "A basis point is", "max_tokens": 16}',
    "/v1/responses": '{"model": "llama-8b", "input": "What is a basis point?", "max_output_tokens": 16}',
    "/tokenize": '{"model": "llama-8b", "prompt": "A basis point is"}',
    "/detokenize": '{"model": "llama-8b", "tokens": [32, 15032]}',
    "/v1/adapters/{name}/version": '{"version": "v1"}',
}


def make_http() -> str:
    """Return the page: each endpoint with its request, reply and errors, then the objects that they name."""
    from finlora.serve.http.asgi import make_app
    from finlora.serve.http.web_page import page_router

    server = SimpleNamespace(
        keys=None,
        config=SimpleNamespace(limits=SimpleNamespace(max_body_bytes=1), allowed_origins=()),
        meter=SimpleNamespace(count_request=None),
    )
    app = make_app(cast(Any, server), has_proxy=True)._app  # type: ignore[attr-defined]
    described = app.openapi()
    schemas = described["components"]["schemas"]
    calls = [(path, method, call) for path, calls in described["paths"].items() for method, call in calls.items()]
    parts = [
        "A running server describes itself at `/openapi.json`; this page says the same. Every endpoint but `/healthz`, "
        "`/health`, `/ping`, `/docs` and the web page needs a key: `Authorization: Bearer KEY`. Bodies are JSON; an unknown "
        "field is refused. Each reply carries an `X-Request-Id`, which the server's log and audit log name too. Send your own "
        "(1 to 64 letters, digits, `.`, `_`, `-`) and the server keeps it. Error bodies and codes: "
        "[Errors](errors.md#http-errors).",
        table(
            ("endpoint", "what it does"),
            (
                (f"[`{method.upper()} {path}`](#{_anchor(method, path)})", clean(call["summary"]))
                for path, method, call in calls
            ),
        ),
    ]
    objects: list[str] = []
    for path, method, call in calls:
        parts += [f"## {method.upper()} {path}", clean(call["description"])]
        parts += _parameters(call)
        if body := call.get("requestBody"):
            parts += ["Request:", _fields(schemas, body, objects)]
        if path in _EXAMPLES:
            parts += [f"    {_EXAMPLES[path]}"]
        reply = call["responses"]["200"]
        if "text/plain" in reply.get("content", ()):
            parts += ["Reply (200): text."]
        else:
            has_body = bool(reply["content"]["application/json"]["schema"]) if "content" in reply else False
            parts += ["Reply (200):", _fields(schemas, reply, objects) if has_body else "No body."]
        errors = sorted(status for status in call["responses"] if status.isdigit() and status != "200")
        parts += ["Errors: " + (", ".join(errors) if errors else "none") + "."]
    parts += ["## Objects"]
    for name in objects:  # grows while objects name others
        parts += [f"### {name}", _rows(schemas, schemas[name], objects)]
    files = sorted({route.path for route in page_router().routes})
    parts += [
        "## Web page",
        "Static files without a key: "
        + ", ".join(map(code, files))
        + ". They hold no data; the page asks the endpoints above with "
        "the key that the user types.",
    ]
    return page("HTTP API", *parts)


def _anchor(method: str, path: str) -> str:
    return f"{method}-{''.join(sign for sign in path if sign.isalnum() or sign in '_-')}"


def _parameters(call: Any) -> list[str]:
    names = [parameter["name"] for parameter in call.get("parameters", ())]
    return [f"In the path: {', '.join(map(code, names))}."] if names else []


def _fields(schemas: Any, body: Any, objects: list[str]) -> str:
    schema = body["content"]["application/json"]["schema"]
    if "$ref" in schema:
        return _rows(schemas, schemas[_name(schema)], objects)
    return f"A JSON object: {_kind(schema, objects)}."


def _rows(schemas: Any, schema: Any, objects: list[str]) -> str:
    required = schema.get("required", ())
    rows = []
    for name, field in schema["properties"].items():
        if "description" not in field and "const" not in field:
            raise LookupError(f"{schema['title']}.{name} has no description")
        default = "required" if name in required else code(_plain(field.get("default")))
        text = field.get("description", f"Always {code(_plain(field.get('const')))}.")
        rows.append((code(name), _kind(field, objects), default, clean(text)))
    if schema["title"].endswith("Request") or schema["title"] in _SENT:
        return table(("field", "type", "default", "meaning"), rows)
    return table(("field", "type", "meaning"), ((name, kind, text) for name, kind, _, text in rows))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(schema: Any) -> str:
    return str(schema["$ref"].rpartition("/")[2])


def _kind(schema: Any, objects: list[str]) -> str:
    """Return a JSON schema's type in words; collects objects that it names, for their own tables."""
    if "$ref" in schema:
        name = _name(schema)
        if name not in objects:
            objects.append(name)
        return f"[{name}](#{name.lower()})"
    if parts := schema.get("anyOf"):
        return " or ".join(_kind(part, objects) for part in parts)
    if "const" in schema:
        return code(_plain(schema["const"]))
    if "enum" in schema:
        return " or ".join(code(_plain(value)) for value in schema["enum"])
    if schema.get("type") == "array":
        items = schema.get("prefixItems")
        if items:
            return f"list of {len(items)} integers"
        inner = _kind(schema["items"], objects)
        return f"list of {inner}s" if inner in ("text", "integer", "number") else f"list of {inner}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"name -> {_kind(inner, objects)}" if isinstance(inner, dict) else "object"
    return {"string": "text", "boolean": "true or false"}.get(schema.get("type", "any"), schema.get("type", "any"))
