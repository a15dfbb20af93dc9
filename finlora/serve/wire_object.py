"""Request bodies and the objects in them: an unknown field is refused, and too many fields are refused as a whole.

The report of a fault takes a thousand times the bytes that caused it. So a list stops at its first fault too (`fail_fast`).
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_MAX_FIELDS = 64


class WireObject(BaseModel):
    """Object of a body.

    Raises:
        ValidationError: a field is unknown, a number is not finite, or there are more than 64 fields: that is one fault.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > _MAX_FIELDS:
            raise ValueError(f"found {len(values):,} fields: expected some of {', '.join(cls.model_fields)}")
        return values


class WireBody(WireObject):
    """Whole body. Every text must be Unicode: JSON can hold half a surrogate pair, which cannot be encoded."""

    @model_validator(mode="before")
    @classmethod
    def _check_texts_are_unicode(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values  # bytes of another content type: pydantic refuses them next
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("a text in it is not Unicode: it holds half of a surrogate pair") from None
        return values
