"""Loader of a base at 16, 8 or 4 bit, tensor by tensor: peak memory stays within one layer of the final size.

Embedding, norms and the output head stay in the compute type, as in the papers of both quantisations (quantised.py).
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finlora.config import Bits, ModelConfig
from finlora.errors import ModelError, ResourceError
from finlora.formula.bare_llama import BareLlama, Rotary
from finlora.formula.families import find_family
from finlora.machine.kernel_folder import keep_kernels
from finlora.machine.lean_imports import lean_imports
from finlora.model.base_cache import StoredBase, await_cache, find_cache, write_cache
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.model.quantised import quantise, require_range
from finlora.model.source import ModelSource
from finlora.precision import resolve_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_Reader = Callable[[str, torch.Size], torch.Tensor]
Int8Rows = tuple[torch.Tensor, torch.Tensor]
"""int8 values (N, K) and the float32 magnitude (N,) that 127 encodes in each row."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A frozen base, its tokenizer, and the facts that an adapter is checked against."""

    model: LlamaForCausalLM | BareLlama
    tokenizer: PreTrainedTokenizerFast
    bits: Bits
    dtype: torch.dtype
    """Compute type."""
    weights_hash: str
    tokenizer_hash: str
    revision: str | None
    weights_gib: float
    """GiB of all weights on the device, quantisation statistics included."""
    load_peak_gib: float | None
    """Highest device memory while loading; None on CPU."""
    load_seconds: float
    waited_seconds: float
    """Wait for another process that quantised it; not in `load_seconds`."""
    is_cached: bool
    """It was read from the cache of quantised bases."""

    def describe_loading(self) -> str:
        """Return one line: where the weights came from, and the load time."""
        source = "read from the cache" if self.is_cached else "made from the model's files"
        waited = (
            f", after a wait of {self.waited_seconds:.1f} s for another process that wrote it"
            if self.waited_seconds >= 1
            else ""
        )
        return f"Base: {self.weights_gib:.2f} GiB at {self.bits} bit, {source} in {self.load_seconds:.1f} s{waited}."


def load_base(
    model: ModelConfig,
    bits: Bits,
    device: torch.device,
    seed: int,
    span: range | None = None,
    files: BaseFiles | None = None,
    *,
    is_bare: bool = False,
) -> BaseModel:
    """Load the weights; every parameter is frozen and the model is in eval mode.

    Args:
        model: the base; `model.bits` is ignored, since evaluation may run at other bits than training.
        bits: 16, 8 or 4.
        device: target of the weights, which are quantised there one tensor at a time.
        seed: for random weights (`model.weights=random`) only.
        span: decoder layers to load, with the embedding if it starts at 0, and norm and head if it ends at the last layer;
            everything else stays on the meta device. None: the whole model.
        files: of the base, if this process has found and checked them already; not changed. None: it does so here.
        is_bare: only a stage takes the weights: the model has no forward pass (bare_llama.py), which is slow to import.

    Raises:
        ModelError: the files are not a complete model, or a tensor is missing or has another shape.
        ResourceError: there is no such device, or it is out of memory.
    """
    started = time.monotonic()
    check_device(device)
    model = resolve_model(model, device.type)
    files = files or read_base_files(model)
    if device.type == "cuda":
        keep_kernels()
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        net, is_cached, waited = _build_or_read(files, model, bits, device, seed, span, is_bare)
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError(
            f"out of GPU memory while loading {model.base} at {bits} bit ({error}): use fewer bits or a larger GPU."
        ) from error
    return BaseModel(
        model=net,
        tokenizer=files.tokenizer,
        bits=bits,
        dtype=_DTYPES[model.compute_dtype],
        weights_hash=files.weights_hash,
        tokenizer_hash=files.tokenizer_hash,
        revision=files.source.revision,
        weights_gib=measure_weights(net) / 2**30,
        load_peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        load_seconds=time.monotonic() - started - waited,
        waited_seconds=waited,
        is_cached=is_cached,
    )


def write_plain(net: LlamaForCausalLM, folder: Path, max_shard_size: str) -> None:
    """Write a base's weights, config and generation config as a plain Hugging Face folder.

    Not by its save_pretrained: that imports DeepSpeed, which takes seconds and warns of a missing GPU.

    Args:
        max_shard_size: as huggingface_hub writes it: `4GB`.
    """
    from huggingface_hub import save_torch_model

    config: Any = net.config
    config.architectures, config.dtype = [type(net).__name__], str(net.dtype).removeprefix("torch.")
    tied = ["lm_head.weight"] if config.tie_word_embeddings else None
    save_torch_model(net, folder, max_shard_size=max_shard_size, shared_tensors_to_discard=tied)
    for settings in (config, net.generation_config):
        settings.save_pretrained(str(folder))


def check_device(device: torch.device) -> None:
    """Refuse a GPU that this process does not see, instead of running on another device.

    Raises:
        ResourceError: no such GPU; says how to choose the CPU.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "the config asks for a GPU (device=cuda), but torch sees none here: run on a GPU node, or choose the CPU "
            "yourself with train.device=cpu eval.device=cpu."
        )


def measure_weights(net: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, with bitsandbytes' scales and code tables."""
    tensors = [tensor for tensor in [*net.parameters(), *net.buffers()] if not tensor.is_meta]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for module in net.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
            total += sum(part.numel() * part.element_size() for part in parts)
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
        if isinstance(scales, torch.Tensor):
            total += scales.numel() * scales.element_size()
    return total


def read_int8(layers: Sequence[Any]) -> Int8Rows:
    """Join the rows of 8-bit layers that share an input into one matrix; each layer keeps a view of its rows."""
    parts = []
    for layer in layers:
        holder = layer.weight if layer.weight.CB is not None else layer.state
        parts.append((holder.CB, holder.SCB))
    values, scales = (torch.cat(part) if len(layers) > 1 else part[0] for part in zip(*parts, strict=True))
    start = 0
    for layer, (own, _) in zip(layers, parts, strict=True):
        rows = slice(start, start + own.shape[0])
        holder = layer.weight if layer.weight.CB is not None else layer.state
        layer.weight.data, holder.CB, holder.SCB = values[rows], values[rows], scales[rows]
        start = rows.stop
    return values, scales


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Silence bitsandbytes' messages inside: one per layer on input casts, and one on optional kernels from a hub."""
    loggers = [logging.getLogger(f"bitsandbytes.{name}") for name in ("autograd._functions", "backends.cpu.ops")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _is_in_span(name: str, span: range, num_layers: int, is_tied: bool) -> bool:
    """Return whether a parameter belongs to a span of decoder layers."""
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) in span
    if name == "model.embed_tokens.weight":
        return span.start == 0 or (is_tied and span.stop == num_layers)
    return span.stop == num_layers


def _build_or_read(
    files: BaseFiles,
    model: ModelConfig,
    bits: Bits,
    device: torch.device,
    seed: int,
    span: range | None,
    is_bare: bool,
) -> tuple[LlamaForCausalLM | BareLlama, bool, float]:
    """Return the model, whether it was read from the cache, and the seconds waited for another process to write that."""
    source = files.source
    cache = find_cache(model, files, bits, _DTYPES[model.compute_dtype], device, seed)
    if cache is None or (span is not None and not cache.is_complete):  # part of a base is not worth caching
        return _build(source, model, bits, device, seed, span, None, is_bare), False, 0.0
    started = time.monotonic()
    with await_cache(cache) as is_written:
        waited = time.monotonic() - started
        if not is_written:
            net = _build(source, model, bits, device, seed, span, None, is_bare)
            write_cache(cache, net)
            return net, False, waited
    with closing(StoredBase(cache, device)) as stored:
        return _build(source, model, bits, device, seed, span, stored, is_bare), True, waited


def _build(
    source: ModelSource,
    model: ModelConfig,
    bits: Bits,
    device: torch.device,
    seed: int,
    span: range | None,
    stored: StoredBase | None,
    is_bare: bool,
) -> LlamaForCausalLM | BareLlama:
    dtype = _DTYPES[model.compute_dtype]
    config = copy.deepcopy(source.config)  # the source is shared
    num_layers, is_tied = config.num_hidden_layers, config.tie_word_embeddings
    config._attn_implementation = model.attention
    config.dtype = dtype
    net, rotary = _make_empty(config, dtype, is_bare=is_bare)
    with _open_reader(source, device, dtype, seed) as read:
        for name, parameter in list(net.named_parameters()):
            owner_name, _, leaf = name.rpartition(".")
            owner = net.get_submodule(owner_name)
            if name == "lm_head.weight" and is_tied:
                continue
            if span is not None and not _is_in_span(name, span, num_layers, is_tied):
                continue
            is_quantised = bits < 16 and isinstance(owner, nn.Linear) and ".layers." in name and leaf == "weight"
            if is_quantised and stored:
                net.set_submodule(owner_name, stored.read_layer(name, parameter.shape))
                continue
            weight = stored.read_weight(name) if stored else read(name, parameter.shape)
            if not stored and source.shards:
                require_range(weight, name, bits if is_quantised else 16)
            if is_quantised:
                net.set_submodule(owner_name, quantise(weight, bits, dtype))
            else:
                setattr(owner, leaf, nn.Parameter(weight, requires_grad=False))
            del weight
    if is_tied:
        net.lm_head.weight = net.model.embed_tokens.weight
    net.model.rotary_emb = rotary.to(device)
    net.name_or_path = net.config.name_or_path = model.base
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = bits == 8, bits == 4  # PEFT chooses its layers by these
    net.requires_grad_(False)
    return net.eval()


def _make_empty(config: Any, dtype: torch.dtype, *, is_bare: bool) -> tuple[Any, nn.Module]:
    """Return a model without weights, and its rotary tables."""
    if is_bare:
        return BareLlama(config, dtype), Rotary(config)
    with lean_imports():
        import transformers

        model_class = getattr(transformers, find_family(config.to_dict()).model_class)
    with torch.device("meta"):
        net = model_class(config)
    return net, type(net.model.rotary_emb)(config)


@contextmanager
def _open_reader(source: ModelSource, device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[_Reader]:
    """Yield a function that reads one named tensor to the device."""
    if not source.shards:
        generator = torch.Generator(device=device)
        std = source.config.initializer_range

        def read_random(name: str, shape: torch.Size) -> torch.Tensor:
            if name.endswith("norm.weight"):
                return torch.ones(shape, dtype=dtype, device=device)
            generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # independent of what else is loaded
            return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

        yield read_random
        return
    from safetensors import safe_open

    # One shard is open at a time and tensors are read through its memory map, so host memory stays at one tensor.
    opened: dict[str, object] = {}

    def read_tensor(name: str, shape: torch.Size) -> torch.Tensor:
        path = source.shards.get(name)
        if path is None:
            raise ModelError(f"{source.folder} has no tensor {name}: its config.json describes another model.")
        if str(path) not in opened:
            opened.clear()
            opened[str(path)] = safe_open(str(path), framework="pt", device="cpu")
        tensor: torch.Tensor = opened[str(path)].get_tensor(name)  # type: ignore[attr-defined]
        if tensor.shape != shape:
            raise ModelError(f"{path} holds {name} as {list(tensor.shape)} where config.json says {list(shape)}.")
        return tensor.to(device=device, dtype=dtype, copy=True)

    try:
        yield read_tensor
    finally:
        opened.clear()
