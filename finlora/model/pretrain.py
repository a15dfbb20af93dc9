"""Pretraining of a small Llama base with its own tokenizer on unlabelled text, for demos, tests and use without a hub.

The result is a plain Hugging Face folder: config.json, safetensors and tokenizer. Its config.json is written last, so
an interrupted pretraining leaves a folder that loading refuses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from finlora.data.pretraining.generated_texts import pretraining_texts
from finlora.data.pretraining.unlabelled import input_of, unlabelled_texts
from finlora.data.sets.prepared import read_prepared
from finlora.durable import follow_umask, scratch_folder
from finlora.errors import DatasetError, ModelError
from finlora.formula.families import FAMILIES
from finlora.machine.host import require_output
from finlora.model.base import check_device, write_plain
from finlora.precision import AUTO, resolve_precision

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_ANSWER_MARK = "\nAnswer: "
_NO_TARGET = -100
_BOS, _EOS, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"


_OWN_SETTINGS: Mapping[str, Mapping[str, float | None]] = {
    "mistral": {"sliding_window": None},
    # Granite 3.3's, whose factor of the scores is 1 / head width
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 1 / 64},
}
"""Settings of a family whose defaults in transformers are other ones than its models have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Shape and schedule of a small base."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"] = "llama"
    """`model_type` of the base."""
    vocab_size: int = 2048
    """Vocabulary size of the tokenizer, which is trained first."""
    hidden_size: int = 256
    """Width of the hidden states."""
    intermediate_size: int = 704
    """Width inside the MLP."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int = 2
    """Key and value heads, which attention heads share (grouped-query attention)."""
    context_length: int = 256
    """Tokens in a training block. The model still takes prompts up to 8,192 tokens."""
    batch_size: int = 16
    """Blocks per optimiser step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the forward and backward pass; weights are float32. auto: bf16 on a GPU; on a CPU as model.compute_dtype."""
    num_steps: int = 400
    """Optimiser steps."""
    answer_weight: float = 10.0
    """Loss weight of the answer tokens of self-supervised questions. They are one token in forty, and a base must learn to
    answer from its prompt."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of weights and data order."""


def pretrain_base(
    texts: Sequence[str],
    settings: PretrainConfig,
    output: Path,
    device: torch.device,
    on_step: Callable[[int, float], None],
) -> float:
    """Train tokenizer and model from scratch and write them to `output`.

    Args:
        texts: documents; the stream opens each with BOS and closes it with EOS.
        on_step: called after each step with (steps done, loss).

    Returns:
        Seconds of the model's training.

    Raises:
        DatasetError: fewer tokens than one block.
    """
    import transformers

    tokenizer = _train_tokenizer(texts, settings.vocab_size)
    stream, weights = _encode_stream(texts, tokenizer, settings.answer_weight)
    if len(stream) < settings.context_length + 1:
        raise DatasetError(
            f"{len(texts)} texts give {len(stream)} tokens: expected at least one block of {settings.context_length + 1}."
        )
    torch.manual_seed(settings.seed)
    family = FAMILIES[settings.family]
    config = getattr(transformers, family.config_class)(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        head_dim=settings.hidden_size // settings.num_heads,
        **_OWN_SETTINGS.get(settings.family, {}),
    )
    model = getattr(transformers, family.model_class)(config).to(device)
    started = time.perf_counter()
    _fit(model, stream.to(device), weights.to(device), settings, on_step)
    seconds = time.perf_counter() - started
    _save(model, tokenizer, output)
    return seconds


def run_pretraining(
    settings: PretrainConfig,
    tasks: Sequence[str],
    data: Path,
    output: Path,
    device_name: str,
    on_step: Callable[[str, int, int, str], None],
) -> str:
    """Pretrain on the inputs of prepared train splits (never their answers), or on generated text for `synthetic`.

    A finished base in `output` is kept, not trained again.

    Args:
        on_step: called with (name, steps done, total steps, note).

    Returns:
        One line for the user.

    Raises:
        ConfigError: `output` cannot be written.
        ModelError: `output` holds a model of other settings or texts.
        DatasetError: a task is not prepared or has too little text.
        ResourceError: there is no such device.
    """
    device = torch.device(device_name)
    check_device(device)
    resolved = dataclasses.replace(settings, precision=resolve_precision(settings.precision, device.type))
    is_there = (output / "config.json").is_file()
    if not is_there:
        require_output("--output ", output, is_new=True)
    texts = [text for task in tasks for text in _texts_of(task, data, settings.seed)]
    stamp = {"settings": dataclasses.asdict(resolved), "tasks": list(tasks), "texts": _hash_texts(texts)}
    stamp_file = output / "pretraining.json"
    if is_there:
        if not _is_same(_read_stamp(stamp_file), stamp, any_precision=settings.precision == AUTO):
            raise ModelError(
                f"{output} holds another model already, or one of other texts or settings: choose another --output, or delete "
                "that folder to train again."
            )
        return f"{output} is complete already, kept."

    def show(step: int, loss: float) -> None:
        on_step("pretraining", step, settings.num_steps, f"loss {loss:.3f}")

    output.mkdir(parents=True, exist_ok=True)
    stamp_file.write_text(json.dumps(stamp, sort_keys=True), encoding="utf-8")
    seconds = pretrain_base(texts, resolved, output, device, show)
    return f"Base {output}: {len(texts):,} texts, {settings.num_steps} steps in {resolved.precision}, {seconds:.0f} s"


def _hash_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _read_stamp(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_same(found: dict[str, Any], wanted: dict[str, Any], *, any_precision: bool) -> bool:
    """Return whether a finished base has the wanted settings; old stamps without a precision mean bf16."""
    settings = {"precision": "bf16", **found.get("settings", {})}
    if any_precision:
        settings["precision"] = wanted["settings"]["precision"]
    return {**found, "settings": settings} == wanted


def _texts_of(task: str, data: Path, seed: int) -> list[str]:
    if task == "synthetic":
        return pretraining_texts(seed, 6000)
    split = read_prepared(data, task, "train")
    inputs = sorted({input_of(example.prompt) for example in split.examples})
    return unlabelled_texts(inputs, seed)


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    # Llama 3's split: words with their space, digits in threes, so that the small tokenizer behaves like the real one.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, backend.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )


def _encode_stream(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, answer_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all documents as one int64 stream, BOS text EOS BOS text EOS ..., and a float32 loss weight a token.

    Prompt and answer of a self-supervised question are encoded apart, as fine-tuning does: encoded together, the answer's
    first token would include the prompt's last space, and differ from the token that fine-tuning asks for.
    """
    cut = [text.rpartition(_ANSWER_MARK) for text in texts]
    prompts = [before + mark if mark else answer for before, mark, answer in cut]
    answers = [answer if mark else "" for _, mark, answer in cut]
    # One call for all: the overhead of a call exceeds the cost of a text's tokens.
    encoded = (tokenizer(parts, add_special_tokens=False)["input_ids"] for parts in (prompts, answers))
    ids: list[int] = []
    weights: list[float] = []
    for prompt_ids, answer_ids, (_, mark, _) in zip(*encoded, cut, strict=True):
        ids += [tokenizer.bos_token_id, *prompt_ids, *answer_ids, tokenizer.eos_token_id]
        weights += [1.0] * (1 + len(prompt_ids)) + [answer_weight if mark else 1.0] * (len(answer_ids) + 1)
    return torch.tensor(ids, dtype=torch.long), torch.tensor(weights, dtype=torch.float32)


def _fit(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    weights: torch.Tensor,
    settings: PretrainConfig,
    on_step: Callable[[int, float], None],
) -> None:
    # Fused: on two cores the demo's step takes 0.18 s and not 0.25, as each parameter is read and written once.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    generator = torch.Generator().manual_seed(settings.seed)
    length, num_warmup = settings.context_length, max(1, settings.num_steps // 20)
    is_half = resolve_precision(settings.precision, stream.device.type) == "bf16"
    model.train()
    for step in range(settings.num_steps):
        progress = max(0.0, (step - num_warmup) / max(1, settings.num_steps - num_warmup))
        scale = (step + 1) / num_warmup if step < num_warmup else 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * scale
        starts = torch.randint(0, len(stream) - length, (settings.batch_size,), generator=generator)
        blocks, scales = (
            torch.stack([x[start : start + length] for start in starts.tolist()]) for x in (stream, weights)
        )
        with torch.autocast(stream.device.type, torch.bfloat16, enabled=is_half):
            logits = model(input_ids=blocks).logits
        # A view of all rows. The last row of a block has no target, but slicing it off would copy the step's largest tensor.
        targets = torch.nn.functional.pad(blocks[:, 1:], (0, 1), value=_NO_TARGET).flatten()
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets, ignore_index=_NO_TARGET, reduction="none"
        )
        own = torch.nn.functional.pad(scales[:, 1:], (0, 1)).flatten()
        loss: torch.Tensor = (losses * own).sum() / own.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, float(loss.detach()))


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.bfloat16)
    with scratch_folder(output.parent, f".{output.name}-") as staging:
        # Such shards pass through channels with a size limit, and exercise the sharded reader.
        write_plain(model, staging, "15MB")
        tokenizer.save_pretrained(str(staging))
        follow_umask(staging)
        output.mkdir(exist_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            shutil.move(path, output / path.name)
