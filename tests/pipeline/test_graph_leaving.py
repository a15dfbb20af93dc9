"""Filter of Ray's log for stages that leave a graph."""

from __future__ import annotations

import logging

import pytest
import ray.dag.compiled_dag_node
from ray.exceptions import ActorDiedError, GetTimeoutError

import finlora.pipeline.graph  # noqa: F401  (it adds the filter)


@pytest.mark.parametrize(
    ("error", "is_shown"), [(ActorDiedError(), False), (GetTimeoutError("30 s"), True), (None, True)]
)
def test_traceback_of_a_crashed_stage_is_not_shown(error, is_shown):
    shown = []
    logger, handler = ray.dag.compiled_dag_node.logger, logging.Handler()
    handler.emit = shown.append
    logger.addHandler(handler)
    try:
        logger.error("Error cancelling worker task", exc_info=error)
    finally:
        logger.removeHandler(handler)
    assert len(shown) == is_shown
