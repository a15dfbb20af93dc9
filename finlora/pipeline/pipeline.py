"""Pipeline of stages in Ray actors, each on a GPU, a share of one, or CPU cores.

The actors form one Ray compiled graph: messages go from a stage to the next without the driver, several micro-batches are in
flight at once, and each stage computes them in the order in which they were started. Adapters are loaded by messages too, so
between the same two micro-batches on all stages.

A stage crash ends the graph, but not the other stages: `repair` restarts the dead stage alone, with its old resources, and joins
it to the others, which keep weights and adapters.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.dag import InputNode
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from finlora.cluster.lease import Patience, take_lease
from finlora.config import Bits, ModelConfig, Transport
from finlora.engine.messages import Change, Message
from finlora.engine.micro_batch import MicroBatch, Output
from finlora.errors import AdapterError, FinloraError, ResourceError, StageLostError
from finlora.formula.llama import LlamaShape
from finlora.machine.cpu import missing_environment
from finlora.pipeline.actor import StageActor
from finlora.pipeline.graph import join_stages, leave_graph
from finlora.pipeline.ray_workarounds import translate_ray_errors, wait_with_pauses
from finlora.pipeline.split_layers import split_layers
from finlora.precision import resolve_model

_logger = logging.getLogger(__name__)

_BUFFER_BYTES = 64 * 2**20
"""Largest message between two stages; 2,048 rows of 8,192 in bfloat16 take half of it."""
_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 2.0
"""Seconds for a stage to leave the graph; now and then one blocks on a message that will not come."""
_REPAIR_TIMEOUT_S = 15.0
"""The same in a repair, where the stage is kept: it may compute a long prompt first."""
_CHECK_TIMEOUT_S = 30.0
"""Seconds for a loaded stage to answer a short call; one that does not counts as dead."""
_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Number of stages, their resources, and how they are linked."""

    num_stages: int
    cache_rows: int
    """Tokens of the KV cache; each stage has the rows of its own layers."""
    device: str = "cuda"
    """`cuda` or `cpu`; never chosen automatically."""
    gpus_per_stage: float = 1.0
    cpus_per_stage: float = 1.0
    keep_unpacked: bool = False
    """Hold 4-bit weights unpacked."""
    transport: Transport = "messages"
    """How hidden states are sent: with `messages`, through GPU memory where two stages share it and within Ray's messages
    elsewhere; otherwise by torch.distributed (finlora/pipeline/transports.py)."""
    wait_s: float | None = 600.0
    """Most seconds to wait for the stages' resources while others hold them. None: no limit."""
    holder: str = "a model in stages"
    """Shown as the holder to others who wait for these GPUs and cores."""


class Pipeline:
    """Executor over stage actors. Ray must be connected; call `close` at the end.

    Raises:
        ResourceError: the cluster is too small for the stages, others held its resources for too long, or a stage cannot load.
        StageLostError: a stage crashed meanwhile.
        ModelError: the base's files are not usable.
    """

    can_follow = True

    def __init__(self, model: ModelConfig, shape: LlamaShape, bits: Bits, config: PipelineConfig, seed: int) -> None:
        model = resolve_model(model, config.device)  # once for all stages, which may run on different processors
        self.spans = split_layers(shape, bits, config.num_stages, config.device)
        self._model, self._bits, self._config, self._seed = model, bits, config, seed
        wait_with_pauses(config.device)
        self._gpus = config.gpus_per_stage if config.device == "cuda" else 0.0
        self._require(config.num_stages, config.cpus_per_stage, self._gpus)
        # All bundles or none: two pipelines that each got half of theirs would deadlock.
        bundle = {kind: share for kind, share in (("CPU", config.cpus_per_stage), ("GPU", self._gpus)) if share}
        self._lease = ExitStack()
        self._group = self._lease.enter_context(
            take_lease([bundle] * config.num_stages, config.wait_s, _logger.warning, config.holder)
        )
        self.actors = [self._start_actor(index) for index in range(config.num_stages)]
        self.adapters: dict[str, Path] = {}
        """Folders of the adapters that all stages have loaded."""
        self._hashes: dict[str, str] = {}  # of the adapters' files
        self._in_flight: deque[Any] = deque()  # Ray's references of messages
        self._buffers: deque[int] = deque()  # send buffers of messages in flight
        self._answers_come_late = False  # each only with the next message
        self._started: dict[int, int] = {}
        """Number of each micro-batch in flight -> its ticket."""
        self._outputs: deque[Output] = deque()
        self._tickets = itertools.count(1)
        self._graph: Any = None
        try:
            with translate_ray_errors():
                self.stages: list[dict[str, float]] = ray.get([actor.describe.remote() for actor in self.actors])
                self._connect()
        except BaseException:
            self.close()
            raise

    def start(self, batch: MicroBatch) -> None:
        self._send(batch)

    def collect(self) -> Output:
        output: Output = self._outputs.popleft() if self._outputs else self._receive()
        del self._started[output.number]
        return output

    def load_adapter(self, name: str, folder: Path) -> None:
        try:
            digest = self._change(Change(name, str(folder)))
        except FinloraError:
            self._change(Change(name, None))  # from the stages before the one that refused it
            raise
        self.adapters[name], self._hashes[name] = folder, digest

    def unload_adapter(self, name: str) -> None:
        self.adapters.pop(name, None)
        self._change(Change(name, None))

    @translate_ray_errors()
    def peak_memory_gib(self) -> float | None:
        # Not part of each message: reading torch's counters takes as long as queuing a pass.
        peaks: list[float] = ray.get(
            [actor.peak_memory_gib.remote() for actor in self.actors], timeout=_CHECK_TIMEOUT_S
        )
        return sum(peaks)

    def prepare_grammars(self) -> None:
        """Let the last stage get ready for requests with a grammar; returns at once."""
        self.actors[-1].prepare_grammars.remote()

    @translate_ray_errors()
    def check(self) -> None:
        """Health check: raises StageLostError if a stage is dead or does not answer."""
        ray.get([actor.describe.remote() for actor in self.actors], timeout=_CHECK_TIMEOUT_S)

    @translate_ray_errors()
    def repair(self) -> list[int]:
        """Restart only the dead stages, and join them to the others. Then no micro-batch is in flight and all caches are empty.

        The other stages keep weights and adapters, restarted ones load them again. An adapter whose files have changed is
        unloaded everywhere and removed from `adapters`.

        Returns:
            Numbers of the restarted stages, from 0.

        Raises:
            StageLostError: no stage is dead, so it is not known which one failed; or all are, or another one crashed meanwhile.
            ResourceError: the resources of a dead stage did not become free in time, or a new stage cannot load. After either
                error only `close` and a new pipeline help.
        """
        dead = sorted(self._leave_graph(_REPAIR_TIMEOUT_S, keeps_stages=True) | self._find_dead())
        if not dead or len(dead) == len(self.actors):
            raise StageLostError(f"{len(dead)} of {len(self.actors)} stages are dead: only a new pipeline helps.")
        for index in dead:
            ray.kill(self.actors[index])
            self.actors[index] = self._start_actor(index)
        living = [actor for index, actor in enumerate(self.actors) if index not in dead]
        ray.get([actor.reset.remote() for actor in living], timeout=_CHECK_TIMEOUT_S)
        for index, facts in zip(dead, self._await_loaded([self.actors[index] for index in dead]), strict=True):
            self.stages[index] = facts
        for name, folder in list(self.adapters.items()):
            try:
                ray.get(
                    [self.actors[index].load_adapter.remote(name, str(folder), self._hashes[name]) for index in dead]
                )
            except AdapterError as error:
                _logger.warning("Adapter %s cannot be loaded again and is dropped: %s", name, error)
                ray.get([actor.unload_adapter.remote(name) for actor in self.actors], timeout=_CHECK_TIMEOUT_S)
                del self.adapters[name]
        self._connect()
        return dead

    def close(self) -> None:
        """Kill the actors and free their resources."""
        self._leave_graph(_CLOSE_TIMEOUT_S, keeps_stages=False)
        for actor in self.actors:
            ray.kill(actor)
        self._lease.close()

    def _start_actor(self, index: int) -> Any:
        config, span, actor = self._config, self.spans[index], ray.remote(StageActor)
        bundle = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        # Without it, stages of a replica of `serve deploy` would inherit the environment of `ray start`.
        missing = missing_environment() if config.device == "cpu" else {}
        own = {"runtime_env": {"env_vars": missing}} if missing else {}
        options: Any = actor.options(
            num_cpus=config.cpus_per_stage, num_gpus=self._gpus, scheduling_strategy=bundle, **own
        )
        return options.remote(
            dataclasses.asdict(self._model),
            self._bits,
            (span.start, span.stop),
            self._seed,
            device=config.device,
            cache_rows=config.cache_rows,
            keep_unpacked=config.keep_unpacked,
        )

    def _connect(self) -> None:
        """Join loaded stages, and compile their graph."""
        self._answers_come_late = join_stages(self.actors, self._config.transport, next(self._tickets))
        with InputNode() as message:
            node = message
            for actor in self.actors:
                node = actor.run.bind(node)
        self._graph = node.experimental_compile(
            _buffer_size_bytes=_BUFFER_BYTES,
            _submit_timeout=_TIMEOUT_S,
            _max_inflight_executions=len(self.actors) + 3,
        )

    def _leave_graph(self, timeout_s: float, *, keeps_stages: bool) -> set[int]:
        """Discard micro-batches in flight and tear down the graph; stages that do not leave it are killed and returned."""
        graph, self._graph = self._graph, None
        if graph is None:
            return set()
        stuck = leave_graph(graph, self.actors, timeout_s, keeps_stages=keeps_stages)
        self._in_flight.clear()  # only now: dropping references makes a live graph fetch their results
        self._buffers.clear()
        self._outputs.clear()
        self._started.clear()
        return stuck

    def _find_dead(self) -> set[int]:
        refs = [actor.describe.remote() for actor in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=_CHECK_TIMEOUT_S)
        dead = set()
        for index, ref in enumerate(refs):
            try:
                ray.get(ref, timeout=0)
            except RayError:  # it is dead, or has not answered
                dead.add(index)
        return dead

    def _await_loaded(self, actors: Sequence[Any]) -> list[dict[str, float]]:
        """Return the sizes of new actors once they are loaded; only the wait for their resources is bounded.

        Raises:
            ResourceError: the node of a stage is gone, and no other had room in time.
        """
        refs = [actor.describe.remote() for actor in actors]
        patience = Patience(self._config.wait_s, _logger.warning)
        while ray.wait(refs, num_returns=len(refs), timeout=_POLL_S)[1]:
            if placement_group_table(self._group)["state"] != "CREATED":
                patience.check("the node of a stage is gone, and no other has room for the stage")
        facts: list[dict[str, float]] = ray.get(refs)
        return facts

    def _change(self, change: Change) -> Any:
        while self._buffers:
            self._outputs.append(self._receive())
        self._send(change)
        return self._receive()

    def _send(self, work: MicroBatch | Change) -> None:
        buffer = next(index for index in range(len(self._buffers) + 1) if index not in self._buffers)
        ticket, follows = next(self._tickets), None
        if isinstance(work, MicroBatch):
            self._started[work.number] = ticket
            follows = None if work.follows is None else self._started[work.follows]
        message = Message(work, buffer=buffer, ticket=ticket, follows=follows)
        with translate_ray_errors():
            self._in_flight.append(self._graph.execute(message))
        self._buffers.append(buffer)

    def _receive(self) -> Any:
        message = Message(None)
        with translate_ray_errors():
            if self._answers_come_late and len(self._buffers) == 1:  # no later message brings its answer
                self._in_flight.append(self._graph.execute(message))
            while message.is_empty:
                message = ray.get(self._in_flight.popleft(), timeout=_TIMEOUT_S)
        self._buffers.popleft()
        if isinstance(message.state, FinloraError):
            raise message.state
        if isinstance(message.state, Output):
            return dataclasses.replace(message.state, stage_seconds=message.seconds)
        return message.state

    @staticmethod
    def _require(num_stages: int, cpus: float, gpus: float) -> None:
        there = ray.cluster_resources()
        for name, need in (("GPU", gpus * num_stages), ("CPU", cpus * num_stages)):
            if need > there.get(name, 0.0):
                raise ResourceError(
                    f"{num_stages} stages need {need:g} {name}s and the cluster has {there.get(name, 0.0):g}: choose fewer "
                    f"stages, reserve fewer {name}s for each stage, or add nodes."
                )
