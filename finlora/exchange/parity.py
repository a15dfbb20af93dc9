"""Parity run of an adapter: its test rows, answered by the form of its training and by each form in which it is served."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from finlora.config import Bits, RunConfig
from finlora.data.sets.prepared import PreparedSplit, read_prepared
from finlora.engine.interface import Engine
from finlora.engine.request import ADAPTER
from finlora.errors import AdapterError, ConfigError
from finlora.evaluate.evaluation import Answers, Work, answer_examples, encode_split
from finlora.evaluate.metrics import judge_answers
from finlora.evaluate.parity_report import Parity, read_merged_record, write_parity
from finlora.inference.batch import BatchEngine
from finlora.inference.open_base import count_rows, open_engine
from finlora.model.adapter_files import ADAPTER_WEIGHTS
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.model.contract import Contract, read_contract, require_same_task
from finlora.precision import resolve_evaluation

OnProgress = Callable[[str, int, int], None]
"""Called with the form that answers, the rows done and their total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Test rows of an adapter, encoded for its base, and the answers of the form of its training."""

    config: RunConfig
    contract: Contract
    files: BaseFiles
    splits: tuple[tuple[PreparedSplit, int], ...]
    """Test split of each task, cut to the rows that are asked, and the number of all its rows."""
    works: tuple[Work, ...]

    def answer_as_trained(self, adapter: Path, on_progress: OnProgress) -> list[Answers]:
        """Return the answers of the base at the bits of the training, with the adapter beside it."""
        bits = cast(Bits, self.contract.bits)
        return _answer(self.config, self.files, adapter, bits, self.works, "the form of the training", on_progress)

    def compare(
        self, form: str, bits: Bits | None, base_hash: str, trained: Sequence[Answers], answers: Sequence[Answers]
    ) -> list[Parity]:
        """Return a row a task for the answers of one form."""
        facts = {"form": form, "bits": bits, "trained_bits": self.contract.bits, "base_hash": base_hash}
        facts |= {"compute_dtype": self.config.model.compute_dtype, "device": self.config.eval.device}
        facts["seed"] = self.config.seed
        return [
            _compare(work, *split, *pair, facts)
            for work, split, pair in zip(self.works, self.splits, zip(trained, answers, strict=True), strict=True)
        ]


def prepare_rows(config: RunConfig, adapter: Path, limit: int | None) -> Rows:
    """Check an adapter against its base and encode its test rows.

    Args:
        config: with absolute paths; base, tasks, device and stages are its.
        limit: rows of each task, chosen by config.seed; None: the whole test split.

    Raises:
        AdapterError: the bits of its training are unknown, or it does not fit the base.
        DatasetError: a test split is missing, or an example is too long.
    """
    config = resolve_evaluation(config)
    contract = read_contract(adapter)
    if contract.bits is None:
        raise AdapterError(
            f"the bits of the base in the training of {adapter} are unknown, so there is no form to compare with: adopt it again "
            "with --bits, if you know them."
        )
    files = read_base_files(config.model)
    date = files.check_adapter(adapter, contract)
    splits = tuple(_choose_rows(config, adapter, contract, task, limit) for task in config.data.tasks)
    if limit is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_test_examples=None))
    works = tuple(encode_split(config, files.tokenizer, split, split.task, date) for split, _ in splits)
    return Rows(config=config, contract=contract, files=files, splits=splits, works=works)


def measure_parity(
    config: RunConfig,
    adapter: Path,
    *,
    bits: Sequence[Bits],
    merged: Sequence[Path],
    limit: int | None,
    on_progress: OnProgress,
) -> list[Parity]:
    """Answer the test rows by each form, compare, and write parity.json beside the adapter and into each merged folder.

    Args:
        config, limit: as in `prepare_rows`.
        bits: of the base, with the adapter beside it.
        merged: folders of models that `finlora merge` made of this adapter.

    Raises:
        AdapterError: as in `prepare_rows`, or a merged model is of another adapter.
        DatasetError: as in `prepare_rows`.
        ResourceError: the device has too little room.
    """
    rows = prepare_rows(config, adapter, limit)
    kinds = {folder: _read_kind(folder, rows.contract) for folder in merged}
    served = {folder: _open_merged(rows, folder) for folder in merged}  # refused before anything is loaded
    trained = rows.answer_as_trained(adapter, on_progress)
    found: list[Parity] = []
    for own in bits:
        answers = _answer(rows.config, rows.files, adapter, own, rows.works, f"{own} bit", on_progress)
        found += rows.compare(f"{own} bit", own, rows.files.weights_hash, trained, answers)
        write_parity(adapter, adapter, found)
    for folder, (settings, files) in served.items():
        answers = _answer(settings, files, None, 16, rows.works, kinds[folder], on_progress)
        of_model = rows.compare(kinds[folder], None, files.weights_hash, trained, answers)
        found += of_model
        write_parity(adapter, adapter, found)
        write_parity(folder, adapter, of_model)
    return found


def _choose_rows(
    config: RunConfig, adapter: Path, contract: Contract, task: str, limit: int | None
) -> tuple[PreparedSplit, int]:
    """Return the test split, cut to the rows that are asked, and the number of all its rows."""
    split = read_prepared(Path(config.data.dir), task, "test")
    require_same_task(adapter, contract, task, split.card_hash)
    total = len(split.examples)
    if limit is None or limit >= total:
        return split, total
    chosen = sorted(random.Random(config.seed).sample(range(total), limit))
    return dataclasses.replace(split, examples=tuple(split.examples[index] for index in chosen)), total


def _read_kind(folder: Path, contract: Contract) -> str:
    """Return what a merged model was merged onto.

    Raises:
        AdapterError: it was not merged by FinLoRA, or from another adapter.
    """
    try:
        merged = read_merged_record(folder)
        if merged.adapter_hash is None:
            raise ValueError("it names no adapter")
    except (FileNotFoundError, ValueError) as error:
        raise AdapterError(
            f"{folder} is no model that `finlora merge` wrote ({error}): give the folder of one."
        ) from error
    if merged.adapter_hash != contract.files.get(ADAPTER_WEIGHTS):
        raise AdapterError(f"{folder} was merged from another adapter: merge this one, or give that one.")
    return "merged onto dequantised weights" if merged.onto == "dequantised" else "merged onto the 16-bit base"


def _open_merged(rows: Rows, folder: Path) -> tuple[RunConfig, BaseFiles]:
    """Return the settings and files of a merged model, whose prompts must be those of the adapter."""
    config = rows.config
    model = dataclasses.replace(config.model, base=str(folder), revision=None, tokenizer=None, template_date=None)
    settings = dataclasses.replace(config, model=model)
    files = read_base_files(model)
    for (split, _), work in zip(rows.splits, rows.works, strict=True):
        own = encode_split(settings, files.tokenizer, split, split.task, files.template_date)
        if [item.prompt_ids for item in own.encoded] != [item.prompt_ids for item in work.encoded]:
            raise AdapterError(
                f"{folder} makes other prompts than the adapter's base: its tokenizer was changed. Merge again."
            )
    return settings, files


def _answer(
    config: RunConfig,
    files: BaseFiles,
    adapter: Path | None,
    bits: Bits,
    works: Sequence[Work],
    form: str,
    on_progress: OnProgress,
) -> list[Answers]:
    """Answer all rows by one form, which is freed again."""
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, bits=bits))
    sizes = sorted((size for work in works for size in work.sizes), reverse=True)
    with open_engine(
        config, files, adapter, config.eval.num_stages, count_rows(sizes, config.eval.batch_size), sizes[0]
    ) as opened:
        engine = BatchEngine(opened.core, ADAPTER if adapter else None, opened.renew)
        answers = answer_works(engine, works, config, form, on_progress)
    del engine, opened
    gc.collect()  # before the next form needs the memory
    return answers


def answer_works(
    engine: Engine, works: Sequence[Work], config: RunConfig, form: str, on_progress: OnProgress
) -> list[Answers]:
    """Answer all rows by an engine, with one progress over all tasks."""
    total, done, answers = sum(len(work.examples) for work in works), 0, []
    for work in works:

        def show(own: int, before: int = done) -> None:
            on_progress(form, before + own, total)

        answers.append(answer_examples(engine, work, config, show))
        done += len(work.examples)
    return answers


def _compare(
    work: Work, split: PreparedSplit, total: int, trained: Answers, served: Answers, facts: Mapping[str, Any]
) -> Parity:
    """Compare two forms' answers to the same rows.

    Args:
        total: rows of the whole test split.
        facts: fields that are equal for all tasks.
    """
    if not work.examples:
        raise ConfigError(f"no test row of {work.task} was asked: raise model.max_seq_len.")
    pairs = [
        (trained.probabilities[index], served.probabilities[index])
        for index in range(len(work.examples))
        if index in trained.probabilities
    ]
    differences = [max(abs(one - other) for one, other in zip(*pair, strict=True)) for pair in pairs]

    def share_right(texts: Sequence[str]) -> float:
        return sum(judge_answers(texts, work.examples, is_exact=split.card is not None)) / len(work.examples)

    return Parity(
        **facts,
        task=work.task,
        num_rows=len(work.examples),
        is_partial=len(work.examples) < total,
        data_hash=split.hash,
        num_equal=sum(one == other for one, other in zip(trained.texts, served.texts, strict=True)),
        mean_difference=sum(differences) / len(differences) if differences else None,
        max_difference=max(differences) if differences else None,
        accuracy=share_right(served.texts),
        trained_accuracy=share_right(trained.texts),
    )
