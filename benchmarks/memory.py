"""Comparison of the memory forecast with torch's allocations: three real steps at the true Llama-3.1 shapes, random weights.

    python benchmarks/memory.py --output results.jsonl             # all cases; those that do not fit the GPU are skipped
    python benchmarks/memory.py --cases 8b-4bit-r4-16x276-ckpt 70b-8bit
    python benchmarks/memory.py --size tiny --device cpu           # the same path on a small shape, without GPU numbers

A case is SIZE-BITSbit for weights only, or SIZE-BITSbit-rRANK-BxT[-ckpt] for training. Each runs in its own process, so that the
GPU is empty at its start. All rows but the first are padded, as in real batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from finlora.config import LoraConfig, ModelConfig, RunConfig, TrainConfig
from finlora.errors import ConfigError
from finlora.formula.llama import LLAMA_8B, LLAMA_70B, LlamaShape
from finlora.model.memory.fixed_memory import CUDA_CONTEXT_GIB
from finlora.model.memory.padded_memory import MemoryPlan, PaddedBatch, plan_memory

SHAPES = {
    "8b": LLAMA_8B,
    "70b": LLAMA_70B,
    "tiny": LlamaShape(
        hidden_size=64, intermediate_size=224, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=2048
    ),
}
# A micro-batch of NER's usual length (276 tokens), and one of its longest example (719).
DEFAULT_CASES = [
    "8b-16bit",
    "8b-8bit",
    "8b-4bit",
    "8b-4bit-r4-16x276",
    "8b-4bit-r4-16x276-ckpt",
    "8b-4bit-r4-16x719-ckpt",
    "8b-8bit-r8-16x276-ckpt",
    "70b-4bit-r4-4x276-ckpt",
    "70b-8bit",
    "70b-16bit",
]
TINY_CASES = [
    "tiny-16bit",
    "tiny-4bit",
    "tiny-16bit-r4-4x64",
    "tiny-8bit-r4-4x64-ckpt",
    "tiny-4bit-r4-4x64-ckpt",
]
LABELS_A_ROW, STEPS, MARGIN_GIB = 4, 3, 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement; lora_rank 0: weights only."""

    name: str
    size: str
    bits: int
    lora_rank: int = 0
    micro_batch: int = 1
    length: int = 1
    checkpointing: bool = False


def parse_case(name: str) -> Case:
    """Read a case from its name.

    Raises:
        ConfigError: the name is not of the form that the module describes.
    """
    match = re.fullmatch(r"(8b|70b|tiny)-(16|8|4)bit(?:-r(\d+)-(\d+)x(\d+)(-ckpt)?)?", name)
    if match is None:
        raise ConfigError(
            f"case {name!r}: expected SIZE-BITSbit or SIZE-BITSbit-rRANK-BxT[-ckpt], e.g. 8b-4bit-r4-16x276"
        )
    size, bits, lora_rank, rows, length, checkpointing = match.groups()
    if lora_rank is None:
        return Case(name=name, size=size, bits=int(bits))
    return Case(
        name=name,
        size=size,
        bits=int(bits),
        lora_rank=int(lora_rank),
        micro_batch=int(rows),
        length=int(length),
        checkpointing=checkpointing is not None,
    )


def make_config(case: Case, folder: str, tokenizer: str, device: str) -> RunConfig:
    """Return the config of a case's run."""
    return RunConfig(
        model=ModelConfig(
            base=folder,
            tokenizer=tokenizer,
            weights="random",
            bits=case.bits,  # type: ignore[arg-type]
            compute_dtype="bfloat16",  # as on a GPU, also in a trial on a CPU
        ),
        lora=LoraConfig(rank=case.lora_rank or 4),
        train=TrainConfig(
            device=device,  # type: ignore[arg-type]
            precision="bf16",
            micro_batch_size=case.micro_batch,
            global_batch_size=case.micro_batch,
            gradient_checkpointing=case.checkpointing,
        ),
    )


def forecast_case(case: Case) -> MemoryPlan:
    """Forecast a case from its shape."""
    batch = PaddedBatch(
        num_examples=case.micro_batch,
        num_tokens=case.length,
        num_labels=case.micro_batch * LABELS_A_ROW,
        is_padded=case.micro_batch > 1,
    )
    return plan_memory(SHAPES[case.size], make_config(case, "base", "tokenizer", "cuda"), batch)


def write_base(folder: Path, shape: LlamaShape) -> None:
    """Write config.json of a shape and a small tokenizer, so that load_base finds a complete folder."""
    import torch

    from finlora.data.pretraining.generated_texts import pretraining_texts
    from finlora.model.pretrain import PretrainConfig, pretrain_base

    small = PretrainConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=1, context_length=32, num_steps=1
    )
    pretrain_base(pretraining_texts(1, 100), small, folder, torch.device("cpu"), lambda _step, _loss: None)
    (folder / "model.safetensors").unlink()
    values = {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": shape.is_tied,
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def measure_case(case: Case, device_name: str) -> dict[str, Any]:
    """Load, attach and train three steps; return measured numbers, GiB = 2**30 bytes."""
    import torch

    from finlora.model.base import load_base, quiet_bitsandbytes

    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="finlora-memory-") as name, quiet_bitsandbytes():
        folder = Path(name)
        write_base(folder, SHAPES[case.size])
        config = make_config(case, name, name, device_name)
        base = load_base(config.model, config.model.bits, device, seed=0)
        measured: dict[str, Any] = {"weights_gib": base.weights_gib, "load_peak_gib": base.load_peak_gib}
        if on_gpu:
            measured["device"] = torch.cuda.get_device_name(device)
            measured["weights_allocated_gib"] = torch.cuda.memory_allocated(device) / 2**30
        if case.lora_rank:
            measured |= _train(base.model, case, config, device, folder)
        if on_gpu:
            free, total = torch.cuda.mem_get_info(device)
            measured["outside_torch_gib"] = (total - free - torch.cuda.memory_reserved(device)) / 2**30
            measured["reserved_peak_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return measured


def _train(net: Any, case: Case, config: RunConfig, device: Any, folder: Path) -> dict[str, Any]:
    import torch

    from finlora.data.encode import IGNORED, Batch
    from finlora.model.lora import attach_lora, save_adapter, trainable_parameters
    from finlora.optim.optimizer import make_optimizer
    from finlora.train.steps.loop import AnswerLoss

    model = attach_lora(net, config.lora, net.name_or_path, 0)
    if case.checkpointing:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # renamed in transformers 5.23, not in 5.17
            model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(trainable_parameters(model).values())
    optimizer = make_optimizer(parameters, config.optim, STEPS)
    loss_of = AnswerLoss(model.train())
    rows, length = case.micro_batch, case.length
    torch.manual_seed(0)
    input_ids = torch.randint(3, 500, (rows, length), device=device)
    mask = torch.ones(rows, length, dtype=torch.long, device=device)
    labels = torch.full((rows, length), IGNORED, device=device)
    end = length * 3 // 4
    mask[1:, end:] = 0
    labels[:, end - LABELS_A_ROW : end] = input_ids[:, end - LABELS_A_ROW : end]
    batch = Batch(input_ids, mask, labels, int(mask.sum()))
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(STEPS):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        last_loss = float(loss.detach())
        del loss  # as the loop does: the graph's nodes hold LLM.int8()'s inputs
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # DeepSpeed keeps gradients between steps too
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    measured: dict[str, Any] = {
        "train_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "seconds_per_step": min(seconds),
        "tokens_per_second": int(mask.sum()) / min(seconds),
        "loss": last_loss,
    }
    measured["adapter_file_mib"] = save_adapter(model, folder / "adapter")
    return measured


def run_in_process(case: Case, device: str) -> dict[str, Any]:
    """Measure a case in a fresh process; an error becomes the row's `error`."""
    if device == "cuda":
        import torch

        free = torch.cuda.mem_get_info()[0] / 2**30
        needed = forecast_case(case).total_gib + MARGIN_GIB
        if needed > free:
            return {"error": f"skipped: forecast {needed:.1f} GiB, {free:.1f} GiB free"}
    command = [sys.executable, __file__, "--device", device, "--run-one", case.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit {done.returncode}: {lines[-1][:300]}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def print_case(case: Case, measured: dict[str, Any], plan: MemoryPlan) -> None:
    """Print a line for each number: measured, forecast and their ratio."""
    if "error" in measured:
        print(f"{case.name:28} {measured['error']}", flush=True)
        return
    for key in ("weights_gib", "load_peak_gib", "train_peak_gib", "adapter_file_mib"):
        value, expected = measured.get(key), getattr(plan, key)
        if value is not None:
            print(f"{case.name:28} {key:18} {value:10.3f} {expected:10.3f} {expected / value:8.3f}")
    if "outside_torch_gib" in measured:
        print(f"{case.name:28} {'outside torch':18} {measured['outside_torch_gib']:10.3f} {CUDA_CONTEXT_GIB:10.3f}")
    if "tokens_per_second" in measured:
        print(
            f"{case.name:28} {measured['seconds_per_step']:.3f} s a step, {measured['tokens_per_second']:,.0f} real tokens/s"
        )
    sys.stdout.flush()


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="names; default: all of --size")
    parser.add_argument("--size", choices=["8b", "70b", "tiny"], help="only the default cases of this size")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON lines file to append to")
    parser.add_argument("--run-one", metavar="CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_one:
        print(json.dumps(measure_case(parse_case(arguments.run_one), arguments.device)))
        return
    defaults = TINY_CASES if arguments.size == "tiny" else DEFAULT_CASES
    names = arguments.cases or [n for n in defaults if arguments.size is None or n.startswith(f"{arguments.size}-")]
    cases = [parse_case(name) for name in names]
    print(f"{'case':28} {'number':18} {'measured':>10} {'forecast':>10} {'ratio':>8}")
    for case in cases:
        measured, plan = run_in_process(case, arguments.device), forecast_case(case)
        print_case(case, measured, plan)
        if arguments.output:
            row = {"case": dataclasses.asdict(case), "measured": measured, "forecast": dataclasses.asdict(plan)}
            row["forecast"] |= {"train_peak_gib": plan.train_peak_gib, "total_gib": plan.total_gib}
            with arguments.output.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
