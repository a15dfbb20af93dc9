"""Export of an adapter as one requantised model for vLLM, checked against the form of its training before it is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from finlora.config import RunConfig
from finlora.data.encode import end_token_id
from finlora.durable import follow_umask, scratch_folder
from finlora.engine.request import normalise_choices
from finlora.errors import ModelError
from finlora.evaluate.parity_report import Parity, write_parity
from finlora.exchange.compressed import PackedBits, requantise, require_library
from finlora.exchange.parity import OnProgress, answer_works, prepare_rows
from finlora.machine.lean_imports import lean_imports
from finlora.model.base import check_device
from finlora.model.contract import MERGED_FILE
from finlora.model.merge import Onto, export_merged
from finlora.model.source import fingerprint_weights
from finlora.report.tables import format_share
from finlora.yamltext import read_yaml

_MAX_RECORD_BYTES = 2**20
_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def export_vllm(
    config: RunConfig,
    adapter: Path,
    output: Path,
    *,
    bits: PackedBits,
    limit: int | None,
    min_agreement: float,
    on_progress: OnProgress,
) -> list[Parity]:
    """Merge, requantise, load the folder with transformers, compare its answers, and keep it if they agree.

    The update is merged onto the weights of the training, read back to 16 bit, and then rounded to compressed-tensors' levels.

    Args:
        config: with absolute paths; base, tasks and device are its.
        output: new folder.
        limit: test rows of each task, chosen by config.seed; None: all.
        min_agreement: least share of rows with the answer of the form of the training.

    Raises:
        AdapterError: the bits of its training are unknown, or it does not fit the base.
        ModelError: `output` is not empty, or the answers agree in fewer rows; nothing is kept then.
    """
    require_library()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output} exists and is not empty: give another folder for the export, or remove it.")
    device = torch.device("cuda:0" if config.eval.device == "cuda" else "cpu")
    check_device(device)
    rows = prepare_rows(config, adapter, limit)
    onto: Onto = "base" if rows.contract.bits == 16 else "dequantised"
    trained = rows.answer_as_trained(adapter, on_progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output.parent, f".{output.name}-") as staging:
        merged, packed = staging / "merged", staging / "packed"
        packed.mkdir()
        export_merged(rows.config.model, adapter, merged, device, allow_other_bits=False, onto=onto)
        on_progress("merging", 1, 1)
        form = f"exported for vLLM, {requantise(merged, packed, bits)}"
        on_progress("rounding", 1, 1)
        with _load(packed, device, _TYPES[rows.config.model.compute_dtype]) as model:
            engine = _PlainEngine(
                model, end_token_id(rows.files.tokenizer, rows.config.model.template), rows.files.tokenizer
            )
            answers = answer_works(engine, rows.works, rows.config, form, on_progress)
        shards = {path.name: path for path in packed.glob("*.safetensors")}
        written = fingerprint_weights(dataclasses.replace(rows.files.source, shards=shards))
        found = rows.compare(form, None, written, trained, answers)
        if poor := [row for row in found if row.agreement < min_agreement]:
            share = format_share(poor[0].agreement, *poor[0].interval)
            raise ModelError(
                f"at {bits} bit the export gives the answer of the training in {share} % of {poor[0].num_rows:,} rows of "
                f"{poor[0].task}, and {100 * min_agreement:g} % are asked for: nothing was kept. "
                + ("Export it with --bits 8, or lower" if bits == 4 else "Lower")
                + " --min-agreement if that is enough."
            )
        record = read_yaml(packed / MERGED_FILE, _MAX_RECORD_BYTES)
        record |= {"exported": form, "format": "compressed-tensors, pack-quantized"}
        (packed / MERGED_FILE).write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")
        write_parity(packed, adapter, found)
        follow_umask(packed)
        packed.replace(output)
    write_parity(adapter, adapter, found)
    return found


@contextlib.contextmanager
def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    """Yield the model that transformers reads from a folder: no code of FinLoRA computes in it."""
    with lean_imports():
        from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():  # both libraries draw progress bars there
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True).to(device).eval()
        model(torch.zeros(1, 1, dtype=torch.long, device=device))  # the first forward pass unpacks
    try:
        yield model
    finally:
        del model
        gc.collect()


class _PlainEngine:
    """`Engine` over a model of transformers, a prompt at a time: slow, and independent of FinLoRA's own.

    Args:
        end: token that ends an answer.
    """

    def __init__(self, model: Any, end: int, tokenizer: Any) -> None:
        self._model, self._end, self._tokenizer = model, end, tokenizer

    def score_choices(
        self,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[Sequence[int]]],
        on_done: Callable[[int], None],
    ) -> list[list[float]]:
        found = []
        for prompt, own in zip(prompts, choices, strict=True):
            found.append(normalise_choices(self._score(list(prompt), [list(choice) for choice in own])))
            on_done(len(found))
        return found

    @torch.inference_mode()
    def _score(self, prompt: list[int], choices: list[list[int]]) -> list[float]:
        """Return the log-probability of each choice after a prompt: the sum over its tokens."""
        longest = max(map(len, choices))
        ids = torch.tensor([prompt + choice + [self._end] * (longest - len(choice)) for choice in choices])
        # Padding stands behind the tokens that count, which causal attention does not let see it.
        output = self._model(ids.to(self._model.device), logits_to_keep=longest + 1)
        logits = output.logits[:, :-1].float().log_softmax(-1)
        picked = logits.gather(2, ids[:, len(prompt) :, None].to(logits.device))[..., 0].cpu()
        return [float(row[: len(choice)].sum()) for row, choice in zip(picked, choices, strict=True)]

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, on_done: Callable[[int], None]
    ) -> list[str]:
        texts: list[str] = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=self._model.device)
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self._end,
                pad_token_id=self._end,
            )
            texts.append(self._tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
            on_done(len(texts))
        return texts
