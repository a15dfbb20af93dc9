"""Plain reference of 0/1 Adam: all workers in one process, loops over the blocks of coordinates, no communication.

Follows Algorithm 1 of arXiv:2202.06009 statement by statement with the deviations that finlora/optim/zero_one_adam.py
lists (their numbers stand in brackets). It shares no code with the product. `paper_compressor=True` undoes deviation 5, to
measure it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradient = Callable[[int, int, Tensor], Tensor]


def variance_steps(freeze_steps: int) -> set[int]:
    """T_v [9]: k_{j+1} = k_j + 2^floor(j / 16), k_0 = 1."""
    steps, k, j = set(), 1, 0
    while k <= freeze_steps:
        steps.add(k)
        k, j = k + 2 ** (j // 16), j + 1
    return steps


def one_bit(vector: Tensor, blocks: Sequence[slice]) -> Tensor:
    """C(x): in each block, the sign times the mean absolute value."""
    out = torch.zeros_like(vector)
    for block in blocks:
        if vector[block].numel():
            scale = vector[block].abs().sum() / vector[block].numel()
            out[block] = torch.where(vector[block] >= 0, scale, -scale)
    return out


def run(
    start: Tensor,
    gradient: Gradient,
    *,
    num_workers: int,
    learning_rates: Sequence[float],
    freeze_steps: int,
    sync_interval: Callable[[int], int],
    blocks: Sequence[slice],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    paper_compressor: bool = False,
) -> list[list[Tensor]]:
    """Return every worker's weights after every step: result[step - 1][worker].

    Args:
        gradient: (worker, step, weights) -> local gradient.
        blocks: the real elements that share a scale, in order. A server's chunk holds whole blocks, so that the servers'
            part is the same whoever owns a block, and one server error vector stands for all servers.
    """
    beta1, beta2 = betas
    bound = max(1.0, (1 - beta1) / (1 - beta2) ** 0.5)
    workers = range(num_workers)
    x = [start.clone() for _ in workers]
    m = [torch.zeros_like(start) for _ in workers]
    u = [torch.zeros_like(start) for _ in workers]
    worker_error = [torch.zeros_like(start) for _ in workers]
    server_error = torch.zeros_like(start)
    v, num_variance_updates = torch.zeros_like(start), 0
    last_synced, rate_sum, decay, since = start.clone(), 0.0, 1.0, 0
    t_v = variance_steps(freeze_steps)
    ratio = [1.0 for _ in workers]  # [11]: squares of the norms' ratios
    history = []

    for t, learning_rate in enumerate(learning_rates, start=1):
        g = [gradient(i, t, x[i]) for i in workers]
        rate = learning_rate / (1 - beta1**t)  # [2]
        shrink = 1 - learning_rate * weight_decay  # [10]
        if t in t_v:  # before the model moves [3]
            g_mean = sum(g[1:], g[0]) / num_workers
            if max_grad_norm:  # [11]
                for i in workers:
                    newest = min(max(float(g[i].norm() / g_mean.norm()) ** 2, 1.0), num_workers)
                    ratio[i] = newest if num_variance_updates == 0 else 0.9 * ratio[i] + 0.1 * newest
                g_mean = g_mean * min(1.0, max_grad_norm / (float(g_mean.norm()) + 1e-6))
            v = beta2 * v + (1 - beta2) * g_mean * g_mean
            num_variance_updates += 1
            g = [g_mean for _ in workers]  # [4]
        elif max_grad_norm:  # [11]
            limits = [max_grad_norm * ratio[i] ** 0.5 for i in workers]
            g = [g[i] * min(1.0, limits[i] / (float(g[i].norm()) + 1e-6)) for i in workers]
        v_hat = v / (1 - beta2**num_variance_updates)  # [2]
        if t not in t_v:  # [7]
            for block in blocks:
                mean = v_hat[block].sum() / v_hat[block].numel()
                if mean == 0:
                    mean = v_hat.sum() / v_hat.numel()
                v_hat[block] = torch.where(v_hat[block] > 0, v_hat[block].clamp(min=float((1 - beta2) * mean)), mean)
        d = v_hat.sqrt() + eps

        if t in t_v or learning_rate > 0:  # [10]
            for i in workers:
                m[i] = beta1 * m[i] + (1 - beta1) * g[i]
                if t not in t_v:  # [8]
                    m[i] = torch.minimum(torch.maximum(m[i], -bound * d), bound * d)
                x[i] = shrink * x[i] - rate * m[i] / d  # [1]
                u[i] = u[i] + rate * m[i]  # [1]
            rate_sum, decay, since = rate_sum + rate, decay * shrink, since + 1

        if t in t_v:  # [4]: equal already, nothing to exchange
            last_synced, rate_sum, decay, since = x[0].clone(), 0.0, 1.0, 0
            u = [torch.zeros_like(start) for _ in workers]
        elif since >= sync_interval(t):  # t in T_u [9]
            weight = torch.ones_like(d) if paper_compressor else d  # [5]
            if num_workers == 1:
                u_bar = u[0]  # [12]
            else:  # 1bit-AllReduce, in the two stages of 1-bit Adam [6]
                total = torch.zeros_like(start)
                for i in workers:
                    c = u[i] / weight + worker_error[i]
                    sent = one_bit(c, blocks)
                    worker_error[i] = c - sent
                    total = total + sent
                c = total / num_workers + server_error
                sent = one_bit(c, blocks)
                server_error = c - sent
                u_bar = sent * weight
            for i in workers:
                m[i] = torch.minimum(torch.maximum(u_bar / rate_sum, -bound * d), bound * d)  # [1, 8]
                x[i] = decay * last_synced - u_bar / d
                u[i] = torch.zeros_like(start)
            last_synced, rate_sum, decay, since = x[0].clone(), 0.0, 1.0, 0
        history.append([weights.clone() for weights in x])
    return history
