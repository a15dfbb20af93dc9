"""Time of a decode step with and without grammars, on one engine in one run: the sides take turns.

    python benchmarks/structured_output.py --base .demo/real-base --shape 8b --bits 8
    python benchmarks/structured_output.py --base .demo/real-base --bits 16 --stages 2 --gpus-per-stage 0.5
    python benchmarks/structured_output.py --base .demo/real-base --device cpu --requests 8 --tokens 24 --rounds 2

`--base` gives the tokenizer and, without `--shape`, the weights. `--shape 8b` takes the shape of Llama 3.1 8B with random weights
and a vocabulary of 128,256: the base's, with pairs of its words as further tokens.

Stages are Ray actors, as in a server, one too; `--in-process` computes as `finlora evaluate` does with one stage.

Sides: plain, no grammar; schema, one JSON Schema for all requests; schemas, another one for each; mixed, every second request has
a schema; regex, a regular expression. No text is complete within `--tokens`. Timed from the end of the last prefill to the first
answer: seconds a token of all requests. The table has the median over the rounds, and the quotient by plain of the same round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SIDES = ("plain", "schema", "schemas", "mixed", "regex")
NEVER = -1  # no token ends an answer
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_shape(base: Path, folder: Path, num_layers: int) -> Path:
    """Write the config of Llama 3.1 8B, and the base's tokenizer grown to its vocabulary."""
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    words = [word for word in vocabulary if word.isascii() and word.isalpha() and 2 <= len(word) <= 6]
    starts = [word for word in vocabulary if word.startswith("\u0120") and word[1:].isalpha() and len(word) <= 7]
    choose, known = random.Random(0), set(vocabulary)
    while len(vocabulary) < LLAMA_8B["vocab_size"] - 256:  # type: ignore[operator]
        first, second = choose.choice(starts), choose.choice(words)
        if first + second not in known:
            known.add(first + second)
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second] if isinstance(merges[0], list) else f"{first} {second}")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base / name).is_file():
            (folder / name).write_bytes((base / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": num_layers}))
    return folder


def make_grammar(side: str, number: int) -> str:
    """Return the grammar of a request; its texts are longer than any run."""
    from finlora.grammar.compile import json_schema, regex

    if side == "plain" or (side == "mixed" and number % 2):
        return ""
    if side == "regex":
        return regex(r"([A-Z][a-z]{2,8} (rose|fell) by [0-9]{1,2}\.[0-9] %; ){200}")
    item = {
        "type": "object",
        "properties": {
            "company": {"type": "string", "maxLength": 24},
            "sentiment": {"enum": ["positive", "negative", "neutral"]},
            "change": {"type": "number", "minimum": -100, "maximum": 100},
            "date": {"type": "string", "format": "date"},
            "reasons": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 3},
            f"field_{number if side == 'schemas' else 0}": {"type": ["integer", "null"], "minimum": 0, "maximum": 9999},
        },
    }
    item["required"] = list(item["properties"])  # type: ignore[arg-type]
    return json_schema({"type": "array", "items": item, "minItems": 400})


def time_step(executor: Any, requests: Sequence[Any], limits: Any, tokenizer: Any) -> float:
    """Return the seconds in which each request gets one token, while all of them decode."""
    from finlora.engine.engine import EngineCore
    from finlora.engine.scheduler import Scheduler

    core = EngineCore(executor, Scheduler(limits, NEVER, lambda: 0), tokenizer)
    for request in requests:
        core.submit(request)
    began, steps = None, 0
    while True:
        ended = core.step()
        if ended:
            break
        if began is None:
            began = time.perf_counter() if core.scheduler.num_prefilled == len(requests) else None
        else:
            steps += 1
    seconds = time.perf_counter() - (began or 0.0)
    assert began is not None, "the answers ended before all prompts were computed: raise --tokens"
    faults = [answer.fault for answer in ended if answer.finish != "length"]
    while not core.is_idle:
        faults += [answer.fault for answer in core.step() if answer.finish != "length"]
    assert not faults, faults
    return seconds / (steps + 1) * limits.max_in_flight


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of a step by side, one for each round."""
    from finlora.config import EvalConfig, ModelConfig, RunConfig
    from finlora.data.encode import encode_prompt
    from finlora.engine.admission import Limits
    from finlora.engine.request import Request, Sampling
    from finlora.inference.open_base import choose_batch_rows, choose_in_flight, open_executor, round_up, warm_up
    from finlora.model.base import quiet_bitsandbytes
    from finlora.model.base_files import read_base_files

    is_gpu = options.device == "cuda"
    with ExitStack() as stack:
        base, weights = options.base, "random" if options.random else "pretrained"
        if options.shape:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            base, weights = make_shape(options.base, folder / "8b", options.layers), "random"
        config = RunConfig(
            model=ModelConfig(
                base=str(base),
                weights=weights,  # type: ignore[arg-type]
                bits=options.bits,
                compute_dtype="bfloat16" if is_gpu else "float32",
            ),
            eval=EvalConfig(device=options.device, bits=None, num_gpus=options.gpus_per_stage),
        )
        stack.enter_context(quiet_bitsandbytes())
        if not options.in_process:
            from finlora.cluster import connect

            connect.connect(log_to_driver=False)
            import ray  # reads its settings at import

            stack.callback(ray.shutdown)
        files = read_base_files(config.model)
        prompts = [
            encode_prompt(
                f"{number}. Nokia's profit rose {number} percent in the quarter. As JSON:", files.tokenizer, "raw"
            )
            for number in range(options.requests)
        ]
        rows = sum(len(prompt) + options.tokens + 16 for prompt in prompts)
        executor: Any
        if options.in_process:
            executor, rows = stack.enter_context(open_executor(config, files, 1, rows, rows))
        else:
            from finlora.pipeline.pipeline import Pipeline, PipelineConfig  # after Ray's settings

            rows = round_up(rows)
            settings = PipelineConfig(
                num_stages=options.stages,
                cache_rows=rows,
                device=options.device,
                gpus_per_stage=options.gpus_per_stage,
                cpus_per_stage=0.25,
            )
            executor = Pipeline(config.model, files.shape, options.bits, settings, 0)
            stack.callback(executor.close)
        in_flight = choose_in_flight(options.stages, options.device, options.gpus_per_stage)
        limits = Limits(
            cache_rows=rows,
            max_in_flight=in_flight,
            max_batch_tokens=choose_batch_rows(in_flight),
            follows=executor.can_follow,
        )
        if is_gpu:
            warm_up(executor, rows, limits.max_batch_tokens)

        def run(side: str) -> float:
            requests = [
                Request(
                    id=str(number),
                    prompt_ids=prompt,
                    sampling=Sampling(
                        max_tokens=options.tokens,
                        temperature=options.temperature,
                        seed=number,
                        grammar=make_grammar(side, number),
                    ),
                )
                for number, prompt in enumerate(prompts)
            ]
            return time_step(executor, requests, limits, files.tokenizer)

        for side in options.sides:  # kernels, and each grammar compiled
            run(side)
        found: dict[str, list[float]] = {side: [] for side in options.sides}
        for number in range(options.rounds):
            for side in options.sides if number % 2 == 0 else options.sides[::-1]:
                found[side].append(run(side))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a base, such as .demo/real-base")
    parser.add_argument("--shape", choices=["8b"], help="random weights of this shape in place of the base's own")
    parser.add_argument("--random", action="store_true", help="random weights: the base's folder needs no weights")
    parser.add_argument("--layers", type=int, default=32, help="layers of the shape")
    parser.add_argument("--bits", type=int, choices=[16, 8, 4], default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--in-process", action="store_true", help="one stage, in this process")
    parser.add_argument("--gpus-per-stage", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, help="JSON file of all rounds")
    options = parser.parse_args()
    found = measure(options)
    if options.output:
        options.output.write_text(json.dumps(found))
    print(f"{'side':8} {'ms a step':>10} {'least':>8} {'most':>8} {'beside plain':>13}")
    for side, seconds in found.items():
        ratios = [own / plain for own, plain in zip(seconds, found.get("plain", seconds), strict=True)]
        print(
            f"{side:8} {1e3 * statistics.median(seconds):10.2f} {1e3 * min(seconds):8.2f} {1e3 * max(seconds):8.2f} "
            f"{statistics.median(ratios):13.3f}"
        )


if __name__ == "__main__":
    main()
