"""All settings of FinLoRA, frozen and typed. finlora/configfile.py reads them from YAML and overrides.

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
from finlora.formula.lora_config import LoraConfig

Bits = Literal[16, 8, 4]
Transport = Literal["messages", "nccl", "gloo"]
Template = Literal["raw", "chat"]
SQLITE = "sqlite:///"
_SERVER = ("https://", "http://")
MAX_NAME_BYTES = 128
"""Longest name of a run: a file system allows 255 bytes, and Ray adds to the name."""


def is_date(text: str) -> bool:
    """Return whether a text is a date such as 2024-07-26."""
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
    """Base model: its id on the Hugging Face hub, or a local folder with config.json, tokenizer and *.safetensors."""
    revision: str | None = None
    """Hub commit or tag. None: the hub's default branch, whose commit is then recorded."""
    tokenizer: str | None = None
    """Folder or Llama-3 `tokenizer.model` file. None: the tokenizer beside the weights."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` fills the layers with random numbers, to measure speed and memory without the weights."""
    bits: Bits = 4
    """Bits of the frozen base weights: 16 (bf16), 8 (LLM.int8) or 4 (NF4 with double quantisation)."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of activations and of unquantised weights. auto: bfloat16 on a GPU; on a CPU bfloat16 where it has AMX-BF16 or
    AVX512_BF16 and a short measurement finds it faster, else float32."""
    template: Template = "raw"
    """`raw`: plain completion as in the paper; `chat`: the tokenizer's chat template around the same prompt."""
    template_date: str | None = None
    """Date (such as 2024-07-26) that replaces today's date in prompts whose chat template writes it, so that answers do not
    change with the day. None: the adapter's own; without an adapter, and in training, 2024-07-26, the default of Llama 3's
    template."""
    max_seq_len: int = 8192
    """Longest prompt and answer together, in tokens. data.too_long says what happens to longer examples."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers, for training on padded rows."""
    cache: str | None = None
    """Folder for the quantised base: the first load writes it, later loads with the same bits read it. None: each load
    quantises."""

    def __post_init__(self) -> None:
        _refuse(
            "model",
            [
                (bool(self.base.strip()), "base is empty: name a hub id or a local folder"),
                (self.max_seq_len >= 8, f"max_seq_len={self.max_seq_len}: expected at least 8 tokens"),
                (
                    self.template_date is None or is_date(self.template_date),
                    f"template_date={self.template_date}: expected a date such as 2024-07-26",
                ),
                (
                    self.template_date is None or self.template == "chat",
                    f"template_date={self.template_date} has no effect with template=raw, which writes no date: leave it out",
                ),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    tasks: tuple[str, ...] = ("synthetic",)
    """Prepared tasks to train on together, or to evaluate one after the other. `finlora prepare list` shows all names."""
    dir: str = "~/finlora/data"
    """Folder of prepared tasks, as `finlora prepare` writes it: `DIR/TASK/train.parquet` and `test.parquet`. All nodes must
    see it."""
    too_long: Literal["error", "skip"] = "error"
    """What happens to an example longer than model.max_seq_len: `error` stops the run, `skip` leaves it out and counts it.
    No example is ever truncated."""
    max_train_examples: int | None = None
    """Train on the first N examples of the shuffled order only. None: all."""
    max_test_examples: int | None = None
    """Evaluate the first N test examples only; the result says so. A search takes the first N of those that it holds out, for
    its trials' losses and scores. None: all."""

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
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A, which is learning_rate; LoRA+ (arXiv:2402.12354) sets 16 and a smaller learning_rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment, against division by zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    warmup_ratio: float = 0.03
    """Share of all steps during which the learning rate rises linearly from 0 to its peak."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up; linear and cosine fall to 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm: their mean over workers, or with 0/1 Adam a worker's own between exchanges. 0: no
    clipping."""
    freeze_ratio: float = 0.2
    """0/1 Adam: share of all steps after which the variance (second moment) is frozen."""
    max_local_steps: int = 16
    """0/1 Adam: most steps between two synchronisations of the workers."""

    def __post_init__(self) -> None:
        _refuse(
            "optim",
            [
                (self.learning_rate > 0, f"learning_rate={self.learning_rate}: expected more than 0"),
                (self.lora_plus_ratio >= 1, f"lora_plus_ratio={self.lora_plus_ratio}: expected at least 1"),
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
    """Ray Train workers. Each holds a copy of the base; set it to the number of GPUs."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of training. `cpu` is for small models; FinLoRA never falls back to it by itself."""
    gpus_per_worker: float = 1.0
    """GPUs that Ray reserves for each worker. Below 1, several workers share a GPU and communicate over gloo instead of
    NCCL."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray reserves for each worker."""
    global_batch_size: int = 16
    """Examples per optimiser step, over all workers."""
    micro_batch_size: int = 4
    """Examples per forward pass of a worker, on padded rows; gradient accumulation follows from it. Packed runs use
    train.max_pack_tokens instead."""
    epochs: int = 4
    """Passes over the training set."""
    max_steps: int | None = None
    """Optimiser steps after which the run stops. None: after the epochs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, on padded rows: less memory, about a third more time."""
    packing: bool = True
    """Lay examples end to end instead of padding them: the same result, faster. false: padded rows through transformers. A
    base or adapter that cannot be packed also trains on padded rows, and the run says why."""
    share_prefix: bool = True
    """Packed runs: compute the prefix that all prompts of a pack share once. The result is the same, except that the
    examples of a pack share the dropout masks of the prefix."""
    max_pack_tokens: int = 16384
    """Most tokens in a pack; a run takes fewer where memory is short. A longer example is a pack of its own."""
    recompute: Literal["auto", "none", "mlp", "layer"] = "auto"
    """Packed runs: activations that the backward pass computes again, to save memory: none, those of the MLP (about a
    quarter more time) or of the whole layer (about half more). auto: the fastest that fits, by forecast."""
    unpack_weights: Literal["auto", "always", "never"] = "auto"
    """Packed runs: hold 4-bit weights as bfloat16, which takes four times the memory and saves unpacking them at each
    product. The numbers are the same. auto: where it fits and is faster, by forecast."""
    memory_gib: float | None = None
    """GPU memory that a worker may use, in GiB. None: the GPU's, or its share where gpus_per_worker is below 1."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the forward and backward pass. bf16: autocast to bfloat16; adapter and optimiser state stay float32. auto:
    bf16 on a GPU; on a CPU as model.compute_dtype."""
    max_failures: int = 3
    """Restarts of failed workers from the last checkpoint before the run fails."""
    max_stall_s: float | None = 900.0
    """Seconds without a finished pass, step or checkpoint after which a worker counts as failed. None: no limit."""
    checkpoint_every_steps: int | None = 100
    """Optimiser steps between checkpoints, besides one at the end of each epoch. None: only at the end of each epoch.
    0/1 Adam writes them at the next synchronisation."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk. The adapter of the last step is always written beside them."""
    log_every_steps: int = 10
    """Optimiser steps between two points in TensorBoard. A job log gets a line every 10 s in any case."""

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
                (
                    self.gpus_per_worker > 0,
                    f"gpus_per_worker={self.gpus_per_worker}: expected more than 0; to train without a GPU, set "
                    "train.device=cpu and leave this out",
                ),
                (self.cpus_per_worker > 0, f"cpus_per_worker={self.cpus_per_worker}: expected more than 0"),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    bits: Bits | None = 8
    """Bits of the base weights during evaluation; the paper evaluates at 8. None: those of training (model.bits)."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the evaluation. FinLoRA never falls back to `cpu` by itself."""
    batch_size: int = 64
    """Examples that the KV cache holds at once; fewer where memory is short."""
    num_stages: int = 1
    """Pipeline stages: Ray actors that share the layers, each on eval.num_gpus GPUs. 1: the evaluating process holds all
    layers."""
    transport: Transport = "messages"
    """How hidden states pass between stages: as Ray messages, by NCCL from GPU to GPU, or by gloo over sockets. With
    `messages`, stages on one machine whose GPUs reach each other's memory copy from GPU to GPU."""
    method: Literal["labels", "generate"] = "labels"
    """How a task with labels is scored: `labels` compares the probabilities of all labels in one forward pass, `generate`
    writes text and reads the label from it. Free-text tasks (XBRL) always generate."""
    max_new_tokens: int = 48
    """Longest generated answer, in tokens."""
    num_gpus: float = 1.0
    """GPUs that Ray reserves for the evaluation, or for each of its stages."""

    def __post_init__(self) -> None:
        counts = ((key, getattr(self, key)) for key in ("batch_size", "num_stages", "max_new_tokens"))
        _refuse(
            "eval",
            [
                *((n >= 1, f"{key}={n}: expected at least 1") for key, n in counts),
                (
                    self.num_gpus > 0,
                    f"num_gpus={self.num_gpus}: expected more than 0; to evaluate without a GPU, set eval.device=cpu and leave "
                    "this out",
                ),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    tensorboard: bool = True
    """Write the loss and the speed as TensorBoard events into the folder of the run."""
    mlflow: str | None = None
    """MLflow store of settings, loss, scores and files: `sqlite:////PATH/mlflow.db`, a file, or the `https://` address of a
    server. None: no MLflow."""
    wandb: str | None = None
    """Weights & Biases: `offline` writes files into the folder of the run, and `wandb sync` sends them where you want; or the
    `https://` address of a server. None: no W&B."""
    project: str = "finlora"
    """Name of MLflow's experiment and of W&B's project."""
    adapter: bool = True
    """Copy the finished adapter into the tracking system, too. false: its settings, scores and hashes only."""

    def __post_init__(self) -> None:
        servers = [address for address in (self.mlflow, self.wandb) if (address or "").startswith(_SERVER)]
        _refuse(
            "tracking",
            [
                (
                    self.mlflow in (None, *servers) or (str(self.mlflow).startswith(SQLITE) and self.mlflow != SQLITE),
                    f"mlflow={self.mlflow}: expected sqlite:///PATH (four slashes before an absolute path) or http(s)://HOST",
                ),
                (
                    self.wandb in (None, "offline", *servers),
                    f"wandb={self.wandb}: expected offline or http(s)://HOST",
                ),
                (
                    not any("@" in str(address) for address in servers),
                    "mlflow and tracking.wandb are written into the folder of the run: expected addresses without a password; "
                    "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and WANDB_API_KEY hold it",
                ),
                (
                    bool(self.project.strip()) and "/" not in self.project,
                    f"project={self.project!r}: expected a name without a slash",
                ),
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    name: str = "run"
    """Name of the run: its folder under output_dir, and its name in Ray's dashboard."""
    output_dir: str = "~/finlora/runs"
    """Folder of all runs, on storage that all nodes share."""
    seed: int = 42
    """Seed of the data order, dropout and adapter initialisation."""
    max_wait_s: float | None = 1800.0
    """Seconds that training and evaluation wait for GPUs and cores that others hold, before they end with exit code 5.
    None: no limit."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

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
                    not (self.lora.dora and self.model.bits == 8 and train.device == "cpu"),
                    "lora.dora=true with model.bits=8 and train.device=cpu: PEFT 0.21 loses scales of 8-bit weights on a CPU. "
                    "Set model.bits=4 or 16, or train on a GPU",
                ),
                (
                    self.model.bits == 16 or not self.lora.changes_base,
                    f"lora.init={self.lora.init} with model.bits={self.model.bits}: A and B begin with a part of the base's "
                    f"weights, and what is left would be rounded to {self.model.bits} bit anew, so the adapter would not fit "
                    "the base that it is served on. Set model.bits=16, or lora.init=default",
                ),
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
