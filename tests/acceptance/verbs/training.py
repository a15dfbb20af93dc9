"""Steps of training: forecast, the main adapter, all bits with both optimisers, a run that is stopped and killed."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from acceptance.processes import Process
from acceptance.walk import Tools

ALONE = {"RAY_ADDRESS": None}
"""Environment of commands that start their own Ray, as on a laptop."""
_FIRST, _LAST = 6, 10
DATA_FAULT = 3
"""Exit code of data errors (finlora/errors.py)."""


def doctor(tools: Tools) -> None:
    """Run doctor: no faults here, and a missing folder is named."""
    walk, checks = tools.walk, tools.checks
    done = tools.finlora("doctor", "--config", walk.config)
    checks.contains("this machine and config", " 0 faults", done.text)

    nowhere = f"data.dir={walk.output / 'nowhere'}"
    # Without the cluster: each of its nodes would report the missing folder too, with a config error's code.
    faulty = tools.finlora("doctor", "--config", walk.config, nowhere, code=DATA_FAULT, environment=ALONE)
    checks.contains("no prepared data", "nowhere", faulty.text)


def plan(tools: Tools) -> None:
    """Forecast a run: it fits, and a tiny GPU is refused with the reason."""
    walk, checks = tools.walk, tools.checks
    dry = tools.finlora("train", "--config", walk.config, "--dry-run")
    checks.contains("dry run", f"{walk.scale.num_train // 16} optimiser steps", dry.text)
    done = tools.finlora("plan", "--config", walk.config)
    checks.contains("verdict", "It fits", done.text)
    total = re.search(r"total\s+([\d.]+)", done.text)
    # 135M weights at 4 bit, unpacked to bfloat16, take 0.1 to 0.3 GiB.
    checks.at_least("GiB of a worker", 0.05, float(total[1]) if total else 0.0)
    checks.at_most("GiB of a worker", 40.0, float(total[1]) if total else 999.0)
    # On a GPU, CUDA's context takes 1.3 GiB more; a smaller GPU is refused as impossible.
    too_small, needed = ("1.35", "1.4") if walk.device == "cuda" else ("0.01", "0.1")
    done = tools.finlora("plan", "--config", walk.config, "--gpu-memory", too_small, code=5)
    checks.contains(f"a GPU of {too_small} GiB", f"It does not fit: {needed} GiB per worker", done.text)
    done = tools.finlora("plan", "--config", walk.config, "model.bits=3", "train.epochs=0", code=2)
    checks.contains("two wrong settings at once", "2 settings are wrong", done.text)


def warm(tools: Tools) -> None:
    """Compile the base's kernels into a folder of their own, and nothing the second time; without a GPU it is refused."""
    walk, checks = tools.walk, tools.checks
    if walk.device != "cuda":
        alone = {"CUDA_VISIBLE_DEVICES": ""}
        done = tools.finlora("warm", "--config", walk.config, code=5, environment=alone)
        checks.contains("no GPU", "torch sees no GPU here", done.text)
        return
    own = {"TRITON_CACHE_DIR": str(walk.output / "kernels")}
    first = tools.finlora("warm", "--config", walk.config, environment=own)
    checks.equal("uses of the base that were compiled", 6, first.text.count(" kernels compiled in "))
    again = tools.finlora("warm", "--config", walk.config, environment=own)
    checks.equal("uses compiled before", 6, again.text.count(": compiled before"))


def train_main(tools: Tools) -> None:
    """Train the adapter that other steps evaluate, ask and serve."""
    walk, checks = tools.walk, tools.checks
    steps = walk.scale.num_train // 16
    done = tools.finlora("train", "--config", walk.config)
    first, last = losses_told(done.text)
    checks.at_most("last loss, as a share of the first", 0.6, last / first)
    (record,) = tools.results("main")
    checks.close("shown loss is the record's", record["metrics"]["loss_last"], last, 5e-5)
    checks.equal("points of the loss curve", steps, len(record["loss_curve"]))
    files = {path.name for path in (walk.runs / "main" / "adapter").iterdir()}
    expected = {"adapter_model.safetensors", "adapter_config.json", "config.yaml", "finlora.yaml"}
    checks.equal("files of the adapter that are missing", [], sorted(expected - files))


def train_again(tools: Tools) -> None:
    """Repeat the command of a finished run: it trains nothing and shows the same loss."""
    walk, checks = tools.walk, tools.checks
    before = curve(walk.runs / "main")
    again = tools.finlora("train", "--config", walk.config)
    checks.close("last loss", tools.results("main")[0]["metrics"]["loss_last"], losses_told(again.text)[1], 5e-5)
    checks.equal("its curve is as it was", True, before == curve(walk.runs / "main"))


def short_run(bits: int, optimizer: str) -> Callable[[Tools], None]:
    """Return a step that trains a few steps; 0/1 Adam, which saves communication, with two workers."""

    def train(tools: Tools) -> None:
        walk, checks = tools.walk, tools.checks
        name, steps = run_name(bits, optimizer), walk.scale.num_short_steps
        workers = 2 if optimizer == "zero_one_adam" else 1
        done = tools.finlora(
            *("train", "--config", walk.config, f"name={name}", f"model.bits={bits}", f"optim.name={optimizer}"),
            *(f"train.max_steps={steps}", f"train.num_workers={workers}", "train.cpus_per_worker=1"),
        )
        first, last = losses_told(done.text)
        (record,) = [each for each in tools.results(name) if each["kind"] == "training"]
        checks.at_most(f"loss after {steps} steps", walk.scale.short_loss, last)
        checks.at_most("its share of the first loss", 0.8, last / first)
        checks.equal("bits and workers of the record", (bits, workers), (record["bits"], len(record["wire"])))
        if workers > 1:
            # It saves traffic by longer intervals, which so few steps do not reach: at first it sends more than Adam.
            rounds = [each["rounds"] for each in record["wire"]]
            checks.equal("exchanges of both workers", (True, 1), (rounds[0] > 0, len(set(rounds))))

    return train


def run_name(bits: int, optimizer: str) -> str:
    return f"short-{bits}-{optimizer}"


def losses_told(text: str) -> tuple[float, float]:
    """Read `loss 1.2345 -> 0.1234` from the last line of `train`; infinite if it is missing."""
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", text)
    return (float(found[1]), float(found[2])) if found else (1.0, float("inf"))


def undisturbed(tools: Tools) -> None:
    """Train the next step's run undisturbed, with its own Ray, as on a laptop."""
    done = tools.end(_start_long(tools, "undisturbed", ALONE))
    total = tools.scale.num_long_steps
    tools.checks.equal(
        "steps of its curve", list(range(1, total + 1)), [step for step, _ in curve(tools.walk.runs / "undisturbed")]
    )
    tools.checks.at_most("last loss", tools.scale.short_loss, losses_told(done.text)[1])


def stop_and_resume(tools: Tools) -> None:
    """Interrupt a run by Ctrl-C, then kill its driver: the same command resumes from the last checkpoint each time."""
    checks, scale = tools.checks, tools.scale
    total, every = scale.num_long_steps, scale.checkpoint_steps
    stopped = tools.walk.runs / "stopped"
    process = _start_long(tools, "stopped")
    tools.until(lambda: last_step(stopped) >= 2, process, "two steps")
    process.send(signal.SIGINT)
    done = tools.end(process, code=130)
    at = last_step(stopped)
    checks.contains("SIGINT", "the same command resumes there", done.text)
    checks.equal("checkpoints of it", True, bool(list(stopped.glob("checkpoint_*"))))
    checks.at_most("step at which it stopped", total - 1, at)
    process = _start_long(tools, "stopped")
    # After the next checkpoint, so that this attempt has one.
    tools.until(lambda: last_step(stopped) >= at + every + 1, process, "steps after the resumption")
    process.send(signal.SIGKILL)
    tools.end(process, code=-signal.SIGKILL)
    checks.at_most("step at which its driver was killed", total - 1, last_step(stopped))
    tools.end(_start_long(tools, "stopped"))
    checks.equal("steps of its curve", list(range(1, total + 1)), [step for step, _ in curve(stopped)])
    written = progress_steps(stopped)
    # The first repeated step: it follows the last checkpoint before the kill, not the start.
    restart = next((after for before, after in pairwise(written) if after <= before), written[-1])
    checks.at_least("first step after the kill", at + 1, restart)


def compare_curves(tools: Tools) -> None:
    """Compare the stopped and killed run with the undisturbed one."""
    walk, checks = tools.walk, tools.checks
    one, other = dict(curve(walk.runs / "stopped")), dict(curve(walk.runs / "undisturbed"))
    checks.equal("steps", list(other), list(one))
    differences = [abs(one[step] - other[step]) for step in other]
    if walk.device == "cpu":  # equal bit for bit
        checks.at_most("largest difference of a loss", 1e-3, max(differences))
        return
    # Bit for bit on an H200 too, unless a segment has more than 128 keys: then FlashAttention sums query gradients in no fixed
    # order, which changes last bits in bfloat16, and the runs drift apart.
    checks.at_most(f"largest difference in the first {_FIRST} steps", 0.05, max(differences[:_FIRST]))
    last = [sum(list(losses.values())[-_LAST:]) / _LAST for losses in (one, other)]
    checks.close(f"mean loss of the last {_LAST} steps", last[1], last[0], 0.1)


def _start_long(tools: Tools, name: str, environment: dict[str, str | None] | None = None) -> Process:
    scale = tools.scale
    settings = (
        *(f"train.max_steps={scale.num_long_steps}", f"train.checkpoint_every_steps={scale.checkpoint_steps}"),
        *("model.bits=16", "data.max_train_examples=null", "lora.dropout=0.1"),
    )
    return tools.start("train", "--config", tools.walk.config, f"name={name}", *settings, environment=environment)


def progress_steps(run: Path) -> list[int]:
    """Return the steps of progress.jsonl of all attempts, in the order of writing."""
    return [record["step"] for record in _progress(run)]


def last_step(run: Path) -> int:
    return max(progress_steps(run), default=0)


def curve(run: Path) -> list[tuple[int, float]]:
    """Return step and loss; for a repeated step the later one."""
    return sorted({record["step"]: record["loss"] for record in _progress(run)}.items())


def _progress(run: Path) -> list[dict]:
    file = run / "progress.jsonl"
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # being written
            continue
    return records
