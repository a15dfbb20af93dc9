"""Faults of a request body as one refusal in OpenAI's words, without the values found, which may be confidential."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError

from finlora.serve.failures import RefusedError

BODY_CODES = (
    *("invalid_json", "invalid_content_type", "missing_required_parameter", "unknown_parameter", "unsupported_value"),
    *("invalid_type", "invalid_value"),
)
"""Error codes of bodies that are not what an endpoint expects."""
_SENTENCES = ("wish", "part")
"""Faults whose message is a whole sentence (finlora/serve/neutral_fields.py, conversation.py)."""
_MAX_FAULTS, _MAX_NAME = 20, 100  # a body may hold a million fields with names of any length


def invalid_body(error: RequestValidationError, content_type: str) -> RefusedError:
    """Return the refusal of a body, which names all its faults.

    Args:
        content_type: of the request; empty: it has none.
    """
    found = error.errors()
    first = found[0]
    whole = tuple(first["loc"]) == ("body",)
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "it is not JSON")
        at = first["loc"][-1]
        where = f" at character {at}" if isinstance(at, int) else ""
        return RefusedError(400, f"We could not parse the JSON body of your request: {why}{where}.", "invalid_json")
    if whole and first["type"] == "missing":
        return RefusedError(
            400,
            "We could not parse the JSON body of your request: it is empty. Send a JSON object with the header "
            "`Content-Type: application/json`.",
            "invalid_json",
        )
    if whole and first["type"].endswith("_type"):
        if not _is_json(content_type):
            found_type = repr(content_type[:_MAX_NAME]) if content_type else "none"
            return RefusedError(
                400,
                f"found the content type {found_type}: send a JSON object with the header `Content-Type: application/json`.",
                "invalid_content_type",
            )
        return RefusedError(400, "the body is not a JSON object: expected one, such as {...}.", "invalid_type")
    if wishes := [fault for fault in found if fault["type"] in _SENTENCES]:
        wish = wishes[0]  # in one plain sentence, without what follows from it
        return RefusedError(
            400, str(wish["msg"]), "unsupported_value", str(wish.get("ctx", {}).get("param", "")) or None
        )
    faults = [_describe(fault) for fault in found[:_MAX_FAULTS]]
    if len(found) > _MAX_FAULTS:
        faults.append(f"And {len(found) - _MAX_FAULTS:,} more faults.")
    param = str(first["loc"][1])[:_MAX_NAME] if len(first["loc"]) > 1 else None
    return RefusedError(400, " ".join(dict.fromkeys(faults)), _code_of(first["type"]), param)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _describe(fault: Any) -> str:
    field = ".".join(str(part)[:_MAX_NAME] for part in fault["loc"] if part != "body")
    kind, text = fault["type"], str(fault["msg"]).removeprefix("Value error, ")
    text = f"{text[:1].lower()}{text[1:]}".rstrip(".")
    if kind == "missing":
        return f"Missing required parameter: '{field}'."
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{field}'."
    if not field:
        return f"{text}."
    return f"Invalid {'type' if _code_of(kind) == 'invalid_type' else 'value'} for '{field}': {text}."


def _code_of(kind: str) -> str:
    codes = {
        "missing": "missing_required_parameter",
        "extra_forbidden": "unknown_parameter",
        "not_offered": "unsupported_value",
    }
    return codes.get(kind) or ("invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value")
