"""Warm-up, which must not change any answer, and the size of the KV cache."""

from __future__ import annotations

import pytest
import torch
from engine_requests import RAGGED, generate_alone, make_requests, run, tokens_of

from finlora.engine.admission import Limits
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.errors import ResourceError
from finlora.inference import open_base
from finlora.inference.open_base import count_fitting_rows, count_rows, open_executor, round_up, warm_up
from finlora.model.base_files import read_base_files


@pytest.mark.parametrize("num_stages", [1, 2])
def test_warm_up_changes_no_answer(make_core, plain, num_stages):
    core = make_core(num_stages)
    warm_up(core.executor, 1024, 300)
    answers, _ = run(core, make_requests(count=5))
    for number, prompt in enumerate(RAGGED):
        assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), prompt, 5)


def test_cache_takes_the_rows_that_fit_and_must_hold_one_request(make_config, monkeypatch):
    monkeypatch.setattr(open_base, "count_fitting_rows", lambda _device, _row_bytes: 96)
    config = make_config()
    base = read_base_files(config.model)
    with open_executor(config, base, 1, 500, 90) as (executor, rows):
        assert rows == 96
        assert executor.stages[0].cache.shape[2] == 97
    words = (
        r"the KV cache has room for 96 tokens beside the base at 16 bit and one request needs 112: choose fewer bits"
    )
    with pytest.raises(ResourceError, match=words), open_executor(config, base, 1, 500, 100):
        pass


def test_cache_on_a_gpu_leaves_room_for_activations(monkeypatch):
    """A twentieth of the GPU's memory and 1.5 GiB stay free. Rows are whole blocks; their number is negative if less is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10 * 2**30, 40 * 2**30))
    rows = count_fitting_rows(torch.device("cuda"), 100_000)
    assert rows % 16 == 0
    assert 0 <= 6.5 * 2**30 - rows * 100_000 < 16 * 100_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2**30, 40 * 2**30))
    assert count_fitting_rows(torch.device("cuda"), 100_000) < 0


def test_rows_are_counted_in_blocks():
    assert [round_up(number) for number in (1, 16, 17)] == [16, 16, 32]
    assert count_fitting_rows(torch.device("cpu"), 10) >= 10**9


def test_counted_rows_hold_any_of_the_requests_concurrently():
    """Each request takes whole blocks; here its last block is almost empty."""
    requests = [
        Request(id=str(n), prompt_ids=(n,) * (16 * n + 12), sampling=Sampling(max_tokens=5)) for n in range(1, 9)
    ]
    sizes = sorted((request.num_tokens for request in requests), reverse=True)
    for chosen in (requests, requests[:5], requests[-5:]):
        limits = Limits(cache_rows=count_rows(sizes, len(chosen)))
        scheduler = Scheduler(limits, 1, lambda: 0)
        for request in chosen:
            scheduler.submit(request)
        scheduler.next_batch()
        assert scheduler.num_active == len(chosen)
