"""Stages held by Ray actors, each on its GPU, a share of one, or CPU cores; micro-batches pass from actor to actor.

The actors form one Ray compiled graph: hidden states go straight from a stage to the next through shared memory, several
micro-batches are under way at once, and each stage works through them in the order in which they were started. Adapters are
loaded by the same way, so they come between the same two micro-batches everywhere.

A stage that dies takes the graph with it and not the others: `repair` starts it alone, in its old place, and joins it to those
that live, whose weights and adapters stay where they are.
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
from finlora.machine.cpu import missing_environment
from finlora.model.source import find_source
from finlora.pipeline.actor import StageActor
from finlora.pipeline.graph import join_stages, leave_graph
from finlora.pipeline.ray_workarounds import tell_lost_stages, wait_with_pauses
from finlora.pipeline.split_layers import split_layers
from finlora.precision import resolve_model

_logger = logging.getLogger(__name__)

_BUFFER_BYTES = 64 * 2**20
"""Largest message between two stages: 2,048 rows of 8,192 in bfloat16 take half of it."""
_TIMEOUT_S = 600.0
_CLOSE_TIMEOUT_S = 2.0
"""Seconds for a stage to leave the graph by itself: now and then one goes on waiting for a message that nobody sends any more."""
_REPAIR_TIMEOUT_S = 15.0
"""The same where it is to live on: it may compute a long prompt first."""
_SIGN_TIMEOUT_S = 30.0
"""Seconds for a loaded stage to do what takes it a moment; one that does not is taken for dead."""
_POLL_S = 1.0


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
    transport: Transport = "messages"
    """How hidden states travel: beside Ray's messages, or by torch.distributed (hidden_states.py). With messages they
    stay on the GPU where the next stage reaches its memory (hidden_states_gpu.py), and are within the message elsewhere."""
    wait_s: float | None = 600.0
    """Seconds to wait for the stages' places while others hold them. None: without limit."""
    holder: str = "a model in stages"
    """Whom others read of who wait for these GPUs and cores."""


class Pipeline:
    """An executor over stage actors. Ray must be connected; call `close` at the end.

    Raises:
        ResourceError: the cluster has too little for the stages, or others held it for too long, says who; or one cannot load.
        StageLostError: one died meanwhile.
        ModelError: the base's files are not usable.
    """

    can_follow = True

    def __init__(self, model: ModelConfig, bits: Bits, config: PipelineConfig, seed: int) -> None:
        model = resolve_model(model, config.device)  # once for all stages, which may lie on different processors
        shape = find_source(model).shape
        self.spans = split_layers(shape, bits, config.num_stages)
        self._model, self._bits, self._config, self._seed = model, bits, config, seed
        wait_with_pauses(config.device)
        self._gpus = config.gpus_per_stage if config.device == "cuda" else 0.0
        self._require(config.num_stages, config.cpus_per_stage, self._gpus)
        # All places or none: two pipelines that each got half of theirs would wait for each other for good.
        bundle = {kind: share for kind, share in (("CPU", config.cpus_per_stage), ("GPU", self._gpus)) if share}
        self._lease = ExitStack()
        self._group = self._lease.enter_context(
            take_lease([bundle] * config.num_stages, config.wait_s, _logger.warning, config.holder)
        )
        self.actors = [self._start_actor(index) for index in range(config.num_stages)]
        self.adapters: dict[str, Path] = {}
        """Folder of each adapter that every stage has."""
        self._hashes: dict[str, str] = {}  # of their files
        self._in_flight: deque[Any] = deque()  # messages
        self._buffers: deque[int] = deque()  # send buffers of messages whose answer has not come
        self._answers_come_late = False  # each only behind the next message
        self._started: dict[int, int] = {}
        """Tickets of the micro-batches that were not collected, by number."""
        self._outputs: deque[Output] = deque()
        self._tickets = itertools.count(1)
        self._graph: Any = None
        try:
            with tell_lost_stages():
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
            self._change(Change(name, None))  # the stages before the one that refused it
            raise
        self.adapters[name], self._hashes[name] = folder, digest

    def unload_adapter(self, name: str) -> None:
        self.adapters.pop(name, None)
        self._change(Change(name, None))

    @tell_lost_stages()
    def peak_memory_gib(self) -> float | None:
        # Asked for, and not in each message: to read torch's counters takes as long as to queue a pass.
        peaks: list[float] = ray.get([actor.peak_memory_gib.remote() for actor in self.actors], timeout=_SIGN_TIMEOUT_S)
        return sum(peaks)

    @tell_lost_stages()
    def check(self) -> None:
        """Raise StageLostError where a stage is dead or gives no sign."""
        ray.get([actor.describe.remote() for actor in self.actors], timeout=_SIGN_TIMEOUT_S)

    @tell_lost_stages()
    def repair(self) -> list[int]:
        """Start dead stages alone, and join them to those that live. Nothing is under way and all caches are empty after it.

        Living stages keep weights and adapters, new ones load them again; an adapter whose files are no longer what the others
        hold is dropped everywhere, and missing in `adapters`.

        Returns:
            Numbers of the stages that were started, from 0.

        Raises:
            StageLostError: none is dead, so it is not known which one failed; or all are, or another one died meanwhile.
            ResourceError: the place of a dead stage did not come back in time, or a new one cannot load. After each of them only
                `close` and a new pipeline help.
        """
        dead = sorted(self._leave_graph(_REPAIR_TIMEOUT_S, lives_on=True) | self._find_dead())
        if not dead or len(dead) == len(self.actors):
            raise StageLostError(f"{len(dead)} of {len(self.actors)} stages are dead: only a new pipeline helps.")
        for index in dead:
            ray.kill(self.actors[index])
            self.actors[index] = self._start_actor(index)
        living = [actor for index, actor in enumerate(self.actors) if index not in dead]
        ray.get([actor.reset.remote() for actor in living], timeout=_SIGN_TIMEOUT_S)
        for index, facts in zip(dead, self._await_loaded([self.actors[index] for index in dead]), strict=True):
            self.stages[index] = facts
        for name, folder in list(self.adapters.items()):
            try:
                ray.get(
                    [self.actors[index].load_adapter.remote(name, str(folder), self._hashes[name]) for index in dead]
                )
            except AdapterError as error:
                _logger.warning("Adapter %s cannot be put back and is unloaded: %s", name, error)
                ray.get([actor.unload_adapter.remote(name) for actor in self.actors], timeout=_SIGN_TIMEOUT_S)
                del self.adapters[name]
        self._connect()
        return dead

    def close(self) -> None:
        """End the actors and free what they hold."""
        self._leave_graph(_CLOSE_TIMEOUT_S, lives_on=False)
        for actor in self.actors:
            ray.kill(actor)
        self._lease.close()

    def _start_actor(self, index: int) -> Any:
        config, span, actor = self._config, self.spans[index], ray.remote(StageActor)
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        # A replica of `serve deploy` has the environment of `ray start`, and so would its stages.
        missing = missing_environment() if config.device == "cpu" else {}
        own = {"runtime_env": {"env_vars": missing}} if missing else {}
        options: Any = actor.options(
            num_cpus=config.cpus_per_stage, num_gpus=self._gpus, scheduling_strategy=place, **own
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
        """Join loaded stages that have no graph."""
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

    def _leave_graph(self, timeout_s: float, *, lives_on: bool) -> set[int]:
        """Give up what is under way and have the stages leave the graph; those that do not are killed and returned."""
        graph, self._graph = self._graph, None
        if graph is None:
            return set()
        stuck = leave_graph(graph, self.actors, timeout_s, lives_on=lives_on)
        self._in_flight.clear()  # only now: what waits in a graph that stands is still fetched by it
        self._buffers.clear()
        self._outputs.clear()
        self._started.clear()
        return stuck

    def _find_dead(self) -> set[int]:
        refs = [actor.describe.remote() for actor in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=_SIGN_TIMEOUT_S)
        dead = set()
        for index, ref in enumerate(refs):
            try:
                ray.get(ref, timeout=0)
            except RayError:  # it died, or it has given no sign
                dead.add(index)
        return dead

    def _await_loaded(self, actors: Sequence[Any]) -> list[dict[str, float]]:
        """Return what new actors hold once they are loaded; only the wait for their places is bounded.

        Raises:
            ResourceError: a place lay on a node that is gone, and no other came in time.
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
        with tell_lost_stages():
            self._in_flight.append(self._graph.execute(message))
        self._buffers.append(buffer)

    def _receive(self) -> Any:
        message = Message(None)
        with tell_lost_stages():
            if self._answers_come_late and len(self._buffers) == 1:  # nothing is behind it
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
                    f"{num_stages} stages need {need:g} {name}s and the cluster has {there.get(name, 0.0):g}: take fewer stages, "
                    f"a smaller share of {name}s for each, or add nodes."
                )
