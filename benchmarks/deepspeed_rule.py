"""DeepSpeed 0.19.6's ZeroOneAdam as an update rule, with a switch for each difference from finlora's 0/1 Adam.

Reimplemented from that class: m momentum, v variance, u the sum of rate * m since the last synchronisation,
D = sqrt(v) + eps, C the 1-bit average with error feedback, n ranks. Step t from 1:

    t <= var_freeze_step, t in T_v:   m, v <- exact mean gradient;                        x <- x - rate m / D
    t <= var_freeze_step, other t:    m <- b1 m + (1 - b1) C(g)                           x <- x - rate m / D
    t >  var_freeze_step:             m <- b1 m + (1 - b1) g_i;   u <- u + rate m;        x <- x - rate m / D
        every local interval:         m <- C(u) / sum of rate;    x <- x_synced - C(u) / D;    u <- 0

T_v: each gap is used 16 times, then doubled. Local interval: doubled every `local_step_scaler` frozen steps, at most 16.
With all switches off this is finlora's ZeroOneAdam (tests/benchmarks/test_deepspeed_rule.py checks for equal weights).

It needs neither DeepSpeed nor cupy: signs and scales are averaged as floats, and the bytes of the real messages are counted.

Source: deepspeed/runtime/fp16/onebit/zoadam.py and deepspeed/runtime/comm/compressed.py of release 0.19.6 (PyPI).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from finlora.optim.onebit import SCALE_BYTES, Schedule, rank_and_world_size

VAR_FREEZE_STEP, VAR_UPDATE_SCALER, LOCAL_STEP_SCALER, LOCAL_STEP_CLIPPER = (
    100_000,
    16,
    32_678,
    16,
)  # DeepSpeed's defaults
BLOCK_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Differences of DeepSpeed from finlora; True is as released."""

    first_step: bool = True
    """The first call creates buffers, drops its gradient and counts as a step; so does the first call after a resume."""
    lone_gradient: bool = True
    """With one rank, outside T_v and before the freeze, m does not change: the gradient is dropped, x still moves along m."""
    bias: bool = True
    """No bias correction, whatever the setting: rate = lr, and v starts from 0."""
    units: bool = True
    """The 1-bit average takes the gradient before the freeze and u after it, not u / D; errors are cleared between."""
    scale: bool = True
    """The scale is the root mean square of a tensor (on a server, of a tensor's chunk), not a mean over 512 elements."""
    floor: bool = True
    """v has no floor for near-zero gradients, and steps have no bound while v is frozen."""
    schedule: bool = True
    """T_v and the local intervals follow fixed counts, not the run's length; the last step does not synchronise."""
    resume: bool = True
    """A resumed run takes rank 0's weights, m and v; errors, u, intervals and the freeze are reset. The old intervals decide
    whether the first gradient is averaged: mostly it is not, and the ranks' weights diverge permanently."""


class Regions:
    """Consecutive regions of a vector. Shapes: sizes (R,), which sum up to N."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = torch.tensor(sizes)
        self.of_element = torch.repeat_interleave(torch.arange(len(sizes)), self.sizes)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of each element's region. Shapes: (N,) -> (N,)."""
        sums = torch.zeros(len(self.sizes)).index_add_(0, self.of_element, values)
        return (sums / self.sizes)[self.of_element]


class DeepSpeedRule(torch.optim.Optimizer):
    """Optimiser on one flat float32 vector; the parameters become views of it.

    Args:
        parameters: float32; each size is a multiple of 8 * n, so that no padding is needed.
        schedule: finlora's T_v and T_u, followed when faults.schedule is off.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        schedule: Schedule,
        faults: Faults,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        var_freeze_step: int = VAR_FREEZE_STEP,
        local_step_scaler: int = LOCAL_STEP_SCALER,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.schedule, self.faults, self.betas, self.eps = schedule, faults, betas, eps
        self.var_freeze_step, self.local_step_scaler = var_freeze_step, local_step_scaler
        self.process_group = process_group
        self.rank, self.world_size = rank_and_world_size(process_group)
        self.parameters = list(parameters)
        self.sizes = [parameter.numel() for parameter in parameters]
        assert all(size % (8 * self.world_size) == 0 for size in self.sizes), "padding is not emulated"
        self.x = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        for parameter, part in zip(self.parameters, self.x.split(self.sizes), strict=True):
            parameter.data = part.view_as(parameter)
        self.m, self.v, self.step_count, self.num_variance_updates = self._zeros(), self._zeros(), 0, 0
        self.bytes_sent, self.num_syncs = 0, 0
        self._tensors = Regions(self.sizes)
        self._chunks = Regions([size // self.world_size for size in self.sizes for _ in range(self.world_size)])
        self._blocks = Regions([min(BLOCK_SIZE, size - i) for size in self.sizes for i in range(0, size, BLOCK_SIZE)])
        self._reset()

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self.x)

    def _reset(self) -> None:
        self.worker_error, self.server_error, self.u = self._zeros(), self._zeros(), self._zeros()
        self.has_started, self.is_frozen, self.is_averaged = False, False, True
        self.var_interval, self.var_counter, self.local_interval, self.local_counter = 1, 0, 1, 0
        self.rate_sum, self.steps_since_sync, self.synced = 0.0, 0, self.x.clone()

    @torch.no_grad()
    def resume(self) -> None:
        """Change the state as saving and loading does."""
        if not self.faults.resume:
            return
        is_averaged = self.step_count < self.var_freeze_step and (self.step_count + 1) % self.var_interval == 0
        for tensor in (self.x, self.m, self.v):
            if self.world_size > 1:
                dist.broadcast(tensor, group=self.process_group, group_src=0)
        self._reset()
        self.is_averaged = is_averaged

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with this rank's gradients."""
        self.step_count += 1
        if self.faults.first_step and not self.has_started:
            self.has_started = True
            return
        lr, beta1 = self.param_groups[0]["lr"], self.betas[0]
        rate = lr if self.faults.bias else lr / (1 - beta1**self.step_count)
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in self.parameters])
        is_variance_step = self._is_variance_step()
        if is_variance_step:
            self._step_exact(gradient, rate)
        elif not self._is_frozen_now() and self.faults.lone_gradient and self.world_size == 1:
            self.x.addcdiv_(self.m, self._denominator(), value=-rate)
        elif not self._is_frozen_now() and self.faults.units:
            self.m.mul_(beta1).add_(self._average_one_bit(gradient), alpha=1 - beta1)
            self.x.addcdiv_(self.m, self._denominator(), value=-rate)
        else:
            self._step_local(gradient, rate)
        self._advance(is_variance_step)

    def _step_exact(self, gradient: Tensor, rate: float) -> None:
        beta1, beta2 = self.betas
        mean = gradient
        if self.world_size > 1 and self.is_averaged:
            dist.all_reduce(mean, group=self.process_group)
            mean.div_(self.world_size)
            self.bytes_sent += 2 * (self.world_size - 1) * 4 * len(mean) // self.world_size
            self.num_syncs += 1
        self.num_variance_updates += 1
        self.m.mul_(beta1).add_(mean, alpha=1 - beta1)
        self.v.mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
        self.x.addcdiv_(self.m, self._denominator(is_floored=False), value=-rate)

    def _step_local(self, gradient: Tensor, rate: float) -> None:
        denominator = self._denominator()
        if self.steps_since_sync == 0:
            self.synced = self.x.clone()
        self.m.mul_(self.betas[0]).add_(gradient, alpha=1 - self.betas[0])
        self._bound_momentum(denominator)
        self.u.add_(self.m, alpha=rate)
        self.x.addcdiv_(self.m, denominator, value=-rate)
        self.rate_sum += rate
        self.steps_since_sync += 1
        if not self._is_sync_step():
            return
        units = torch.ones_like(denominator) if self.faults.units else denominator
        average = self._average_one_bit(self.u / units) * units
        self.m = average / self.rate_sum
        self._bound_momentum(denominator)
        self.x.copy_(self.synced).addcdiv_(average, denominator, value=-1)
        self.u.zero_()
        self.rate_sum, self.steps_since_sync = 0.0, 0

    def _bound_momentum(self, denominator: Tensor) -> None:
        if not self.faults.floor:
            limit = denominator * max(1.0, (1 - self.betas[0]) / (1 - self.betas[1]) ** 0.5)
            self.m = self.m.clamp(-limit, limit)

    def _denominator(self, *, is_floored: bool = True) -> Tensor:
        beta2 = self.betas[1]
        v = self.v if self.faults.bias else self.v / (1 - beta2**self.num_variance_updates)
        if is_floored and not self.faults.floor:
            mean = self._blocks.mean(v)
            mean = torch.where(mean > 0, mean, v.mean())
            v = torch.where(v > 0, v.maximum((1 - beta2) * mean), mean)
        return v.sqrt() + self.eps

    def _average_one_bit(self, values: Tensor) -> Tensor:
        """Average by both stages of 1-bit Adam. Every rank computes the servers' stage for all chunks, with equal bits."""
        n = self.world_size
        if n == 1:
            return values
        compensated = values + self.worker_error
        sent = self._compress(compensated, self._tensors)
        self.worker_error = compensated - sent
        dist.all_reduce(sent, group=self.process_group)
        compensated = sent / n + self.server_error
        result = self._compress(compensated, self._chunks)
        self.server_error = compensated - result
        num_scales = len(self.sizes) * n if self.faults.scale else len(self._blocks.sizes)
        self.bytes_sent += 2 * (n - 1) * (len(values) // 8 + SCALE_BYTES * num_scales) // n
        self.num_syncs += 1
        return result

    def _compress(self, values: Tensor, regions: Regions) -> Tensor:
        """Sign times scale, sign(0) = +1."""
        scale = regions.mean(values.square()).sqrt() if self.faults.scale else self._blocks.mean(values.abs())
        return torch.where(values >= 0, scale, -scale)

    def _is_frozen_now(self) -> bool:
        return self.is_frozen if self.faults.schedule else self.step_count > self.schedule.freeze_steps

    def _is_variance_step(self) -> bool:
        if self.faults.schedule:
            return not self.is_frozen and self.step_count % self.var_interval == 0
        return self.schedule.is_variance_step(self.step_count)

    def _is_sync_step(self) -> bool:
        if self.faults.schedule:
            return not self.is_frozen or self.step_count % self.local_interval == 0
        return self.steps_since_sync >= self.schedule.sync_interval(self.step_count)

    def _advance(self, is_variance_step: bool) -> None:
        self.is_averaged = True
        if self.is_frozen:
            self.local_counter += 1
            if self.local_counter == self.local_step_scaler:
                self.local_counter, self.local_interval = 0, min(LOCAL_STEP_CLIPPER, 2 * self.local_interval)
        elif is_variance_step:
            self.var_counter += 1
            if self.var_counter == VAR_UPDATE_SCALER:
                self.var_counter, self.var_interval = 0, 2 * self.var_interval
        is_last_before_freeze = (
            self.step_count > self.var_freeze_step
            if self.faults.schedule
            else self.step_count >= self.schedule.freeze_steps
        )
        if is_last_before_freeze and not self.is_frozen:
            self.is_frozen = True
            if self.faults.units:
                self.worker_error.zero_()
                self.server_error.zero_()
