"""Served base model: its tokenizer and hashes, and the start of its pipeline stages."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finlora.config import Bits, Template
from finlora.data.encode import end_token_id
from finlora.data.question import Form
from finlora.data.task import Task
from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.scheduler import Scheduler
from finlora.errors import ModelError
from finlora.evaluate.parity_report import find_merged_doubt
from finlora.formula.llama import LlamaShape
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.precision import describe_type
from finlora.serve.settings import ServeConfig
from finlora.serve.stage_states import OpenCore, StageFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedBase:
    """Facts of a base model that need no weights in memory."""

    shape: LlamaShape
    tokenizer: PreTrainedTokenizerFast
    template: Template
    template_date: str | None
    """Date that the chat template writes into prompts for the base alone; an adapter has its own."""
    bits: Bits
    """Bits at which it is served."""
    weights_hash: str
    tokenizer_hash: str
    end_token_id: int
    max_tokens: int
    """Most tokens of prompt and answer together."""
    doubt: str
    """Why the answers of a merged model are not shown to be those of its adapter's training; empty: they are."""
    tasks: Mapping[str, Task]
    """Tasks of task files that a merged model brings."""

    @property
    def forms(self) -> dict[str, Form]:
        """How a user asks its own tasks."""
        return {name: task.form for name, task in self.tasks.items() if task.form is not None}


def read_base(config: ServeConfig, files: BaseFiles | None = None) -> ServedBase:
    """Find a base model and read its tokenizer and hashes.

    Args:
        files: of the base, if this process has found and checked them already. None: it does so here.

    Raises:
        ModelError: the base's files are not usable; or it is a merged model that config.min_agreement excludes.
    """
    files = files or read_base_files(config.model)
    doubt = find_merged_doubt(files.source.folder, files.weights_hash, config.bits, config.min_agreement or 0.0)
    if doubt and config.min_agreement is not None:
        raise ModelError(
            f"model.base={config.model.base} is not shown to answer as it was trained, and this server requires it "
            f"(min_agreement={config.min_agreement:g}): {doubt}."
        )
    longest = min(config.model.max_seq_len, files.context_length, config.stages.cache_rows)
    return ServedBase(
        shape=files.shape,
        tokenizer=files.tokenizer,
        template=config.model.template,
        template_date=files.template_date,
        bits=config.bits,
        doubt=doubt,
        weights_hash=files.weights_hash,
        tokenizer_hash=files.tokenizer_hash,
        end_token_id=end_token_id(files.tokenizer, config.model.template),
        max_tokens=longest,
        tasks=files.tasks,
    )


def open_pipeline(config: ServeConfig, base: ServedBase, holder: str = "a served model") -> OpenCore:
    """Start all stages of a base as Ray actors; Ray must be connected.

    Args:
        holder: name shown to others who wait for these GPUs and cores.

    Raises:
        ResourceError: the cluster has too few GPUs or cores, or others held them for longer than `stages.wait_s`.
        ModelError: the base's files are not usable.
    """
    from finlora.inference.open_base import choose_in_flight, warm_up
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    stages = config.stages
    _logger.info("Computes in %s", describe_type(config.model, stages.device))
    settings = PipelineConfig(
        num_stages=stages.num,
        cache_rows=stages.cache_rows,
        device=stages.device,
        gpus_per_stage=stages.gpus,
        cpus_per_stage=stages.cpus,
        keep_unpacked=stages.keep_unpacked,
        transport=stages.transport,
        wait_s=stages.wait_s,
        holder=holder,
    )
    pipeline = Pipeline(config.model, base.shape, config.bits, settings, config.seed)
    in_flight = choose_in_flight(stages.num, stages.device, stages.gpus)

    def describe() -> OpenCore:
        pipeline.prepare_grammars()
        if stages.device == "cuda":  # compile kernels and capture CUDA graphs before the first request
            warm_up(pipeline, stages.cache_rows, config.limits.max_batch_tokens)
        core = EngineCore(
            pipeline, make_scheduler(config, base, in_flight, follows=pipeline.can_follow), base.tokenizer
        )
        core.adapters |= pipeline.adapters
        facts = tuple(
            StageFacts(
                first_layer=span.start,
                last_layer=span.stop - 1,
                weights_gib=held["weights_gib"],
                cache_gib=held["cache_gib"],
            )
            for span, held in zip(pipeline.spans, pipeline.stages, strict=True)
        )
        return OpenCore(core=core, stages=facts, check=pipeline.check, close=pipeline.close, repair=repair)

    def repair() -> OpenCore:
        dead = pipeline.repair()
        _logger.warning("Restarted only stage %s of %d", ", ".join(map(str, dead)), stages.num)
        return describe()

    return describe()


def make_scheduler(config: ServeConfig, base: ServedBase, max_in_flight: int, *, follows: bool) -> Scheduler:
    """Return a scheduler with the limits of a config."""
    limits = Limits(
        cache_rows=config.stages.cache_rows,
        max_batch_tokens=config.limits.max_batch_tokens,
        max_waiting=config.limits.max_waiting,
        max_in_flight=max_in_flight,
        follows=follows,
    )
    return Scheduler(limits, base.end_token_id, lambda: random.getrandbits(31))
