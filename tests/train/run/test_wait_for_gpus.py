"""A run whose cores are taken: the holder's name, the end of the wait, a stop during it, and the start afterwards."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, contextmanager

import pytest
from runs import folder_of, losses_of

from finlora.cluster.lease import take_lease
from finlora.errors import ResourceError, StoppedError
from finlora.train.run.attempts import read_attempts

pytestmark = pytest.mark.ray


@contextmanager
def every_core_taken():
    """Hold all cores while inside; yields a function that releases them early."""
    import ray

    with ExitStack() as lease:
        cores = ray.cluster_resources()["CPU"]
        lease.enter_context(take_lease([{"CPU": cores}], 60.0, lambda _line: None, name="serve-of-otto"))
        yield lease.close


def test_wait_ends_with_the_holders_name_and_the_run_goes_on_later(configure, ray_instance):
    from ray.experimental.internal_kv import _internal_kv_get

    from finlora.train.worker import run_training

    held = r"0 of \d+ free; held: \d+ by serve-of-otto \(job .*"
    with (
        every_core_taken(),
        pytest.raises(ResourceError, match=rf"CPU wanted, {held}Waited \d+ s \(max_wait_s=2\): stop one of them"),
    ):
        run_training(configure("name=taken", "train.max_steps=1", "max_wait_s=2"))
    (refused,) = read_attempts(folder_of(configure("name=taken")))
    assert refused.waited >= 1.0
    lines = []
    config = configure("name=taken", "train.max_steps=1")
    with every_core_taken() as give_back:

        def hear(line):
            if line.startswith("Waiting"):
                lines.append(line)
                give_back()

        result = run_training(config, hear)
    assert [line.partition(",")[0] for line in lines] == ["Waiting"]
    assert "by serve-of-otto" in lines[0]
    assert [step for step, _ in losses_of(config)] == [1]
    assert not folder_of(config).waiting.exists()
    group = folder_of(config).group.read_text()
    assert _internal_kv_get(group, namespace="finlora") == b"the training taken"  # for others that wait
    # Waiting and work of both attempts, counted separately.
    both = read_attempts(folder_of(config))
    assert (result.attempts, result.waited_seconds) == (2, sum(each.waited for each in both))
    assert result.waited_seconds > refused.waited
    assert result.wall_seconds == sum(each.seconds for each in both)
    assert both[0] == refused


def test_stop_during_the_wait_ends_it(configure, ray_instance):
    from finlora.train.worker import run_training

    def stop_when_told(line):
        if line.startswith("Waiting"):
            os.kill(os.getpid(), signal.SIGTERM)

    with every_core_taken(), pytest.raises(StoppedError, match=r"^Stopped by SIGTERM before the first step: ") as stop:
        run_training(configure("name=never-placed"), stop_when_told)
    assert stop.value.exit_code == 143
