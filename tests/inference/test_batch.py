"""Batch inference against transformers: label probabilities and greedy text, also after stage losses."""

from __future__ import annotations

import pytest
import torch
from plain_engine import PlainEngine

from finlora.config import ModelConfig
from finlora.data.encode import encode_answer, encode_prompt
from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.scheduler import Scheduler
from finlora.errors import StageLostError
from finlora.inference.batch import BatchEngine
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.source import find_source
from finlora.model.tokenizer import load_tokenizer
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
PROMPTS = [
    "Profit rose at Brunholt .",
    "x",
    "Instruction: What is the sentiment of this news?\nInput: Sales fell 3 %\nAnswer: ",
    "Instruction: What is the sentiment of this news?\nInput: Sales rose 30 % to a record\nAnswer: ",
    "x",
]
CHOICES = [
    ["negative", "neutral", "positive"],
    ["Yes", "No"],
    ["strong negative", "neutral", "mildly positive outlook"],
    ["negative", "neutral", "positive"],
    ["Yes", "No"],
]


def ignore(_done):
    """Discard progress."""


@pytest.fixture(scope="module")
def tokenizer(four_layers):
    return load_tokenizer(find_source(four_layers).tokenizer_path)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode_prompt(text, tokenizer, "raw") for text in PROMPTS]


@pytest.fixture(scope="module")
def choices(tokenizer):
    return [[encode_answer(text, tokenizer, "raw") for text in own] for own in CHOICES]


def flatten(rows):
    return [value for row in rows for value in row]


@pytest.mark.parametrize("adapter", [None, "all"])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_scores_equal_the_plain_engine(make_core, plain, tokenizer, prompts, choices, adapter, num_stages):
    seen = []
    scores = BatchEngine(make_core(num_stages), adapter).score_choices(prompts, choices, seen.append)
    expected = PlainEngine(plain(adapter=adapter), tokenizer, "raw", CPU).score_choices(prompts, choices)
    assert flatten(scores) == pytest.approx(flatten(expected), rel=0, abs=1e-5)
    assert [sum(row) for row in scores] == pytest.approx([1.0] * len(prompts))
    assert seen[-1] == len(prompts)
    assert seen == sorted(seen)


@pytest.mark.parametrize("adapter", [None, "few"])
def test_generated_text_equals_the_plain_engine_in_any_order(make_core, plain, tokenizer, prompts, adapter):
    engine = BatchEngine(make_core(), adapter)
    texts = engine.generate(prompts, 12, ignore)
    expected = PlainEngine(plain(adapter=adapter), tokenizer, "raw", CPU).generate(prompts, 12)
    assert texts == expected
    assert engine.generate(prompts[::-1], 12, ignore) == expected[::-1]
    assert any(texts)


def test_all_prompts_are_answered_even_if_they_exceed_the_queue(make_core, prompts, choices):
    core = make_core(cache_rows=512, max_waiting=70)
    engine = BatchEngine(core, None)
    many = [prompts[number % 5] for number in range(200)]
    scores = engine.score_choices(many, [choices[number % 5] for number in range(200)], ignore)
    for number in range(200):
        assert scores[number] == pytest.approx(scores[number % 5], rel=0, abs=1e-5)
    assert core.is_idle


def test_common_prefix_is_computed_once(make_core, prompts, choices):
    core = make_core()
    BatchEngine(core, None).score_choices([prompts[2]] * 20, [choices[2]] * 20, ignore)
    rows = core.meter.totals().num_rows
    own = sum(len(choice) - 1 for choice in choices[2])
    # The first prompt is computed in full; of each other one, only the last token and the choices.
    assert rows == len(prompts[2]) + own + 19 * (1 + own)


class Losing:
    """Stages in this process that raise a stage loss at given numbers of micro-batches."""

    def __init__(self, executor, losses):
        self.executor, self.losses, self.can_follow = executor, losses, False
        self.start, self.load_adapter = executor.start, executor.load_adapter
        self.num_collected = 0

    def collect(self):
        output = self.executor.collect()
        self.num_collected += 1
        if self.num_collected in self.losses:
            raise StageLostError(f"a stage of the model was lost (at {self.num_collected}): ask again")
        return output


def make_losing(core, losses):
    """Return an engine, and the list of the micro-batches at which it recovers."""
    executor, renewed = Losing(core.executor, losses), []

    def renew():
        while executor.executor._in_flight:
            executor.executor.collect()
        renewed.append(executor.num_collected)
        limits = Limits(cache_rows=1024, max_batch_tokens=128)
        fresh = EngineCore(executor, Scheduler(limits, 1, lambda: 0), core.tokenizer)
        fresh.adapters |= core.adapters
        return fresh

    first = renew()
    renewed.clear()
    return BatchEngine(first, "few", renew), renewed


def test_unanswered_prompts_are_submitted_again_after_a_stage_loss(make_core, plain, tokenizer, prompts, choices):
    expected = PlainEngine(plain(adapter="few"), tokenizer, "raw", CPU)
    engine, renewed = make_losing(make_core(), {1, 9})
    seen = []
    assert engine.generate(prompts, 12, seen.append) == expected.generate(prompts, 12)
    assert renewed == [1, 9]  # before the texts are complete
    assert seen[-1] == len(prompts)
    engine, renewed = make_losing(make_core(), {2, 4})
    many = engine.score_choices(prompts * 8, choices * 8, ignore)
    assert renewed == [2, 4]
    wanted = expected.score_choices(prompts, choices)
    for start in range(0, 40, 5):  # to 1e-5, since a CPU's matrix product sums in another order in larger batches
        assert flatten(many[start : start + 5]) == pytest.approx(flatten(wanted), rel=0, abs=1e-5)


def test_repeated_stage_losses_end_the_evaluation(make_core, prompts):
    engine, renewed = make_losing(make_core(), {1, 2, 3})
    with pytest.raises(StageLostError, match=r"was lost \(at 3\): ask again"):
        engine.generate(prompts, 12, ignore)
    assert renewed == [1, 2]


def test_stage_loss_without_recovery_ends_the_evaluation_at_once(make_core, prompts):
    engine, _ = make_losing(make_core(), {1})
    with pytest.raises(StageLostError, match=r"was lost \(at 1\): ask again"):
        BatchEngine(engine.core, None).generate(prompts, 12, ignore)


def test_bf16_scores_stay_near_float32(four_layers, make_core, tokenizer, prompts, choices):
    rough = ModelConfig(base=four_layers.base, weights="random", compute_dtype="bfloat16")
    with quiet_bitsandbytes():
        net = load_base(rough, 16, CPU, 0).model
    stage = Stage(net, range(4), 1024, torch.bfloat16)
    core = EngineCore(InProcess([stage]), Scheduler(Limits(cache_rows=1024), 1, lambda: 0), tokenizer)
    rounded = BatchEngine(core, None).score_choices(prompts, choices, ignore)
    exact = BatchEngine(make_core(), None).score_choices(prompts, choices, ignore)
    assert flatten(rounded) == pytest.approx(flatten(exact), abs=0.08)
