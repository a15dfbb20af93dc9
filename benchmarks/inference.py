"""Inference speed and memory of FinLoRA's engine and of transformers' generate, at true Llama shapes with random weights.

    python benchmarks/inference.py --data ~/finlora/data --base ~/llama --tokenizer ~/llama/tokenizer.model
    python benchmarks/inference.py --works 8b-8bit-ner-labels-64 --sides plain-1 finlora
    python benchmarks/inference.py --works tiny-16bit-synthetic_sentiment-labels-4 --device cpu --repeats 1

A work is SIZE-BITSbit-TASK-labels-COUNT (the label of COUNT examples), SIZE-BITSbit-TASK-NEWnew-COUNT (COUNT examples at once,
NEW tokens each), or either with the suffix -STAGESstages (Ray actors, sharing GPUs if necessary). Prompts come from the prepared
task's test split. `plain-B` is transformers' generate on padded batches of B, with four new tokens for a label, as it cannot
score labels. Both sides generate every requested token; each side runs in its own process. GB = 1e9 bytes as
torch.cuda.max_memory_allocated counts them, over all stages; first: seconds to the first token of a single request.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sides import compare, make_parser

from finlora.errors import ConfigError

WORKS = (
    "8b-8bit-ner-labels-256",
    "8b-4bit-ner-labels-256",
    "8b-8bit-ner-64new-1",
    "8b-16bit-ner-64new-1",
    "8b-4bit-xbrl_values-30new-16",
    "70b-4bit-ner-32new-16-4stages",
    "70b-4bit-ner-32new-16",
)
SIDES = ("plain-1", "plain-8", "plain-16", "plain-32", "finlora")
LABEL_TOKENS = 4
NEVER = -1  # no token ends an answer


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row of the table."""

    name: str
    size: str
    bits: int
    task: str
    num_new: int
    """New tokens; 0: labels."""
    count: int
    num_stages: int


def parse_work(name: str) -> Work:
    """Read a work from its name.

    Raises:
        ConfigError: the name does not have the form in the module's docstring.
    """
    form = r"(8b|70b|tiny)-(16|8|4)bit-([a-z_]+)-(?:labels|(\d+)new)-(\d+)(?:-(\d+)stages)?"
    match = re.fullmatch(form, name)
    if match is None:
        raise ConfigError(
            f"work {name!r}: expected SIZE-BITSbit-TASK-labels-COUNT or SIZE-BITSbit-TASK-NEWnew-COUNT, e.g. {WORKS[0]}"
        )
    size, bits, task, num_new, count, stages = match.groups()
    return Work(
        name=name,
        size=size,
        bits=int(bits),
        task=task,
        num_new=int(num_new or 0),
        count=int(count),
        num_stages=int(stages or 1),
    )


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Questions for both sides."""

    prompts: list[tuple[int, ...]]
    choices: list[tuple[tuple[int, ...], ...]]


def read_questions(work: Work, config: Any, tokenizer: Any) -> Questions:
    """Select examples spread evenly over the test split."""
    from finlora.data.sets.prepared import read_prepared
    from finlora.evaluate.evaluation import encode_split

    split = read_prepared(Path(config.data.dir), work.task, "test")
    encoded = encode_split(config, tokenizer, split, work.task)
    step = max(1, len(encoded.examples) // work.count)
    chosen = [index * step % len(encoded.examples) for index in range(work.count)]
    return Questions(
        prompts=[tuple(encoded.encoded[index].prompt_ids) for index in chosen],
        choices=[
            tuple(tuple(encoded.choice_ids[choice]) for choice in encoded.examples[index].choices)
            if not work.num_new
            else ()
            for index in chosen
        ],
    )


def measure_plain(
    work: Work, batch: int, config: Any, questions: Questions, device: Any, repeats: int
) -> dict[str, Any]:
    """Time transformers' generate on batches of prompts padded on the left."""
    import torch

    from finlora.model.base import load_base, quiet_bitsandbytes
    from finlora.model.memory.peak import measure_peak_gib

    num_new = work.num_new or LABEL_TOKENS
    with quiet_bitsandbytes():
        base = load_base(config.model, config.model.bits, device, 0)
        pad = base.tokenizer.pad_token_id
        # Timing one batch is enough; all would take the slowest side minutes.
        prompts = questions.prompts[: max(batch, min(len(questions.prompts), 4 * batch, 64))]

        @torch.inference_mode()
        def run(count: int) -> None:
            for start in range(0, len(prompts), batch):
                rows = prompts[start : start + batch]
                longest = max(len(row) for row in rows)
                ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
                mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
                base.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    pad_token_id=pad,
                )

        seconds = _time(lambda: run(num_new), device, repeats)
        first = _time(lambda: run(1), device, repeats) if len(prompts) == 1 else None
    return {
        "seconds_per_example": seconds / len(prompts),
        "first_seconds": first,
        "weights_gib": base.weights_gib,
        "peak_gb": measure_peak_gib(device) * 2**30 / 1e9,
        "notes": f"{len(prompts)} examples",
    }


def measure_finlora(work: Work, config: Any, questions: Questions, options: argparse.Namespace) -> dict[str, Any]:
    """Time the engine on all questions at once, from an empty prefix cache each time."""
    import torch

    from finlora.engine.admission import Limits
    from finlora.engine.engine import EngineCore
    from finlora.engine.request import Request, Sampling
    from finlora.engine.scheduler import Scheduler
    from finlora.inference.open_base import choose_batch_rows, choose_in_flight, count_rows, open_executor
    from finlora.model.base import quiet_bitsandbytes
    from finlora.model.base_files import read_base_files

    device = torch.device(options.device)
    sampling = Sampling(max_tokens=work.num_new or 1)
    requests = [
        Request(id=str(number), prompt_ids=prompt, choices=choices, sampling=sampling)
        for number, (prompt, choices) in enumerate(zip(questions.prompts, questions.choices, strict=True))
    ]
    sizes = sorted((request.num_tokens for request in requests), reverse=True)
    rows = count_rows(sizes, options.at_once)
    with ExitStack() as stack:
        stack.enter_context(quiet_bitsandbytes())
        if work.num_stages > 1:
            from finlora.cluster import connect

            connect.connect(log_to_driver=False)
            import ray  # reads its settings at import

            stack.callback(ray.shutdown)
        base = read_base_files(config.model)
        tokenizer = base.tokenizer
        executor, rows = stack.enter_context(open_executor(config, base, work.num_stages, rows, sizes[0]))
        in_flight = options.in_flight or choose_in_flight(work.num_stages, config.eval.device, config.eval.num_gpus)
        batch_rows = options.batch_tokens or choose_batch_rows(in_flight)

        def run(asked: Sequence[Any]) -> tuple[Any, Any]:
            """Return the readings of the run, and of decoding alone: from the last prefill to the first answer's end."""
            # A new scheduler has an empty prefix cache.
            follows = executor.can_follow and not options.no_following
            limits = Limits(cache_rows=rows, max_in_flight=in_flight, max_batch_tokens=batch_rows, follows=follows)
            core = EngineCore(executor, Scheduler(limits, NEVER, lambda: 0), tokenizer)
            for request in asked:
                core.submit(request)
            prefilled = steady = None
            while not core.is_idle:
                ended = core.step()
                if prefilled is None and not core.scheduler.num_waiting:
                    prefilled = core.meter.totals() if core.scheduler.num_prefilled == len(asked) else None
                elif prefilled is not None and steady is None and ended:
                    steady = core.meter.read(prefilled)
            return core.meter.read(), steady

        run(requests)  # warm-up: compiles kernels and runs each size of pass once
        run(requests)
        readings: list[Any] = []
        seconds = _time(lambda: readings.append(run(requests)), device, options.repeats)
        lone = [Request(id="lone", prompt_ids=requests[0].prompt_ids, sampling=Sampling(max_tokens=1))]
        run(lone)
        firsts: list[Any] = []
        first = _time(lambda: firsts.append(run(lone)), device, options.repeats)
        peak = executor.peak_memory_gib() or 0.0
        whole, steady = readings[-1]
        weights = [stage["weights_gib"] for stage in executor.stages] if work.num_stages > 1 else None  # type: ignore[attr-defined]
    return {
        "seconds_per_example": seconds / len(requests),
        "first_seconds": first,
        "weights_gib": sum(weights) if weights else None,
        "peak_gb": peak * 2**30 / 1e9,
        "notes": f"{whole.describe()}; first token: {_describe_stages(firsts[-1][0])}"
        + (f"; decoding alone: {steady.describe()}" if steady and work.num_stages > 1 else ""),
        "reading": asdict(whole),
        "steady": steady and asdict(steady),
    }


def measure(work: Work, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one side in this process."""
    import torch

    from finlora.config import DataConfig, EvalConfig, ModelConfig, RunConfig
    from finlora.model.source import find_source
    from finlora.model.tokenizer import load_tokenizer

    device = torch.device(options.device)
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    config = RunConfig(
        model=ModelConfig(
            base=str(options.base / work.size if (options.base / work.size).is_dir() else options.base),
            tokenizer=options.tokenizer and str(options.tokenizer),
            weights="random",
            bits=work.bits,  # type: ignore[arg-type]
            compute_dtype="bfloat16" if device.type == "cuda" else "float32",
        ),
        data=DataConfig(tasks=(work.task,), dir=str(options.data)),
        eval=EvalConfig(
            device=options.device,
            bits=None,
            method="generate" if work.num_new else "labels",
            max_new_tokens=max(1, work.num_new),
            num_gpus=min(1.0, num_gpus / work.num_stages),
            transport=options.transport,
        ),
    )
    questions = read_questions(work, config, load_tokenizer(find_source(config.model).tokenizer_path))
    tokens = sum(len(prompt) for prompt in questions.prompts) / work.count
    if side == "finlora":
        result = measure_finlora(work, config, questions, options)
    else:
        result = measure_plain(work, int(side.removeprefix("plain-")), config, questions, device, options.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return result | {"prompt_tokens": tokens, "device": name}


def _time(run: Callable[[], object], device: Any, repeats: int) -> float:
    """Return the median time of a run, in seconds."""
    import torch

    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _describe_stages(reading: Any) -> str:
    stages = " + ".join(f"{share * reading.seconds * 1e3:.1f}" for share in reading.busy)
    return f"{stages} ms computed of {reading.seconds * 1e3:.1f}"


def show(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Return a side's line of the table."""
    seconds = row["seconds_per_example"]
    return (
        f"{seconds:10.4f} {row['first_seconds'] or 0:8.4f} {row['weights_gib'] or 0:8.2f} {row['peak_gb']:8.2f} "
        f"{reference['seconds_per_example'] / seconds:7.1f}  {row['notes']}"
    )


def main() -> None:
    """Run every work on every side and print the table."""
    parser = make_parser(__doc__, WORKS, SIDES, ("plain-1", "plain-32", "finlora"))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs")
    parser.add_argument("--at-once", type=int, default=64, help="requests that the KV cache holds")
    parser.add_argument("--batch-tokens", type=int, help="most rows of a micro-batch; default: as in an evaluation")
    parser.add_argument("--transport", choices=["messages", "nccl", "gloo"], default="messages", help="between stages")
    parser.add_argument("--in-flight", type=int, help="micro-batches in flight; default: as in an evaluation")
    parser.add_argument("--no-following", action="store_true", help="start no token before the previous one is sampled")
    options = parser.parse_args()
    for name in options.works:
        parse_work(name)
    if options.run_one:
        options.result.write_text(json.dumps(measure(parse_work(options.works[0]), options.run_one, options)))
        return
    print(f"{'work':34} {'side':9} {'s/example':>10} {'first s':>8} {'weights':>8} {'peak GB':>8} {'faster':>7}  notes")
    compare(__file__, options, (34, 9), show)


if __name__ == "__main__":
    main()
