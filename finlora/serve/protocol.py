"""Request and reply bodies: OpenAI's completions, chat and models, and the financial endpoints beside them.

An unknown field, or one that asks for what the engine cannot do, is refused by name and never ignored. What asks for nothing is
absent (neutral_fields.py). Bounds that depend on the model are checked later, in finlora/serve/http.

Source: OpenAI API reference, https://platform.openai.com/docs/api-reference (chat, completions, models, errors).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from finlora.serve.conversation import Message
from finlora.serve.neutral_fields import NeutralFields
from finlora.serve.sampling_fields import MAX_TOP, BestOfField, SamplingFields
from finlora.serve.structured_fields import StructuredFields, ToolFields
from finlora.serve.wire_object import WireBody, WireObject

_MAX_STOPS = 16
_Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]
_StopTexts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=_MAX_STOPS)]


class StreamOptions(WireObject):
    include_usage: bool | None = Field(False, description="Send the usage as a last event.")
    include_obfuscation: Literal[False] | None = Field(False, description="Only false: events have no padding.")
    continuous_usage_stats: Literal[False] | None = Field(False, description="Only false.")


class GenerationRequest(WireBody, StructuredFields, SamplingFields, NeutralFields):
    """Fields that chat and text completions share."""

    model: str = Field(
        description="A name of `/v1/models`: the base, `base:adapter`, or `base:adapter@v2` for one version of an adapter."
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Most new tokens. Default: `limits.default_new_tokens` of the server."
    )
    temperature: float | None = Field(0.0, ge=0, le=2, description="0: always the most probable token.")
    top_p: float | None = Field(
        1.0, gt=0, le=1, description="Sample among the most probable tokens that together have this probability."
    )
    stop: str | _StopTexts | None = Field(
        None, description="Texts that end the answer. The answer does not contain them."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed samples the same tokens.")
    stream: bool = Field(False, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    user: str | None = Field(None, description="Ignored: the key says who asks.")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _check_stop(self) -> GenerationRequest:
        if self.stop == "":
            raise ValueError("stop is empty: expected a text of at least one character")
        return self


class ChatRequest(GenerationRequest, ToolFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(
        fail_fast=True,
        min_length=1,
        description="The conversation. A base served with model.template=raw takes one user message, after system messages.",
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens, and wins over it.")
    logprobs: bool | None = Field(
        False,
        description="Return the log-probability of each token. In a stream, each event holds those of its tokens.",
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP,
        description="Most probable tokens that are returned with each token. Only with `logprobs`.",
    )

    @property
    def num_top(self) -> int:
        """Most probable tokens that are returned with each token."""
        return self.top_logprobs or 0

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        return self


class CompletionRequest(GenerationRequest, BestOfField):
    """Body of `POST /v1/completions`."""

    prompt: str | _Texts | Annotated[list[int], Field(fail_fast=True, min_length=1)] = Field(
        description="A text, several texts, or token ids."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP,
        description="Return the log-probability of each token of the answer, and of so many most probable ones there.",
    )
    echo: Literal[False] | None = Field(False, description="Only false.")

    @property
    def num_top(self) -> int:
        """Most probable tokens that are returned with each token."""
        return self.logprobs or 0


class TokenizeRequest(WireBody, ToolFields, NeutralFields):
    """Body of `POST /tokenize`."""

    model: str | None = Field(None, description="A name of `/v1/models`. Default: the base.")
    prompt: str | None = Field(None, description="A text. Give either `prompt` or `messages`.")
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = Field(
        None, description="A conversation."
    )
    add_special_tokens: bool = Field(True, description="Of a text: with the BOS that the model expects, if it has one.")
    return_token_strs: bool = Field(False, description="Return the text of each token too.")

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(WireBody):
    """Body of `POST /detokenize`."""

    model: str | None = Field(None, description="A name of `/v1/models`. Default: the base.")
    tokens: list[int] = Field(fail_fast=True, description="Token ids.")


class ClassifyRequest(WireBody):
    """Body of `POST /v1/classify`."""

    model: str = Field(description="A name of `/v1/models`.")
    task: str = Field(description="A task of `/v1/tasks` with labels.")
    text: str | None = Field(None, description="One text. Give either `text` or `texts`.")
    texts: _Texts | None = Field(None, description="Several texts.")
    about: str | Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None,
        description="What the task asks about the text, an entity or a question: one for all texts, or a list with one for each.",
    )
    threshold: float = Field(
        0.0, ge=0, le=1, description="Return no label where the most probable one has less than this."
    )

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


class ExtractRequest(WireBody):
    """Body of `POST /v1/extract`."""

    model: str = Field(description="A name of `/v1/models`.")
    task: str = Field(description="A task of `/v1/tasks` without labels, such as one that looks for a reported number.")
    context: str = Field(description="XBRL excerpt or other text that holds the answer.")
    question: str = Field("", description="What to look for in it, where the task asks that (`about` of `/v1/tasks`).")
    max_tokens: int | None = Field(
        None, ge=1, description="Most new tokens. Default: `limits.default_extract_tokens` of the server."
    )


class VersionRequest(WireBody):
    """Body of `POST /v1/adapters/{name}/version`."""

    version: str | None = Field(description="Version to serve from now on, such as `v1`. null: the newest.")


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens that were in the prefix cache.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens of all prompts.")
    completion_tokens: int = Field(description="New tokens of all answers.")
    total_tokens: int = Field(description="Both together.")
    prompt_tokens_details: CachedTokens = Field(description="How many of the prompt tokens were cached.")


class LabelResult(BaseModel):
    label: str | None = Field(description="The most probable label; null below the threshold.")
    probabilities: dict[str, float] = Field(
        description="Label -> probability. They add up to 1; the most probable comes first."
    )
    abstained: bool = Field(description="Whether no label reached the threshold.")


class ClassifyResponse(BaseModel):
    id: str = Field(description="Id of the request, as in `X-Request-Id`.")
    model: str = Field(description="As asked for.")
    task: str = Field(description="As asked for.")
    results: list[LabelResult] = Field(description="One for each text, in their order.")
    usage: Usage = Field(description="Tokens of the request.")


class Quote(BaseModel):
    start: int = Field(description="First character of the quote, counted in Unicode code points from 0.")
    end: int = Field(description="Character after the last.")


class ExtractResponse(BaseModel):
    id: str = Field(description="Id of the request, as in `X-Request-Id`.")
    model: str = Field(description="As asked for.")
    task: str = Field(description="As asked for.")
    answer: str = Field(description="The tag or number.")
    quote: Quote | None = Field(description="Position of the answer in the context; null where it is not there.")
    grounded: bool = Field(description="Whether the answer is in the context.")
    finish_reason: Literal["stop", "length"] = Field(description="`length`: cut off at max_tokens.")
    usage: Usage = Field(description="Tokens of the request.")


class CalledFunction(BaseModel):
    name: str = Field(description="One of the request's `tools`.")
    arguments: str = Field(description="JSON that fits the tool's `parameters`, unless the answer was cut off.")


class ToolCall(BaseModel):
    id: str = Field(description="Id of the call.")
    type: Literal["function"] = Field(description="Always `function`.")
    function: CalledFunction = Field(description="What to call.")


class ChatMessage(BaseModel):
    role: Literal["assistant"] = Field(description="The model.")
    content: str | None = Field(description="The answer; null where it is tool calls alone.")
    refusal: None = Field(description="Always null.")
    tool_calls: list[ToolCall] | None = Field(
        None, description="Calls of the request's `tools`; absent without a call."
    )


class TopLogprob(BaseModel):
    token: str = Field(description="Text of the token.")
    logprob: float = Field(description="As of the answer's token.")
    bytes: list[int] | None = Field(description="As of the answer's token.")


class TokenLogprob(BaseModel):
    token: str = Field(description="Text of the token.")
    logprob: float = Field(description="Its natural logarithm of probability, before grammar, temperature and top_p.")
    bytes: list[int] | None = Field(description="The text in UTF-8; null for a part of a character.")
    top_logprobs: list[TopLogprob] = Field(description="The most probable tokens there, as many as were asked for.")


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] = Field(description="One for each token of the answer.")
    refusal: None = Field(description="Always null.")


class ChatChoice(BaseModel):
    index: int = Field(description="Number of the answer, from 0.")
    message: ChatMessage = Field(description="The answer.")
    finish_reason: Literal["stop", "length", "tool_calls"] = Field(
        description="`length`: cut off at max_tokens. `tool_calls`: the answer calls tools that it chose itself."
    )
    logprobs: ChatLogprobs | None = Field(description="null unless the request asks for them.")


class ChatResponse(BaseModel):
    """Reply of `POST /v1/chat/completions` without `stream`."""

    id: str = Field(description="`chatcmpl-` and the request id.")
    object: Literal["chat.completion"] = Field(description="In a stream `chat.completion.chunk`.")
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="As asked for.")
    choices: list[ChatChoice] = Field(description="One for each of the `n` answers.")
    usage: Usage = Field(description="Tokens of the request.")


class CompletionLogprobs(BaseModel):
    tokens: list[str] = Field(description="Text of each token.")
    token_logprobs: list[float] = Field(
        description="Natural logarithm of its probability, before grammar, temperature and top_p."
    )
    top_logprobs: list[dict[str, float]] | None = Field(
        description="Text -> log-probability of the most probable tokens at each token; null with `logprobs` 0."
    )
    text_offset: list[int] = Field(description="Character of the answer at which the token begins.")


class CompletionChoice(BaseModel):
    index: int = Field(description="Number of the prompt times `n`, plus that of the answer, from 0.")
    text: str = Field(description="The continuation.")
    finish_reason: Literal["stop", "length"] = Field(description="`length`: cut off at max_tokens.")
    logprobs: CompletionLogprobs | None = Field(description="null unless the request asks for them.")


class CompletionResponse(BaseModel):
    """Reply of `POST /v1/completions` without `stream`."""

    id: str = Field(description="`cmpl-` and the request id.")
    object: Literal["text_completion"] = Field(description="The same in a stream.")
    created: int = Field(description="Unix seconds.")
    model: str = Field(description="As asked for.")
    choices: list[CompletionChoice] = Field(description="`n` for each prompt, in their order.")
    usage: Usage = Field(description="Tokens of the request.")


class ErrorBody(BaseModel):
    message: str = Field(description="What was found, what was expected, what to do.")
    type: str = Field(description="OpenAI's word for the kind of error.")
    param: str | None = Field(None, description="Field of the request that is wrong.")
    code: str | None = Field(None, description="Word for programs.")


class ErrorResponse(BaseModel):
    error: ErrorBody = Field(description="What went wrong.")
