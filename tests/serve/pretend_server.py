"""Fake server for tests of the web page: the real page files, with answers that the test scripts. Loopback only."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from finlora.serve.http.web_page import page_router
from finlora.serve.protocol import ChatRequest, ClassifyRequest, ExtractRequest

KEY = "a-key-of-the-test"
FORMS = {"/v1/classify": ClassifyRequest, "/v1/extract": ExtractRequest}
SEVEN = (
    "strong negative",
    "moderately negative",
    "mildly negative",
    "neutral",
    "mildly positive",
    "moderately positive",
    "strong positive",
)
TASKS = [
    {"name": "fpb", "about": "none", "labels": ["negative", "neutral", "positive"], "questions": []},
    {"name": "nwgi", "about": "none", "labels": list(SEVEN), "questions": []},
    {"name": "ner", "about": "entity", "labels": ["location", "organization", "person"], "questions": []},
    {"name": "xbrl_values", "about": "question", "labels": [], "questions": []},
    {"name": "headline", "about": "question", "labels": ["Yes", "No"], "questions": ["price", "price down"]},
]
STAGES = {
    "stages": [
        {"layers": [16 * index, 16 * index + 15], "weights_gib": 4.25, "cache_gib": 0.5, "busy": busy}
        for index, busy in enumerate((0.62, 0.48))
    ],
    "queue": 3,
    "active": 5,
    "kv_used": 1536,
    "kv_total": 8192,
    "bubble": 0.12,
    "losses": 0,
    "repairs": 0,
    "recovery_s": None,
}


@dataclass
class Script:
    """Scripted answers by path, and the requests received."""

    models: list[str] = field(default_factory=lambda: ["llama-8b", "llama-8b:sentiment-r4", "llama-8b:xbrl-r4"])
    tasks: list[dict] = field(default_factory=lambda: list(TASKS))
    answers: dict[str, dict] = field(default_factory=dict)
    failures: dict[str, tuple[int, str, dict[str, str]]] = field(default_factory=dict)
    """Path -> status, message and headers of an error to answer instead."""
    pieces: list[str | None] = field(default_factory=list)
    """Pieces of a streamed answer; None: wait until `go` is set."""
    last_event: str = "data: [DONE]\n\n"
    go: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, dict]] = field(default_factory=list)
    num_polls: int = 0
    is_disconnected: threading.Event = field(default_factory=threading.Event)


def make_app(script: Script) -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())

    @app.middleware("http")
    async def guard(request: Request, call_next) -> Response:
        path = request.url.path
        script.num_polls += path == "/v1/stages"
        if path.startswith("/v1/"):
            if request.headers.get("authorization") != f"Bearer {KEY}":
                return refuse(401, "unknown key", {})
            if path in script.failures:
                return refuse(*script.failures[path])
        reply = await call_next(request)
        reply.headers["X-Request-Id"] = "req-0123456789"
        reply.headers.append("X-Request-Id", "another-of-the-proxy")
        return reply

    def refuse(status: int, message: str, headers: dict[str, str]) -> Response:
        error = {"error": {"message": message, "type": "error", "code": None}}
        return JSONResponse(error, status, headers | {"X-Request-Id": "req-0123456789"})

    @app.get("/v1/models")
    def models() -> dict:
        return {"data": [{"id": name} for name in script.models]}

    @app.get("/v1/tasks")
    def tasks() -> dict:
        return {"data": script.tasks}

    @app.get("/v1/stages")
    def stages() -> dict:
        return script.answers.get("/v1/stages", STAGES)

    @app.post("/v1/classify")
    @app.post("/v1/extract")
    async def answer(request: Request) -> dict:
        path = request.url.path
        body = await request.json()
        FORMS[path].model_validate(body)  # a body that the real server refuses fails here
        script.asked.append((path, body))
        while path not in script.answers:  # a test of the waiting state sets the answer later
            await asyncio.sleep(0.02)
        return script.answers[path]

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        ChatRequest.model_validate(body)
        script.asked.append((request.url.path, body))
        return StreamingResponse(write(), media_type="text/event-stream")

    async def write() -> AsyncIterator[str]:
        try:
            for piece in script.pieces:
                while piece is None and not script.go.is_set():
                    await asyncio.sleep(0.02)
                if piece is not None:
                    event = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
                    yield f"data: {json.dumps(event)}\n\n"
            yield script.last_event
        except asyncio.CancelledError:
            script.is_disconnected.set()
            raise

    return app


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Serve the page and the script inside the `with` block; yield the address."""
    config = uvicorn.Config(
        make_app(script), host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.02)
        (socket,) = server.servers[0].sockets
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        script.go.set()
        server.should_exit = True
        thread.join(timeout=20)


def labels(probabilities: dict[str, float], *, abstained: bool = False) -> dict:
    """Return the reply of `/v1/classify` to one text."""
    best = max(probabilities, key=probabilities.get)
    return {
        "results": [
            {"label": None if abstained else best, "probabilities": probabilities, "abstained": abstained},
        ]
    }
