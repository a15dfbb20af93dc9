"""Training in its own process, from the start or from a checkpoint, as in a resumed worker but without Ray.

Usage: resumed_steps.py FOLDER START STOP DROPOUT. Reads FOLDER/START.pt unless START is 0; writes FOLDER/STOP.pt and, to standard
output, the loss of each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finlora.config import LoraConfig, OptimConfig
from finlora.data.encode import Encoded
from finlora.model.layers.packed_model import PackedLlama
from finlora.model.lora import attach_lora, trainable_parameters
from finlora.optim.optimizer import make_optimizer
from finlora.train.steps.batches import PackedBatches
from finlora.train.steps.loop import run_steps
from finlora.train.steps.sampler import Sampler

_TOTAL = 12
"""Steps of the run, which set the learning rate schedule."""


class Engine:
    """Engine for the loop without DeepSpeed."""

    def __init__(self, module, optimizer):
        self.module, self.optimizer = module, optimizer

    def __call__(self, batch):
        return self.module(batch)

    def backward(self, loss, scale_wrt_gas=True):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(folder: Path, start: int, stop: int, dropout: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # 576 wide as SmolLM2-135M: torch.compile sums such rows in one block, by one warp or by eight.
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=512,
        num_hidden_layers=3,
        vocab_size=512,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    base = LlamaForCausalLM(config).to(device, torch.bfloat16).requires_grad_(False)
    model = attach_lora(base, LoraConfig(rank=8, dropout=float(dropout)), "base", 1).train()
    parameters = trainable_parameters(model)
    optim = OptimConfig(learning_rate=1e-2)
    optimizer = make_optimizer(list(parameters.values()), optim, _TOTAL)
    if start:
        saved = torch.load(folder / f"{start}.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved["parameters"][name])
        optimizer.load_state_dict(saved["optimizer"])
    # Batches of 16 come to 400 to 700 rows, on both sides of the 512 at which torch.compile changes the order of its sums.
    draw = torch.Generator().manual_seed(3)
    examples = [
        Encoded(
            tuple(torch.randint(3, 500, (int(torch.randint(8, 60, (), generator=draw)),), generator=draw).tolist()),
            (int(torch.randint(3, 500, (), generator=draw)),),
        )
        for _ in range(96)
    ]
    lengths = [item.num_tokens for item in examples]
    is_cuda = device.type == "cuda"
    losses = []
    run_steps(
        Engine(PackedLlama(model, torch.bfloat16, capture=is_cuda), optimizer),
        examples,
        Sampler(lengths=lengths, global_batch_size=16, world_size=1, seed=1),
        optim,
        worker=0,
        start_step=start,
        total_steps=_TOTAL,
        batches=PackedBatches(max_tokens=4096, lengths=lengths, share_prefix=True, is_padded=is_cuda),
        device=device,
        log_every_steps=1,
        reduce_sum=lambda tensor: tensor,
        on_log=lambda progress: losses.append(progress.loss),
        on_step_end=lambda step: step == stop,
    )
    state = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    torch.save({"parameters": state, "optimizer": optimizer.state_dict()}, folder / f"{stop}.pt")
    sys.stdout.write(json.dumps(losses) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
