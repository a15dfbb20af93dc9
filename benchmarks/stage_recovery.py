"""Recovery time of a pipeline after a stage crash: restart of the stage alone, and restart of all stages.

    python benchmarks/stage_recovery.py --config serve_configs/cpu-demo.yaml --kills 4 stages.num=3

Each round kills another stage's process and measures the seconds from the kill until a token has passed all stages; the two ways
alternate. Exit code 1 if the answer differs from the one before the kills.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "Profit rose 12 %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="Serve YAML")
    parser.add_argument("overrides", nargs="*", help="key=value words that override its args")
    parser.add_argument("--kills", type=int, default=4, help="for each way")
    options = parser.parse_args()
    from finlora.cluster import connect

    connect.connect(log_to_driver=False)
    from finlora.serve.deploy.serve_yaml import read_deployment
    from finlora.serve.served_model import open_pipeline, read_base
    from finlora.serve.settings import make_absolute

    settings = make_absolute(read_deployment(options.config, options.overrides).settings)
    base = read_base(settings)
    opened = open_pipeline(settings, base)
    truth = answer(opened, base, 16)
    taken: dict[str, list[float]] = {"alone": [], "all": []}
    for number in range(2 * options.kills):
        way = ("alone", "all")[number % 2]
        started = kill_stage(opened, number // 2 % settings.stages.num)
        if way == "alone":
            assert opened.repair is not None
            opened = opened.repair()
        else:
            opened.close()
            opened = open_pipeline(settings, base)
        answer(opened, base, 1)
        taken[way].append(time.monotonic() - started)
        print(
            f"stage {number // 2 % settings.stages.num} of {settings.stages.num}, {way}: {taken[way][-1]:.1f} s",
            flush=True,
        )
    is_right = answer(opened, base, 16) == truth
    opened.close()
    for way, seconds in taken.items():
        print(f"{way}: median {statistics.median(seconds):.1f} s, {min(seconds):.1f} to {max(seconds):.1f} s")
    print("the answer is the same" if is_right else "the answer is DIFFERENT")
    return int(not is_right)


def kill_stage(opened: Any, index: int) -> float:
    """Kill a stage's process; returns the time."""
    import ray

    actor = opened.core.executor.actors[index]
    os.kill(ray.get(actor.__ray_call__.remote(lambda _actor: os.getpid())), signal.SIGKILL)
    return time.monotonic()


def answer(opened: Any, base: Any, num_tokens: int) -> list[int]:
    """Return the tokens of a continuation."""
    from finlora.engine.request import Request, Sampling
    from finlora.serve.http.completions import encode_plain

    ids = (int(base.tokenizer.bos_token_id), *encode_plain(PROMPT, base))
    opened.core.submit(Request(id="r", prompt_ids=ids, sampling=Sampling(max_tokens=num_tokens)))
    answers: list[Any] = []
    while not opened.core.is_idle:
        answers += opened.core.step()
    return [token.id for token in answers[0].tokens]


if __name__ == "__main__":
    sys.exit(main())
