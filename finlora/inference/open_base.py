"""Base model of a config as an executor: one stage in this process, or several in actors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from finlora.config import RunConfig
from finlora.data.encode import end_token_id
from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore, Executor
from finlora.engine.kv_cache import BLOCK
from finlora.engine.micro_batch import MicroBatch
from finlora.engine.request import ADAPTER
from finlora.engine.scheduler import Scheduler
from finlora.errors import ResourceError
from finlora.grammar.vocabulary import Vocabulary
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.base_files import BaseFiles
from finlora.model.memory.fixed_memory import GIB
from finlora.stage.decode_graphs import DECODE_SIZES, FEW_TAILS, PROMPT_SIZES, SHORT
from finlora.stage.stage import Stage

_ROOM_SHARE, _ROOM_BYTES = 0.05, 1.5 * GIB
"""Share of a GPU's memory, and bytes, kept free for the activations of a micro-batch."""
ODD_ROWS = 37
"""Rows beyond the largest micro-batch in the warm-up, so that a row count that is no multiple of 16 is compiled too."""


@contextmanager
def open_executor(
    config: RunConfig, files: BaseFiles, num_stages: int, wanted_rows: int, least_rows: int
) -> Iterator[tuple[Executor, int]]:
    """Load a base model while inside; yields its executor, and the rows of its KV cache.

    Args:
        config: eval.bits and eval.device apply to the base.
        files: of the base.
        num_stages: 1: in this process; more: in that many Ray actors, Ray being connected.
        wanted_rows: tokens that the KV cache should hold.
        least_rows: tokens that it must hold; if wanted_rows do not fit, it gets as many as do.

    Raises:
        ModelError: the base's files are not usable.
        ResourceError: the device's memory or the cluster's resources are too small.
    """
    bits = config.eval.bits or config.model.bits
    wanted_rows, least_rows = round_up(wanted_rows), round_up(least_rows)
    if num_stages > 1:
        from finlora.pipeline.pipeline import Pipeline, PipelineConfig

        settings = PipelineConfig(
            num_stages=num_stages,
            cache_rows=wanted_rows,
            device=config.eval.device,
            gpus_per_stage=config.eval.num_gpus,
            cpus_per_stage=1.0 / num_stages,  # one core in all, as an evaluation reserves
            transport=config.eval.transport,
            wait_s=config.max_wait_s,
            holder=f"the model of {config.name} in stages",
        )
        pipeline = Pipeline(config.model, files.shape, bits, settings, config.seed)
        try:
            yield pipeline, wanted_rows
        finally:
            pipeline.close()
        return
    device = torch.device("cuda:0" if config.eval.device == "cuda" else "cpu")
    with quiet_bitsandbytes():
        base = load_base(config.model, bits, device, config.seed, files=files, is_bare=True)
        net, dtype = base.model, base.dtype
        span = range(net.config.num_hidden_layers)
        width = 2 * net.config.num_key_value_heads * net.config.head_dim * dtype.itemsize
        rows = min(wanted_rows, count_fitting_rows(device, len(span) * width))
        if rows < least_rows:
            raise ResourceError(
                f"the KV cache has room for {max(0, rows):,} tokens beside the base at {bits} bit and one request needs "
                f"{least_rows:,}: choose fewer bits (eval.bits), more stages (eval.num_stages), or a larger GPU."
            )
        vocabulary = Vocabulary(base.tokenizer, end_token_id(base.tokenizer, config.model.template))
        yield InProcess([Stage(net, span, rows, dtype, vocabulary=vocabulary)]), rows


class OpenEngine(NamedTuple):
    """An engine over a loaded base model."""

    core: EngineCore
    renew: Callable[[], EngineCore] | None
    """Restarts only the lost stages and returns a core over all, without requests; errors as in Pipeline.repair. None: there is
    one process."""


@contextmanager
def open_engine(
    config: RunConfig,
    files: BaseFiles,
    adapter: Path | None,
    num_stages: int,
    wanted_rows: int,
    least_rows: int,
) -> Iterator[OpenEngine]:
    """Load a base model and at most one adapter, named ADAPTER, while inside; arguments and errors as in `open_executor`."""
    with open_executor(config, files, num_stages, wanted_rows, least_rows) as (executor, rows):
        in_flight = choose_in_flight(num_stages, config.eval.device, config.eval.num_gpus)
        limits = Limits(
            cache_rows=rows,
            max_in_flight=in_flight,
            max_batch_tokens=choose_batch_rows(in_flight),
            follows=executor.can_follow,
        )
        end = end_token_id(files.tokenizer, config.model.template)

        def make_core() -> EngineCore:
            return EngineCore(executor, Scheduler(limits, end, lambda: random.getrandbits(31)), files.tokenizer)

        core = make_core()
        if adapter is not None:
            core.load_adapter(ADAPTER, adapter)
        if isinstance(executor, InProcess):
            yield OpenEngine(core, None)
            return
        from finlora.pipeline.pipeline import Pipeline

        assert isinstance(executor, Pipeline)

        def renew() -> EngineCore:
            executor.repair()
            renewed = make_core()
            renewed.adapters |= executor.adapters
            return renewed

        yield OpenEngine(core, renew)


def choose_in_flight(num_stages: int, device: str, gpus_per_stage: float) -> int:
    """Return the number of micro-batches in flight: one for each processor that the stages compute on.

    Stages that share a GPU take turns on it. More micro-batches would be smaller, and each of them reads all weights.

    Args:
        device: `cuda` or `cpu`.
        gpus_per_stage: GPUs of a stage, or a share of one; ignored on CPU.
    """
    if device != "cuda" or gpus_per_stage >= 1:
        return num_stages
    return min(num_stages, max(1, math.ceil(num_stages * gpus_per_stage - 1e-6)))


def choose_batch_rows(in_flight: int) -> int:
    """Return the most rows of a micro-batch.

    With one in flight, six times as many rows read and unpack the weights a sixth as often; several stages are kept busy by more
    micro-batches of fewer rows.
    """
    return 12288 if in_flight == 1 else 2048


def warm_up(executor: Executor, num_rows: int, batch_tokens: int) -> None:
    """Warm up every batch shape, so that no request waits for kernels to compile or CUDA graphs to be captured.

    Args:
        executor: with an empty KV cache.
        num_rows: rows of its cache.
        batch_tokens: most rows of a micro-batch.
    """
    longest = min(batch_tokens, num_rows)
    sizes, label_counts = [size for size in PROMPT_SIZES if size < longest], (0, 1, FEW_TAILS + 1)
    # Rows of labels come on top of the largest micro-batch, in any number: counts that are no multiple of 16 are compiled again.
    whole = [(longest, 0), (longest // 2, 0), (longest, 0), (min(longest + ODD_ROWS, num_rows), FEW_TAILS + 1)]
    # The first run is eager, the second is captured: prompts alone, and with the last tokens of labels, a few and many.
    recorded = [(size, num_labels) for size, num_labels in product(sizes, label_counts) if num_labels < size]
    for size, num_labels in (*whole, *recorded, *recorded):
        _pass(executor, _make_prompts(size, num_labels))
    for size in (*DECODE_SIZES, *DECODE_SIZES):  # eager, then captured
        tokens = MicroBatch(0, adapters=[(None, size)])
        for _ in range(size):
            tokens.add([0], 0, [num_rows], [(num_rows, 1)])  # the spare row behind the cache
        _pass(executor, tokens)


def _make_prompts(num_rows: int, num_labels: int) -> MicroBatch:
    """Return a micro-batch of one prompt, or of short ones if it has many labels; each label adds one row."""
    batch, left = MicroBatch(0, adapters=[(None, num_rows)]), num_rows - num_labels
    first = size = min(left, SHORT) if num_labels > 1 else left
    while left:
        start, size = batch.num_rows, min(left, size)
        batch.add([0] * size, 0, range(start, start + size), [(start, size)])
        left -= size
    for row in range(batch.num_rows, num_rows):
        batch.add([0], first, [row], [(0, first), (row, 1)])
    return batch


def _pass(executor: Executor, batch: MicroBatch) -> None:
    executor.start(batch)
    executor.collect()


def count_fitting_rows(device: torch.device, row_bytes: int) -> int:
    """Return the cache rows that fit into a device's free memory; on CPU, no limit."""
    if device.type != "cuda":
        return 2**40
    free, total = torch.cuda.mem_get_info(device)
    room = free - _ROOM_SHARE * total - _ROOM_BYTES
    return int(room / row_bytes) // BLOCK * BLOCK


def count_rows(sizes: Sequence[int], at_once: int) -> int:
    """Return the cache rows that fit any `at_once` requests beside one kept prefix.

    Args:
        sizes: most rows of each request, the largest first.
    """
    return sum(map(round_up, sizes[:at_once])) + round_up(sizes[0])


def round_up(num_tokens: int) -> int:
    """Return a number of cache rows rounded up to whole blocks."""
    return -(-num_tokens // BLOCK) * BLOCK
