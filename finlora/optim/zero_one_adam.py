"""0/1 Adam: Adam that exchanges one bit per element, and only at some steps, for data-parallel training on slow networks.

Source: Lu, Li, Zhang, De Sa, He 2022, arXiv:2202.06009, Algorithm 1. Worker i, step t from 1, g_i the local gradient:

    m_i <- b1 m_i + (1 - b1) g_i;   x_i <- x_i - r_t m_i / D;   u_i <- u_i + r_t m_i           every step
    t in T_u:  U = 1bit-AllReduce(u_i);  m_i <- U / sum of r since t';  x_i <- x_t' - U / D;  u_i <- 0;  t' <- t
    t in T_v:  G = AllReduce(g_i);  v <- b2 v + (1 - b2) G^2

Checked against the restatement in github.com/junaidaliop/zij, canon/math/01adam.md (commit 00728ec), and the authors' code
and tutorial (DeepSpeed 0.19.6, runtime/fp16/onebit/zoadam.py), called the code below. Deviations, each with its reason:
 1. x and u use the momentum that includes g_i, as in the code. With the previous one, as stated, no gradient would ever
    reach x while every step synchronises. The sum of r covers u's steps, without step t' again, as in the code.
 2. r_t = lr / (1 - b1^t), and v is divided by 1 - b2^(number of its updates): Adam's bias corrections. Without them, as in
    the paper and the code, steps grow to 6.6 times Adam's (at step 12) and stay 1 / sqrt(1 - b2^n) times Adam's where v
    freezes after n updates. D = sqrt(v) + eps, as in Adam.
 3. v is updated before x moves, as in Adam and the code. T_v ends before local steps begin, so D is constant in them.
 4. At t in T_v every rank has the exact mean gradient G, so m and x use it and the 1-bit exchange is skipped, as in the
    code. Ranks are then equal by construction, and the first steps are plain Adam.
 5. The 1-bit exchange sends u / D, the update, not u. One scale then fits coordinates whose gradients differ by orders of
    magnitude (LoRA's A and B); a sign times mean |u| over a small D would move the small ones much too far. The code sends
    g until T_v ends, then u, and clears the errors between; here they are kept.
 6. The scale is a mean over 512 elements of one parameter, 1.06 bits per element; in the code, a parameter's root mean square.
 7. Outside T_v, v is at least (1 - b2) times its mean over the block, which is what one gradient of typical size adds;
    where v is 0 it is the mean itself. A frozen v cannot grow: otherwise the next gradient of such a coordinate explodes.
 8. Outside T_v, |m| / D is clamped to max(1, (1 - b1) / sqrt(1 - b2)), Adam's own bound of a step in units of the learning
    rate (Kingma and Ba, arXiv:1412.6980, section 2.1), also after m is recovered from U. A frozen v breaks the bound: on
    TFNS m / D grew to 640 in a few coordinates, whose compression errors exceeded the other 511 values of their block.
 9. T_v and T_u are scaled to the run's length: `Schedule`.
10. Decoupled weight decay, on x between synchronisations and on x_t' at them. A step with lr = 0 outside T_v changes nothing.
11. Gradients are clipped here, without a round of communication: their exact mean in T_v, as for AdamW, and each rank's own
    gradient elsewhere. A rank's own has more noise and so a larger norm: clipped to the mean's bound it would keep less of
    what the ranks have in common, where v comes from clipped means, and steps would be up to sqrt(n) times too short. Its
    bound is larger by the ratio of the two norms in T_v, as a moving average between 1 and sqrt(n).
12. With one rank nothing is sent or compressed; all else is the same.
13. LoRA+ (arXiv:2402.12354) gives a parameter f times the learning rate: x moves by f r m / D and f U / D, and decays by f lr.
    u, U and the compression stay without f, which is constant within a block: they are those of x / f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finlora.errors import CheckpointError, ConfigError
from finlora.optim.onebit import FlatLayout, OneBitExchange, Schedule, floor_by_block, rank_and_world_size
from finlora.optim.traffic import WireClock

_COUNTS = ("_num_variance_updates", "_steps_since_sync", "_rate_sum", "_decay")
_NORM_WEIGHT = 0.1
"""Of the newest ratio of norms in its moving average."""
_EXCHANGE_COUNTS = ("bytes_sent", "num_compressed", "num_exact")


class ZeroOneAdam(torch.optim.Optimizer):
    """0/1 Adam over one flat float32 vector of all parameters. See the module for the equations.

    It does all communication itself: gradients must be local, not averaged, and every rank must call `step` and
    `synchronise` in the same order. bfloat16 parameters get a float32 master copy, float32 ones do not. The first `step`
    broadcasts rank 0's weights.

    Args:
        params: parameters, or exactly one group of them, all on one device.
        lr: step size; read from param_groups[0]["lr"] at each step, so that any scheduler works.
        total_steps: optimiser steps of the whole run, to which the schedules are scaled.
        freeze_ratio: share of total_steps after which the variance is frozen.
        max_local_steps: longest gap between two synchronisations, in steps.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        process_group: None: the default group, or one rank where torch.distributed is not initialised.
        block_size: elements that share a scale, a multiple of 8.
        clock: times the communication. None: it is not timed.
        rate_factors: factor of each parameter's learning rate, more than 0; empty: 1.

    Raises:
        ConfigError: an impossible schedule, a second parameter group, or parameters on several devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        total_steps: int,
        freeze_ratio: float,
        max_local_steps: int,
        max_grad_norm: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        block_size: int = 512,
        clock: WireClock | None = None,
        rate_factors: Sequence[float] = (),
    ) -> None:
        self.schedule = Schedule.from_ratio(total_steps, freeze_ratio, max_local_steps)
        if block_size < 8 or block_size % 8:
            raise ConfigError(
                f"ZeroOneAdam: block_size={block_size}: expected a multiple of 8, so that signs fill bytes"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if len({parameter.device for parameter in self._parameters()}) != 1:
            raise ConfigError("ZeroOneAdam: parameters lie on several devices, expected one: move them together first")
        self._block_size, self._process_group, self._clock = block_size, process_group, clock
        self._max_grad_norm = max_grad_norm
        self._step = self._num_variance_updates = self._steps_since_sync = 0
        self._rate_sum = 0.0
        self._decay: float | Tensor = 1.0
        self._rate_factors = rate_factors if set(rate_factors) - {1.0} else ()
        self._factors: Tensor | None = None
        # Allocated at the first step: DeepSpeed may move and broadcast the weights after it gets the optimiser.
        self._buffers: dict[str, Tensor] = {}
        self._exchange: OneBitExchange | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one group of parameters.

        Raises:
            ConfigError: a second group. One flat vector has one learning rate and one weight decay.
        """
        if self.param_groups:
            raise ConfigError("ZeroOneAdam: found a second parameter group, expected one: pass all parameters together")
        super().add_param_group(param_group)

    @property
    def is_synchronised(self) -> bool:
        """Whether all ranks hold the same weights now. A checkpoint of the model may be written only then."""
        return self._steps_since_sync == 0

    @property
    def num_syncs(self) -> int:
        """Rounds of communication so far, exact and 1-bit together; 0 with one rank."""
        return self._exchange.num_exact + self._exchange.num_compressed if self._exchange else 0

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank sent: num_exact * 2 (n-1)/n 4 N + num_compressed * 2 (n-1)/n (N / 8 + 4 N / B), N padded."""
        return self._exchange.bytes_sent if self._exchange else 0

    @property
    def bytes_adam(self) -> int:
        """Bytes that a ring all-reduce of the gradients, in the parameters' types, would send over the same steps."""
        n, parameters = rank_and_world_size(self._process_group)[1], self._parameters()
        return self._step * 2 * (n - 1) * sum(p.numel() * p.element_size() for p in parameters) // n

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the local gradients; a missing gradient counts as 0. Returns the closure's result."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        if self._exchange is None:
            self._allocate()
            # The method needs x_0 equal on all ranks.
            if self._exchange is not None and self._exchange.world_size > 1:
                dist.broadcast(self._buffers["last_synced"], group=self._process_group, group_src=0)
            self._write_weights(self._buffers["last_synced"])
        self._step += 1
        gradient = self._layout.gather(parameter.grad for parameter in self._parameters())
        if self.schedule.is_variance_step(self._step):
            self._step_exact(gradient)
        else:
            self._step_local(gradient)
        if self._steps_since_sync >= self.schedule.sync_interval(self._step):
            self.synchronise()
        return loss

    @torch.no_grad()
    def synchronise(self) -> None:
        """Make the weights equal on all ranks, as at t in T_u. All ranks must call it; does nothing if they are equal already."""
        if self.is_synchronised or self._exchange is None:
            return
        buffers, denominator = self._buffers, self._denominator(is_floored=True)
        update = self._exchange.average(buffers["u"] / denominator)
        buffers["m"] = update * denominator / self._rate_sum
        self._bound_momentum(denominator)
        buffers["last_synced"].mul_(self._decay).sub_(self._scale(update))
        buffers["u"].zero_()
        self._write_weights(buffers["last_synced"])
        self._steps_since_sync, self._rate_sum, self._decay = 0, 0.0, 1.0

    def _step_exact(self, gradient: Tensor) -> None:
        """Take a step of T_v: Adam with the exact mean gradient, the same on every rank."""
        assert self._exchange is not None and self.is_synchronised, "T_v ends before local steps begin"  # noqa: PT018
        (beta1, beta2), buffers = self._group()["betas"], self._buffers
        exact = self._exchange.average_exact(gradient)
        self._compare_norms(gradient, exact)
        mean = self._clip(exact, self._max_grad_norm)
        self._num_variance_updates += 1
        buffers["m"].mul_(beta1).add_(mean, alpha=1 - beta1)
        buffers["v"].mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
        rate, decay = self._rate_and_decay()
        weights = buffers["last_synced"].mul_(decay)
        weights.addcdiv_(self._scale(buffers["m"]), self._denominator(is_floored=False), value=-rate)
        self._write_weights(weights)

    def _step_local(self, gradient: Tensor) -> None:
        """Take a step outside T_v: only this rank's weights, momentum and u change."""
        rate, decay = self._rate_and_decay()
        if rate == 0:
            return  # Otherwise the momentum recovered from u is 0 / 0, and a step of T_v starts with unequal momenta.
        beta1, buffers = self._group()["betas"][0], self._buffers
        denominator = self._denominator(is_floored=True)
        limit = self._max_grad_norm * buffers["norm_ratio"].sqrt()
        buffers["m"].mul_(beta1).add_(self._clip(gradient, limit), alpha=1 - beta1)
        self._bound_momentum(denominator)
        weights = self._read_weights().mul_(decay)
        weights.addcdiv_(self._scale(buffers["m"]), denominator, value=-rate)
        buffers["u"].add_(buffers["m"], alpha=rate)
        self._write_weights(weights)
        self._rate_sum += rate
        self._decay = self._decay * decay
        self._steps_since_sync += 1

    def _bound_momentum(self, denominator: Tensor) -> None:
        """Clamp the momentum: deviation 8."""
        beta1, beta2 = self._group()["betas"]
        limit = denominator * max(1.0, (1 - beta1) / (1 - beta2) ** 0.5)
        torch.clamp(self._buffers["m"], -limit, limit, out=self._buffers["m"])

    def _compare_norms(self, own: Tensor, mean: Tensor) -> None:
        """Note how much larger a rank's own gradient is than the mean: deviation 11."""
        assert self._exchange is not None
        if self._max_grad_norm == 0 or self._exchange.world_size == 1:
            return
        squares = (own.square().sum() / mean.square().sum().clamp_(min=1e-30)).clamp_(1.0, self._exchange.world_size)
        self._buffers["norm_ratio"].lerp_(squares, _NORM_WEIGHT if self._num_variance_updates else 1.0)

    def _clip(self, gradient: Tensor, limit: float | Tensor) -> Tensor:
        """Clip a gradient to a norm: deviation 11."""
        if self._max_grad_norm == 0:
            return gradient
        return gradient.mul((limit / (gradient.norm() + 1e-6)).clamp(max=1.0))

    def _rate_and_decay(self) -> tuple[float, float | Tensor]:
        group = self._group()
        loss: float = group["lr"] * group["weight_decay"]
        decay = 1 - loss if self._factors is None or not loss else 1 - loss * self._factors
        return group["lr"] / (1 - group["betas"][0] ** self._step), decay

    def _scale(self, update: Tensor) -> Tensor:
        """Return an update times the factors of the learning rates."""
        return update if self._factors is None else update * self._factors

    def _denominator(self, *, is_floored: bool) -> Tensor:
        """Return D = sqrt(v / (1 - b2^updates)) + eps, with the floor of deviation 7 outside T_v."""
        beta2 = self._group()["betas"][1]
        v = self._buffers["v"] / (1 - beta2**self._num_variance_updates)
        if is_floored:
            v = floor_by_block(v, 1 - beta2, self._layout.is_real, self._block_size)
        denominator: Tensor = v.sqrt_().add_(self._group()["eps"])
        return denominator

    def _group(self) -> dict[str, Any]:
        return self.param_groups[0]

    def _parameters(self) -> list[Tensor]:
        parameters: list[Tensor] = self._group()["params"]
        return parameters

    def _read_weights(self) -> Tensor:
        return self._buffers["master"] if "master" in self._buffers else self._layout.gather(self._parameters())

    def _write_weights(self, flat: Tensor) -> None:
        if "master" in self._buffers:
            self._buffers["master"].copy_(flat)
        self._layout.scatter(flat)

    def _allocate(self) -> None:
        _, world_size = rank_and_world_size(self._process_group)
        self._layout = FlatLayout(self._parameters(), self._block_size, world_size)
        self._exchange = OneBitExchange(self._layout.is_real, self._block_size, self._process_group, self._clock)
        if self._rate_factors:
            pairs = zip(self._parameters(), self._rate_factors, strict=True)
            self._factors = self._layout.gather(
                torch.full_like(each, factor, dtype=torch.float32) for each, factor in pairs
            )
        weights = self._layout.gather(self._parameters())
        self._buffers = {name: torch.zeros_like(weights) for name in ("m", "v", "u")} | {"last_synced": weights}
        self._buffers["norm_ratio"] = torch.ones((), device=weights.device)  # its square, as a moving average
        if any(parameter.dtype != torch.float32 for parameter in self._parameters()):
            self._buffers["master"] = weights.clone()

    def _fingerprint(self) -> dict[str, int]:
        """Return the values that a saved state must share with this optimiser."""
        rank, world_size = rank_and_world_size(self._process_group)
        return {
            "world_size": world_size,
            "rank": rank,
            "num_elements": sum(parameter.numel() for parameter in self._parameters()),
            "block_size": self._block_size,
            "total_steps": self.schedule.total_steps,
            "freeze_steps": self.schedule.freeze_steps,
            "max_local_steps": self.schedule.max_local_steps,
        }

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return this rank's whole state, weights included. Every rank saves and loads its own; tensors are references."""
        state: dict[str, Any] = {"fingerprint": self._fingerprint(), "step": self._step}
        if self._exchange is not None:
            errors = {"worker_error": self._exchange.worker_error, "server_error": self._exchange.server_error}
            buffers = {name: tensor for name, tensor in self._buffers.items() if name != "master"}
            state["tensors"] = buffers | errors | {"weights": self._read_weights()}
            state["exchange"] = {name: getattr(self._exchange, name) for name in _EXCHANGE_COUNTS}
            state["counts"] = {name: getattr(self, name) for name in _COUNTS}
        return {**super().state_dict(), STATE_KEY: state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore this rank's `state_dict` bit for bit, the parameters' values included.

        Raises:
            CheckpointError: the state is another optimiser's or rank's, or of another world size, model or schedule.
        """
        state = take_own_state(state_dict, self._fingerprint())
        super().load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        self._step, self._buffers, self._exchange = state["step"], {}, None
        if "tensors" not in state:
            return
        self._allocate()
        assert self._exchange is not None
        device = self._parameters()[0].device
        tensors = {name: tensor.to(device, copy=True) for name, tensor in state["tensors"].items()}
        self._write_weights(tensors.pop("weights"))
        self._exchange.worker_error = tensors.pop("worker_error")
        self._exchange.server_error = tensors.pop("server_error")
        self._buffers |= tensors
        for owner, counts in ((self._exchange, state["exchange"]), (self, state["counts"])):
            for name, value in counts.items():
                setattr(owner, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)


STATE_KEY = "zero_one_adam"
"""Entry of the optimiser's state_dict."""


def take_own_state(state_dict: Mapping[str, Any], expected: Mapping[str, int]) -> dict[str, Any]:
    """Return the entry of 0/1 Adam.

    Args:
        expected: the fingerprint of the optimiser that resumes.

    Raises:
        CheckpointError: the state is another optimiser's or rank's, or of another world size, model or schedule.
    """
    state: dict[str, Any] | None = state_dict.get(STATE_KEY)
    if state is None:
        raise CheckpointError(
            f"found an optimiser state without {STATE_KEY!r}, expected one that 0/1 Adam saved: "
            "set optim.name to the optimiser that wrote the checkpoint, or start a new run"
        )
    saved = state["fingerprint"]
    differences = [f"{k} {saved.get(k)}, expected {v}" for k, v in expected.items() if saved.get(k) != v]
    if differences:
        raise CheckpointError(
            f"found a 0/1 Adam state with {'; '.join(differences)}: error buffers and local weights belong to one rank "
            "of one run; resume with the same workers and settings, or start a new run from the exported adapter"
        )
    return state
