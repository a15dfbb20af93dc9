"""Requests with a grammar over stages in Ray actors: the same answers as in one process, late reads and repairs included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray
from engine_requests import RAGGED, run, set_late_read, tokens_of

from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.errors import StageLostError
from finlora.grammar.compile import choice, json_schema
from finlora.model.source import find_source
from finlora.model.tokenizer import load_tokenizer

ROWS = 2048
LABELS = ("negative", "neutral", "positive")
SCHEMA = {"type": "object", "properties": {"up": {"type": "boolean"}, "n": {"enum": [1, 22]}}, "required": ["up", "n"]}


@pytest.fixture(scope="module")
def pipelines(four_layers, ray_instance):
    """Return a pipeline of some stages."""
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    opened = {}

    def open_stages(count):
        if count not in opened:
            config = PipelineConfig(num_stages=count, cache_rows=ROWS, device="cpu", cpus_per_stage=0.2)
            opened[count] = Pipeline(four_layers, find_source(four_layers).shape, 16, config, seed=0)
            opened[count].prepare_grammars()
        return opened[count]

    yield open_stages
    for pipeline in opened.values():
        pipeline.close()


def ask(pipeline, four_layers, *, follows=True):
    tokenizer = load_tokenizer(Path(four_layers.base))
    limits = Limits(cache_rows=ROWS, max_in_flight=len(pipeline.actors), follows=follows)
    # The stages take the tokenizer's own end token.
    core = EngineCore(pipeline, Scheduler(limits, tokenizer.eos_token_id, lambda: 3), tokenizer)
    grammars = {"plain": "", "label": choice(LABELS), "json": json_schema(SCHEMA)}
    requests = [
        Request(
            id=f"{name}-{number}",
            prompt_ids=prompt,
            sampling=Sampling(max_tokens=40, temperature=float(number), seed=number, grammar=grammar),
        )
        for number, prompt in enumerate(RAGGED[1:3])
        for name, grammar in grammars.items()
    ]
    answers, texts = run(core, requests)
    for name, text in texts.items():
        if name.startswith("label"):
            assert text in LABELS
        elif name.startswith("json"):
            assert json.loads(text)["n"] in (1, 22)
    return {name: tokens_of(answer) for name, answer in answers.items()}


@pytest.mark.ray
def test_any_number_of_actors_gives_the_same_answers(pipelines, four_layers):
    one, two, four = (ask(pipelines(count), four_layers) for count in (1, 2, 4))
    assert one == two == four


@pytest.mark.ray
def test_late_read_changes_no_answer(pipelines, four_layers):
    """The last stage then masks a micro-batch before it has returned the one before."""
    pipeline = pipelines(2)
    expected = ask(pipeline, four_layers, follows=False)

    set_late_read(pipeline, is_late=True)
    found = ask(pipeline, four_layers, follows=False)
    set_late_read(pipeline, is_late=False)
    assert found == expected


@pytest.mark.ray
def test_matchers_of_lost_requests_are_gone_after_a_repair(pipelines, four_layers):
    """A new scheduler counts matchers from 0 again."""
    pipeline = pipelines(2)
    tokenizer = load_tokenizer(Path(four_layers.base))
    expected = ask(pipeline, four_layers)
    core = EngineCore(
        pipeline, Scheduler(Limits(cache_rows=ROWS, max_in_flight=2, follows=True), -1, lambda: 3), tokenizer
    )
    for number in range(3):
        sampling = Sampling(max_tokens=60, grammar=json_schema({"type": "string", "minLength": 200}))
        core.submit(Request(id=str(number), prompt_ids=RAGGED[2], sampling=sampling))
    for _ in range(3):
        core.step()
    ray.kill(pipeline.actors[0])
    with pytest.raises(StageLostError):
        run(core, [])
    assert pipeline.repair() == [0]
    assert ask(pipeline, four_layers) == expected
