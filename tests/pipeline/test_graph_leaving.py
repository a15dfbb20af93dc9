"""What Ray says of stages that leave a graph, as far as it is news."""

from __future__ import annotations

import logging

import pytest
import ray.dag.compiled_dag_node
from ray.exceptions import ActorDiedError, GetTimeoutError

import finlora.pipeline.graph  # noqa: F401  (it decides what passes)


@pytest.mark.parametrize(
    ("error", "is_told"), [(ActorDiedError(), False), (GetTimeoutError("30 s"), True), (None, True)]
)
def test_traceback_of_a_stage_that_is_known_to_be_dead_is_not_shown(error, is_told):
    told = []
    logger, handler = ray.dag.compiled_dag_node.logger, logging.Handler()
    handler.emit = told.append
    logger.addHandler(handler)
    try:
        logger.error("Error cancelling worker task", exc_info=error)
    finally:
        logger.removeHandler(handler)
    assert len(told) == is_told
