"""Sampling: every example once an epoch, batches that do not depend on the number of workers."""

from __future__ import annotations

from collections import Counter

import pytest

from finlora.train.sampler import Sampler


def make(num_examples=37, world_size=1, seed=3, global_batch_size=8):
    return Sampler(
        num_examples=num_examples,
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


def test_shares_of_workers_differ_by_one_example_at_most():
    sampler = make(num_examples=39, world_size=4)
    sizes = [len(sampler.share(sampler.global_batch(4), worker)) for worker in range(4)]
    assert sizes == [2, 2, 2, 1]


def test_order_changes_with_epoch_and_seed_and_repeats_for_both():
    epochs = [seen(make(), range(epoch * 5, epoch * 5 + 5)) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert seen(make(), range(5)) == epochs[0]
    assert seen(make(seed=4), range(5)) != epochs[0]
