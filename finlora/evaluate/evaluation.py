"""Evaluation of a base or an adapter on prepared test splits, in one process or over pipeline stages."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from finlora.cluster.lease import seconds_waited
from finlora.config import RunConfig
from finlora.configfile import config_to_tree, load_config
from finlora.data.encode import Encoded, encode_choices, encode_examples
from finlora.data.example import Example
from finlora.data.sets.prepared import PreparedSplit, read_prepared
from finlora.data.taskfile.load import read_card
from finlora.durable import hash_file
from finlora.engine.interface import Engine
from finlora.engine.meter import Reading
from finlora.engine.request import ADAPTER
from finlora.errors import ConfigError
from finlora.evaluate.answer_table import AnswerTable, make_answer_table, write_answer_table
from finlora.evaluate.calibration import bin_confidences, calibration_error
from finlora.evaluate.metrics import NUMERIC_TOLERANCE, judge_answers, score_answers, score_segments
from finlora.evaluate.reference import measure_labels
from finlora.inference.batch import BatchEngine
from finlora.inference.open_base import count_rows, open_engine
from finlora.machine.start_clock import StartClock, name_first
from finlora.model.adapter_files import ADAPTER_WEIGHTS
from finlora.model.base import check_device
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.model.contract import read_contract, require_same_task
from finlora.precision import describe_type, resolve_evaluation
from finlora.results import Result, describe_environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called with the task, the examples done and their total."""
OnReading = Callable[[Reading], None]


def ignore_reading(_reading: Reading) -> None:
    """Default for on_reading: does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Test split, encoded for the engine."""

    task: str
    split: PreparedSplit
    examples: Sequence[Example]
    """Examples that fit the model."""
    encoded: Sequence[Encoded]
    choice_ids: Mapping[str, tuple[int, ...]]
    """Allowed answer -> its tokens, end token included."""
    sizes: Sequence[int]
    """KV cache rows that each example can need."""


def run_evaluation(
    config: RunConfig,
    adapter: Path | None,
    on_progress: OnProgress,
    on_reading: OnReading = ignore_reading,
    base: BaseFiles | None = None,
    answers: Path | None = None,
    start: StartClock | None = None,
) -> list[Result]:
    """Evaluate every task of the config, in this process or over eval.num_stages Ray actors.

    Args:
        config: with absolute paths. Test splits, adapter and lengths are checked before the model is loaded.
        adapter: adapter folder; None: the base alone.
        on_reading: gets the counters of the stages at the end; after the restart of a stage, those since then.
        base: files of the config's base, if this process has found and checked them already. None: it does so here.
        answers: folder for a table of the answers a task (answer_table.py). None: they are not kept.
        start: of the command. None: it starts here.

    Raises:
        DatasetError: a test split is missing, damaged, or an example is too long.
        AdapterError: the adapter is incomplete or was made for another base, tokenizer or template.
        ResourceError: the device or the cluster has too little room.
        StageLostError: stages crashed repeatedly. After one crash the stages restart and their questions are asked again.
    """
    start = start or StartClock("data")
    config, waited = resolve_evaluation(config), seconds_waited()
    device = torch.device("cuda:0" if config.eval.device == "cuda" else "cpu")
    if config.eval.num_stages == 1:
        check_device(device)
    base = base or read_base_files(config.model)
    tokenizer = base.tokenizer
    contract = read_contract(adapter) if adapter else None
    date = base.check_adapter(adapter, contract) if adapter and contract else base.template_date
    splits = _read_splits(config, adapter)
    works = [
        encode_split(config, tokenizer, split, task, date)
        for split, task in zip(splits, config.data.tasks, strict=True)
    ]
    sizes = sorted((size for work in works for size in work.sizes), reverse=True)
    # The longest requests at once, and one more for the prefix that they share.
    wanted = count_rows(sizes, config.eval.batch_size)
    start.enter("base")

    def show(task: str, done: int, total: int) -> None:
        start.end()
        on_progress(task, done, total)

    with open_engine(config, base, adapter, config.eval.num_stages, wanted, sizes[0]) as opened:
        start.enter(name_first("first answers", config.eval.device))
        engine = BatchEngine(opened.core, ADAPTER if adapter else None, opened.renew)
        results = []
        for work in works:
            result, table = _evaluate_task(config, engine, work, show)
            result = dataclasses.replace(
                result,
                variant=contract.variant if contract else "base",
                base_hash=base.weights_hash,
                run=name_run(adapter) if adapter else None,
                adapter=str(adapter) if adapter else None,
                adapter_hash=hash_file(adapter / ADAPTER_WEIGHTS) if adapter else None,
                adapter_mib=contract.adapter_mib if contract else None,
                peak_memory_gib=engine.core.executor.peak_memory_gib(),
                waited_seconds=seconds_waited() - waited,
                start_seconds=start.seconds,
            )
            results.append(_keep_answers(result, table, answers) if answers else result)
        on_reading(engine.core.meter.read())
        return results


def _keep_answers(result: Result, table: AnswerTable, folder: Path) -> Result:
    """Write a task's answers, and return its Result with the file's name and hash. A full disk costs them, not the scores."""
    whose = (result.adapter_hash or "base")[:12]
    parts = (result.task, whose, f"{result.bits}bit", result.method, (result.data_hash or "")[:12], result.num_examples)
    path = folder / f"{'-'.join(map(str, parts))}.parquet"
    try:
        digest = write_answer_table(table, path)
    except OSError as error:
        _logger.warning("%s: the answers could not be written (%s). Their scores are kept.", path, error)
        return result
    return dataclasses.replace(result, answers=path.name, answers_hash=digest)


def name_run(adapter: Path) -> str:
    """Return the name of the run that trained an adapter, from the config in its folder, even if that was copied."""
    try:
        return load_config(adapter / "config.yaml").name
    except ConfigError:  # of another version of FinLoRA, or missing
        return adapter.parent.name if adapter.name == "adapter" else adapter.name


def check_evaluation(config: RunConfig, base: BaseFiles, adapter: Path | None) -> str:
    """Check that test splits and adapter exist and fit the base, before any GPU is taken; returns the plan as one sentence.

    Raises:
        DatasetError: a test split is missing or damaged.
        AdapterError: the adapter is incomplete or was made for another base, tokenizer or template.
    """
    splits = _read_splits(config, adapter)
    counts = [f"{split.task} {len(split.examples):,}" for split in splits]
    subject, date, unknown = "the base model", base.template_date, ""
    if adapter is not None:
        contract = read_contract(adapter)
        subject, date = f"adapter {contract.variant} of {adapter}", base.check_adapter(adapter, contract)
        unknown = f". {said}" if (said := contract.describe_unknown()) else ""
    today = f"; date in the chat template: {date}" if date else ""
    limit = f", the first {config.data.max_test_examples} of each" if config.data.max_test_examples else ""
    return (
        f"Evaluating {subject} on {config.model.base} at {config.eval.bits or config.model.bits} bit "
        f"({config.eval.device}, {describe_type(config.model, config.eval.device)}): test examples "
        f"{', '.join(counts)}{limit}{today}{unknown}"
    )


def _read_splits(config: RunConfig, adapter: Path | None) -> list[PreparedSplit]:
    """Return the test split of each task, each asking what the adapter was trained on."""
    splits = [read_prepared(Path(config.data.dir), task, "test") for task in config.data.tasks]
    if adapter is not None:
        contract = read_contract(adapter)
        for split in splits:
            require_same_task(adapter, contract, split.task, split.card_hash)
    return splits


class Answers(NamedTuple):
    """Answers of the engine, in the order of the examples."""

    texts: list[str]
    method: str
    """`labels`, `generate`, or both for a mixed set."""
    confidences: dict[int, float]
    """Index of an example with label scoring -> probability of the chosen label."""
    probabilities: dict[int, Sequence[float]]
    """Index of an example with label scoring -> probability of each of its choices."""


def answer_examples(engine: Engine, work: Work, config: RunConfig, on_progress: Callable[[int], None]) -> Answers:
    """Get the engine's answer to each example, by label scoring or generation."""
    examples = work.examples
    scored = [index for index, item in enumerate(examples) if _is_scored(item, config)]
    generated = sorted(set(range(len(examples))) - set(scored))
    answers = [""] * len(examples)
    confidences: dict[int, float] = {}
    probabilities: dict[int, Sequence[float]] = {}
    prompts = [item.prompt_ids for item in work.encoded]
    if scored:
        own = [[work.choice_ids[choice] for choice in examples[index].choices] for index in scored]
        scores = engine.score_choices([prompts[index] for index in scored], own, on_progress)
        for index, row in zip(scored, scores, strict=True):
            chosen = max(range(len(row)), key=row.__getitem__)
            answers[index], confidences[index] = examples[index].choices[chosen], row[chosen]
            probabilities[index] = row
    if generated:
        num_scored = len(scored)
        texts = engine.generate(
            [prompts[index] for index in generated],
            config.eval.max_new_tokens,
            lambda done: on_progress(num_scored + done),
        )
        for index, text in zip(generated, texts, strict=True):
            answers[index] = text
    used = [name for name, group in (("labels", scored), ("generate", generated)) if group]
    return Answers(answers, "+".join(used), confidences, probabilities)


def encode_split(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, split: PreparedSplit, task: str, date: str | None = None
) -> Work:
    """Encode a test split.

    Args:
        date: for the chat template, as in `encode_prompt`.

    Raises:
        DatasetError: an example is too long, unless data.too_long skips it.
    """
    limit, template = config.data.max_test_examples, config.model.template
    examples = list(split.examples[:limit])
    encoded, kept = encode_examples(
        examples,
        tokenizer,
        template=template,
        max_seq_len=config.model.max_seq_len,
        too_long=config.data.too_long,
        reserve=[0 if _is_scored(item, config) else config.eval.max_new_tokens for item in examples],
        date=date,
    )
    examples = [examples[index] for index in kept]
    choices = sorted({choice for item in examples if _is_scored(item, config) for choice in item.choices})
    choice_ids = dict(zip(choices, encode_choices(choices, tokenizer, template), strict=True))
    rooms = [
        sum(len(choice_ids[choice]) for choice in item.choices)
        if _is_scored(item, config)
        else config.eval.max_new_tokens
        for item in examples
    ]
    sizes = [len(item.prompt_ids) + room for item, room in zip(encoded, rooms, strict=True)]
    return Work(task=task, split=split, examples=examples, encoded=encoded, choice_ids=choice_ids, sizes=sizes)


def _evaluate_task(
    config: RunConfig, engine: BatchEngine, work: Work, on_progress: OnProgress
) -> tuple[Result, AnswerTable]:
    examples, split = work.examples, work.split
    started = time.perf_counter()
    answers, method, confidences, probabilities = answer_examples(
        engine, work, config, lambda done: on_progress(work.task, done, len(examples))
    )
    seconds = time.perf_counter() - started
    own = read_card(split.card) if split.card else None
    tolerance = NUMERIC_TOLERANCE if own is None else Decimal(str(own.number.tolerance))
    scores = score_answers(answers, examples, seed=config.seed, tolerance=tolerance, is_exact=own is not None)
    names = own.segment_names[: len(examples[0].segments)] if own else ()
    table = make_answer_table(
        answers, examples, judge_answers(answers, examples, is_exact=own is not None), confidences
    )
    is_right = [answers[index] == examples[index].answer for index in confidences]
    calibration = bin_confidences(list(confidences.values()), is_right)
    error = {"calibration_error": calibration_error(calibration)} if calibration else {}
    num_tokens = sum(len(item.prompt_ids) for item in work.encoded)
    result = Result(
        kind="evaluation",
        task=work.task,
        variant="base",
        base=config.model.base,
        bits=config.eval.bits or config.model.bits,
        method=method,
        num_examples=len(examples),
        is_partial=len(examples) < len(split.examples),
        metrics=scores.metrics | error,
        counts=scores.confusion,
        calibration=calibration,
        labels=_measure_labels(examples, probabilities),
        segments=score_segments(answers, examples, names, seed=config.seed, tolerance=tolerance),
        seconds_per_example=seconds / len(examples),
        tokens_per_second=num_tokens / seconds,
        wall_seconds=seconds,
        gpu_hours=count_gpu_hours(config, seconds),
        data_hash=split.hash,
        config=config_to_tree(config),
        environment=describe_environment(),
    )
    return result, table


def _measure_labels(examples: Sequence[Example], probabilities: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Return the facts of the labels for the Result; none where examples have different choices, as in a mix of tasks."""
    choices = {examples[index].choices for index in probabilities}
    if len(choices) != 1:
        return {}
    truths = [examples[index].answer for index in probabilities]
    return dataclasses.asdict(measure_labels(choices.pop(), list(probabilities.values()), truths))


def count_gpu_hours(config: RunConfig, seconds: float) -> float | None:
    """Return the GPUs that an evaluation holds times hours; None on CPU. Stages that share a GPU hold a part of it each."""
    if config.eval.device != "cuda":
        return None
    return seconds / 3600 * config.eval.num_stages * config.eval.num_gpus


def _is_scored(item: Example, config: RunConfig) -> bool:
    """Return whether the answer is chosen among the example's labels. Free text is always generated."""
    return bool(item.choices) and config.eval.method == "labels"
