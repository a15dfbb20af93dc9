"""Communication of 0/1 Adam: schedule, flat layout of the parameters, and averages over ranks, exact or 1-bit.

Shapes: N elements in the padded flat vector, n ranks, B elements in a block; N is a multiple of n * B and B of 8.
A rank is the worker of the whole vector and the server of one chunk of N / n elements. A compressed average has two steps:

    worker  c_i = x_i + e_i            e_i <- c_i - C(c_i)        chunk s of C(c_i) goes to rank s     (all-to-all)
    server  a_s = mean_i C(c_i)[s] + d_s    d_s <- a_s - C(a_s)   C(a_s) goes to every rank            (all-gather)

    C(c)_k = sign(c_k) * mean |c| over the block of k, with sign(0) = +1; padding is excluded from the mean and stays 0.

Nothing is lost, only delayed: mean_i(x_i + e_i) + d = result + mean_i(e_i') + d', where ' marks the new errors.
torch packs eight signs to a byte on any device; sign bytes and float32 scales travel in one message.

Source: 1-bit Adam, arXiv:2102.02888 (two-stage compressed_allreduce); 0/1 Adam, arXiv:2202.06009 (1bit-AllReduce).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from finlora.errors import ConfigError
from finlora.optim.traffic import WireClock, ring_bytes

_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)
SCALE_BYTES = 4
VARIANCE_GAP_DOUBLES_EVERY = 16  # kappa, for all tasks of the authors (var_update_scaler of DeepSpeed's tutorial)
GAPS_A_SPAN = 4  # benchmarks/zero_one_adam.py, 60 steps on 4 ranks: ends 0.03 above AdamW, 0.09 without it
MIN_VARIANCE_STEPS = 10  # 1 / (1 - 0.9), the momentum's memory: after fewer steps v is almost unknown


@dataclass(frozen=True, slots=True)
class Schedule:
    """T_v and T_u of the paper as functions of the step, counted from 1; a resumed run needs only the step.

    T_v: gaps 2^floor(j / 16), as in the authors' code, until freeze_ratio * total_steps, at least 10 steps; the authors end it
    with the learning rate's warm-up. T_u: every step until then. The rest is split into equal spans with gaps 1, 2, 4, ...
    max_local_steps, none longer than a quarter of its span, and the last step synchronises. The paper doubles the gap as the
    learning rate decays, which needs the scheduler's future values; the authors' code doubles it after a fixed count of steps.
    """

    total_steps: int
    freeze_steps: int
    max_local_steps: int

    @classmethod
    def from_ratio(cls, total_steps: int, freeze_ratio: float, max_local_steps: int) -> Schedule:
        """Return the schedule of a run. Raises ConfigError for impossible values."""
        checks = [
            (total_steps >= 1, f"total_steps={total_steps}: expected at least 1"),
            (0 < freeze_ratio <= 1, f"freeze_ratio={freeze_ratio}: expected 0 < freeze_ratio <= 1"),
            (max_local_steps >= 1, f"max_local_steps={max_local_steps}: expected at least 1"),
        ]
        if faults := [f"ZeroOneAdam: {message}" for is_good, message in checks if not is_good]:
            raise ConfigError(faults)
        freeze_steps = max(round(freeze_ratio * total_steps), min(total_steps, MIN_VARIANCE_STEPS))
        return cls(total_steps, freeze_steps, max_local_steps)

    def is_variance_step(self, step: int) -> bool:
        """Return whether step is in T_v: k_0 = 1, k_{j+1} = k_j + 2^floor(j / 16), while k_j <= freeze_steps."""
        if step > self.freeze_steps:
            return False
        start, gap = 1, 1
        while step >= start + VARIANCE_GAP_DOUBLES_EVERY * gap:
            start, gap = start + VARIANCE_GAP_DOUBLES_EVERY * gap, 2 * gap
        return (step - start) % gap == 0

    def sync_interval(self, step: int) -> int:
        """Return the gap between two members of T_u around step; 1 from the last step on, so that a run ends with equal ranks.

        Each gap occurs at least GAPS_A_SPAN times before the next longer one; a short run does not reach the longest.
        """
        if step <= self.freeze_steps or step >= self.total_steps:
            return 1
        num_spans = (self.max_local_steps - 1).bit_length() + 1
        num_steps = self.total_steps - self.freeze_steps
        span = (step - self.freeze_steps - 1) * num_spans // num_steps
        longest = max(1, num_steps // (num_spans * GAPS_A_SPAN))
        return int(min(2**span, self.max_local_steps, longest))

    def exchanges(self) -> Iterator[Literal["exact", "one_bit"] | None]:
        """Yield the exchange of each step of a run in order, where no learning rate is 0. None: no communication."""
        since = 0
        for step in range(1, self.total_steps + 1):
            if self.is_variance_step(step):
                yield "exact"
            elif since + 1 >= self.sync_interval(step):
                since = 0
                yield "one_bit"
            else:
                since += 1
                yield None


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that each of n ranks sends in one average of N elements: 2 (n - 1) messages of N / n elements.

    The exact average is a float32 ring all-reduce. The compressed one is an all-to-all and an all-gather, half each.
    """

    num_elements: int
    """N, padded."""
    block_size: int
    world_size: int

    @property
    def chunk_size(self) -> int:
        """N / n."""
        return self.num_elements // self.world_size

    @property
    def bytes_a_compressed_message(self) -> int:
        """N / (8 n) sign bytes and 4 N / (B n) scale bytes."""
        return self.chunk_size // 8 + SCALE_BYTES * self.chunk_size // self.block_size

    @property
    def bytes_per_compressed(self) -> int:
        return 2 * (self.world_size - 1) * self.bytes_a_compressed_message

    @property
    def bytes_per_exact(self) -> int:
        return ring_bytes(self.num_elements, self.world_size)


def padded_size(sizes: Iterable[int], block_size: int, world_size: int) -> int:
    """Return N: each parameter padded to whole blocks, and the end padded until n ranks get whole blocks."""
    num_blocks = sum(-(-size // block_size) for size in sizes)
    return -(-num_blocks // world_size) * world_size * block_size


def pack_signs(values: Tensor) -> Tensor:
    """Pack eight signs to a byte, the first element in the lowest bit; a set bit means >= 0.

    Shapes: (..., N) of any float type -> (..., N / 8) uint8, N a multiple of 8.
    """
    bits = (values >= 0).view(*values.shape[:-1], -1, 8)
    weights = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=values.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor) -> Tensor:
    """Inverse of `pack_signs`: +1.0 or -1.0 for every bit.

    Shapes: (..., M) uint8 -> (..., 8 * M) float32.
    """
    bits = packed.unsqueeze(-1) & torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=packed.device)
    return (bits != 0).to(torch.float32).mul_(2).sub_(1).flatten(-2)


def floor_by_block(values: Tensor, share: float, is_real: Tensor, block_size: int) -> Tensor:
    """Raise each value to at least `share` times the mean of its block, and a value of 0 to the mean itself.

    Shapes: values and is_real (N,) -> (N,). Padding, where is_real is False, is excluded from the means.
    """
    mean = values.view(-1, block_size).sum(1) / is_real.view(-1, block_size).sum(1).clamp_(min=1)
    # A block of zeros has no scale of its own: it takes the mean of the whole vector.
    mean = torch.where(mean > 0, mean, values.sum() / is_real.sum()).repeat_interleave(block_size)
    return torch.where(values > 0, values.maximum(share * mean), mean)


class FlatLayout:
    """Layout of the parameters in the flat vector: each starts on its own block, so that no two share a scale.

    Args:
        parameters: all on one device.
        block_size: B, elements that share a scale.
        world_size: n; the end is padded until n ranks get whole blocks.
    """

    def __init__(self, parameters: Sequence[Tensor], block_size: int, world_size: int) -> None:
        self._parameters = parameters
        self._slices: list[slice] = []
        start = 0
        for parameter in parameters:
            self._slices.append(slice(start, start + parameter.numel()))
            start += -(-parameter.numel() // block_size) * block_size
        self.size = padded_size((parameter.numel() for parameter in parameters), block_size, world_size)
        self.is_real = torch.zeros(self.size, dtype=torch.bool, device=parameters[0].device)
        for part in self._slices:
            self.is_real[part] = True

    def gather(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """Return a new flat float32 vector of tensors shaped as the parameters; None and padding become 0."""
        flat = torch.zeros(self.size, device=self.is_real.device)
        for part, tensor in zip(self._slices, tensors, strict=True):
            if tensor is not None:
                flat[part].copy_(tensor.reshape(-1))
        return flat

    def scatter(self, flat: Tensor) -> None:
        """Write the flat vector into the parameters, rounded to their types."""
        for part, parameter in zip(self._slices, self._parameters, strict=True):
            parameter.copy_(flat[part].view_as(parameter))


class OneBitExchange:
    """Exact and 1-bit averages over a process group, with this rank's compression errors and counts of its traffic.

    With one rank both averages return their argument: nothing is sent, so nothing is compressed.

    Args:
        is_real: (N,) bool, False on padding.
        block_size: B, elements that share a scale.
        process_group: None: the default group, or one rank where torch.distributed is not initialised.
        clock: times the communication. None: it is not timed.
    """

    def __init__(
        self, is_real: Tensor, block_size: int, process_group: dist.ProcessGroup | None, clock: WireClock | None = None
    ) -> None:
        self.process_group = process_group
        self._communication = clock.running if clock else nullcontext
        self.rank, self.world_size = rank_and_world_size(process_group)
        self.block_size = block_size
        self.traffic = Traffic(is_real.numel(), block_size, self.world_size)
        self.chunk_size = self.traffic.chunk_size
        self._is_real = is_real
        self._real_per_block = is_real.view(-1, block_size).sum(1).clamp_(min=1)
        # With one rank there is no compression and no error.
        compressed = is_real.numel() if self.world_size > 1 else 0
        self.worker_error = torch.zeros(compressed, device=is_real.device)
        self.server_error = torch.zeros(compressed // self.world_size, device=is_real.device)
        self.bytes_sent = 0
        self.num_compressed = 0
        self.num_exact = 0

    def average_exact(self, values: Tensor) -> Tensor:
        """Return the mean over ranks in float32, the same bits on every rank. Shapes: (N,) -> (N,)."""
        if self.world_size == 1:
            return values
        total = values.clone()
        with self._communication():
            dist.all_reduce(total, group=self.process_group)
        self.bytes_sent += self.traffic.bytes_per_exact
        self.num_exact += 1
        return total.div_(self.world_size)

    def average(self, values: Tensor) -> Tensor:
        """Return the 1-bit mean over ranks, the same bits on every rank; its error is added to the next call.

        Shapes: (N,) -> (N,), both 0 on padding.
        """
        if self.world_size == 1:
            return values
        n = self.world_size
        compensated = values + self.worker_error
        to_servers = self._encode(compensated.view(n, -1), self._real_per_block.view(n, -1))
        self.worker_error = compensated - self._decode(to_servers).flatten() * self._is_real

        from_workers = torch.empty_like(to_servers)
        with self._communication():
            dist.all_to_all_single(from_workers, to_servers, group=self.process_group)
        # A loop in rank order, not a reduction kernel, fixes the order of the sum on every device and version.
        mean = torch.zeros_like(self.server_error)
        for worker_chunk in self._decode(from_workers):
            mean += worker_chunk
        mine = slice(self.rank * self.chunk_size, (self.rank + 1) * self.chunk_size)
        chunk = (mean / n) * self._is_real[mine] + self.server_error

        to_all = self._encode(chunk.view(1, -1), self._real_per_block.view(n, -1)[self.rank].view(1, -1))
        self.server_error = chunk - self._decode(to_all).flatten() * self._is_real[mine]
        from_servers = torch.empty_like(to_servers)
        # The list form: all_gather_into_tensor is deprecated in torch 2.13, its successor unknown to 2.11.
        with self._communication():
            dist.all_gather(list(from_servers), to_all[0], group=self.process_group)

        self.bytes_sent += self.traffic.bytes_per_compressed
        self.num_compressed += 1
        return self._decode(from_servers).flatten() * self._is_real

    def _encode(self, chunks: Tensor, real_per_block: Tensor) -> Tensor:
        """Shapes: (k, N / n) float32 and (k, N / (n B)) -> (k, message bytes) uint8: signs, then the scales' bytes."""
        scales = chunks.abs().view(len(chunks), -1, self.block_size).sum(-1) / real_per_block
        return torch.cat([pack_signs(chunks), scales.view(torch.uint8)], dim=-1)

    def _decode(self, messages: Tensor) -> Tensor:
        """Shapes: (k, message bytes) uint8 -> (k, N / n) float32, padding not yet cleared."""
        num_sign_bytes = self.chunk_size // 8
        signs = unpack_signs(messages[:, :num_sign_bytes])
        # float32 views need an aligned address: a clone has one; contiguous() would return a single row without a copy.
        scales = messages[:, num_sign_bytes:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return (signs.view(len(messages), -1, self.block_size) * scales.unsqueeze(-1)).flatten(-2)


def rank_and_world_size(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)
