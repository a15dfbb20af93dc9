"""AdamW, finlora's 0/1 Adam and DeepSpeed 0.19.6's on one toy task: the cost of the method, and of each of DeepSpeed's faults.

    python benchmarks/zero_one_adam.py                      # about 3 minutes on two cores
    python benchmarks/zero_one_adam.py --steps 60 300 1000 --seeds 0 1 2 3 --fault-steps 300 --output results.jsonl
    python benchmarks/zero_one_adam.py --parameters lora    # adapters on a base trained on another language
    python benchmarks/zero_one_adam.py --quick              # a few seconds: a tiny grid for a test

A random Llama (2 layers, hidden 64, 82 thousand parameters) learns a synthetic language (toy_language.py). All optimisers get
the same batches and learning rates; each rank clips its gradients to norm 1 before they are averaged or compressed. One set of
gloo processes is split into groups of each world size.

Loss: mean over the last 10 steps and all ranks. Spread: standard deviation over seeds. Gaps are taken seed by seed. A fault
`alone` is finlora's rule with only this fault of DeepSpeed's; `fixed` is DeepSpeed's rule without it (deepspeed_rule.py).
`deepspeed lr/8` has an eighth of the learning rate; `deepspeed resumed` is saved and loaded after half of the steps. finlora's
0/1 Adam resumes bit for bit (tests/optim/test_zero_one_adam.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deepspeed_rule import DeepSpeedRule, Faults
from toy_language import ENTROPY, loss_of, make_sentences, make_task

from finlora.config import OptimConfig
from finlora.optim.onebit import Schedule
from finlora.optim.optimizer import learning_rate_at
from finlora.optim.zero_one_adam import ZeroOneAdam

ROWS, LAST_STEPS, MAX_GRAD_NORM = 4, 10, 1.0
FAULTS = [field.name for field in dataclasses.fields(Faults) if field.name != "resume"]
SMALL_RATE = 8  # without bias correction steps are up to 6.6 times as long
MAIN = ("adamw", "finlora", "deepspeed", "deepspeed lr/8", "deepspeed resumed")
LEARNING_RATES = {"full": 1e-2, "lora": 1e-2}  # the best of 1e-3, 3e-3, 1e-2, 3e-2 for AdamW


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training run of one optimiser."""

    optimizer: str
    world_size: int
    steps: int
    seed: int
    parameters: str


class MeanGradientAdamW(torch.optim.AdamW):
    """AdamW on all-reduced mean gradients."""

    def __init__(self, parameters: list[torch.nn.Parameter], optim: OptimConfig, group: dist.ProcessGroup) -> None:
        super().__init__(parameters, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay)
        self.parameters, self.group, self.world_size = parameters, group, dist.get_world_size(group)
        self.bytes_sent, self.num_syncs = 0, 0

    def step(self) -> None:  # type: ignore[override]
        """Average, then step."""
        if self.world_size > 1:
            flat = torch.cat([parameter.grad.reshape(-1) for parameter in self.parameters])
            dist.all_reduce(flat, group=self.group)
            parts = flat.div_(self.world_size).split([parameter.numel() for parameter in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.grad.copy_(part.view_as(parameter))
            self.bytes_sent += 2 * (self.world_size - 1) * 4 * len(flat) // self.world_size
            self.num_syncs += 1
        super().step()


def faults_of(name: str) -> Faults:
    """Read an optimiser's name: `deepspeed`, `fixed FAULT`, `alone FAULT` or `all fixed`."""
    everything = dict.fromkeys([*FAULTS, "resume"], True)
    nothing = dict.fromkeys(everything, False)
    kind, _, fault = name.partition(" ")
    if kind == "alone":
        return Faults(**nothing | {fault: True})
    if kind == "fixed":
        return Faults(**everything | {fault: False})
    return Faults(**nothing if kind == "all" else everything)


def make_optimizer(job: Job, parameters: list[torch.nn.Parameter], optim: OptimConfig, group: dist.ProcessGroup) -> Any:
    """Build a job's optimiser."""
    if job.optimizer == "adamw":
        return MeanGradientAdamW(parameters, optim, group)
    betas = (optim.beta1, optim.beta2)
    if job.optimizer == "finlora":
        return ZeroOneAdam(
            parameters,
            lr=0.0,
            betas=betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            total_steps=job.steps,
            freeze_ratio=optim.freeze_ratio,
            max_local_steps=optim.max_local_steps,
            process_group=group,
        )
    schedule = Schedule.from_ratio(job.steps, optim.freeze_ratio, optim.max_local_steps)
    faults = faults_of(job.optimizer)
    return DeepSpeedRule(parameters, schedule, faults, betas=betas, eps=optim.eps, process_group=group)


def run_job(job: Job, group: dist.ProcessGroup) -> dict[str, Any]:
    """Train; every rank of the group returns the same numbers."""
    net = make_task(job.seed, job.parameters)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    learning_rate = LEARNING_RATES[job.parameters] / (SMALL_RATE if job.optimizer.endswith("lr/8") else 1)
    optim = OptimConfig(learning_rate=learning_rate)
    optimizer = make_optimizer(job, parameters, optim, group)
    sentences = make_sentences(job.seed, job.steps * ROWS, 100 * job.seed + dist.get_rank(group) + 1)
    losses = []
    for step, rows in enumerate(sentences.split(ROWS)):
        if job.optimizer.endswith("resumed") and step == job.steps // 2:
            optimizer.resume()
        optimizer.zero_grad()
        loss = loss_of(net, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, job.steps, optim)
        optimizer.step()
        losses.append(loss.item())
    last = torch.tensor(statistics.mean(losses[-LAST_STEPS:]))
    dist.all_reduce(last, group=group)
    return {
        "loss": float(last) / job.world_size,
        "bytes": optimizer.bytes_sent,
        "rounds": optimizer.num_syncs,
    }


def run_rank(rank: int, num_processes: int, folder: str, jobs: list[Job]) -> None:
    """Body of one process: runs the jobs of its group of each world size; group leaders write results to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_processes)
    with Path(folder, f"{rank}.jsonl").open("w", encoding="utf-8") as stream:
        for world_size in sorted({job.world_size for job in jobs}):
            num_groups = num_processes // world_size
            groups = [dist.new_group(range(g * world_size, (g + 1) * world_size)) for g in range(num_groups)]
            mine = rank // world_size
            if mine >= num_groups:
                continue
            for job in [job for job in jobs if job.world_size == world_size][mine::num_groups]:
                result = run_job(job, groups[mine])
                if rank % world_size == 0:
                    stream.write(json.dumps(dataclasses.asdict(job) | result) + "\n")
                    print(
                        f"{job.world_size} ranks, {job.steps} steps, seed {job.seed}: {job.optimizer}", file=sys.stderr
                    )
    dist.barrier()
    dist.destroy_process_group()
    # All is written; torch 2.13 now and then aborts while it takes down gloo\'s threads with the interpreter.
    os._exit(0)


def run_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Run all jobs in as many processes as the largest world size. Forks, so that torch and transformers are imported once."""
    num_processes = max(job.world_size for job in jobs)
    with tempfile.TemporaryDirectory(prefix="finlora-zero-one-adam-") as folder:
        mp.start_processes(run_rank, (num_processes, folder, jobs), nprocs=num_processes, start_method="fork")
        return [
            json.loads(line)
            for rank in range(num_processes)
            for line in Path(folder, f"{rank}.jsonl").read_text(encoding="utf-8").splitlines()
        ]


def show(values: Iterable[float], *, sign: str = "") -> str:
    """Mean and standard deviation."""
    numbers = list(values)
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):{sign}.3f} ± {spread:.3f}"


def print_tables(results: list[dict[str, Any]], fault_steps: int) -> None:
    """Print the comparison of optimisers, then the faults."""

    def losses(optimizer: str, world_size: int, steps: int) -> dict[int, float]:
        rows = [r for r in results if (r["optimizer"], r["world_size"], r["steps"]) == (optimizer, world_size, steps)]
        return {row["seed"]: row["loss"] for row in rows}

    def gap(optimizer: str, other: str, world_size: int, steps: int) -> str:
        mine, theirs = losses(optimizer, world_size, steps), losses(other, world_size, steps)
        common = mine.keys() & theirs.keys()
        return show((mine[seed] - theirs[seed] for seed in common), sign="+") if common else "-"

    print(f"entropy of the language {ENTROPY:.3f}")
    print(
        f"{'ranks':>5} {'steps':>5}  {'optimiser':18} {'loss':>15} {'gap to adamw':>16} {'MiB sent':>9} {'rounds':>6}"
    )
    for world_size, steps in sorted({(r["world_size"], r["steps"]) for r in results}):
        for name in MAIN:
            if values := losses(name, world_size, steps):
                row = next(
                    r for r in results if (r["optimizer"], r["world_size"], r["steps"]) == (name, world_size, steps)
                )
                print(
                    f"{world_size:5} {steps:5}  {name:18} {show(values.values()):>15} "
                    f"{gap(name, 'adamw', world_size, steps):>16} {row['bytes'] / 2**20:9.2f} {row['rounds']:6}"
                )
    worlds = sorted({r["world_size"] for r in results if r["optimizer"].startswith(("alone", "fixed", "all"))})
    if not worlds:
        return
    print(
        f"\nfaults, {fault_steps} steps: finlora with the fault minus finlora | deepspeed minus deepspeed with it fixed"
    )
    print(f"{'fault':15}" + "".join(f"{f'{n} ranks':^38}" for n in worlds))
    for fault in FAULTS:
        cells = [
            f"{gap(f'alone {fault}', 'finlora', n, fault_steps):>18} {gap('deepspeed', f'fixed {fault}', n, fault_steps):>18} "
            for n in worlds
        ]
        print(f"{fault:15}" + "".join(cells))
    cells = [f"{gap('deepspeed', 'finlora', n, fault_steps):>18} {'':19}" for n in worlds]
    print(f"{'all of them':15}" + "".join(cells))
    cells = [f"{gap('all fixed', 'finlora', n, fault_steps):>18} {'':19}" for n in worlds]
    print(f"{'none of them':15}" + "".join(cells))


def main() -> None:
    """Run the grid and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="world sizes of the comparison")
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 300], help="lengths of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fault-worlds", type=int, nargs="*", default=[1, 2], help="world sizes of the faults' table")
    parser.add_argument("--fault-steps", type=int, default=60)
    parser.add_argument("--parameters", choices=list(LEARNING_RATES), default="full")
    parser.add_argument("--output", type=Path, help="JSON lines file to append to")
    parser.add_argument("--quick", action="store_true", help="a small grid: 2 ranks, 30 steps, one seed, two faults")
    arguments = parser.parse_args()
    started = time.perf_counter()
    faults = FAULTS
    if arguments.quick:
        arguments.worlds, arguments.steps, arguments.seeds = [2], [30], [0]
        arguments.fault_worlds, arguments.fault_steps, faults = [1, 2], 30, ["lone_gradient", "bias"]
    cells = [(n, steps, name) for n in arguments.worlds for steps in arguments.steps for name in MAIN]
    names = ["all fixed", *(f"{kind} {fault}" for kind in ("alone", "fixed") for fault in faults)]
    cells += [
        (n, arguments.fault_steps, name) for n in arguments.fault_worlds for name in ["finlora", "deepspeed", *names]
    ]
    jobs = [
        Job(optimizer=name, world_size=n, steps=steps, seed=seed, parameters=arguments.parameters)
        for n, steps, name in dict.fromkeys(cells)
        for seed in arguments.seeds
    ]
    results = run_jobs(jobs)
    print_tables(results, arguments.fault_steps)
    print(f"{len(jobs)} runs in {time.perf_counter() - started:.0f} s")
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(result) + "\n" for result in results)


if __name__ == "__main__":
    main()
