"""Forward passes padded to captured sizes give the same answers as passes without padding."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from engine_requests import ON_GPU, RAGGED, make_requests, run, tokens_of
from safetensors.torch import load_file, save_file

from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.micro_batch import MicroBatch
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.tokenizer import load_tokenizer
from finlora.stage.decode_graphs import DECODE_SIZES, PART_SIZES, PROMPT_SIZES, Form, StageGraphs
from finlora.stage.stage import Stage

SPARE = 1000


@pytest.fixture
def passes():
    return StageGraphs(lambda _rows, _hidden: torch.zeros(0), SPARE, torch.device("cpu"), fills=True)


def make_batch(*segments, adapters=None):
    """Return a micro-batch; each segment is given as (rows, first key row, keys)."""
    batch = MicroBatch(0, adapters=adapters or [(None, sum(count for count, *_ in segments))])
    for count, start, num_keys in segments:
        own = range(start + num_keys - count, start + num_keys)
        batch.add([7 + index for index in range(count)], num_keys - count, own, [(start, num_keys)])
    return batch


def lay_out(passes, batch, adapters=None):
    taken, found = passes.take(batch), []
    passes._run = lambda rows, _hidden: found.append(rows) or torch.zeros(taken.form.num_rows)
    passes.run(batch, taken, None, adapters or {None: 0})
    return taken.form, found[0]


def test_prompt_is_padded_with_its_own_first_rows(passes):
    form, rows = lay_out(passes, make_batch((100, 16, 120), adapters=[("a", 100)]), {"a": 3})
    assert form == Form(128, 4, 0, 128, False, True)
    assert rows.ids.tolist() == [*range(7, 107), *range(7, 35)]
    assert rows.positions.tolist() == [*range(20, 120), *range(20, 48)]
    assert rows.slots.tolist() == [*range(36, 136)] + [SPARE] * 28
    assert rows.adapters.tolist() == [3] * 128
    assert rows.ranges.cumulative_queries.tolist() == [0, 100, 128, 128, 128]
    # The 28 repeated rows attend to the 20 keys before the segment and to their own.
    assert (rows.ranges.starts.tolist()[:2], rows.ranges.lengths.tolist()[:2]) == ([16, 16], [120, 48])


def test_longest_segments_are_repeated_several_times_if_they_are_short(passes):
    form, rows = lay_out(passes, make_batch((3, 0, 3), (65, 16, 65), (1, 96, 9)))
    assert (form.num_rows, form.num_segments) == (128, 4)
    assert rows.ranges.cumulative_queries.tolist() == [0, 3, 68, 69, 128]
    form, rows = lay_out(passes, make_batch((2, 0, 2), (3, 16, 3)))
    assert (form.num_rows, form.num_segments) == (16, 64)
    assert rows.ranges.cumulative_queries.tolist()[:8] == [0, 2, 5, 8, 10, 13, 15, 16]
    assert rows.ranges.cumulative_queries.tolist()[-1] == 16


def test_decode_rows_are_padded_with_rows_of_one_key(passes):
    form, rows = lay_out(passes, make_batch((1, 0, 30), (1, 48, 20), (1, 96, 9)))
    assert form == Form(4, 4, 0, 1, True, False)
    assert (rows.slots.tolist(), rows.ranges.lengths.tolist()) == ([29, 67, 104, SPARE], [30, 20, 9, 1])


@pytest.mark.parametrize(
    "batch",
    [
        make_batch((PROMPT_SIZES[-1] + 1, 0, PROMPT_SIZES[-1] + 1)),
        make_batch(*((2, 16 * index, 2) for index in range(max(most for most, _ in PART_SIZES) + 1))),
    ],
)
def test_pass_larger_than_every_size_is_not_padded(passes, batch):
    assert passes.take(batch) is None


def test_rows_with_a_second_range_are_padded_with_the_first_such_row(passes):
    batch = make_batch((4, 0, 4), adapters=[(None, 6)])
    batch.add([5, 6], 4, [20, 21], [(0, 4), (20, 2)])
    form, rows = lay_out(passes, batch)
    assert form == Form(16, 24, 16, 16, False, False)
    # Both rows attend to the four keys before them, and in a second range to their own; the padding repeats the first four rows.
    assert rows.ranges.cumulative_queries.tolist()[:4] == [0, 4, 5, 6]
    assert (rows.ranges.starts.tolist()[:3], rows.ranges.lengths.tolist()[:4]) == ([0, 0, 0], [4, 4, 4, 4])
    assert rows.tails.rows.tolist() == [4, 5, *[4] * 14]
    assert (rows.tails.starts.tolist(), rows.tails.counts.tolist()) == ([20] * 16, [1, 2, *[1] * 14])
    assert rows.tails.first.cumulative_queries.tolist() == [0, 2, *[16] * 23]
    assert (rows.tails.first.starts.tolist()[:3], rows.tails.first.lengths.tolist()[:3]) == ([0, 0, SPARE], [4, 4, 1])


def test_answers_after_their_prompt_form_one_segment_with_it(passes):
    batch = make_batch((4, 16, 24), adapters=[(None, 8)])
    batch.add([5], 24, [40], [(16, 25)])
    batch.add([6, 7], 24, [41, 42], [(16, 24), (41, 2)])
    batch.add([8], 24, [43], [(16, 24), (43, 1)])
    _, rows = lay_out(passes, batch)
    assert rows.ranges.cumulative_queries.tolist()[:2] == [0, 8]
    assert (rows.ranges.starts.tolist()[0], rows.ranges.lengths.tolist()[0]) == (16, 28)
    assert rows.tails.rows.tolist()[:3] == [5, 6, 7]
    assert (rows.tails.starts.tolist()[:3], rows.tails.counts.tolist()[:3]) == ([41, 41, 43], [1, 2, 1])
    assert (rows.tails.first.starts.tolist()[0], rows.tails.first.lengths.tolist()[0]) == (16, 24)
    assert rows.tails.first.cumulative_queries.tolist()[:3] == [0, 3, 16]


def test_prompt_that_is_long_only_with_its_answers_gets_all_its_programs(passes):
    batch = MicroBatch(0, adapters=[(None, 30 * 130)])
    for start in range(0, 30 * 256, 256):
        batch.add([7] * 60, 0, range(start, start + 60), [(start, 60)])
        batch.add([5], 60, [start + 60], [(start, 61)])
        batch.add([6], 60, [start + 61], [(start, 60), (start + 61, 1)])
    assert passes.take(batch).form.max_queries == 128
    first = 30 * 256
    batch.add([7] * 127, 0, range(first, first + 127), [(first, 127)])
    batch.add([5], 127, [first + 127], [(first, 128)])
    assert passes.take(batch).form.max_queries == 128
    batch.add([6], 127, [first + 128], [(first, 127), (first + 128, 1)])
    assert passes.take(batch).form.max_queries == passes.take(batch).form.num_rows  # 129 queries in one segment


def test_long_answers_are_not_padded(passes):
    batch = make_batch((4, 16, 24), adapters=[(None, 13)])
    batch.add([5] * 9, 24, range(60, 69), [(16, 24), (60, 9)])
    assert passes.take(batch) is None


def test_programs_for_long_segments_are_launched_only_with_few_segments(passes):
    sizes = {}
    for count, length in ((3, 200), (30, 20), (30, 4), (3, 20)):
        form = passes.take(make_batch(*((length, 256 * index, length) for index in range(count)))).form
        sizes[count, length] = (form.num_rows, form.num_segments, form.max_queries)
    assert sizes == {(3, 200): (768, 4, 768), (30, 20): (768, 64, 128), (30, 4): (128, 64, 128), (3, 20): (64, 4, 64)}
    mixed = [(130, 0, 130), *((9, 256 * index, 9) for index in range(1, 30))]
    assert passes.take(make_batch(*mixed)).form == Form(512, 64, 0, 512, False, False)


def test_every_number_of_rows_is_padded_to_the_next_size(passes):
    for count in range(1, PROMPT_SIZES[-1] + 1):
        form, _, _, filling = passes.take(make_batch((count, 0, count)))
        sizes = DECODE_SIZES if count == 1 else PROMPT_SIZES
        assert form.num_rows == min(size for size in sizes if size >= count)
        assert count + sum(segment.num_rows for _, segment in filling) == form.num_rows


def make_mixed():
    """Return requests of adapters and the base, with a shared prefix, choices of one token and of several, and generated text."""
    shared = RAGGED[3][:32]
    return [
        Request(id="a", prompt_ids=(*shared, 5), choices=((9,), (10,)), adapter="all"),
        Request(id="b", prompt_ids=(*shared, 6, 7), choices=((9, 1), (10, 11, 1))),
        *make_requests(RAGGED, 6, adapter="few"),
        Request(id="c", prompt_ids=(*shared, 8), sampling=Sampling(max_tokens=5)),
        Request(id="d", prompt_ids=RAGGED[5], sampling=Sampling(max_tokens=4), adapter="all"),
    ]


@pytest.mark.parametrize(("num_stages", "bits"), [(1, 16), (2, 16), (1, 8), (1, 4)])
def test_padded_passes_give_the_same_answers(make_core, num_stages, bits):
    cores = [make_core(num_stages, bits, fills=fills, max_in_flight=1) for fills in (True, False)]
    forms = []
    stage = cores[0].executor.stages[-1]
    compute = stage.passes._run
    stage.passes._run = lambda rows, hidden: forms.append(rows.form) or compute(rows, hidden)
    # Attention sums in another order; rounding to int8 can turn a difference in the last digit into a step of 1/127.
    rel = 5e-3 if bits == 8 else 1e-5
    for requests in (make_mixed(), make_requests(RAGGED[2:3])):
        (filled, _), (bare, _) = (run(core, requests) for core in cores)
        for name, answer in bare.items():
            assert tokens_of(filled[name]) == tokens_of(answer)
            assert list(filled[name].log_probs) == pytest.approx(list(answer.log_probs), rel=rel)
    assert any(form.num_tails for form in forms)
    assert {(form.is_decode, form.has_adapters) for form in forms} == {
        (is_decode, has_adapters) for is_decode in (True, False) for has_adapters in (True, False)
    }


def test_label_is_scored_if_the_prompts_last_chunk_is_one_token(make_core):
    """Such a chunk looks like a generated token, for which no label is scored."""
    request = Request(id="l", prompt_ids=RAGGED[2], choices=((9,), (10,)))
    whole, cut = (run(make_core(max_batch_tokens=rows), [request])[0]["l"] for rows in (64, 32))
    assert list(cut.log_probs) == pytest.approx(list(whole.log_probs), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch_tokens", [2048, 12288])
def test_text_of_many_concurrent_requests_on_a_gpu(mild, batch_tokens):
    """150 requests make passes of 65 to 128 segments without second ranges. Compared with the same passes without padding."""
    rng = random.Random(5)
    requests = [
        Request(id=str(number), prompt_ids=tuple(rng.choices(range(3, 500), k=rng.randint(1, 60))), adapter=adapter)
        for number, adapter in enumerate([None, "few", "all"] * 50)
    ]
    answers, forms = [], []
    for fills in (True, False):
        stage = Stage(load_base(mild[0], 16, torch.device("cuda"), 0).model, range(4), 100 * 64, torch.bfloat16)
        limits = Limits(cache_rows=100 * 64, max_batch_tokens=batch_tokens, follows=True)
        core = EngineCore(InProcess([stage]), Scheduler(limits, 511, lambda: 3), load_tokenizer(Path(mild[0].base)))
        for name, folder in mild[1].items():
            core.load_adapter(name, folder)
        stage.passes.fills = fills
        answers.append(run(core, requests)[0])
        forms += stage.passes._graphs
    assert any(form.num_segments == 128 for form in forms)
    for name, bare in answers[1].items():
        for own, right in zip(answers[0][name].tokens, bare.tokens, strict=False):
            assert own.log_prob == pytest.approx(right.log_prob, abs=0.1)
            if own.id != right.id:
                break  # two tokens were about equally likely: from here on the texts differ


@pytest.fixture(scope="module")
def mild(four_layers, adapter_folders, tmp_path_factory):
    """The base and adapters with smaller weights, whose results 16-bit rounding changes little."""
    folder = shutil.copytree(four_layers.base, tmp_path_factory.mktemp("mild") / "base")
    values = json.loads((folder / "config.json").read_text()) | {"initializer_range": 0.05}
    (folder / "config.json").write_text(json.dumps(values))
    adapters = {}
    for name, source in adapter_folders.items():
        adapters[name] = shutil.copytree(source, folder.parent / name)
        file = adapters[name] / "adapter_model.safetensors"
        save_file({key: tensor * 0.3 for key, tensor in load_file(file).items()}, file)
    return dataclasses.replace(four_layers, base=str(folder)), adapters


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("adapters", [[(None, 133)], [(None, 1), ("all", 100), ("few", 32)]])
def test_padded_passes_in_16_bit(mild, device, bits, adapters):
    """Errors are like those of eager passes without padding. On a GPU the passes are eager, then captured, then replayed."""
    batch = make_batch((1, 0, 30), (100, 48, 120), (32, 176, 32), adapters=adapters)
    states = {}
    for dtype, fills in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        with quiet_bitsandbytes():
            stage = Stage(load_base(mild[0], bits, torch.device(device), 0).model, range(4), 512, dtype)
            stage.passes.fills, stage.is_last = fills, False
            for name, folder in mild[1].items():
                stage.load_adapter(name, folder)
            cached = torch.randn(stage.cache.shape, generator=torch.Generator().manual_seed(0))
            stage.cache.copy_(cached)
            states[dtype, fills] = [stage.run(batch, None).float() for _ in range(3)]
    truth = states[torch.float32, False][0]
    errors = [float((found - truth).norm() / truth.norm()) for found in states[torch.bfloat16, True]]
    bare = float((states[torch.bfloat16, False][0] - truth).norm() / truth.norm())
    assert max(errors) < 1.2 * bare < 0.05, (errors, bare)
    if device == "cuda":
        (graph,) = stage.passes._graphs
        assert graph.num_rows == 192
