"""Process of a test world of 0/1 Adam: trains a small regression and writes a report for the tests."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finlora.optim.onebit import OneBitExchange
from finlora.optim.zero_one_adam import ZeroOneAdam

STEPS, FREEZE_RATIO, MAX_LOCAL_STEPS, WEIGHT_DECAY, BLOCK = 60, 0.5, 4, 0.01, 8
INPUTS, OUTPUTS, RANK = 10, 5, 3
# A has 30 elements and B 15, so that both end in a block with padding.
BLOCKS = [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 30), slice(30, 38), slice(38, 45)]
TOLERANCE = 1e-6
MAX_GRAD_NORM = 0.5
"""Bites at most steps."""
CONVERGENCE_STEPS, CONVERGENCE_PEAK = 500, 0.03
CONVERGENCE_SEEDS = {1: (0, 1, 2), 2: (0, 1, 2), 4: (0,)}
"""By world size. Four ranks on two cores take three times as long a step as two."""


class Regression:
    """y = B A x + noise from a teacher of the same shape, with inputs of uneven size: LoRA in small."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.input_scale = torch.logspace(-1, 0.5, INPUTS)
        self.teacher = torch.randn(OUTPUTS, RANK, generator=generator) @ torch.randn(RANK, INPUTS, generator=generator)
        a = torch.randn(RANK, INPUTS, generator=generator) / INPUTS**0.5
        self.start = torch.cat([a.flatten(), torch.zeros(OUTPUTS * RANK)])

    def batch(self, worker: int, step: int, size: int = 8) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step * 17 + worker)
        x = torch.randn(size, INPUTS, generator=generator) * self.input_scale
        return x, x @ self.teacher.T + 0.5 * torch.randn(size, OUTPUTS, generator=generator)

    def gradient(self, worker: int, step: int, weights: Tensor) -> Tensor:
        x, y = self.batch(worker, step)
        a, b = weights[: RANK * INPUTS].view(RANK, INPUTS), weights[RANK * INPUTS :].view(OUTPUTS, RANK)
        hidden = x @ a.T
        error = (hidden @ b.T - y) * (2 / y.numel())
        return torch.cat([((error @ b).T @ x).flatten(), (error.T @ hidden).flatten()])

    def loss(self, weights: Tensor) -> float:
        x, y = self.batch(worker=99, step=99_999, size=512)
        a, b = weights[: RANK * INPUTS].view(RANK, INPUTS), weights[RANK * INPUTS :].view(OUTPUTS, RANK)
        return float((x @ a.T @ b.T - y).square().mean())


def learning_rates(total_steps: int, peak: float) -> list[float]:
    """Linear warm-up over 5 steps, then linear to just above 0."""
    return [peak * min(1.0, (t + 1) / 5) * (1 - t / total_steps) for t in range(total_steps)]


def parameters_of(flat: Tensor, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    a, b = flat[: RANK * INPUTS].view(RANK, INPUTS), flat[RANK * INPUTS :].view(OUTPUTS, RANK)
    return [torch.nn.Parameter(part.detach().clone().to(dtype)) for part in (a, b)]


def flat_of(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in parameters])


def make_optimizer(parameters: list[torch.nn.Parameter], **changes: Any) -> ZeroOneAdam:
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": WEIGHT_DECAY,
        "total_steps": STEPS,
        "freeze_ratio": FREEZE_RATIO,
        "max_local_steps": MAX_LOCAL_STEPS,
        "block_size": BLOCK,
    }
    return ZeroOneAdam(parameters, **settings | changes)


def take_step(
    problem: Regression, optimizer: ZeroOneAdam, parameters: list[torch.nn.Parameter], worker: int, step: int, lr: float
) -> None:
    gradient = problem.gradient(worker, step, flat_of(parameters))
    for parameter, part in zip(parameters, parameters_of(gradient), strict=True):
        parameter.grad = part.detach().to(parameter.dtype)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def train(
    problem: Regression, worker: int, rates: list[float], dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[list[Tensor], list[bool], ZeroOneAdam, list[bytes]]:
    """Weights and synchronisation flags after every step, the optimiser, and its saved state after every step."""
    parameters = parameters_of(problem.start, dtype)
    optimizer = make_optimizer(parameters, total_steps=len(rates), **changes)
    weights, flags, states = [], [], []
    for step, lr in enumerate(rates, start=1):
        take_step(problem, optimizer, parameters, worker, step, lr)
        weights.append(flat_of(parameters))
        flags.append(optimizer.is_synchronised)
        if len(rates) == STEPS:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            states.append(buffer.getvalue())
    return weights, flags, optimizer, states


def load(state: bytes) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True)
    return loaded


def resume(
    problem: Regression, worker: int, rates: list[float], state: bytes, stop: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int, int]:
    """Go on from the state saved after step `stop`, from parameters that hold nothing: weights, bytes, rounds at the end."""
    parameters = parameters_of(torch.full_like(problem.start, float("nan")), dtype)
    optimizer = make_optimizer(parameters)
    optimizer.load_state_dict(load(state))
    for step in range(stop + 1, len(rates) + 1):
        take_step(problem, optimizer, parameters, worker, step, rates[step - 1])
    return master_of(optimizer), optimizer.bytes_sent, optimizer.num_syncs


def master_of(optimizer: ZeroOneAdam) -> Tensor:
    """The 45 float32 weights without the padding between A and B."""
    weights = optimizer.state_dict()["zero_one_adam"]["tensors"]["weights"]
    return torch.cat([weights[:30], weights[32:47]])


class SentBytes:
    """Counts the bytes that this rank sends to others in collectives, by their tensors."""

    def __init__(self, world_size: int) -> None:
        self.total, self._world_size = 0, world_size
        self._all_to_all, self._all_gather = dist.all_to_all_single, dist.all_gather

    def __enter__(self) -> SentBytes:
        dist.all_to_all_single, dist.all_gather = self._count_all_to_all, self._count_all_gather
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single, dist.all_gather = self._all_to_all, self._all_gather

    def _count_all_to_all(self, output: Tensor, values: Tensor, **options: Any) -> None:
        self.total += values.nbytes * (self._world_size - 1) // self._world_size
        self._all_to_all(output, values, **options)

    def _count_all_gather(self, outputs: list[Tensor], values: Tensor, **options: Any) -> None:
        self.total += values.nbytes * (self._world_size - 1)
        self._all_gather(outputs, values, **options)


def report_of_rank(rank: int, world_size: int, folder: str) -> None:
    """Body of one process of a world; writes its report to FOLDER/<rank>.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    report: dict[str, Any] = {}
    problem, rates = Regression(seed=0), learning_rates(STEPS, 0.03)

    weights, flags, optimizer, states = train(problem, rank, rates)
    report["weights"], report["flags"] = torch.stack(weights), flags
    report["bytes"] = (optimizer.bytes_sent, optimizer.bytes_adam, optimizer.num_syncs)
    report["padded"] = optimizer.state_dict()["zero_one_adam"]["tensors"]["v"].numel()
    report["states"] = states

    # Before the freeze with errors to remember, at a synchronisation after it, and between two.
    stops = (20, flags.index(True, 40) + 1, flags.index(False, 40) + 1)
    report["resumed"] = {stop: resume(problem, rank, rates, states[stop - 1], stop) for stop in stops}

    between = flags.index(False, 40) + 1
    parameters = parameters_of(problem.start)
    optimizer = make_optimizer(parameters)
    optimizer.load_state_dict(load(states[between - 1]))
    before = optimizer.is_synchronised
    optimizer.synchronise()
    report["forced"] = (before, optimizer.is_synchronised, flat_of(parameters))

    # Rank 0's initial weights must be used: the others start with different ones.
    parameters = parameters_of(problem.start + rank)
    optimizer = make_optimizer(parameters)
    take_step(problem, optimizer, parameters, rank, 1, 0.01)
    report["after_unequal_start"] = flat_of(parameters)

    weights, _, optimizer, _ = train(problem, rank, rates, max_grad_norm=MAX_GRAD_NORM)
    report["clipped"] = torch.stack(weights)
    report["norm_ratio"] = float(optimizer.state_dict()["zero_one_adam"]["tensors"]["norm_ratio"])

    weights, flags, optimizer, states = train(problem, rank, rates, torch.bfloat16)
    tensors = optimizer.state_dict()["zero_one_adam"]["tensors"]
    report["bf16"] = (torch.stack(weights), flags, master_of(optimizer))
    report["bf16_state_dtypes"] = {name: tensor.dtype for name, tensor in tensors.items()}
    report["bf16_resumed"] = resume(problem, rank, rates, states[between - 1], between, torch.bfloat16)[0]

    report["final_loss"] = {}
    for seed in CONVERGENCE_SEEDS[world_size]:
        noisy = Regression(seed)
        weights, _, _, _ = train(
            noisy, rank, learning_rates(CONVERGENCE_STEPS, CONVERGENCE_PEAK), weight_decay=0.0, max_local_steps=8
        )
        report["final_loss"][seed] = noisy.loss(weights[-1])

    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = make_optimizer([parameter], total_steps=400, freeze_ratio=0.05, max_local_steps=16, block_size=512)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(400):
        parameter.grad = torch.randn(64, 64, generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    report["long_bytes"] = (optimizer.bytes_sent, optimizer.bytes_adam, optimizer.num_syncs)

    is_real = torch.ones(64, dtype=torch.bool)
    is_real[60:] = False
    exchange = OneBitExchange(is_real, BLOCK, None)
    rounds = []
    with SentBytes(world_size) as sent:
        for _ in range(3):
            values = torch.randn(64, generator=generator) * is_real
            old = (exchange.worker_error.clone(), exchange.server_error.clone())
            rounds.append((values, *old, exchange.average(values), exchange.worker_error, exchange.server_error))
    report["exchange"], report["exchange_bytes"] = rounds, (exchange.bytes_sent, sent.total)

    torch.save(report, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    # All is written; torch 2.13 now and then aborts while it takes down gloo\'s threads with the interpreter.
    os._exit(0)
