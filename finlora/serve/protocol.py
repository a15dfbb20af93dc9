"""What goes over the wire: OpenAI's completions, chat and models, and the financial questions beside them.

A field that is not known, or asks for what the engine cannot do, is refused by name: nothing that a client asks for is left
out in silence. Texts come in UTF-8; bounds that depend on the model are checked where it is known.

Source: OpenAI API reference, https://platform.openai.com/docs/api-reference (chat, completions, models, errors).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MAX_STOPS = 16
_MAX_FIELDS = 64
_Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]
_StopTexts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=_MAX_STOPS)]


class _Wire(BaseModel):
    """One object of a body. Lists stop at their first fault, and objects of too many fields at once: each fault takes a
    thousand times the bytes that caused it.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > _MAX_FIELDS:
            raise ValueError(f"found {len(values):,} fields: expected some of {', '.join(cls.model_fields)}")
        return values


class _Body(_Wire):
    """A whole body, of which every text must be one: JSON can hold halves of characters, which nothing here can encode."""

    @model_validator(mode="before")
    @classmethod
    def _check_texts_are_unicode(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values  # bytes of another content type; what follows refuses them
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("a text in it is not Unicode: half of a surrogate pair stands alone") from None
        return values


class StreamOptions(_Wire):
    include_usage: bool = Field(False, description="Send the usage in a last event of its own.")


class GenerationRequest(_Body):
    """What both kinds of completion have in common."""

    model: str = Field(description="`base` for the base alone, `base:adapter`, or `base:adapter@v2` for one version.")
    max_tokens: int | None = Field(None, ge=1, description="Most new tokens. Left out: the server's default.")
    temperature: float | None = Field(0.0, ge=0, le=2, description="0, the default: the likeliest token each time.")
    top_p: float | None = Field(
        1.0, gt=0, le=1, description="Draw among the likeliest tokens of this total probability."
    )
    stop: str | _StopTexts | None = Field(None, description="Texts that end the answer and are left out of it.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Equal seeds draw equal tokens.")
    stream: bool = Field(False, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = Field(1, description="Only 1 is offered: send the request again for another answer.")
    user: str | None = Field(None, description="Taken and not used: the key says who asks.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(0.0, description="Only 0 is offered.")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(0.0, description="Only 0 is offered.")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _check_stop(self) -> GenerationRequest:
        if self.stop == "":
            raise ValueError("stop is empty: expected a text of at least one character")
        return self


class TextPart(_Wire):
    type: Literal["text"]
    text: str


class Message(_Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)]
    name: str | None = Field(None, description="Taken and not used.")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(
        fail_fast=True, min_length=1, description="A base served without turns takes one user message."
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens, which it goes before.")
    logprobs: bool | None = Field(
        False, description="Give each token's log-probability; in a stream, each event those of its tokens."
    )
    top_logprobs: Literal[0] | None = Field(None, description="Only 0: other tokens' probabilities are not offered.")


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: str | _Texts | Annotated[list[int], Field(fail_fast=True, min_length=1)] = Field(
        description="A text, several texts (without stream), or token ids."
    )
    logprobs: Literal[0] | None = Field(None, description="0: give each token's log-probability, and no others'.")
    echo: Literal[False] | None = Field(False, description="Only false.")
    best_of: Literal[1] | None = Field(1, description="Only 1.")


class ClassifyRequest(_Body):
    """Body of `POST /v1/classify`."""

    model: str = Field(description="As in `/v1/models`.")
    task: str = Field(description="A task of `/v1/tasks` that has labels.")
    text: str | None = Field(None, description="One text; or give `texts`.")
    texts: _Texts | None = Field(None, description="Several texts, answered in one go.")
    about: str | Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="What the task asks about the text: an entity or a question; one for all texts, or one each."
    )
    threshold: float = Field(0.0, ge=0, le=1, description="Abstain where the likeliest label has less probability.")

    @model_validator(mode="after")
    def _check_texts(self) -> ClassifyRequest:
        if (self.text is None) == (self.texts is None):
            raise ValueError("expected either text or texts")
        if isinstance(self.about, list) and len(self.about) != len(self.all_texts):
            raise ValueError(
                f"about holds {len(self.about)} entries for {len(self.all_texts)} texts: expected one each"
            )
        return self

    @property
    def all_texts(self) -> list[str]:
        return self.texts if self.texts is not None else [self.text or ""]

    @property
    def all_abouts(self) -> list[str | None]:
        return list(self.about) if isinstance(self.about, list) else [self.about] * len(self.all_texts)


class ExtractRequest(_Body):
    """Body of `POST /v1/extract`."""

    model: str = Field(description="As in `/v1/models`.")
    task: Literal["xbrl_tags", "xbrl_values"]
    context: str = Field(description="XBRL fragment or other text in which the answer stands.")
    question: str = Field(description="What is looked for in it.")
    max_tokens: int | None = Field(None, ge=1, description="Most new tokens. Left out: enough for a tag or a number.")


class VersionRequest(_Body):
    """Body of `POST /v1/adapters/{name}/version`."""

    version: str | None = Field(description="Version to serve from now on, as `v1`; null: the newest.")


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class LabelResult(BaseModel):
    label: str | None = Field(description="The likeliest label; null where the server abstained.")
    probabilities: dict[str, float] = Field(description="Label -> probability, normalised over all, likeliest first.")
    abstained: bool


class ClassifyResponse(BaseModel):
    id: str
    model: str
    task: str
    results: list[LabelResult] = Field(description="In the order of the texts.")
    usage: Usage


class Quote(BaseModel):
    start: int = Field(description="First character (Unicode code point) in the context.")
    end: int = Field(description="The character behind the last.")


class ExtractResponse(BaseModel):
    id: str
    model: str
    task: str
    answer: str
    quote: Quote | None = Field(description="Where the answer stands in the context; null: nowhere.")
    grounded: bool = Field(description="Whether the answer stands in the context.")
    finish_reason: Literal["stop", "length"]
    usage: Usage


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody
