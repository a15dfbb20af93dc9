"""Training speed and memory of FinLoRA's packed loop and of plain transformers + PEFT + bitsandbytes, at true Llama shapes.

    python benchmarks/train_throughput.py --data ~/finlora/data --base ~/llama-8b --tokenizer ~/llama-8b/tokenizer.model
    python benchmarks/train_throughput.py --works 8b-4bit-r4-ner-16 --sides finlora --memory-gb 10
    python benchmarks/train_throughput.py --works tiny-4bit-r4-synthetic_sentiment-4 --device cpu --steps 2 --repeats 1

A work is SIZE-BITSbit-rRANK[all]-TASK-BATCH[xACCUMULATION]; the global batch is BATCH x ACCUMULATION examples. `all` adapts all
seven projections, without it q, k and v are adapted. Weights are random,
prompts are real: the prepared task's train split with the base's tokenizer. Each side runs in its own process; both are timed on
the same steps after a warm-up. GB = 1e9 bytes, as torch.cuda.max_memory_allocated counts them. The roof's share is 4 x parameters
of the decoder layers x real tokens / time (forward pass and activation gradient), over the rate of a large bf16 product measured
in the same process; tokens that a shared prefix saves count as computed. `forecast` is `finlora plan`'s peak for these steps;
`held` is torch's memory from the driver, including unused parts of its blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sides import compare, make_parser

from finlora.errors import ConfigError

WORKS = (
    "8b-4bit-r4-ner-16",
    "8b-4bit-r4-fpb-16",
    "8b-4bit-r16all-ner-16",
    "8b-4bit-r16all-fpb-16",
    "8b-8bit-r8-ner-16",
    "8b-4bit-r4-xbrl_tags+xbrl_values-2x2",
    "70b-4bit-r4-ner-4x4",
)
SIDES = ("plain", "plain-again", "plain-checkpointing", "finlora")
"""plain-again: plain with other dropout masks."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row of the table."""

    name: str
    size: str
    bits: int
    lora_rank: int
    adapts_all: bool
    tasks: tuple[str, ...]
    micro_batch: int
    accumulation: int


def parse_work(name: str) -> Work:
    """Read a work from its name.

    Raises:
        ConfigError: the name is not of the form that the module describes.
    """
    match = re.fullmatch(r"(8b|70b|tiny)-(16|8|4)bit-r(\d+)(all)?-([a-z_+]+)-(\d+)(?:x(\d+))?", name)
    if match is None:
        raise ConfigError(
            f"work {name!r}: expected SIZE-BITSbit-rRANK[all]-TASK-BATCH[xACCUMULATION], e.g. 8b-4bit-r4-ner-16"
        )
    size, bits, lora_rank, adapts_all, tasks, batch, accumulation = match.groups()
    return Work(
        name=name,
        size=size,
        bits=int(bits),
        lora_rank=int(lora_rank),
        adapts_all=adapts_all is not None,
        tasks=tuple(tasks.split("+")),
        micro_batch=int(batch),
        accumulation=int(accumulation or 1),
    )


class PlainEngine:
    """Engine for the loop without DeepSpeed: one GPU has nothing to reduce."""

    def __init__(self, module: Any, optimizer: Any, device: Any, max_grad_norm: float, is_half: bool) -> None:
        self.module, self.optimizer, self.device, self.max_grad_norm = module, optimizer, device, max_grad_norm
        self.is_half = is_half

    def __call__(self, batch: Any) -> Any:
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
            return self.module(batch)

    def backward(self, loss: Any, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def step(self) -> None:
        import torch

        parameters = self.optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def full_loss(model: Any, other_masks: bool) -> Callable[[Any], Any]:
    """Return transformers' loss over the full vocabulary at every position, as its Trainer computes it."""
    import torch

    def loss_of(batch: Any) -> Any:
        if other_masks:
            torch.manual_seed(torch.initial_seed() + 1)
        out = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
        )
        return out.loss * int((batch.labels != -100).sum())

    return loss_of


def measure(work: Work, side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train `repeats` windows of `steps` steps after a warm-up, and return their speeds."""
    import torch

    from finlora.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
    from finlora.formula.llama import PROJECTION_NAMES
    from finlora.model.base import load_base, quiet_bitsandbytes
    from finlora.model.lora import attach_lora, trainable_parameters
    from finlora.optim.optimizer import make_optimizer
    from finlora.precision import is_autocast
    from finlora.train.path import make_sampler, take_path
    from finlora.train.plan import find_memory_gib, plan_run
    from finlora.train.run.run_folder import load_training_set
    from finlora.train.steps.batches import PaddedBatches
    from finlora.train.steps.loop import run_steps

    device = torch.device(arguments.device)
    # A pack size is captured when it occurs again: FinLoRA is measured after most sizes have occurred.
    # The plain side starts at a later step, so that both are timed on the same examples.
    num_before = -(-arguments.warm_up // arguments.steps)
    num_warm = num_before if side == "finlora" else 2
    start = arguments.steps * max(0, num_before - num_warm)
    total = start + arguments.steps * (num_warm + arguments.repeats)
    config = RunConfig(
        model=ModelConfig(
            base=str(arguments.base / work.size if (arguments.base / work.size).is_dir() else arguments.base),
            tokenizer=arguments.tokenizer and str(arguments.tokenizer),
            weights="random",
            bits=work.bits,  # type: ignore[arg-type]
        ),
        lora=dataclasses.replace(
            LoraConfig(rank=work.lora_rank, dropout=arguments.dropout),
            **({"target_modules": PROJECTION_NAMES} if work.adapts_all else {}),
        ),
        data=DataConfig(tasks=work.tasks, dir=str(arguments.data)),
        train=TrainConfig(
            device=arguments.device,
            micro_batch_size=work.micro_batch,
            global_batch_size=work.micro_batch * work.accumulation,
            epochs=1000,
            max_steps=total,
            memory_gib=arguments.memory_gb and arguments.memory_gb * 1e9 / 2**30,
            recompute=arguments.recompute,
            share_prefix=not arguments.own_prefix,
            unpack_weights=arguments.unpack_weights,
        ),
    )
    training_set = load_training_set(config)
    sampler = make_sampler(config, training_set.encoded)
    verdict = plan_run(config, find_memory_gib(device), 1, training_set)
    with quiet_bitsandbytes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        base = load_base(config.model, config.model.bits, device, seed=0)
        model = attach_lora(base.model, config.lora, config.model.base, 0)
        parameters = list(trainable_parameters(model).values())
        optimizer = make_optimizer(parameters, config.optim, total)
        notes = ""
        if side == "finlora":
            verdict.require_fit()
            pad = base.tokenizer.pad_token_id
            taken = take_path(model.train(), config, training_set.encoded, verdict.packs, device, pad)
            module, batches, notes = taken.module, taken.batches, verdict.describe(config)
        else:
            if side == "plain-checkpointing":
                model.gradient_checkpointing_enable({"use_reentrant": False})
            module = full_loss(model.train(), other_masks=side == "plain-again")
            batches = PaddedBatches(micro_batch_size=work.micro_batch, pad_token_id=base.tokenizer.pad_token_id)
        windows: list[Any] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        run_steps(
            PlainEngine(module, optimizer, device, config.optim.max_grad_norm, is_autocast(config)),
            training_set.encoded,
            sampler,
            config.optim,
            worker=0,
            start_step=start,
            total_steps=total,
            batches=batches,
            device=device,
            log_every_steps=arguments.steps,
            reduce_sum=lambda values: values,
            on_log=windows.append,
            on_step_end=lambda _step: False,
        )
    measured = windows[num_warm:]
    examples = statistics.median(window.examples_per_second for window in measured)
    tokens = statistics.median(window.tokens_per_second for window in measured)
    result: dict[str, Any] = {
        "examples_per_second": examples,
        "spread": [min(w.examples_per_second for w in measured), max(w.examples_per_second for w in measured)],
        "tokens_per_second": tokens,
        "peak_gb": windows[-1].memory_gib * 2**30 / 1e9,
        "weights_gib": base.weights_gib,
        "seconds": time.perf_counter() - started,
        "losses": [window.loss for window in windows],
        "forecast_gb": verdict.plan.train_peak_gib * 2**30 / 1e9 if side == "finlora" else None,
        "notes": notes,
    }
    if device.type == "cuda":
        held = torch.cuda.max_memory_reserved(device) / 1e9
        roof = measure_roof(device)
        layers = sum(p.numel() for p in _layer_shapes(base.model))
        result |= {
            "device": torch.cuda.get_device_name(device),
            "roof_tflops": roof / 1e12,
            "held_gb": held,
            "share_of_roof": 4 * layers * tokens / roof,
        }
    return result


def _layer_shapes(net: Any) -> list[Any]:
    """Return empty tensors in the unpacked shapes of the decoder layers' weights."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        plain = LlamaForCausalLM(net.config)
    return [parameter for name, parameter in plain.named_parameters() if ".layers." in name and parameter.dim() == 2]


def measure_roof(device: Any) -> float:
    """Return the rate of an 8192^3 bf16 product on random data, in operations a second (median of 20)."""
    import torch

    torch.cuda.empty_cache()
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(left, right)
        end.record()
        torch.cuda.synchronize(device)
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * size**3 / statistics.median(seconds[5:])


def show(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Return a side's line of the table."""
    speed = row["examples_per_second"]
    return (
        f"{speed:10.2f} {row['tokens_per_second']:9,.0f} {row['peak_gb']:8.2f} {row['forecast_gb'] or 0:8.2f} "
        f"{row.get('held_gb', 0):6.2f} {row.get('share_of_roof', 0):6.1%} {speed / reference['examples_per_second']:6.2f}  "
        f"{row['notes']}"
    )


def main() -> None:
    """Run every work on every side and print the table."""
    parser = make_parser(__doc__, WORKS, SIDES, ("plain", "finlora"))
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps a window")
    parser.add_argument("--repeats", type=int, default=5, help="windows")
    parser.add_argument(
        "--warm-up",
        type=int,
        default=128,
        help="steps before the windows; plain runs only the last two windows of them",
    )
    parser.add_argument("--own-prefix", action="store_true", help="compute the prompts' prefix for each example")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--memory-gb", type=float, help="memory that FinLoRA may use, 1e9 bytes; default: the GPU's")
    parser.add_argument("--recompute", choices=["auto", "none", "mlp", "layer"], default="auto")
    parser.add_argument("--unpack-weights", choices=["auto", "always", "never"], default="auto")
    arguments = parser.parse_args()
    for name in arguments.works:
        parse_work(name)
    if arguments.run_one:
        arguments.result.write_text(json.dumps(measure(parse_work(arguments.works[0]), arguments.run_one, arguments)))
        return
    print(
        f"{'work':38} {'side':20} {'examples/s':>10} {'tokens/s':>9} {'peak GB':>8} {'forecast':>8} {'held':>6} {'roof':>6} "
        f"{'ratio':>6}  notes"
    )
    compare(__file__, arguments, (38, 20), show)


if __name__ == "__main__":
    main()
