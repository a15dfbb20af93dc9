"""Model, adapter and health endpoints: models, adapters with their versions, stages, liveness and readiness."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from finlora.serve.failures import RefusedError
from finlora.serve.http.context import LOOKING_ERRORS, errors_of, key_of, server_of
from finlora.serve.protocol import VersionRequest

router = APIRouter()
_STARTED = int(time.time())
_METRICS_S = 10.0


class ModelFacts(BaseModel):
    id: str = Field(description="Name to give as `model`.")
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in Unix seconds.")
    owned_by: Literal["finlora"] = "finlora"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelFacts] = Field(description="The models.")


class AdapterFacts(BaseModel):
    name: str = Field(description="Name of its folder. `base:name` is its model.")
    versions: list[str] = Field(description="Names of its versions; empty where the folder is the adapter itself.")
    unapproved: list[str] = Field(
        [], description="Versions that are not served because they lack an approval. Only with `require_approval`."
    )
    refused: str = Field("", description="Why it cannot be served. Only then, and without the fields below.")
    current: str | None = Field(
        None, description="Version that is served; null where the folder is the adapter itself."
    )
    hash: str = Field("", description="Hash of its weights.")
    bits: int | None = Field(0, description="Bits of the base that it was trained on; null: unknown.")
    rank: int = Field(0, description="Its LoRA rank.")
    template_date: str | None = Field(None, description="Date that its chat template writes; null: none.")
    tasks: list[str] = Field([], description="Tasks that it was trained on.")
    unknown: list[str] = Field(
        [], description="What is unknown of it, where another program trained it (`finlora adopt`)."
    )
    doubt: str = Field(
        "", description="Why its answers are not shown to be those of its training (`finlora parity`); empty: they are."
    )
    loaded: bool = Field(False, description="Whether it is in memory now.")


class AdapterList(BaseModel):
    data: list[AdapterFacts] = Field(description="The adapters that the key may use.")


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class StageState(BaseModel):
    layers: tuple[int, int] = Field(description="Its first and last decoder layer.")
    weights_gib: float = Field(description="Weights of its layers, in GiB.")
    cache_gib: float = Field(description="Its part of the KV cache, in GiB.")
    busy: float = Field(description="Share of the last half second in which it computed; 0 when idle.")


class StagesState(BaseModel):
    stages: list[StageState] = Field(description="Empty while a stage restarts.")
    queue: int = Field(description="Requests in the queue.")
    active: int = Field(description="Requests in flight.")
    kv_used: int = Field(description="KV cache positions held by requests in flight.")
    kv_total: int = Field(description="KV cache positions in all.")
    bubble: float = Field(
        description="Share of the last half second in which stages waited although there was work; 0 when idle."
    )
    losses: int = Field(description="Crashes of stages since the start.")
    repairs: int = Field(description="Crashes after which only the crashed stages restarted, not all.")
    recovery_s: float | None = Field(description="Seconds from the last crash until all stages ran again.")


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    seconds: float = Field(description="Seconds that the token took.")


@router.get("/v1/models", tags=["OpenAI"], summary="List the models that the key may use", responses=LOOKING_ERRORS)
async def list_models(request: Request) -> ModelList:
    """List the base and, as `base:adapter`, each adapter that the key may use."""
    names = server_of(request).list_models(key_of(request))
    return ModelList(data=[ModelFacts(id=name, created=_STARTED) for name in names])


@router.get("/v1/models/{model}", tags=["OpenAI"], summary="Look a model up", responses=errors_of(401, 404, 500, 503))
async def find_model(model: str, request: Request) -> ModelFacts:
    """Show one model of that list."""
    names = server_of(request).list_models(key_of(request))
    if model not in names:
        raise RefusedError(
            404, f"there is no model {model!r}: expected one of {', '.join(names)}.", "model_not_found", "model"
        )
    return ModelFacts(id=model, created=_STARTED)


@router.get(
    "/v1/adapters",
    tags=["Adapters"],
    summary="List adapters with their versions",
    response_model=AdapterList,
    response_model_exclude_unset=True,
    responses=LOOKING_ERRORS,
)
async def list_adapters(request: Request) -> dict[str, list[dict[str, Any]]]:
    """List the adapter folder: each adapter with its versions, and the reason where one is refused."""
    server, key = server_of(request), key_of(request)
    return {"data": [server.describe_adapter(name) for name in server.shelf.list_names() if key.may_use(name)]}


@router.post(
    "/v1/adapters/{name}/version",
    tags=["Adapters"],
    summary="Choose the version that is served",
    response_model=AdapterFacts,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401, 403, 404, 413, 422, 500, 503),
)
async def set_version(name: str, body: VersionRequest, request: Request) -> dict[str, Any]:
    """Roll an adapter back, or forward again. Needs an admin key. Requests in flight keep the version that they began with."""
    server = server_of(request)
    server.require_admin(key_of(request))
    if name not in server.shelf.list_names():
        raise RefusedError(404, f"there is no adapter {name!r}.", "model_not_found", "name")
    server.shelf.set_current(name, body.version)
    return server.describe_adapter(name)


@router.get("/v1/stages", tags=["Health"], summary="Show stages, queue and cache", responses=LOOKING_ERRORS)
async def show_stages(request: Request) -> StagesState:
    """Show the layers, memory and load of each stage, the queue, the KV cache and the crashes of stages so far."""
    engine = server_of(request).engine
    snapshot, stages = engine.snapshot, engine.stages
    busy = snapshot.busy if len(snapshot.busy) == len(stages) else (0.0,) * len(stages)
    return StagesState(
        stages=[
            StageState(
                layers=(stage.first_layer, stage.last_layer),
                weights_gib=stage.weights_gib,
                cache_gib=stage.cache_gib,
                busy=share,
            )
            for stage, share in zip(stages, busy, strict=True)
        ],
        queue=snapshot.queue,
        active=snapshot.active,
        kv_used=snapshot.kv_used,
        kv_total=snapshot.kv_total,
        bubble=snapshot.bubble,
        losses=snapshot.num_losses,
        repairs=snapshot.num_repairs,
        recovery_s=snapshot.recovery_s,
    )


@router.get("/healthz", tags=["Health"], summary="Say that the server runs")
async def live() -> Alive:
    """Answer while the HTTP process runs. Needs no key and says nothing about the model."""
    return Alive()


@router.get("/readyz", tags=["Health"], summary="Send a token through all stages", responses=LOOKING_ERRORS)
async def ready(request: Request) -> Ready:
    """Answer 200 after sending one token through all stages, 503 while a stage is down."""
    return Ready(seconds=await server_of(request).probe())


@router.get(
    "/metrics",
    tags=["Health"],
    summary="Show the metrics of this node to Prometheus",
    response_class=PlainTextResponse,
    responses=errors_of(401, 403, 404, 500, 503),
)
async def show_metrics(request: Request) -> PlainTextResponse:
    """Show what Ray's metrics port shows, with a key. Needs an admin key: metrics name adapters and tasks of all keys."""
    server = server_of(request)
    server.require_admin(key_of(request))
    if server.metrics_address is None:
        raise RefusedError(404, "Ray exports no metrics on this node.", "no_metrics")
    try:
        text = await asyncio.to_thread(_read, server.metrics_address)
    except OSError as error:
        raise RefusedError(
            503, "Ray's metrics port does not answer now: ask again later.", "no_metrics", retry_after_s=5
        ) from error
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _read(address: str) -> str:
    # Without the machine's proxy settings: the address is this node's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=_METRICS_S) as reply:
        text: str = reply.read().decode()
    return text
