"""Training loop over any engine with backward() and step(). No Ray and no DeepSpeed here.

Loss: the sum of the cross entropy over all answer tokens of the global batch, divided by their number; an example's weight counts
in both. Every worker knows that number from the sampler, so workers and micro-batches change the result only by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from finlora.config import OptimConfig
from finlora.data.encode import IGNORED, Batch, Encoded
from finlora.data.packing import Pack
from finlora.errors import FinloraError
from finlora.formula.llama import shape_of
from finlora.model.memory.peak import measure_peak_gib
from finlora.optim.optimizer import learning_rate_at, set_rate
from finlora.train.steps.batches import Batches
from finlora.train.steps.sampler import Sampler

if TYPE_CHECKING:
    from peft import PeftModel


class TrainEngine(Protocol):
    """Engine interface of the loop; DeepSpeedEngine implements it."""

    optimizer: torch.optim.Optimizer

    def __call__(self, batch: Batch | Pack) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> Any: ...

    def step(self) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """State of a run after an optimiser step, averaged over the steps since the last record."""

    step: int
    """Optimiser steps done."""
    total_steps: int
    epoch: float
    loss: float
    """Mean cross entropy per answer token, over all workers."""
    learning_rate: float
    tokens_per_second: float
    """Real tokens of all workers, padding not counted."""
    examples_per_second: float
    memory_gib: float
    """Peak memory of this worker's device; resident memory on CPU."""
    seconds_left: float


class AnswerLoss(nn.Module):
    """Summed cross entropy over the answer tokens of a padded batch, through transformers' and PEFT's own forward pass.

    The output head runs only at positions with a label. This is the padded path: the reference of
    finlora/model/layers/packed_model.py, and the path of models that cannot run packed.

    Shapes: input_ids, attention_mask, labels (B, T); the head gets (N, hidden) for N labelled positions.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self._logits_scale = shape_of(model.get_base_model().config.to_dict()).additions.logits_scale

    def forward(self, batch: Batch) -> torch.Tensor:
        llama = self.model.get_base_model()
        hidden = llama.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        targets = batch.labels[:, 1:]
        has_label = targets != IGNORED
        logits = llama.lm_head(hidden[:, :-1][has_label])
        if self._logits_scale != 1:
            logits = logits * self._logits_scale
        if batch.weights is None:
            return nn.functional.cross_entropy(logits.float(), targets[has_label], reduction="sum")
        losses = nn.functional.cross_entropy(logits.float(), targets[has_label], reduction="none")
        return (losses * batch.weights[:, None].expand(targets.shape)[has_label]).sum()


def count_steps(sampler: Sampler, epochs: int, max_steps: int | None) -> int:
    """Return the optimiser steps of the whole run."""
    total = sampler.steps_per_epoch * epochs
    return total if max_steps is None else min(total, max_steps)


def run_steps(
    engine: TrainEngine,
    examples: Sequence[Encoded],
    sampler: Sampler,
    optim: OptimConfig,
    *,
    worker: int,
    start_step: int,
    total_steps: int,
    batches: Batches,
    device: torch.device,
    log_every_steps: int,
    reduce_sum: Callable[[torch.Tensor], torch.Tensor],
    on_log: Callable[[Progress], None],
    on_step_end: Callable[[int], bool],
    on_pass: Callable[[], object] = lambda: None,
) -> int:
    """Train from `start_step` to `total_steps`.

    Args:
        worker: this worker's rank in the data-parallel group.
        batches: splits this worker's share of a global batch into forward passes and assembles each.
        reduce_sum: sums a float tensor over all workers in place and returns it.
        on_log: called on every worker each `log_every_steps` steps and after the last one.
        on_step_end: called on every worker with the steps done; writes checkpoints, returns whether to stop.
        on_pass: called after each forward and backward pass.

    Returns:
        The steps done: `total_steps`, or fewer after a stop.

    Raises:
        FinloraError: the loss is not finite.
    """
    window = _Window(device, reduce_sum)
    to_come = islice(sampler.batches(total_steps), start_step, None)
    batches.foresee((sampler.share(batch, worker) for batch in to_come), examples)
    for step in range(start_step, total_steps):
        batch = sampler.global_batch(step)
        num_targets = sum(examples[index].loss_tokens for index in batch)
        set_rate(engine.optimizer, learning_rate_at(step, total_steps, optim))
        # Dropout depends on seed, step and worker only: a resumed run samples the same masks without saved generators.
        torch.manual_seed((sampler.seed * 1_000_003 + step) * 4_099 + worker)
        for indices in batches.cut(sampler.share(batch, worker)):
            micro_batch = batches.assemble([examples[index] for index in indices])
            window.num_tokens += micro_batch.num_tokens
            window.num_examples += len(indices)
            loss = engine(micro_batch.to(device))
            # The engine averages gradients over workers; the factor world_size turns the mean back into the sum.
            engine.backward(loss * (sampler.world_size / num_targets), scale_wrt_gas=False)
            window.loss_sum += loss.detach().double() / num_targets
            # `loss` would keep the graph alive through the next pass, and LLM.int8() stores its inputs in the graph.
            del loss
            on_pass()
        engine.step()
        window.num_steps += 1
        done = step + 1
        if done % log_every_steps == 0 or done == total_steps:
            on_log(window.close(done, total_steps, sampler, learning_rate_at(step, total_steps, optim)))
        if on_step_end(done):
            return done
    return total_steps


class _Window:
    """Sums since the last record, kept on the device so that a step needs no host sync."""

    def __init__(self, device: torch.device, reduce_sum: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.device = device
        self.reduce_sum = reduce_sum
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.num_tokens = self.num_examples = self.num_steps = 0
        self.started = time.perf_counter()

    def close(self, done: int, total_steps: int, sampler: Sampler, learning_rate: float) -> Progress:
        counts = torch.tensor([0.0, self.num_tokens, self.num_examples], dtype=torch.float64, device=self.device)
        counts[0] = self.loss_sum
        loss_sum, num_tokens, num_examples = self.reduce_sum(counts).tolist()
        loss = loss_sum / self.num_steps
        seconds = time.perf_counter() - self.started
        if not torch.isfinite(torch.tensor(loss)):
            raise FinloraError(
                f"the loss became {loss} within the {self.num_steps} steps before step {done}: lower optim.learning_rate, "
                "or check the data for empty prompts; the last checkpoint is from before."
            )
        progress = Progress(
            step=done,
            total_steps=total_steps,
            epoch=done / sampler.steps_per_epoch,
            loss=loss,
            learning_rate=learning_rate,
            tokens_per_second=num_tokens / seconds,
            examples_per_second=num_examples / seconds,
            memory_gib=measure_peak_gib(self.device),
            seconds_left=(total_steps - done) * seconds / self.num_steps,
        )
        self.reset()
        return progress
