"""Sampler: every example once in an epoch, batches that do not depend on the number of workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from finlora.train.steps.sampler import Sampler


def make(num_examples=37, world_size=1, seed=3, global_batch_size=8):
    lengths = np.random.default_rng(num_examples).integers(20, 500, num_examples).tolist()
    return Sampler(
        lengths=lengths,
        global_batch_size=global_batch_size,
        world_size=world_size,
        seed=seed,
    )


def seen(sampler, steps):
    """Return the examples of all workers over some steps."""
    return [
        index
        for step in steps
        for worker in range(sampler.world_size)
        for index in sampler.share(sampler.global_batch(step), worker)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_examples", [32, 33, 37, 39, 5])
def test_every_example_is_seen_once_an_epoch(num_examples, world_size):
    sampler = make(num_examples, world_size)
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        assert Counter(seen(sampler, steps)) == Counter(range(num_examples))


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batch_does_not_depend_on_the_workers(world_size):
    one, many = make(), make(world_size=world_size)
    for step in range(12):
        assert many.global_batch(step) == one.global_batch(step)
        assert sorted(seen(many, [step])) == sorted(one.global_batch(step))


def test_last_batch_of_an_epoch_holds_what_is_left():
    sampler = make(num_examples=37)
    assert sampler.steps_per_epoch == 5
    assert [len(sampler.global_batch(step)) for step in range(6)] == [8, 8, 8, 8, 5, 8]


def test_workers_beyond_a_small_batch_get_nothing():
    sampler = make(num_examples=33, world_size=4)
    batch = sampler.global_batch(4)
    assert [sampler.share(batch, worker) for worker in range(4)] == [batch, [], [], []]


def test_no_worker_has_more_examples_than_an_even_deal_gives():
    sampler = make(num_examples=39, world_size=4)
    sizes = [len(sampler.share(sampler.global_batch(4), worker)) for worker in range(4)]
    assert sorted(sizes) == [1, 2, 2, 2]


def test_longest_come_first_and_each_goes_to_the_lightest_worker():
    """By hand: 9 -> a, 8 -> b, 7 -> b? b has 8 and a 9, so 7 -> b (15), then 6 -> a (15), 5 -> a by its number, 4 -> b."""
    sampler = Sampler(lengths=[4, 9, 5, 8, 6, 7], global_batch_size=6, world_size=2, seed=0)
    first, second = sampler.shares([0, 1, 2, 3, 4, 5])
    assert (first, second) == ([1, 2, 4], [0, 3, 5])
    assert [sum(sampler.lengths[index] for index in share) for share in (first, second)] == [20, 19]


def test_workers_wait_less_than_after_a_deal_in_turn():
    sampler = make(num_examples=640, world_size=4, global_batch_size=16)
    loads = {"by length": [], "in turn": []}
    for step in range(40):
        batch = sampler.global_batch(step)
        loads["by length"].append([sum(sampler.lengths[index] for index in share) for share in sampler.shares(batch)])
        loads["in turn"].append([sum(sampler.lengths[index] for index in batch[worker::4]) for worker in range(4)])
    busy = {name: np.mean([np.mean(step) / max(step) for step in steps]) for name, steps in loads.items()}
    assert busy["in turn"] < 0.85
    assert busy["by length"] > 0.96


def test_order_changes_with_epoch_and_seed_and_repeats_for_both():
    epochs = [seen(make(), range(epoch * 5, epoch * 5 + 5)) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert seen(make(), range(5)) == epochs[0]
    assert seen(make(seed=4), range(5)) != epochs[0]
