"""Memory forecast of a run against its GPUs, with the setting that would make it fit. Needs no Ray and no GPU."""

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
from finlora.formula.llama import LlamaShape
from finlora.formula.low_rank import list_start_faults
from finlora.model.memory.fixed_memory import context_gib
from finlora.model.memory.packed_memory import PackPlan
from finlora.model.memory.padded_memory import MemoryPlan, find_worst_micro_batch, plan_memory
from finlora.train.path import plan_path, refuse_packing
from finlora.train.run.run_folder import TrainingSet, load_training_set

if TYPE_CHECKING:
    import torch
    from rich.console import Console

REFERENCE_GPU_GIB = 47.4
"""Memory that torch reports on the reference machine's 48 GB card (RTX A6000) with ECC off; ECC takes about 3 GiB."""
MARGIN = 0.05
"""Share kept free: the forecast's required accuracy, and fragments of torch's caching allocator."""

_LEN_STEP = 64
"""Tokens between two length limits to try."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Forecast of a run against its machine."""

    plan: MemoryPlan
    packs: PackPlan | None
    """Packed training. None: padded rows."""
    padded_because: str | None
    """Reason for padded rows; None where the run trains packed."""
    gpu_memory_gib: float
    """Memory that one worker may use: the GPU's, or its share where workers share a GPU, or train.memory_gib if less."""
    fits: bool
    words: str
    """One sentence: it fits, or the settings that would make it fit."""
    settings: tuple[str, ...]
    """`section.key=value` texts that make it fit. Empty where it fits already, or where no setting helps."""

    def describe(self, config: RunConfig) -> str:
        """Return one line on how the run trains."""
        way = "packed" if self.padded_because is None else f"on padded rows ({self.padded_because})"
        weights = f"; {_describe_weights(config, self)}" if self.packs is not None and self.packs.keep_unpacked else ""
        return f"Training {way}: {_describe_batch(config, self)}{weights}; forecast {self.plan.train_peak_gib:.2f} GiB per worker"

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
        num_gpus: GPUs of the cluster; ignored where train.device is `cpu`.
        training_set: None: read and encoded here.

    Raises:
        ConfigError: gpu_memory_gib or num_gpus is impossible, or the rank is for `lora.init`.
        DatasetError: the prepared data is missing, damaged or too long.
        ModelError: the base has no readable config.json or tokenizer.
    """
    context = context_gib(config.train.device)
    if gpu_memory_gib <= context or num_gpus < 1:
        raise ConfigError(
            f"found {gpu_memory_gib:g} GiB on {num_gpus} GPUs: expected more than {context} GiB on at least one."
        )
    training_set = training_set or load_training_set(config)
    examples, shape = training_set.encoded, training_set.base.shape
    train, lora = config.train, config.lora
    if lora.changes_base and (faults := list(list_start_faults(lora.settings, shape))):
        raise ConfigError([f"lora.init={lora.init}: {fault}" for fault in faults])
    workers_per_gpu = max(1, int(1 / train.gpus_per_worker)) if train.device == "cuda" else train.num_workers
    budget = min(gpu_memory_gib / min(workers_per_gpu, train.num_workers), train.memory_gib or math.inf)
    refusal = refuse_packing(config)

    def has_room(plan: MemoryPlan) -> bool:
        return plan.total_gib * (1 + MARGIN) <= budget

    plan, packs = _forecast(config, shape, examples, budget, is_packed=refusal is None)
    verdict = functools.partial(Verdict, plan=plan, packs=packs, padded_because=refusal, gpu_memory_gib=budget)
    found = f"{plan.total_gib:.1f} GiB per worker, {MARGIN:.0%} kept free of {budget:.1f} GiB"
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
    for saving, changed in _list_savings(config, longest, is_packed=refusal is None):
        kept = [item for item in examples if item.num_tokens <= changed.model.max_seq_len]
        if not kept:
            break
        better, _ = _forecast(changed, shape, kept, budget, is_packed=refusal is None)
        if has_room(better):
            left_out = len(examples) - len(kept)
            note = f", which leaves out {left_out:,} of {len(examples):,} examples" if left_out else ""
            words = f"It does not fit: {found}. {' '.join(saving)} makes it fit at {better.total_gib:.1f} GiB{note}."
            return verdict(fits=False, words=words, settings=saving)
    tried = "recomputing activations" if refusal is None else "gradient checkpointing, micro-batches of one example"
    words = (
        f"It does not fit: {found}, and neither {tried}, 4 bit nor shorter examples make it fit. "
        "Use larger GPUs or a smaller base."
    )
    return verdict(fits=False, words=words, settings=())


def _forecast(
    config: RunConfig, shape: LlamaShape, examples: Sequence[Encoded], budget_gib: float, *, is_packed: bool
) -> tuple[MemoryPlan, PackPlan | None]:
    if is_packed:
        packs = plan_path(config, shape, examples, budget_gib / (1 + MARGIN) - context_gib(config.train.device))
        return packs.memory, packs
    lengths = [(item.num_tokens, len(item.answer_ids)) for item in examples]
    batch = find_worst_micro_batch(lengths, config.train.micro_batch_size)
    return plan_memory(shape, config, batch), None


def explain_out_of_memory(config: RunConfig, found: str, packs: PackPlan | None) -> ResourceError:
    """Return the error for a GPU out of memory in a step, with the settings that save memory, the cheapest first.

    Args:
        found: torch's message; its first sentences say how much was requested and free.
        packs: packed training. None: padded rows.
    """
    size = config.train.micro_batch_size
    smaller = max((part for part in range(1, size) if size % part == 0), default=None)
    if packs is not None:
        less = packs.memory.total_gib * 0.9
        words = (
            f"set train.memory_gib={less:.1f}, which makes packs smaller or recomputes more, and start the same command: "
            "it resumes from the last checkpoint"
        )
    else:
        savings = [
            *(["train.gradient_checkpointing=true"] if not config.train.gradient_checkpointing else []),
            *([f"train.micro_batch_size={smaller}"] if smaller else []),
            *(["model.bits=4"] if config.model.bits != 4 else []),
        ]
        words = (
            f"set {' or '.join(savings)}, under another `name`" if savings else "use a larger GPU or shorter examples"
        )
    return ResourceError(
        f"a worker's GPU ran out of memory ({'. '.join(found.split('. ')[:3])}): {words}. `finlora plan` forecasts a run; "
        "no other process may use the GPU meanwhile."
    )


def find_memory_gib(device: str | torch.device) -> float:
    """Return the memory of a GPU (`cuda`: the first here), of the reference card where there is none, or the RAM for `cpu`."""
    if str(device) == "cpu":
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(device).total_memory) / 2**30
    return REFERENCE_GPU_GIB


def count_gpus(config: RunConfig) -> int:
    """Return the number of GPUs that the config asks for, rounded up."""
    return max(1, math.ceil(config.train.num_workers * config.train.gpus_per_worker))


def print_plan(config: RunConfig, verdict: Verdict, console: Console) -> None:
    """Print the forecast as a table."""
    from finlora.printed_table import print_table

    plan = verdict.plan
    where = "GPU" if config.train.device == "cuda" else "machine, a worker's share"
    variant, saved = config.lora.variant, config.lora.saved
    file_rank = f" of rank {saved.rank}" if config.lora.changes_base else ""
    rows = [
        ("weights", plan.weights_gib, _describe_weights(config, verdict)),
        (
            "adapter",
            plan.adapter_gib,
            f"rank {config.lora.rank}{f' ({variant})' if variant else ''}, float32; its file{file_rank} has "
            f"{plan.adapter_file_mib:.2f} MiB",
        ),
        ("optimizer", plan.optimizer_gib, f"gradients and state of {config.optim.name}"),
        ("activations", plan.activations_gib, _describe_batch(config, verdict)),
        ("peak of a step", plan.train_peak_gib, "the four above, as torch allocates them"),
        ("peak of loading", plan.load_peak_gib, "weights and one tensor in transfer"),
        (
            "total",
            plan.total_gib,
            "the higher peak"
            + (f", and about {plan.context_gib} GiB for the CUDA context" if plan.context_gib else ""),
        ),
        (where, verdict.gpu_memory_gib, f"of which {MARGIN:.0%} of the total is kept free"),
    ]
    header = ("memory of one worker", "GiB", "what it is")
    print_table(console, header, [(name, f"{gib:.2f}", meaning) for name, gib, meaning in rows], right=[1])
    if verdict.padded_because is not None:
        console.print(f"Trains on padded rows, which takes more time and memory than packs: {verdict.padded_because}.")


def _describe_weights(config: RunConfig, verdict: Verdict) -> str:
    is_dense = verdict.packs is not None and verdict.packs.keep_unpacked
    return f"frozen base at {config.model.bits} bit" + (", held unpacked in memory" if is_dense else "")


def _describe_batch(config: RunConfig, verdict: Verdict) -> str:
    if verdict.packs is not None:
        again = {"none": "", "mlp": ", gate and up projection recomputed", "layer": ", layers recomputed"}
        return f"largest pack {verdict.packs.size.num_rows:,} tokens{again[verdict.packs.recompute]}"
    batch = verdict.plan.micro_batch
    assert batch is not None, "a padded plan has a batch"
    again_words = ", recomputed" if config.train.gradient_checkpointing else ""
    return f"{batch.num_examples} x {batch.num_tokens:,} padded tokens, the longest batch{again_words}"


def _list_savings(config: RunConfig, longest: int, *, is_packed: bool) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Yield settings that save memory, the cheapest first; each keeps those before it.

    Order: recomputation (a third more time), smaller micro-batches, 4 bit, and last a length limit, which loses data.
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
