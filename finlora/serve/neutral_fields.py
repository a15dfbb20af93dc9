"""Fields that clients send though they ask for nothing: such a value is absent, another one is refused in one sentence.

Source: https://platform.openai.com/docs/api-reference/chat/create and
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html (extra parameters).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError


class _Wish(NamedTuple):
    is_neutral: Callable[[Any], bool]
    instead: str
    """What to do in place of another value."""


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda found: any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in values)


_LEAVE = "leave it out"
_ANY = _Wish(lambda _found: True, "")
_WISHES: dict[str, _Wish] = {
    # Labels of the caller's own books. Nothing here depends on them.
    "metadata": _Wish(lambda found: isinstance(found, dict), "send an object, or leave it out"),
    **dict.fromkeys(("safety_identifier", "prompt_cache_key", "request_id"), _ANY),
    "prompt_cache_retention": _Wish(_is("in_memory", "in-memory"), "the prefix cache needs no setting: leave it out"),
    "store": _Wish(_is(False), "this server stores no answers: leave it out, and keep the answer yourself"),
    "background": _Wish(_is(False), "this server answers at once: leave it out"),
    "service_tier": _Wish(_is("auto", "default"), "this server has one tier: leave it out"),
    "modalities": _Wish(_is(["text"]), "this model writes texts only: leave it out"),
    "audio": _Wish(_is({}), "this model writes texts only: leave it out"),
    "prediction": _Wish(_is({}), "predicted outputs are not offered: leave it out"),
    "verbosity": _Wish(_is("medium"), "say in a message how long the answer should be"),
    "reasoning_effort": _Wish(_is("none"), "this server's prompts have thinking off: leave it out"),
    "include_reasoning": _Wish(_is(True, False), _LEAVE),
    "web_search_options": _Wish(_is({}), "this server searches no web: leave it out"),
    "functions": _Wish(_is([]), "send `tools`, which replaced it"),
    "function_call": _Wish(_is("none", "auto", {}), "send `tool_choice`, which replaced it"),
    # Sampling.
    "typical_p": _Wish(_is(1), "use `top_p`"),
    "repetition_penalty": _Wish(_is(1), _LEAVE),
    "length_penalty": _Wish(_is(1), _LEAVE),
    "use_beam_search": _Wish(_is(False), "use temperature 0 for the most probable text"),
    "stop_token_ids": _Wish(_is([]), "use `stop` with texts"),
    "bad_words": _Wish(_is([]), "use `structured_outputs` with `regex` to limit the answer"),
    "allowed_token_ids": _Wish(_is([]), "use `structured_outputs` with `choice` to limit the answer"),
    "include_stop_str_in_output": _Wish(_is(False), "add the stop text to the answer yourself"),
    "skip_special_tokens": _Wish(_is(True), _LEAVE),
    "spaces_between_special_tokens": _Wish(_is(True), _LEAVE),
    "detokenize": _Wish(_is(True), _LEAVE),
    "truncate_prompt_tokens": _Wish(_is(-1), "cut the prompt yourself, `/tokenize` counts its tokens"),
    "prompt_logprobs": _Wish(_is(0, False), _LEAVE),
    "priority": _Wish(_is(0), "this server takes requests of all keys in turn: leave it out"),
    "return_token_ids": _Wish(_is(False), "use `/tokenize` on the answer"),
    "return_tokens_as_token_ids": _Wish(_is(False), "use `/tokenize` on the answer"),
    "add_generation_prompt": _Wish(_is(True), _LEAVE),
    "continue_final_message": _Wish(_is(False), "use `/v1/completions` to continue a text"),
    "chat_template_kwargs": _Wish(_is({}), "the prompt is rendered as in the training: leave it out"),
    "chat_template": _Wish(_is(""), "the prompt is rendered as in the training: leave it out"),
    "documents": _Wish(_is([]), "put the texts into a message"),
    "mm_processor_kwargs": _Wish(_is({}), "this model reads texts only: leave it out"),
    "suffix": _Wish(_is(""), "put the text that follows into the prompt"),
    # Chat's fields, sent to completions by clients that share one set of parameters.
    "tools": _Wish(_is([]), "use `/v1/chat/completions`"),
    "tool_choice": _Wish(_is("none", "auto"), "use `/v1/chat/completions`"),
    "parallel_tool_calls": _Wish(_is(True, False), "use `/v1/chat/completions`"),
}


class NeutralFields(BaseModel):
    """Body whose nulls and neutral values are absent. A field that the body declares itself keeps its own rules."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if value is None:
                continue
            wish = None if name in cls.model_fields else _WISHES.get(name)
            if wish is None:
                kept[name] = value
            elif not wish.is_neutral(value):
                raise PydanticCustomError(
                    "wish",
                    "{param} is not offered with this value: {instead}.",
                    {"param": name, "instead": wish.instead},
                )
        return kept
