"""What there is and how it does: models, adapters and their versions, stages, liveness and readiness."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from finlora.serve.doorway import ERRORS, key_of, server_of
from finlora.serve.failures import RefusedError
from finlora.serve.protocol import VersionRequest

router = APIRouter(responses=ERRORS)
_STARTED = int(time.time())


class ModelFacts(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["finlora"] = "finlora"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelFacts]


class StageState(BaseModel):
    layers: tuple[int, int] = Field(description="First and last decoder layer.")
    weights_gib: float
    cache_gib: float
    busy: float = Field(description="Share of the last half second that it computed; 0 without work.")


class StagesState(BaseModel):
    stages: list[StageState] = Field(description="Empty while a stage is being restarted.")
    queue: int = Field(description="Requests in line.")
    active: int = Field(description="Requests at work.")
    kv_used: int = Field(description="Rows of the KV cache that they hold.")
    kv_total: int
    bubble: float = Field(
        description="Share of the stages' time with work that was idle, over the last half second; 0 without work."
    )
    losses: int = Field(description="How often stages were lost.")
    repairs: int = Field(description="How often only the dead stages had to be started for it; else all were.")
    recovery_s: float | None = Field(description="Seconds from the last loss until the stages stood again.")


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    seconds: float = Field(description="How long one token took through all stages.")


@router.get("/v1/models", tags=["OpenAI"], summary="List the models that the key may use")
async def list_models(request: Request) -> ModelList:
    """Return the base and each adapter on it."""
    names = server_of(request).list_models(key_of(request))
    return ModelList(data=[ModelFacts(id=name, created=_STARTED) for name in names])


@router.get("/v1/models/{model}", tags=["OpenAI"], summary="Look a model up")
async def find_model(model: str, request: Request) -> ModelFacts:
    """Return a model that the key may use."""
    names = server_of(request).list_models(key_of(request))
    if model not in names:
        raise RefusedError(
            404, f"there is no model {model!r}: expected one of {', '.join(names)}.", "model_not_found", "model"
        )
    return ModelFacts(id=model, created=_STARTED)


@router.get("/v1/adapters", tags=["Adapters"], summary="List adapters with their versions")
async def list_adapters(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Return what lies in the adapter folder, with the reason where one is refused."""
    server, key = server_of(request), key_of(request)
    return {"data": [server.describe_adapter(name) for name in server.shelf.list_names() if key.may_use(name)]}


@router.post("/v1/adapters/{name}/version", tags=["Adapters"], summary="Choose the version that is served")
async def set_version(name: str, body: VersionRequest, request: Request) -> dict[str, Any]:
    """Roll an adapter back, or forward again; needs an admin key. Requests at work end with the version they began with."""
    server = server_of(request)
    server.require_admin(key_of(request))
    if name not in server.shelf.list_names():
        raise RefusedError(404, f"there is no adapter {name!r}.", "model_not_found", "name")
    server.shelf.set_current(name, body.version)
    return server.describe_adapter(name)


@router.get("/v1/stages", tags=["Health"], summary="Show stages, queue and cache")
async def show_stages(request: Request) -> StagesState:
    """Return what each stage holds and how busy it is."""
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
async def live() -> dict[str, str]:
    """Answer whenever the process lives; needs no key and says nothing of the model."""
    return {"status": "alive"}


@router.get("/readyz", tags=["Health"], summary="Send a token through all stages")
async def ready(request: Request) -> Ready:
    """Answer 200 when a token has just come through every stage, 503 while one is dead."""
    return Ready(seconds=await server_of(request).probe())
