"""Reference engine: transformers' own forward pass and generate on padded batches.

Shapes: B prompts, T tokens of the longest row, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from finlora.config import Template
from finlora.data.encode import end_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PlainEngine:
    """Greedy generation and label scoring."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerFast, template: Template, device: torch.device
    ) -> None:
        """Take a LlamaForCausalLM, or a PeftModel around one, in eval mode."""
        self.model = model
        self.llama = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tokenizer = tokenizer
        self.end_token_id = end_token_id(tokenizer, template)
        self.device = device

    @torch.inference_mode()
    def score_choices(
        self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Score every token of every choice in one forward pass.

        A row holds the prompt followed by all its choices. A choice attends to the prompt and itself, not to other
        choices, and its positions start at the prompt's end, so each choice has the score that it would have alone.
        """
        lengths = [len(p) + sum(len(c) for c in own) for p, own in zip(prompts, choices, strict=True)]
        num_rows, longest = len(prompts), max(lengths)
        input_ids = torch.zeros((num_rows, longest), dtype=torch.long)
        positions = torch.zeros((num_rows, longest), dtype=torch.long)
        visible = torch.eye(longest, dtype=torch.bool).repeat(
            num_rows, 1, 1
        )  # padding attends to itself: no empty softmax
        rows, columns, targets, owners = [], [], [], []
        for row, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
            size = len(prompt)
            input_ids[row, :size] = torch.tensor(prompt)
            positions[row, :size] = torch.arange(size)
            visible[row, :size, :size] = torch.ones(size, size, dtype=torch.bool).tril()
            start = size
            for number, choice in enumerate(own):
                end = start + len(choice)
                input_ids[row, start:end] = torch.tensor(choice)
                positions[row, start:end] = torch.arange(size, size + len(choice))
                visible[row, start:end, :size] = True
                visible[row, start:end, start:end] = torch.ones(len(choice), len(choice), dtype=torch.bool).tril()
                # A token is predicted at the column before it; the first one at the prompt's last token.
                rows += [row] * len(choice)
                columns += [size - 1, *range(start, end - 1)]
                targets += list(choice)
                owners += [(row, number)] * len(choice)
                start = end
        dtype = self.llama.get_input_embeddings().weight.dtype
        mask = torch.zeros((num_rows, 1, longest, longest), dtype=dtype, device=self.device)
        mask.masked_fill_(~visible[:, None].to(self.device), torch.finfo(dtype).min)
        hidden = self.llama.model(
            input_ids=input_ids.to(self.device),
            attention_mask=mask,
            position_ids=positions.to(self.device),
            use_cache=False,
        ).last_hidden_state
        logits = self.llama.lm_head(hidden[rows, columns]).float()  # (N, V)
        wanted = torch.tensor(targets, device=self.device)[:, None]
        log_probs = torch.log_softmax(logits, dim=-1).gather(1, wanted)[:, 0].double().tolist()
        totals = [[0.0] * len(own) for own in choices]
        for (row, number), value in zip(owners, log_probs, strict=True):
            totals[row][number] += value
        return [torch.softmax(torch.tensor(total, dtype=torch.float64), dim=0).tolist() for total in totals]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Decode greedily with a KV cache, prompts padded on the left."""
        longest = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self.model.generate(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_token_id,
            pad_token_id=pad,
        )
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in output[:, longest:].tolist()]
