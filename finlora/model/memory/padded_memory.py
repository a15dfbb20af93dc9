"""Forecast of the memory of a padded training step: the tensors that autograd saves, and the peak of the backward pass.

Counted are transformers' LlamaForCausalLM with sdpa, PEFT's LoRA under bf16 autocast, a frozen base, bitsandbytes' matmuls on
CUDA, and AnswerLoss. Legend, all in bytes: e an activation's element (2 in bfloat16), n = B T tokens, H hidden, Q query width, K
key-value width, I intermediate, L layers, N labelled rows, V vocabulary, r LoRA rank.

Saved by each decoder layer. The first layer's input needs no gradient, so neither its norm nor its dropout mask is saved:
    2 norms              (4 H + 4) n each      float32 input and 1/rms; the frozen weight needs no input
    LoRA dropout         (e d + d) n a target  its output for A's gradient, and a byte mask; d is the target's input width
    LoRA A               e r n a target        its output for B's gradient, and both factors cast to bf16
    attention            (2 e Q + 2 e W) n     query, output, key, value; W = Q where rows are padded, else K
                         4 heads B T'          log-sum-exp, T' = T up to 32; and e B T T'' mask as bias, T'' = T up to 8
    norms of heads       (4 Q + 4 K + 4 h) n       in families that have them; h counts query and key heads
    MLP                  3 e I n               gate, silu(gate), up
    DoRA                 2 e d n a target      the base's product and B's, d the target's output width; with dropout and a
                                               quantised base also its unpacked weight (e K N), for the input's gradient
    DoRA of gate or up   3 (4 - e) I n         their results are float32, as the row lengths
DoRA computes W0 + scale B A in each pass: (e + 4) K^2 for the identity that A and B are applied to, and 4 e K N, at a time.
At 8 bit, MatMul8bitLt also holds its input on the autograd node: norm outputs (2 e H n) and down_proj's input (e I n).
Gradient checkpointing (non-reentrant) saves e H n a layer but cannot drop tensors held on a node: at 8 bit these inputs and the
attention output (e Q n) stay for all layers. With checkpointing PEFT makes the embedding's output need a gradient, so the first
layer is like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finlora.config import RunConfig
from finlora.formula.llama import LlamaShape, find_projection
from finlora.model.memory.fixed_memory import (
    GIB,
    context_gib,
    count_adapter_file_bytes,
    count_adapter_parameters,
    count_load_peak_bytes,
    count_optimizer_bytes,
    count_start_bytes,
    count_weight_bytes,
)
from finlora.precision import count_bytes, is_autocast

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatch:
    """The largest padded micro-batch of a run."""

    num_examples: int
    """B: rows."""
    num_tokens: int
    """T: tokens of the longest row, to which all are padded."""
    num_labels: int
    """Answer tokens of all rows, where the output head runs."""
    is_padded: bool
    """Rows differ in length: attention then takes a (B, 1, T, T) mask and copies keys and values for every query head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Memory forecast of one worker, in GiB of torch's allocations. Training holds the first four at a time."""

    weights_gib: float
    adapter_gib: float
    """Adapter in float32."""
    optimizer_gib: float
    """Gradients and optimiser state."""
    activations_gib: float
    """Peak activations of a step, temporary tensors included."""
    load_peak_gib: float
    context_gib: float
    """Memory of the process outside torch's allocator."""
    adapter_file_mib: float
    """adapter_model.safetensors in bfloat16, MiB = 2**20 bytes."""
    micro_batch: PaddedBatch | None
    """The largest padded batch; None for packs."""

    @property
    def train_peak_gib(self) -> float:
        """torch.cuda.max_memory_allocated of a training step."""
        return self.weights_gib + self.adapter_gib + self.optimizer_gib + self.activations_gib

    @property
    def total_gib(self) -> float:
        """Memory of a worker: the higher peak of training and loading, and the context."""
        return max(self.train_peak_gib, self.load_peak_gib) + self.context_gib


def plan_memory(shape: LlamaShape, config: RunConfig, micro_batch: PaddedBatch) -> MemoryPlan:
    """Forecast a worker's memory. Read are model.bits, lora, optim.name and train of the config."""
    model, lora, train = config.model, config.lora, config.train
    element = element_bytes(config)
    weight_element = count_bytes(config)
    optim = config.optim
    optimizer = count_optimizer_bytes(
        shape, lora, optim.name, train.num_workers, has_factors=optim.lora_plus_ratio != 1
    )
    weights = count_weight_bytes(shape, model.bits, weight_element)
    load_peak = max(count_load_peak_bytes(shape, model.bits, weight_element), weights + count_start_bytes(shape, lora))
    return MemoryPlan(
        weights_gib=weights / GIB,
        adapter_gib=_FLOAT32 * count_adapter_parameters(shape, lora) / GIB,
        optimizer_gib=optimizer / GIB,
        activations_gib=count_step_peak_bytes(shape, config, micro_batch, element) / GIB,
        load_peak_gib=load_peak / GIB,
        context_gib=context_gib(train.device),
        adapter_file_mib=count_adapter_file_bytes(shape, lora) / 2**20,
        micro_batch=micro_batch,
    )


def find_worst_micro_batch(lengths: Sequence[tuple[int, int]], micro_batch_size: int) -> PaddedBatch:
    """Return an upper bound of a run's micro-batches from (tokens, answer tokens) of its examples.

    The longest example may be in a full micro-batch: T is its length. N counts the B longest answers. A single row is never
    padded.
    """
    num_examples = min(micro_batch_size, len(lengths))
    answers = sorted((answer for _, answer in lengths), reverse=True)
    return PaddedBatch(
        num_examples=num_examples,
        num_tokens=max(total for total, _ in lengths),
        num_labels=sum(answers[:num_examples]),
        is_padded=num_examples > 1 and len({total for total, _ in lengths}) > 1,
    )


def element_bytes(config: RunConfig) -> int:
    """Return the bytes of an activation's element; float32 in either setting counts as float32 throughout, an upper bound."""
    return count_bytes(config) if is_autocast(config) else _FLOAT32


def count_layer_bytes(shape: LlamaShape, config: RunConfig, batch: PaddedBatch, element: int, *, is_first: bool) -> int:
    """Return the bytes that autograd saves of one decoder layer without checkpointing, by the module's table."""
    hidden, query, inner = shape.hidden_size, shape.query_size, shape.intermediate_size
    n, lora = batch.num_examples * batch.num_tokens, config.lora
    norm = (_FLOAT32 * hidden + _FLOAT32) * n
    total = norm if is_first else 2 * norm
    for target, rank in zip(lora.target_modules, lora.settings.ranks, strict=True):
        projection = find_projection(target)
        num_out, num_in = projection.size(shape)
        needs_input_grad = not (is_first and projection.product == "qkv")
        total += element * (num_in + rank) * n + element * rank * num_out
        if needs_input_grad:
            total += element * rank * num_in + (num_in * n if lora.dropout else 0)
        if lora.dora:
            total += 2 * element * num_out * n
            if lora.dropout and config.model.bits < 16 and needs_input_grad:
                total += element * num_in * num_out
    if lora.dora and any(find_projection(target).product == "gate_up" for target in lora.target_modules):
        total += 3 * (_FLOAT32 - element) * inner * n
    width = query if batch.is_padded else shape.kv_size
    total += element * (2 * query + 2 * width) * n
    total += _FLOAT32 * shape.num_heads * batch.num_examples * _round_up(batch.num_tokens, 32)
    if batch.is_padded:
        total += element * n * _round_up(batch.num_tokens, 8)
    if shape.additions.has_head_norms:
        total += _FLOAT32 * (query + shape.kv_size + shape.num_heads + shape.num_kv_heads) * n
    return total + 3 * element * inner * n


def count_saved_bytes(shape: LlamaShape, config: RunConfig, batch: PaddedBatch, element: int) -> int:
    """Return the bytes that all decoder layers, final norm and loss save between forward and backward pass."""
    n = batch.num_examples * batch.num_tokens
    layers = _count_layers_bytes(shape, config, batch, element)
    layers += 2 * element * batch.num_tokens * shape.head_dim  # cosines and sines of the positions
    return layers + _count_norm_bytes(shape, n) + _FLOAT32 * batch.num_labels * shape.vocab_size


def count_step_peak_bytes(shape: LlamaShape, config: RunConfig, batch: PaddedBatch, element: int) -> int:
    """Return the peak activation memory of forward and backward pass, the highest of three moments:

    - loss: log-probabilities, their gradient and that of the logits, 12 N V in float32;
    - final norm: five float32 tensors of H n besides its kept input;
    - MLP of the last layer: a gradient of H n, and either three of I n (silu, gate, up) or the input's gradient of I n
      beside the base weight that the matmul unpacks (bits < 16). With checkpointing this layer was just recomputed.
    The backward pass of attention needs less: the MLP's tensors are freed by then, and I is more than 2 Q in Llama.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    n = batch.num_examples * batch.num_tokens
    layers = _count_layers_bytes(shape, config, batch, element)
    norm, labels = _count_norm_bytes(shape, n), batch.num_labels * shape.vocab_size
    loss_moment = layers + norm + 3 * _FLOAT32 * labels
    norm_moment = layers + norm + 5 * _FLOAT32 * hidden * n
    recomputed = 0
    if config.train.gradient_checkpointing:
        recomputed = count_layer_bytes(shape, config, batch, element, is_first=False)
    unpacked = element * hidden * inner if config.model.bits < 16 else 0
    if config.model.bits == 4:
        unpacked += _FLOAT32 * hidden * inner // 64  # absmax before it is applied
    mlp_moment = (
        layers + recomputed + element * hidden * n + max(3 * element * inner * n, element * inner * n + unpacked)
    )
    return max(loss_moment, norm_moment, mlp_moment, layers + recomputed + _count_dora_bytes(shape, config, element))


def _count_layers_bytes(shape: LlamaShape, config: RunConfig, batch: PaddedBatch, element: int) -> int:
    """Return the bytes that all decoder layers save between forward and backward pass."""
    n, num_layers = batch.num_examples * batch.num_tokens, shape.num_layers
    hidden, inner = shape.hidden_size, shape.intermediate_size
    if config.train.gradient_checkpointing:
        inputs = element * num_layers * hidden * n
        mask = n * batch.num_tokens if batch.is_padded else 0  # bool, for the recomputation
        on_nodes = element * num_layers * (2 * hidden + inner + shape.query_size) * n if config.model.bits == 8 else 0
        return inputs + mask + on_nodes
    # The first layer's q, k and v need no input gradient without checkpointing, so they hold nothing.
    on_nodes = element * ((2 * num_layers - 1) * hidden + num_layers * inner) * n if config.model.bits == 8 else 0
    first = count_layer_bytes(shape, config, batch, element, is_first=True)
    other = count_layer_bytes(shape, config, batch, element, is_first=False)
    return first + (num_layers - 1) * other + on_nodes


def _count_dora_bytes(shape: LlamaShape, config: RunConfig, element: int) -> int:
    """Return the bytes in which DoRA computes the row lengths of its largest projection; 0 without it."""
    if not config.lora.dora:
        return 0
    sizes = (find_projection(target).size(shape) for target in config.lora.target_modules)
    return max((element + _FLOAT32) * num_in**2 + 4 * element * num_in * num_out for num_out, num_in in sizes)


def _count_norm_bytes(shape: LlamaShape, n: int) -> int:
    return (_FLOAT32 * shape.hidden_size + _FLOAT32) * n


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
