"""Say before a run whether it fits its GPUs, and which setting would make it fit. No Ray and no GPU are needed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finlora.config import RunConfig
from finlora.data.encode import Encoded
from finlora.errors import ConfigError, ResourceError
from finlora.model.memory.packed_memory import PackPlan
from finlora.model.memory.padded_memory import MemoryPlan, plan_memory
from finlora.model.memory.shapes import context_gib, find_worst_micro_batch
from finlora.model.source import find_source
from finlora.train.path import plan_path, refuse_packing
from finlora.train.run.run_folder import TrainingSet, load_training_set

if TYPE_CHECKING:
    import torch
    from rich.table import Table

REFERENCE_GPU_GIB = 47.4
"""What torch reports of the reference machine's 48 GB card (RTX A6000) with ECC off; ECC takes about 3 GiB more."""
MARGIN = 0.05
"""Share kept free: the accuracy the forecast is held to, and room for fragments of torch's caching allocator."""

_LEN_STEP = 64
"""Tokens between two length limits that are tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A run's forecast against its machine."""

    plan: MemoryPlan
    packs: PackPlan | None
    """How the run trains packed; None: on padded rows."""
    padded_because: str | None
    """Why it trains on padded rows; None where it trains packed."""
    gpu_memory_gib: float
    """Memory that one worker may use: the GPU's, or its share where workers share a GPU, or train.memory_gib if less."""
    fits: bool
    words: str
    """One sentence: that it fits, or what would make it fit."""
    settings: tuple[str, ...]
    """`section.key=value` texts that make it fit; empty where it fits already, or where nothing would."""

    def describe(self, config: RunConfig) -> str:
        """Say in one line how the run trains."""
        way = "packed" if self.padded_because is None else f"on padded rows ({self.padded_because})"
        weights = f"; {_describe_weights(config, self)}" if self.packs is not None and self.packs.keep_unpacked else ""
        return f"Training {way}: {_describe_batch(config, self)}{weights}; forecast {self.plan.train_peak_gib:.2f} GiB a worker"

    def require_fit(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            ResourceError: with `words`.
        """
        if not self.fits:
            raise ResourceError(self.words)


def plan_run(
    config: RunConfig, gpu_memory_gib: float, num_gpus: int, training_set: TrainingSet | None = None
) -> Verdict:
    """Forecast a run on its prepared data and compare it with the GPUs.

    Args:
        config: with absolute paths (`resolve_paths`).
        gpu_memory_gib: memory of one GPU, GiB = 2**30 bytes as the driver reports it.
        num_gpus: GPUs of the cluster; not looked at when train.device is `cpu`.
        training_set: None: it is read and encoded here.

    Raises:
        ConfigError: gpu_memory_gib or num_gpus makes no sense.
        DatasetError: the prepared data is missing, damaged or too long.
        ModelError: the base has no readable config.json or tokenizer.
    """
    context = context_gib(config.train.device)
    if gpu_memory_gib <= context or num_gpus < 1:
        raise ConfigError(
            f"found {gpu_memory_gib:g} GiB on {num_gpus} GPUs: expected more than {context} GiB on at least one."
        )
    examples = (training_set or load_training_set(config)).encoded
    train = config.train
    workers_per_gpu = max(1, int(1 / train.gpus_per_worker)) if train.device == "cuda" else train.num_workers
    budget = min(gpu_memory_gib / min(workers_per_gpu, train.num_workers), train.memory_gib or math.inf)
    refusal = refuse_packing(config)

    def has_room(plan: MemoryPlan) -> bool:
        return plan.total_gib * (1 + MARGIN) <= budget

    plan, packs = _forecast(config, examples, budget, is_packed=refusal is None)
    verdict = functools.partial(Verdict, plan=plan, packs=packs, padded_because=refusal, gpu_memory_gib=budget)
    found = f"{plan.total_gib:.1f} GiB a worker, {MARGIN:.0%} kept free of {budget:.1f} GiB"
    if train.device == "cuda" and train.num_workers * train.gpus_per_worker > num_gpus:
        most = max(1, int(num_gpus / train.gpus_per_worker))
        words = (
            f"The run needs {train.num_workers * train.gpus_per_worker:g} GPUs and {num_gpus} are there: set "
            f"train.num_workers={most}, or add nodes to the cluster."
        )
        settings = (f"train.num_workers={most}",)
        return verdict(fits=False, words=words, settings=settings)
    if has_room(plan):
        return verdict(fits=True, words=f"It fits: {found}.", settings=())
    longest = max(item.num_tokens for item in examples)
    for mend, changed in _mends(config, longest, is_packed=refusal is None):
        kept = [item for item in examples if item.num_tokens <= changed.model.max_seq_len]
        if not kept:
            break
        better, _ = _forecast(changed, kept, budget, is_packed=refusal is None)
        if has_room(better):
            left_out = len(examples) - len(kept)
            note = f", which leaves out {left_out:,} of {len(examples):,} examples" if left_out else ""
            words = f"It does not fit: {found}. {' '.join(mend)} makes it fit at {better.total_gib:.1f} GiB{note}."
            return verdict(fits=False, words=words, settings=mend)
    tried = "computing activations again" if refusal is None else "gradient checkpointing, micro-batches of one example"
    words = (
        f"It does not fit: {found}, and neither {tried}, 4 bit nor shorter examples make it fit. "
        "Use larger GPUs or a smaller base."
    )
    return verdict(fits=False, words=words, settings=())


def _forecast(
    config: RunConfig, examples: Sequence[Encoded], budget_gib: float, *, is_packed: bool
) -> tuple[MemoryPlan, PackPlan | None]:
    if is_packed:
        packs = plan_path(config, examples, budget_gib / (1 + MARGIN) - context_gib(config.train.device))
        return packs.memory, packs
    lengths = [(item.num_tokens, len(item.answer_ids)) for item in examples]
    batch = find_worst_micro_batch(lengths, config.train.micro_batch_size)
    return plan_memory(find_source(config.model).shape, config, batch), None


def explain_out_of_memory(config: RunConfig, found: str, packs: PackPlan | None) -> ResourceError:
    """Return what to say after a GPU ran out of memory in a step: the settings that save some, the least costly first.

    Args:
        found: torch's message; its first sentences say how much was asked for and free.
        packs: how the run trained packed; None: on padded rows.
    """
    size = config.train.micro_batch_size
    smaller = max((part for part in range(1, size) if size % part == 0), default=None)
    if packs is not None:
        less = packs.memory.total_gib * 0.9
        words = (
            f"set train.memory_gib={less:.1f}, by which packs are made smaller or more is computed again, and start the same "
            "command: it resumes from the last checkpoint"
        )
    else:
        mends = [
            *(["train.gradient_checkpointing=true"] if not config.train.gradient_checkpointing else []),
            *([f"train.micro_batch_size={smaller}"] if smaller else []),
            *(["model.bits=4"] if config.model.bits != 4 else []),
        ]
        words = f"set {' or '.join(mends)}, under another `name`" if mends else "use a larger GPU or shorter examples"
    return ResourceError(
        f"a worker's GPU ran out of memory ({'. '.join(found.split('. ')[:3])}): {words}. `finlora plan` forecasts a run; "
        "nothing else may use the GPU meanwhile."
    )


def find_memory_gib(device: str | torch.device) -> float:
    """Return the memory of a GPU (`cuda`: this machine's first), or the reference card's where there is none; on CPU, the RAM."""
    if str(device) == "cpu":
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(device).total_memory) / 2**30
    return REFERENCE_GPU_GIB


def count_gpus(config: RunConfig) -> int:
    """Return the whole GPUs that the config asks for."""
    return max(1, math.ceil(config.train.num_workers * config.train.gpus_per_worker))


def render_plan(config: RunConfig, verdict: Verdict) -> Table:
    """Lay a verdict out as a table."""
    from rich import box
    from rich.table import Table

    plan = verdict.plan
    where = "GPU" if config.train.device == "cuda" else "machine, a worker's share"
    table = Table("memory of one worker", "GiB", "what it is", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    rows = [
        ("weights", plan.weights_gib, _describe_weights(config, verdict)),
        (
            "adapter",
            plan.adapter_gib,
            f"rank {config.lora.rank}, float32; its file has {plan.adapter_file_mib:.2f} MiB",
        ),
        ("optimizer", plan.optimizer_gib, f"gradients and state of {config.optim.name}"),
        ("activations", plan.activations_gib, _describe_batch(config, verdict)),
        ("peak of a step", plan.train_peak_gib, "the four above, as torch allocates them"),
        ("peak of loading", plan.load_peak_gib, "weights and one tensor on its way"),
        (
            "total",
            plan.total_gib,
            "the higher peak"
            + (f", and about {plan.context_gib} GiB for the CUDA context" if plan.context_gib else ""),
        ),
        (where, verdict.gpu_memory_gib, f"of which {MARGIN:.0%} of the total is kept free"),
    ]
    for name, gib, meaning in rows:
        table.add_row(name, f"{gib:.2f}", meaning)
    return table


def _describe_weights(config: RunConfig, verdict: Verdict) -> str:
    is_dense = verdict.packs is not None and verdict.packs.keep_unpacked
    return f"frozen base at {config.model.bits} bit" + (", unpacked once and kept" if is_dense else "")


def _describe_batch(config: RunConfig, verdict: Verdict) -> str:
    if verdict.packs is not None:
        again = {"none": "", "mlp": ", gate and up projection recomputed", "layer": ", layers recomputed"}
        return f"a pack of {verdict.packs.size.num_rows:,} tokens, the largest{again[verdict.packs.recompute]}"
    batch = verdict.plan.micro_batch
    assert batch is not None, "a padded plan has a batch"
    again_words = ", recomputed" if config.train.gradient_checkpointing else ""
    return f"{batch.num_examples} x {batch.num_tokens:,} padded tokens, the longest{again_words}"


def _mends(config: RunConfig, longest: int, *, is_packed: bool) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Yield settings that save memory, the least costly first; each keeps those before it.

    The order: computing again (a third more time), smaller micro-batches, 4 bit, and last a length limit, as that loses data.
    """
    settings: tuple[str, ...] = ()
    train = config.train
    smaller: list[int] = []
    if is_packed:
        if (train.recompute, train.unpack_weights) != ("auto", "auto"):
            config = _with_train(config, recompute="auto", unpack_weights="auto")
            settings = ("train.recompute=auto", "train.unpack_weights=auto")
            yield settings, config
    else:
        if not train.gradient_checkpointing:
            config = _with_train(config, gradient_checkpointing=True)
            settings = ("train.gradient_checkpointing=true",)
            yield settings, config
        smaller = [size for size in range(train.micro_batch_size - 1, 0, -1) if train.micro_batch_size % size == 0]
    for size in smaller:
        yield (*settings, f"train.micro_batch_size={size}"), _with_train(config, micro_batch_size=size)
    if config.model.bits != 4:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, bits=4))
        settings = (*settings, "model.bits=4")
        yield settings, config
        for size in smaller:
            yield (*settings, f"train.micro_batch_size={size}"), _with_train(config, micro_batch_size=size)
    if smaller:
        config = _with_train(config, micro_batch_size=1)
        settings = (*settings, "train.micro_batch_size=1")
    for limit in range(longest // _LEN_STEP * _LEN_STEP, 0, -_LEN_STEP):
        shorter = dataclasses.replace(config, model=dataclasses.replace(config.model, max_seq_len=limit))
        yield (*settings, f"model.max_seq_len={limit}", "data.too_long=skip"), shorter


def _with_train(config: RunConfig, **changes: bool | int | str) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))  # type: ignore[arg-type]
