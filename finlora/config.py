"""Every setting of FinLoRA: frozen, typed, one place. finlora/configfile.py reads them from YAML and overrides.

Order of authority: the default here < the YAML file < `section.key=value`. None always means one stated thing.
Each class checks its own ranges; RunConfig checks relations between sections. Values that depend on the machine
(world size, GPU memory) are checked where they are first known, in train/worker.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import PurePath
from typing import Literal

from finlora.errors import ConfigError

Bits = Literal[16, 8, 4]
Transport = Literal["messages", "nccl", "gloo"]
Template = Literal["raw", "chat"]
MAX_NAME_BYTES = 128
"""Of a run's name: a file system takes 255 bytes, and Ray makes longer names of it."""
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_date(text: str) -> bool:
    """Return whether a text is a day as 2024-07-26."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _refuse(section: str, checks: Sequence[tuple[bool, str]]) -> None:
    faults = [f"{section}.{message}" for is_good, message in checks if not is_good]
    if faults:
        raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    base: str = "meta-llama/Llama-3.1-8B-Instruct"
    """Hub id, or local folder with config.json, tokenizer and *.safetensors."""
    revision: str | None = None
    """Hub commit or tag. None: the hub's default branch, whose commit is then recorded."""
    tokenizer: str | None = None
    """Folder or Llama-3 `tokenizer.model` file. None: the tokenizer beside the weights."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` fills the true shapes from a seed, to measure speed and memory without the weights."""
    bits: Bits = 4
    """Bits of the frozen base weights: 16 (bf16), 8 (LLM.int8) or 4 (NF4 with double quantisation)."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of activations and of unquantised weights. auto: bfloat16 on a GPU; on a CPU what it multiplies faster, by its units
    (AMX-BF16, AVX512_BF16) or measured (finlora/precision.py)."""
    template: Template = "raw"
    """`raw`: plain completion as in the paper; `chat`: the tokenizer's chat template around the same prompt."""
    template_date: str | None = None
    """Day, as 2024-07-26, that a chat template which writes today's date writes into each prompt. None: an adapter's own, which
    it was trained with; without an adapter, and in training, 2024-07-26, as Llama 3's templates write without a clock."""
    max_seq_len: int = 8192
    """Longest prompt + answer in tokens; longer examples follow data.too_long."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """transformers' attention implementation."""
    cache: str | None = None
    """Folder that keeps the base quantised, for whoever loads it next at the same bits. None: each load quantises."""

    def __post_init__(self) -> None:
        _refuse(
            "model",
            [
                (bool(self.base.strip()), "base is empty: name a hub id or a local folder"),
                (self.max_seq_len >= 8, f"max_seq_len={self.max_seq_len}: expected at least 8 tokens"),
                (
                    self.template_date is None or is_date(self.template_date),
                    f"template_date={self.template_date}: expected a day as 2024-07-26",
                ),
                (
                    self.template_date is None or self.template == "chat",
                    f"template_date={self.template_date} is of no use with template=raw, which writes no date: leave it out",
                ),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    rank: int = 4
    """Rank of the update B A (LoRA, arXiv:2106.09685). The paper pairs 4 bit with rank 4, 8 bit with rank 8."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.1
    """Dropout on the adapter's input during training, 0 <= dropout < 1."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Llama projections that get an adapter."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.target_modules if name not in LLAMA_PROJECTIONS]
        _refuse(
            "lora",
            [
                (self.rank >= 1, f"rank={self.rank}: expected an integer of at least 1 (the paper uses 4 and 8)"),
                (self.alpha > 0, f"alpha={self.alpha}: expected more than 0"),
                (0 <= self.dropout < 1, f"dropout={self.dropout}: expected 0 <= dropout < 1"),
                (bool(self.target_modules), "target_modules is empty: name at least one projection"),
                (not unknown, f"target_modules has {unknown}: expected some of {', '.join(LLAMA_PROJECTIONS)}"),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    tasks: tuple[str, ...] = ("synthetic",)
    """Prepared tasks to train on together, or to evaluate one after the other (names: `finlora prepare --help`)."""
    dir: str = "~/finlora/data"
    """Folder that `finlora prepare` wrote: DIR/<task>/train.parquet and test.parquet. All nodes must see it."""
    too_long: Literal["error", "skip"] = "error"
    """What an example over model.max_seq_len does: stop the run, or be skipped and counted. Never truncated."""
    max_train_examples: int | None = None
    """Use only the first N training examples of the seeded order. None: all."""
    max_test_examples: int | None = None
    """Evaluate only the first N test examples. None: all; a limited evaluation says so in its result."""

    def __post_init__(self) -> None:
        limits = [("max_train_examples", self.max_train_examples), ("max_test_examples", self.max_test_examples)]
        _refuse(
            "data",
            [
                (bool(self.tasks), "tasks is empty: name at least one task"),
                *((n is None or n >= 1, f"{key}={n}: expected at least 1, or null for all") for key, n in limits),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    name: Literal["adamw", "zero_one_adam"] = "adamw"
    """Optimiser of the adapter: AdamW, or 0/1 Adam (arXiv:2202.06009) with 1-bit compressed communication."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Term added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm: their mean over workers, or a worker's own between 0/1 Adam's exchanges; 0: never."""
    freeze_ratio: float = 0.2
    """0/1 Adam: share of the run after which the variance is frozen for good (scaled to the run, never a fixed count)."""
    max_local_steps: int = 16
    """0/1 Adam: longest interval between two synchronisations, in steps."""

    def __post_init__(self) -> None:
        _refuse(
            "optim",
            [
                (self.learning_rate > 0, f"learning_rate={self.learning_rate}: expected more than 0"),
                (0 <= self.beta1 < 1, f"beta1={self.beta1}: expected 0 <= beta1 < 1"),
                (0 <= self.beta2 < 1, f"beta2={self.beta2}: expected 0 <= beta2 < 1"),
                (self.eps > 0, f"eps={self.eps}: expected more than 0"),
                (self.weight_decay >= 0, f"weight_decay={self.weight_decay}: expected at least 0"),
                (0 <= self.warmup_ratio < 1, f"warmup_ratio={self.warmup_ratio}: expected 0 <= warmup_ratio < 1"),
                (self.max_grad_norm >= 0, f"max_grad_norm={self.max_grad_norm}: expected at least 0 (0: no clipping)"),
                (0 < self.freeze_ratio <= 1, f"freeze_ratio={self.freeze_ratio}: expected 0 < freeze_ratio <= 1"),
                (self.max_local_steps >= 1, f"max_local_steps={self.max_local_steps}: expected at least 1"),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    num_workers: int = 1
    """Ray Train workers, each with its own copy of the base: one a GPU."""
    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` trains without a GPU (small models); it is never chosen for you."""
    gpus_per_worker: float = 1.0
    """GPUs that Ray reserves for a worker; below 1, several workers share one GPU (gloo instead of NCCL)."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray reserves for a worker."""
    global_batch_size: int = 16
    """Examples an optimiser step, over all workers."""
    micro_batch_size: int = 4
    """Padded rows only: examples a worker, a forward pass; gradient accumulation follows. Packing cuts by max_pack_tokens."""
    epochs: int = 4
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after so many optimiser steps. None: epochs decide."""
    gradient_checkpointing: bool = False
    """Padded rows only: recompute activations in the backward pass: less memory, about a third more time."""
    packing: bool = True
    """Lay examples end to end: the same result without padding. False, and for models that cannot run so (it is said why):
    padded rows through transformers' own forward pass."""
    share_prefix: bool = True
    """Packing computes the tokens that all prompts of a pack begin with once. Exact but for dropout, whose masks on these
    tokens the examples of a pack then share."""
    max_pack_tokens: int = 16384
    """Most tokens a pack; fewer are taken where the memory asks for it. A longer example is a pack of its own."""
    recompute: Literal["auto", "none", "mlp", "layer"] = "auto"
    """Activations that packing computes again in the backward pass: none, those of the MLP (about a quarter more time), or
    the whole layer (half more). auto: the fastest that fits the memory, by forecast."""
    unpack_weights: Literal["auto", "always", "never"] = "auto"
    """Packing may hold 4-bit weights unpacked in bfloat16: the same numbers in four times the memory, and no unpacking at
    each product. auto: where that fits and is faster, by forecast."""
    memory_gib: float | None = None
    """GPU memory that a worker may use. None: the GPU's, or the share that gpus_per_worker gives."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: DeepSpeed runs the forward pass under bf16 autocast, adapter and optimiser state stay float32. auto: bf16 on a GPU;
    on a CPU as model.compute_dtype."""
    max_failures: int = 3
    """How often Ray Train restarts failed workers from the last checkpoint before the run fails."""
    max_stall_s: float | None = 900.0
    """A worker that finishes no pass, step or checkpoint for so long ends, as failed. None: it may wait for ever."""
    checkpoint_every_steps: int | None = 100
    """Optimiser steps between checkpoints, besides the one an epoch. None: only that one. With 0/1 Adam a checkpoint waits for
    the next step at which all workers agree."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk; the adapter of the last step is always exported beside them."""
    log_every_steps: int = 10
    """Optimiser steps between two TensorBoard points and two losses shown. A job log gets a line each 10 s whatever this is."""

    def __post_init__(self) -> None:
        counts = (
            *("num_workers", "global_batch_size", "micro_batch_size"),
            *("epochs", "keep_checkpoints", "log_every_steps"),
        )
        values = {key: getattr(self, key) for key in counts}
        _refuse(
            "train",
            [
                *((value >= 1, f"{key}={value}: expected at least 1") for key, value in values.items()),
                *(
                    (value is None or value >= 1, f"{key}={value}: expected at least 1, or null")
                    for key in ("max_steps", "checkpoint_every_steps")
                    for value in (getattr(self, key),)
                ),
                *(
                    (value is None or value > 0, f"{key}={value}: expected more than 0, or null")
                    for key in ("memory_gib", "max_stall_s")
                    for value in (getattr(self, key),)
                ),
                (self.max_pack_tokens >= 1, f"max_pack_tokens={self.max_pack_tokens}: expected at least 1"),
                (self.max_failures >= 0, f"max_failures={self.max_failures}: expected at least 0"),
                (self.gpus_per_worker > 0, f"gpus_per_worker={self.gpus_per_worker}: expected more than 0"),
                (self.cpus_per_worker > 0, f"cpus_per_worker={self.cpus_per_worker}: expected more than 0"),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    bits: Bits | None = 8
    """Bits of the base during evaluation; the paper evaluates at 8. None: as trained (model.bits)."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the evaluation; `cpu` is never chosen for you."""
    batch_size: int = 64
    """Examples that the KV cache holds at once; fewer where the memory asks for it."""
    num_stages: int = 1
    """Ray actors that the layers are spread over, each on eval.num_gpus; 1: the evaluating process holds them all."""
    transport: Transport = "messages"
    """How hidden states pass between these stages: in Ray's messages; from GPU to GPU, each stage having one; over sockets."""
    method: Literal["labels", "generate"] = "labels"
    """Closed-label tasks: `labels` scores every allowed label in one forward pass, `generate` decodes freely.
    Free-text tasks (XBRL) always generate."""
    max_new_tokens: int = 48
    """Longest generated answer in tokens."""
    num_gpus: float = 1.0
    """GPUs that the evaluation job reserves from Ray, or each of its stages."""

    def __post_init__(self) -> None:
        counts = ((key, getattr(self, key)) for key in ("batch_size", "num_stages", "max_new_tokens"))
        _refuse(
            "eval",
            [
                *((n >= 1, f"{key}={n}: expected at least 1") for key, n in counts),
                (self.num_gpus > 0, f"num_gpus={self.num_gpus}: expected more than 0"),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    name: str = "run"
    """Name of the run: folder under output_dir, Ray Train run and dashboard entry."""
    output_dir: str = "~/finlora/runs"
    """Folder of all runs, on storage that all nodes see."""
    seed: int = 42
    """Seed of sampling, dropout and adapter initialisation."""
    max_wait_s: float | None = 1800.0
    """Seconds that training and evaluation wait for GPUs and cores that others hold; then they say who. None: no limit."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        train = self.train
        _refuse(
            "run",
            [
                (
                    PurePath(self.name).name == self.name and self.name not in ("", ".", ".."),
                    f"name={self.name!r}: expected a plain folder name without a slash",
                ),
                (
                    self.name.isprintable(),
                    f"name={self.name!r}: expected a name on one line, without control characters",
                ),
                (
                    len(self.name.encode("utf-8", "replace")) <= MAX_NAME_BYTES,
                    f"name of {len(self.name)} characters: expected at most {MAX_NAME_BYTES} bytes, since it names a folder",
                ),
                (self.seed >= 0, f"seed={self.seed}: expected at least 0"),
                (
                    self.max_wait_s is None or self.max_wait_s >= 0,
                    f"max_wait_s={self.max_wait_s}: expected at least 0, or null",
                ),
                (
                    train.global_batch_size >= train.num_workers,
                    f"train.global_batch_size={train.global_batch_size} leaves some of {train.num_workers} workers without an "
                    "example: set it to at least train.num_workers",
                ),
            ],
        )
