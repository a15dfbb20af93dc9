"""Loss on held-out examples during a run, by which a search compares its trials. No Ray here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finlora.config import RunConfig
from finlora.data.encode import Encoded, collate, encode_examples
from finlora.data.sets.prepared import SplitName, read_prepared
from finlora.durable import append_line, read_lines
from finlora.model.base_files import BaseFiles
from finlora.precision import is_autocast
from finlora.train.run.run_folder import RunFolder
from finlora.train.steps.loop import AnswerLoss

if TYPE_CHECKING:
    from peft import PeftModel

HELD_OUT = "held_out_loss"
"""Name of the metric that workers report."""
HELD_OUT_SPLIT: SplitName = "test"
"""Split of a search's own data folder that holds its held-out training examples. Evaluation reads the split of this name. The
published test split takes no part in a search."""
_FILE = "held_out.jsonl"
_MAX_TOKENS = 4096
"""Tokens of a padded batch. Without a backward pass this takes less memory than a training step of any base."""


class HeldOut:
    """Mean cross entropy per answer token on the held-out examples of a search.

    Args:
        config: its data folder holds the search's split of the training examples. data.max_test_examples limits each task, as it
            limits the trial's scores.
        folder: of the run. The losses are also written there, for a search that resumes.
        worker: this worker's rank; each worker measures its share of the examples.
        reduce_sum: sums a float tensor over all workers in place and returns it.
    """

    def __init__(
        self,
        config: RunConfig,
        base: BaseFiles,
        folder: RunFolder,
        worker: int,
        world_size: int,
        reduce_sum: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        limit = config.data.max_test_examples
        examples = [
            example
            for task in config.data.tasks
            for example in read_prepared(Path(config.data.dir), task, HELD_OUT_SPLIT).examples[:limit]
        ]
        encoded, _ = encode_examples(
            examples,
            base.tokenizer,
            template=config.model.template,
            max_seq_len=config.model.max_seq_len,
            too_long=config.data.too_long,
            date=base.template_date,
        )
        encoded.sort(key=lambda item: item.num_tokens)
        self._batches = _cut(encoded[worker::world_size])
        self._pad_token_id = int(base.tokenizer.pad_token_id)
        self._is_bf16 = is_autocast(config)
        self._reduce_sum = reduce_sum
        self._folder = folder if worker == 0 else None

    @torch.no_grad()
    def measure(self, step: int, model: PeftModel, device: torch.device) -> float:
        """Run the model forward on all held-out examples, without dropout. Collective: every worker calls it."""
        was_training = model.training
        model.eval()
        loss = AnswerLoss(model)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._is_bf16):
            for items in self._batches:
                sums[0] += loss(collate(items, self._pad_token_id).to(device)).double()
                sums[1] += sum(item.loss_tokens for item in items)
        model.train(was_training)
        total, count = self._reduce_sum(sums).tolist()
        if self._folder is not None:
            append_held_out(self._folder, step, total / count)
        return float(total / count)


def append_held_out(folder: RunFolder, step: int, loss: float) -> None:
    """Append the loss on the held-out examples after a step."""
    append_line(folder.root / _FILE, {"step": step, HELD_OUT: loss})


def read_held_out(folder: RunFolder) -> list[dict[str, float]]:
    """Return the losses in step order. Of a step that ran twice the later one counts; truncated lines are left out."""
    found = {record["step"]: record for record in read_lines(folder.root / _FILE) if "step" in record}
    return [found[step] for step in sorted(found)]


def _cut(items: list[Encoded]) -> list[list[Encoded]]:
    """Split examples, shortest first, into batches of at most _MAX_TOKENS padded tokens."""
    batches: list[list[Encoded]] = []
    for item in items:
        if not batches or (len(batches[-1]) + 1) * item.num_tokens > _MAX_TOKENS:
            batches.append([])
        batches[-1].append(item)
    return batches
