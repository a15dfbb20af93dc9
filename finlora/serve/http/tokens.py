"""Paths that clients of vLLM know: tokens of a text or a conversation, liveness, version; and what is not offered.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from finlora.data.encode import encode_prompt
from finlora.data.sets.prepare import code_version
from finlora.serve.failures import RefusedError
from finlora.serve.http.completions import encode_messages, encode_plain
from finlora.serve.http.context import errors_of, open_call, server_of
from finlora.serve.http.tool_calls import describe_tools
from finlora.serve.protocol import DetokenizeRequest, TokenizeRequest

router = APIRouter()
_ERRORS = errors_of(400, 401, 404, 413, 422, 429, 500, 503)


class Tokens(BaseModel):
    count: int = Field(description="Number of tokens.")
    max_model_len: int = Field(description="Most tokens of prompt and answer together.")
    tokens: list[int] = Field(description="Their ids.")
    token_strs: list[str] | None = Field(None, description="Their texts, with `return_token_strs`.")


class Text(BaseModel):
    prompt: str = Field(description="Text of the tokens.")


class Version(BaseModel):
    version: str = Field(description="Version of FinLoRA.")


@router.post("/tokenize", tags=["OpenAI"], summary="Count the tokens of a text or a conversation", responses=_ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
    """Return the tokens as `/v1/completions` (`prompt`) or `/v1/chat/completions` (`messages`) would count them."""
    server = server_of(request)
    call = await open_call(request, body.model or server.config.name)
    base = server.base
    if body.messages is not None:
        tools = body.offered_tools
        messages = describe_tools(tools, body.messages) if tools else body.messages
        ids = encode_messages(messages, base, server.date_of(call))
    elif body.add_special_tokens:
        ids = encode_prompt(body.prompt or "", base.tokenizer, "raw")
    else:
        ids = encode_plain(body.prompt or "", base)
    texts = [str(base.tokenizer.decode([token])) for token in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=base.max_tokens, tokens=list(ids), token_strs=texts)


@router.post("/detokenize", tags=["OpenAI"], summary="Write tokens as text", responses=_ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Text:
    """Return the text of token ids, special tokens included."""
    server = server_of(request)
    await open_call(request, body.model or server.config.name)
    size = len(server.base.tokenizer)
    if not all(0 <= token < size for token in body.tokens):
        raise RefusedError(400, f"tokens holds ids outside 0 to {size - 1:,}.", "invalid_value", "tokens")
    return Text(prompt=str(server.base.tokenizer.decode(body.tokens)))


@router.get("/health", tags=["Health"], summary="Say that the server runs", responses=errors_of(503))
async def health(request: Request) -> Response:
    """Answer 200 without a body while all stages run, 503 while one is down. Needs no key."""
    server_of(request).engine.require_ready()
    return Response()


@router.get("/ping", tags=["Health"], summary="Say that the server runs", responses=errors_of(503))
async def ping(request: Request) -> Response:
    """Same as `/health`."""
    return await health(request)


@router.post("/ping", tags=["Health"], summary="Say that the server runs", responses=errors_of(503))
async def ping_by_post(request: Request) -> Response:
    """Same as `/health`."""
    return await health(request)


@router.get("/version", tags=["Health"], summary="Show the version", responses=errors_of(401, 500, 503))
async def version() -> Version:
    """Return the version of FinLoRA."""
    return Version(version=code_version())


_NOT_OFFERED = {
    "/v1/embeddings": "embeddings are not offered: this model writes and labels texts. Use `/v1/classify` for labels.",
    "/v1/moderations": "moderations are not offered: use `/v1/classify` with a task of your own.",
    "/v1/audio/speech": "speech is not offered: this model writes texts only.",
    "/v1/audio/transcriptions": "transcriptions are not offered: this model reads texts only.",
    "/v1/images/generations": "images are not offered: this model writes texts only.",
    "/v1/batches": "batches are not offered: `finlora score` labels a whole table.",
    "/v1/files": "files are not offered: send the text in the request.",
    "/v1/responses/{id}": "stored responses are not offered: this server keeps no answers, so send the whole conversation.",
}


def _add_refusal(path: str, words: str) -> None:
    async def refuse() -> None:
        raise RefusedError(404, words, "not_offered")

    router.add_api_route(path, refuse, methods=["GET", "POST", "DELETE"], include_in_schema=False)


for _path, _words in _NOT_OFFERED.items():
    _add_refusal(_path, _words)
