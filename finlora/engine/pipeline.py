"""Stages held by Ray actors, each on its GPU, a share of one, or CPU cores; micro-batches pass from actor to actor.

The actors form one Ray compiled graph: hidden states go straight from a stage to the next through shared memory, several
micro-batches are under way at once, and each stage works through them in the order in which they were started. Adapters are
loaded by the same way, so they come between the same two micro-batches everywhere.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.dag import DAGContext, InputNode
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from finlora.config import Bits, ModelConfig
from finlora.engine.microbatch import MicroBatch, Output
from finlora.engine.semaphores import remove_left_semaphores
from finlora.engine.spans import split_layers
from finlora.errors import FinloraError, ResourceError
from finlora.lease import take_lease
from finlora.model.shapes import read_shape
from finlora.model.source import find_source

if TYPE_CHECKING:
    from finlora.engine.transport import Neighbours

_logger = logging.getLogger(__name__)

_BUFFER_BYTES = 64 * 2**20
"""Largest message between two stages: 2,048 rows of 8,192 in bfloat16 take half of it."""
_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 2
"""Seconds for a stage to leave the graph by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """How a model is spread over actors."""

    num_stages: int
    cache_rows: int
    """Tokens that the KV cache holds; each stage has the rows of its own layers."""
    device: str = "cuda"
    """`cuda` or `cpu`; never chosen for you."""
    gpus_per_stage: float = 1.0
    cpus_per_stage: float = 1.0
    keep_unpacked: bool = False
    """Hold 4-bit weights unpacked."""
    transport: Literal["messages", "nccl", "gloo"] = "messages"
    """How hidden states travel: within Ray's messages, or by torch.distributed (finlora/engine/transport.py)."""
    wait_s: float | None = 600.0
    """Seconds to wait for the stages' places while others hold them. None: without limit."""


@dataclass(frozen=True, slots=True)
class _Change:
    """Load an adapter, or unload it (folder None)."""

    name: str
    folder: str | None


@dataclass(frozen=True, slots=True)
class _Message:
    """What passes from stage to stage."""

    work: MicroBatch | _Change | None
    state: Any = None
    """Hidden states, an error of a stage before, or from the last stage what the micro-batch asked for."""
    seconds: tuple[float, ...] = ()
    """How long each stage so far worked on it."""
    peaks_gib: tuple[float, ...] = ()
    """The most memory that each stage so far has taken since it was loaded."""


class _StageActor:
    """One stage in a process of its own."""

    def __init__(
        self, model: dict[str, Any], bits: Bits, span: tuple[int, int], config: dict[str, Any], seed: int
    ) -> None:
        import torch

        from finlora.engine.stage import Stage
        from finlora.model.base import load_base, quiet_bitsandbytes

        remove_left_semaphores()
        # oneDNN keeps a kernel for each shape it meets, and micro-batches are of all sizes: with its default of 1,024 a stage on
        # the CPU grew for hours.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
        settings, source = PipelineConfig(**config), ModelConfig(**model)
        device = torch.device("cuda:0" if settings.device == "cuda" else "cpu")
        layers = range(*span)
        self.device, self.settings = device, settings
        self.neighbours: Neighbours | None = None
        with quiet_bitsandbytes():
            base = load_base(source, bits, device, seed, layers)
        dtype = torch.bfloat16 if source.compute_dtype == "bfloat16" else torch.float32
        self.stage = Stage(base.model, layers, settings.cache_rows, dtype, keep_unpacked=settings.keep_unpacked)
        self.weights_gib = base.weights_gib

    def offer(self) -> str:
        """Return an address on which the stages can meet."""
        from finlora.engine.transport import find_free_address

        return find_free_address(ray.util.get_node_ip_address())

    def join(self, stage: int, address: str) -> None:
        """Connect to the stages beside this one."""
        from finlora.engine.transport import Neighbours

        transport, hidden_size = self.settings.transport, self.stage.net.config.hidden_size
        assert transport != "messages"
        self.neighbours = Neighbours(
            transport, stage, self.settings.num_stages, address, hidden_size, self.stage.dtype, self.device
        )

    def describe(self) -> dict[str, float]:
        """Return what the stage holds, which also says that it is loaded."""
        return {"weights_gib": self.weights_gib, "cache_gib": self.stage.cache_bytes / 2**30}

    def run(self, message: _Message) -> _Message:
        """Work on a message from the stage before, and give it to the next."""
        if isinstance(message.state, FinloraError):
            return message
        started = time.perf_counter()
        work: MicroBatch | _Change | None = message.work
        try:
            state = self._work(work, message.state)
        except FinloraError as error:
            state = error
        work = None if isinstance(state, Output) else work
        seconds = (*message.seconds, time.perf_counter() - started)
        return _Message(work, state, seconds, (*message.peaks_gib, self.stage.peak_memory_gib()))

    def _work(self, work: MicroBatch | _Change | None, state: Any) -> Any:
        import torch

        from finlora.model.base import quiet_bitsandbytes

        if isinstance(work, _Change):
            if work.folder is None:
                self.stage.unload_adapter(work.name)
            else:
                self.stage.load_adapter(work.name, Path(work.folder))
            return None
        assert work is not None
        if self.neighbours is not None and not self.stage.is_first:
            state = self.neighbours.receive(work.num_rows)
        with quiet_bitsandbytes():
            result = self.stage.run(work, state)
        if isinstance(result, Output):
            return result
        if self.neighbours is None:
            return result.cpu()
        self.neighbours.send(result)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # until then its seconds are not over
        return None


class Pipeline:
    """An executor over stage actors. Ray must be connected; call `close` at the end.

    Raises:
        ResourceError: the cluster has too little for the stages, or others held it for too long; says who.
        ModelError: the base's files are not usable.
    """

    def __init__(self, model: ModelConfig, bits: Bits, config: PipelineConfig, seed: int) -> None:
        shape = read_shape(find_source(model).folder)
        self.spans = split_layers(shape, bits, config.num_stages)
        gpus = config.gpus_per_stage if config.device == "cuda" else 0.0
        self._require(config.num_stages, config.cpus_per_stage, gpus)
        # All places or none: two pipelines that each got half of theirs would wait for each other for good.
        bundle = {kind: share for kind, share in (("CPU", config.cpus_per_stage), ("GPU", gpus)) if share}
        self._lease = ExitStack()
        name = f"finlora pipeline of {config.num_stages} stages"
        group = self._lease.enter_context(
            take_lease([bundle] * config.num_stages, config.wait_s, _logger.warning, name)
        )
        actor: Any = ray.remote(_StageActor)
        self.actors = [
            actor.options(
                num_cpus=config.cpus_per_stage,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote(dataclasses.asdict(model), bits, (span.start, span.stop), dataclasses.asdict(config), seed)
            for index, span in enumerate(self.spans)
        ]
        self._refs: deque[Any] = deque()
        self._outputs: deque[Output] = deque()
        self._peaks_gib: tuple[float, ...] = ()
        self._graph: Any = None
        try:
            self.stages: list[dict[str, float]] = ray.get([actor.describe.remote() for actor in self.actors])
            if config.transport != "messages":
                address = ray.get(self.actors[0].offer.remote())
                ray.get([actor.join.remote(stage, address) for stage, actor in enumerate(self.actors)])
            with InputNode() as message:
                node = message
                for actor in self.actors:
                    node = actor.run.bind(node)
            self._graph = node.experimental_compile(
                _buffer_size_bytes=_BUFFER_BYTES,
                _submit_timeout=_TIMEOUT_S,
                _max_inflight_executions=config.num_stages + 2,
            )
        except BaseException:
            self.close()
            raise

    def start(self, batch: MicroBatch) -> None:
        self._refs.append(self._graph.execute(_Message(batch)))

    def collect(self) -> Output:
        output: Output = self._outputs.popleft() if self._outputs else self._receive()
        return output

    def load_adapter(self, name: str, folder: Path) -> None:
        self._change(_Change(name, str(folder)))

    def unload_adapter(self, name: str) -> None:
        self._change(_Change(name, None))

    def peak_memory_gib(self) -> float | None:
        return sum(self._peaks_gib) if self._peaks_gib else None

    def close(self) -> None:
        """End the actors and free what they hold."""
        if self._graph is not None:
            # Now and then a stage goes on waiting for a message that nobody sends any more: then it is ended by force.
            DAGContext.get_current().teardown_timeout = _CLOSE_TIMEOUT_S
            self._graph.teardown(kill_actors=True)
        for actor in self.actors:
            ray.kill(actor)
        self._lease.close()

    def _change(self, change: _Change) -> None:
        while self._refs:
            self._outputs.append(self._receive())
        self._refs.append(self._graph.execute(_Message(change)))
        self._receive()

    def _receive(self) -> Any:
        message: _Message = ray.get(self._refs.popleft(), timeout=_TIMEOUT_S)
        if isinstance(message.state, FinloraError):
            raise message.state
        self._peaks_gib = message.peaks_gib
        if isinstance(message.state, Output):
            return dataclasses.replace(message.state, stage_seconds=message.seconds)
        return message.state

    @staticmethod
    def _require(num_stages: int, cpus: float, gpus: float) -> None:
        there = ray.cluster_resources()
        for name, need in (("GPU", gpus * num_stages), ("CPU", cpus * num_stages)):
            if need > there.get(name, 0.0):
                raise ResourceError(
                    f"{num_stages} stages need {need:g} {name}s and the cluster has {there.get(name, 0.0):g}: take fewer stages, "
                    f"a smaller share of {name}s for each, or add nodes."
                )
