"""Plain side of beside_peft.py: trains and scores one adapter with transformers, PEFT and bitsandbytes, without FinLoRA.

    python benchmarks/plain_peft.py train FOLDER       # reads FOLDER/inputs.json, writes FOLDER/adapter and training.json
    python benchmarks/plain_peft.py evaluate FOLDER    # reads both, writes FOLDER/answers.json

Nothing of finlora is imported. Training is transformers' Trainer on padded rows. A label's score is the sum of its tokens' log
probabilities, a row for each label of a question, as lm-evaluation-harness scores; free text is written by greedy `generate`.
inputs.json holds token ids, the order of the examples and the settings (beside_peft.py writes it).

Shapes: B rows, T tokens of the longest row, N label tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader

IGNORED = -100
FIRST_STEP = "first-step"
"""File that is written when the first optimiser step has ended."""


def load_base(inputs: dict[str, Any], bits: int) -> Any:
    """Load the base, quantised by bitsandbytes: NF4 with double quantisation, LLM.int8(), or not at all."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at 8 bit it logs a line a layer and pass
    dtype = getattr(torch, inputs["dtype"])
    quantisation = {
        4: transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        8: transformers.BitsAndBytesConfig(load_in_8bit=True),
    }
    return transformers.AutoModelForCausalLM.from_pretrained(
        inputs["base"],
        dtype=dtype,
        quantization_config=quantisation.get(bits),
        device_map={"": inputs["device"]},
        attn_implementation="sdpa",
    )


def share_of_rate(step: int, num_warm_up: int, total_steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then linear to 0.

    transformers' own linear schedule is one step later in the warm-up, so that its first step has the rate 0.
    """
    if step < num_warm_up:
        return (step + 1) / num_warm_up
    return (total_steps - step) / max(1, total_steps - num_warm_up)


class InOrder:
    """Batch sampler of a fixed order: each pass over it is the next epoch, cut into micro-batches."""

    def __init__(self, epochs: Sequence[Sequence[Sequence[int]]], micro_batch: int) -> None:
        self._epochs = [
            [batch[start : start + micro_batch] for batch in epoch for start in range(0, len(batch), micro_batch)]
            for epoch in epochs
        ]
        self._next = 0

    def __len__(self) -> int:
        return len(self._epochs[0])

    def __iter__(self) -> Iterator[Sequence[int]]:
        epoch = self._epochs[self._next]
        self._next += 1
        return iter(epoch)


class OrderedTrainer(transformers.Trainer):
    """Trainer over batches in a fixed order."""

    order: InOrder

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )


class FirstStep(transformers.TrainerCallback):
    """Writes a file at the end of the first step; its time ends the start-up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_more: Any) -> None:
        if state.global_step == 1:
            self.path.write_text("1", encoding="utf-8")


def make_collator(pad_token_id: int) -> Callable[[Sequence[Sequence[Sequence[int]]]], dict[str, torch.Tensor]]:
    """Return a function that pads examples (prompt, answer) on the right; only answers have labels."""

    def collate(examples: Sequence[Sequence[Sequence[int]]]) -> dict[str, torch.Tensor]:
        batch = pad_right([[*prompt, *answer] for prompt, answer in examples], pad_token_id)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (prompt, answer) in enumerate(examples):
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return batch | {"labels": labels}

    return collate


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask (B, T)."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask (B, T), for `generate`."""
    flipped = pad_right([row[::-1] for row in rows], pad_token_id)
    return {name: tensor.flip(1) for name, tensor in flipped.items()}


def train(folder: Path) -> None:
    """Train the adapter of inputs.json and save it."""
    inputs = _read_inputs(folder)
    settings, is_cuda = inputs["training"], inputs["device"] != "cpu"
    model = load_base(inputs, inputs["bits"])
    transformers.set_seed(settings["seed"])  # A is sampled here
    model = get_peft_model(model, LoraConfig(**inputs["lora"]))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings["learning_rate"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        fused=is_cuda,  # as Trainer's own
    )
    total_steps = settings["total_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(step, settings["num_warm_up"], total_steps)
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=total_steps,
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["accumulation"],
        max_grad_norm=settings["max_grad_norm"],
        bf16=settings["is_autocast"],
        use_cpu=not is_cuda,
        dataloader_pin_memory=is_cuda,
        seed=settings["seed"],
        logging_steps=settings["log_every_steps"],
        save_steps=settings["checkpoint_every_steps"] or total_steps,
        save_total_limit=1,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
    )
    trainer = OrderedTrainer(
        model=model,
        args=arguments,
        train_dataset=inputs["examples"],
        data_collator=make_collator(inputs["pad_token_id"]),
        optimizers=(optimizer, schedule),
        callbacks=[FirstStep(folder / FIRST_STEP)],
    )
    trainer.order = InOrder(inputs["order"], settings["micro_batch"])
    trainer.train()
    model.save_pretrained(str(folder / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    _write(folder / "training.json", {"losses": losses, "peak_gib": measure_peak_gib(inputs["device"])})


def evaluate(folder: Path) -> None:
    """Answer all test questions of inputs.json with the adapter."""
    inputs = _read_inputs(folder)
    model = load_base(inputs, inputs["evaluation"]["bits"])
    model = PeftModel.from_pretrained(model, str(folder / "adapter")).eval()
    answers = {}
    for task, questions in inputs["questions"].items():
        started = time.perf_counter()
        scored = bool(questions[0]["choices"])
        answer = (
            {"log_probs": score(model, inputs, questions)} if scored else {"texts": generate(model, inputs, questions)}
        )
        answers[task] = {**answer, "seconds": time.perf_counter() - started}
    _write(folder / "answers.json", {"tasks": answers, "peak_gib": measure_peak_gib(inputs["device"])})


@torch.inference_mode()
def score(model: Any, inputs: dict[str, Any], questions: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return each label's log probability, end token included."""
    rows = [
        (number, question["prompt"], choice)
        for number, question in enumerate(questions)
        for choice in question["choices"]
    ]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index][1]) + len(rows[index][2]))
    sums = [0.0] * len(rows)
    for indices in _cut(by_length, inputs["evaluation"]["batch_size"]):
        batch = pad_right([[*rows[index][1], *rows[index][2]] for index in indices], inputs["pad_token_id"])
        owners, positions, targets = [], [], []
        for owner, index in enumerate(indices):
            _, prompt, choice = rows[index]
            owners += [owner] * len(choice)
            positions += range(len(prompt) - 1, len(prompt) + len(choice) - 1)
            targets += choice
        owner = torch.tensor(owners, device=model.device)
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits
        log_probs = logits[owner, torch.tensor(positions, device=model.device)].float().log_softmax(-1)  # (N, V)
        chosen = log_probs.gather(1, torch.tensor(targets, device=model.device)[:, None])[:, 0]
        totals = torch.zeros(len(indices), device=model.device).index_add_(0, owner, chosen).tolist()
        for index, total in zip(indices, totals, strict=True):
            sums[index] = total
    scores: list[list[float]] = [[] for _ in questions]
    for (number, _, _), total in zip(rows, sums, strict=True):
        scores[number].append(total)
    return scores


@torch.inference_mode()
def generate(model: Any, inputs: dict[str, Any], questions: Sequence[dict[str, Any]]) -> list[str]:
    """Return each question's greedy answer."""
    settings, pad = inputs["evaluation"], inputs["pad_token_id"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs["tokenizer"])
    by_length = sorted(range(len(questions)), key=lambda index: len(questions[index]["prompt"]))
    texts = [""] * len(questions)
    for indices in _cut(by_length, settings["batch_size"]):
        batch = pad_left([questions[index]["prompt"] for index in indices], pad)
        written = model.generate(
            **{name: tensor.to(model.device) for name, tensor in batch.items()},
            max_new_tokens=settings["max_new_tokens"],
            do_sample=False,
            eos_token_id=inputs["end_token_id"],
            pad_token_id=pad,
        )
        for index, ids in zip(indices, written[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            end = inputs["end_token_id"]
            texts[index] = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)
    return texts


def measure_peak_gib(device: str) -> float:
    """Return the peak of torch's allocations on a GPU, or of this process on a CPU, in GiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _cut(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _read_inputs(folder: Path) -> Any:
    return json.loads((folder / "inputs.json").read_text(encoding="utf-8"))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    # FinLoRA installs DeepSpeed, and accelerate imports it wherever it is: seconds that a user without FinLoRA does not spend.
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    {"train": train, "evaluate": evaluate}[sys.argv[1]](Path(sys.argv[2]))
