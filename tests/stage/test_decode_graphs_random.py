"""Random micro-batches, padded to a captured size, captured and replayed, give their eager results; emulated on CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from emulated_flash import emulate_flash
from emulated_graphs import emulate_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import ADAPTERS, VOCABULARY, add_request, micro_batches

from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.micro_batch import MicroBatch, Segment
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base
from finlora.stage.batch_attention import split_tails
from finlora.stage.decode_graphs import DECODE_SIZES, PART_SIZES, PROMPT_SIZES, StageGraphs, find_parts
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
CACHE_ROWS, USED_ROWS = 9216, 8192
NO_END = 511
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", params=["first stage", "last stage"])
def stage(request, four_layers, adapter_folders):
    """Two of four layers, with both adapters."""
    span = range(2) if request.param == "first stage" else range(2, 4)
    stage = Stage(load_base(four_layers, 16, CPU, 0, span).model, span, CACHE_ROWS, torch.float32)
    for name, folder in adapter_folders.items():
        stage.load_adapter(name, folder)
    return stage


def run(stage, batch):
    """Run a micro-batch on a cache of random values; returns copies of the result and of the cache."""
    generator = torch.Generator().manual_seed(0)
    stage.cache.copy_(torch.randn(stage.cache.shape, generator=generator))
    hidden = None if stage.is_first else torch.randn(batch.num_rows, 64, generator=generator) + batch.input_ids[0] / 500
    result = stage.run(batch, hidden)
    if stage.is_last:
        output = result.read()
        result = torch.tensor([*(number for pair in output.tokens for number in pair), *output.log_probs])
    return result.clone(), stage.cache[:, :, :-1].clone()


def lay_out(batch):
    """Return the input of a graph, with its form; None if the micro-batch is not captured."""
    passes, found = StageGraphs(lambda *_: torch.zeros(0), CACHE_ROWS, CPU, fills=True), []
    taken = passes.take(batch)
    if taken is None:
        return None
    passes._run = lambda rows, _hidden: found.append(rows) or torch.zeros(taken.form.num_rows)
    passes.run(batch, taken, None, {None: 0, "few": 1, "all": 2})
    return found[0]


@BOUNDED
@given(batch=micro_batches(USED_ROWS))
def test_every_layout_is_consistent(batch):
    rows = lay_out(batch)
    if rows is None:
        return
    form, count = rows.form, batch.num_rows
    assert form.num_rows == min(size for size in (DECODE_SIZES if form.is_decode else PROMPT_SIZES) if size >= count)
    assert form.has_adapters == any(name is not None for name, _ in batch.adapters)
    assert rows.ids.tolist()[:count] == batch.input_ids
    assert rows.slots.tolist() == [*batch.slots, *[CACHE_ROWS] * (form.num_rows - count)]
    queries = check_ranges(rows.ranges, form.num_segments, form.num_rows, is_causal=True)
    assert sum(queries) == form.num_rows
    tails = [segment for segment in batch.segments if len(segment.keys) > 1]
    assert (form.num_tails > 0) == bool(tails)
    assert form.is_decode or (form.num_segments, form.num_tails) in PART_SIZES
    if tails:
        check_ranges(rows.tails.first, form.num_segments, form.num_tails, is_causal=False)
        assert len(rows.tails.rows) == form.num_tails
        assert 0 <= int(rows.tails.rows.min()) <= int(rows.tails.rows.max()) < count
        assert 1 <= int(rows.tails.counts.min()) <= int(rows.tails.counts.max()) <= rows.tails.most


def check_ranges(ranges, num_segments, num_queries, *, is_causal):
    ends, starts, lengths = (part.tolist() for part in ranges[:3])
    assert (len(ends), len(starts), len(lengths)) == (num_segments + 1, num_segments + 1, num_segments)
    queries = [stop - start for start, stop in pairwise(ends)]
    assert ends[0] == 0
    assert ends[-1] == num_queries
    assert 0 <= min(queries) <= max(queries) <= ranges.max_queries
    for own, start, length in zip(queries, starts, lengths, strict=False):
        assert length >= 1
        assert start + length <= CACHE_ROWS + 1
        assert not is_causal or length >= own
    return queries


@settings(BOUNDED, max_examples=25)
@given(batch=micro_batches(USED_ROWS))
def test_padded_passes_equal_passes_without_padding(stage, batch):
    results = []
    for stage.passes.fills in (False, True):
        results.append(run(stage, batch))
    close(results[1], results[0])


@settings(BOUNDED, max_examples=12)
@given(batch=micro_batches(USED_ROWS), others=st.lists(st.integers(0, 2**32), min_size=2, max_size=2))
def test_replays_with_new_inputs_equal_eager_passes(stage, batch, others):
    """Tokens, adapters, cache rows and keys of the second and third run differ from the captured ones."""
    twins = [batch, *(move(batch, seed) for seed in others)]
    expected, found = [], []
    stage.passes.fills = False
    for twin in twins:
        expected.append(run(stage, twin))
    passes = StageGraphs(stage._run_rows, CACHE_ROWS, CPU, fills=True)
    passes.captures = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "passes", passes)
        graphs = emulate_graphs(patch)
        emulate_flash(patch)
        run(stage, batch)  # the first pass of a form is not captured
        for twin in twins:
            found.append(run(stage, twin))
    if passes.take(batch) is not None:
        assert [graph.num_replays for graph in graphs] == [3]
    for own, right in zip(found, expected, strict=True):
        close(own, right)


def move(batch, seed):
    """Return a micro-batch of the same form with other cache rows, tokens and adapters."""
    rng = random.Random(seed)
    shift = 16 * rng.randint(1, 40)
    names = [name for name in ADAPTERS if name is not None]
    return replace(
        batch,
        input_ids=[rng.randrange(3, VOCABULARY) for _ in batch.input_ids],
        positions=[position + 1 for position in batch.positions],
        slots=[slot + shift for slot in batch.slots],
        segments=[
            Segment(segment.num_rows, tuple((start + shift, count) for start, count in segment.keys))
            for segment in batch.segments
        ],
        adapters=[(name and rng.choice(names), count) for name, count in batch.adapters],
    )


def close(found, expected):
    for own, right in zip(found, expected, strict=True):
        atol = 1e-4 * float(right.abs().max()) if len(right) else 0.0
        torch.testing.assert_close(own, right, rtol=1e-4, atol=atol)


def make_tails(num_segments, num_tails):
    """Return a prompt with `num_tails` answers of one token in a second range each, and prompts of 2 tokens."""
    batch, start = MicroBatch(0), 0
    if num_tails:
        add_request(batch, "labels", start, 0, 20, [1] * (num_tails + 1))
        start += 512
    while len(split_tails(batch.segments)[0]) < num_segments:
        add_request(batch, "short", start, 3, 2, [])
        start += 16
    batch.adapters.append((None, batch.num_rows))
    return batch


@pytest.mark.parametrize("most", PART_SIZES)
@pytest.mark.parametrize("more", [(-1, -1), (0, 0), (1, 0), (2, 0), (0, 1)])
def test_passes_at_the_bounds_of_each_size(stage, most, more):
    num_segments, num_tails = most[0] + more[0] - 1, max(0, most[1] + more[1])  # padding adds at least one segment
    batch = make_tails(num_segments, num_tails)
    assert len(split_tails(batch.segments)[0]) == num_segments
    results = []
    for stage.passes.fills in (False, True):
        results.append(run(stage, batch))
    close(results[1], results[0])


def test_passes_without_answers_have_a_form_without_tails():
    assert [find_parts(count, 0) for count in (1, 4, 5, 64, 65, 96, 97, 128, 129)] == [
        (4, 0), (4, 0), (64, 0), (64, 0), (128, 0), (128, 0), (128, 0), (128, 0), None,
    ]  # fmt: skip
    assert [find_parts(*parts) for parts in ((2, 1), (24, 16), (25, 1), (2, 17), (96, 256), (97, 1), (2, 257))] == [
        (24, 16), (24, 16), (96, 256), (96, 256), (96, 256), None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("count", [65, 80, 96, 97, 128])
def test_decode_rows_beyond_the_largest_decode_size_are_captured_too(count):
    batch = MicroBatch(0, adapters=[(None, count)])
    for number in range(count):
        add_request(batch, "token", 16 * number, 5, 1, [])
    form = lay_out(batch).form
    assert (form.num_rows, form.num_segments, form.num_tails, form.is_decode) == (128, 128, 0, False)


def test_empty_batch_and_batch_without_rows_to_repeat_are_not_padded():
    passes = StageGraphs(lambda *_: torch.zeros(0), CACHE_ROWS, CPU, fills=True)
    assert passes.take(MicroBatch(0)) is None
    alone = MicroBatch(0, adapters=[(None, 3)])
    alone.add([5, 6, 7], 4, [8, 9, 10], [(0, 4), (8, 3)])
    assert passes.take(alone) is None
    alone.segments = [Segment(3, ((0, 4), (8, 3)))] * 6
    assert passes.take(replace(alone, input_ids=[5] * 16)) is not None  # 16 rows need no padding


def make_requests(count, method, adapters):
    """Return requests for text, labels or both, of several adapters, with common prefixes."""
    rng = random.Random(count)
    shared = [tuple(rng.choices(range(3, VOCABULARY), k=40)) for _ in range(3)]
    requests = []
    for number in range(count):
        prompt = (*rng.choice([(), *shared]), *rng.choices(range(3, VOCABULARY), k=rng.randint(1, 12)))
        is_text = method == "text" or (method == "both" and rng.random() < 0.5)
        choices = [tuple(rng.choices(range(3, VOCABULARY), k=rng.randint(1, 3))) for _ in range(rng.randint(2, 4))]
        requests.append(
            Request(
                id=str(number),
                prompt_ids=prompt,
                adapter=rng.choice(adapters),
                choices=() if is_text else tuple(choices),
                sampling=Sampling(max_tokens=rng.randint(1, 6)),
            )
        )
    return requests


@pytest.fixture(scope="module")
def engines(four_layers, adapter_folders):
    """Four layers as one stage and as two stages, by number of stages, each with the tokenizer."""
    made = {}
    for spans in ([range(4)], [range(2), range(2, 4)]):
        bases = [load_base(four_layers, 16, CPU, 0, span) for span in spans]
        stages = [Stage(base.model, span, CACHE_ROWS, torch.float32) for base, span in zip(bases, spans, strict=True)]
        for each in stages:
            for name, folder in adapter_folders.items():
                each.load_adapter(name, folder)
        made[len(stages)] = stages, bases[0].tokenizer
    return made


@pytest.mark.parametrize(
    ("count", "method", "adapters", "batch_tokens", "num_stages", "num_segments"),
    [
        (1, "text", (None,), 64, 1, 4),
        (20, "both", ADAPTERS, 64, 2, 24),
        (150, "text", (None,), 2048, 1, 128),
        (300, "both", ADAPTERS, 128, 2, 96),
        (100, "labels", ("all",), 128, 1, 96),
        (300, "text", ADAPTERS, 2048, 1, 128),
    ],
)
def test_answers_are_the_same_with_captured_passes(
    engines, count, method, adapters, batch_tokens, num_stages, num_segments
):
    """Passes that the scheduler makes of many requests, some of them with 65 to 128 segments without second ranges."""
    requests = make_requests(count, method, adapters)
    stages, tokenizer = engines[num_stages]
    limits = Limits(cache_rows=64 * 80, max_batch_tokens=batch_tokens, max_in_flight=num_stages, follows=True)

    def ask():
        core = EngineCore(InProcess(stages), Scheduler(limits, NO_END, lambda: 3), tokenizer)
        core.adapters |= dict.fromkeys(name for name in ADAPTERS if name is not None)
        for request in requests:
            core.submit(request)
        answers = {}
        while not core.is_idle:
            answers |= {answer.request_id: answer for answer in core.step()}
        return answers

    plain = ask()
    with pytest.MonkeyPatch.context() as patch:
        emulate_graphs(patch)
        emulate_flash(patch)
        for each in stages:
            patch.setattr(each, "passes", StageGraphs(each._run_rows, CACHE_ROWS, CPU, fills=True))
            each.passes.captures = True
            patch.setattr(each, "_flashes", True)
        captured = ask()
        forms = set(stages[0].passes._seen)
    assert num_segments in {form.num_segments for form in forms}
    assert any(form.is_decode for form in forms) == (method != "labels")
    assert captured.keys() == plain.keys() == {request.id for request in requests}
    for name, answer in plain.items():
        found = captured[name]
        assert list(found.log_probs) == pytest.approx(list(answer.log_probs), rel=1e-4, abs=1e-3)
        assert found.finish == answer.finish
        for own, right in zip(found.tokens, answer.tokens, strict=True):
            assert own.log_prob == pytest.approx(right.log_prob, abs=2e-3)
            if own.id != right.id:
                break  # two tokens were equally likely: from here on the texts differ
