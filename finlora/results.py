"""One Result a measurement, appended as a JSON line; `finlora report` reads them back.

Each line is one write and one fsync, so a crash breaks at most the last line. Reading refuses a broken line, and by
the hash that each line carries, a changed one.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from finlora.durable import append_line, read_last_line, unseal
from finlora.errors import ResultError

SEARCH_MARK = "search.yaml"
"""File that marks a search's folder, above its trials' results."""
_MAX_LINE_BYTES = 2**22
"""Bytes of the last line whose time is read; holds a config and loss curve. A longer line is ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Measurements of one evaluation or one training run. Names hold the units; GiB = 2**30 bytes; None: not measured."""

    kind: Literal["evaluation", "training"]
    task: str
    """Evaluated task, or the trained tasks joined by `+`."""
    variant: str
    """`base`, or the adapter as the tables name it: `4bit-r4`."""
    base: str
    bits: int
    """Bits of the base weights during this measurement."""
    base_hash: str | None = None
    """`fingerprint_weights` of the base. None in older results."""
    run: str | None = None
    """Name of the training run, or of the run whose adapter was evaluated; None for the base model."""
    adapter: str | None = None
    """Adapter folder, None for the base model."""
    adapter_hash: str | None = None
    """SHA-256 of the adapter's weights in hex: joins a training and its adapter's scores, even if the adapter moved."""
    method: str | None = None
    """`labels` or `generate` for evaluations."""
    num_examples: int = 0
    is_partial: bool = False
    """True when max_test_examples or skipped examples made the split smaller than the prepared one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Evaluation: accuracy, accuracy_low, accuracy_high, strict_accuracy(+_low, _high), weighted_f1(+_low, _high),
    numeric_accuracy(+_low, _high) where labels are numbers, unparsable, calibration_error where labels were scored. Training:
    loss_first, loss_last."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Confusion counts: label -> prediction -> number of test examples."""
    calibration: list[dict[str, float]] = field(default_factory=list)
    """Answers chosen among labels, binned by their probability: low, high, count, confidence, accuracy a bin."""
    labels: dict[str, Any] = field(default_factory=dict)
    """How labels were chosen: counts, temperature and estimated accuracy (`LabelFacts` of finlora/evaluate/reference.py). Empty:
    answers were generated, or the examples have different labels."""
    segments: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Scores by a task file's segments: column -> value -> the metrics above, with the number of examples as count. For Yes/No
    questions also yes_precision, yes_recall and yes_f1."""
    answers: str | None = None
    """Name of the table of its answers in the folder `answers` beside this file (finlora/evaluate/answer_table.py)."""
    answers_hash: str | None = None
    """SHA-256 of that table in hex."""
    loss_curve: list[list[float]] = field(default_factory=list)
    """Training: [step, mean loss] points."""
    wire: list[dict[str, float]] = field(default_factory=list)
    """Training: the optimiser's traffic over the run, one record a worker in rank order: rounds, bytes_sent, bytes_adam (what a
    float32 ring all-reduce at each step would send), seconds (including waits for other workers)."""
    seconds_per_example: float | None = None
    tokens_per_second: float | None = None
    wall_seconds: float | None = None
    """Working time, without the wait for GPUs and cores. Training: summed over all attempts, with start-ups."""
    waited_seconds: float | None = None
    """Waiting time for GPUs and cores that others use, summed over all attempts."""
    attempts: int | None = None
    """Training: the number of driver starts."""
    start_seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds, from the start of the command's process to its first step or answer; training: of the last attempt.
    Empty: not measured."""
    gpu_hours: float | None = None
    """wall_seconds x GPUs in hours, None on CPU."""
    peak_memory_gib: float | None = None
    """Peak device memory summed over workers; on CPU the peak resident memory of the processes."""
    adapter_mib: float | None = None
    data_hash: str | None = None
    """Hash of the prepared split."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config, which is enough to rerun the measurement."""
    environment: dict[str, str] = field(default_factory=dict)
    created: str = ""


def describe_environment() -> dict[str, str]:
    """Return versions and device of this process, for a Result. Asks torch only if it is already imported."""
    import importlib.metadata

    environment = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray"):
        try:
            environment[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            environment[package] = "absent"
    import torch

    environment["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return environment


def append_result(path: Path, result: Result) -> None:
    """Append one line to a results file, creating folder and file. Concurrent writers on one host do not interleave.

    Its time is at least that of the line before it. The newest of several measurements counts, even after a clock was set
    back.

    Raises:
        ResultError: the line could not be written, for example on a full disk.
    """
    record = dataclasses.asdict(result)
    if not record["created"]:
        before = (read_last_line(path, _MAX_LINE_BYTES) or {}).get("created")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record["created"] = max(now, before) if isinstance(before, str) else now
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        append_line(path, record, is_synced=True)
    except OSError as error:
        raise ResultError(
            f"{path}: the result could not be written ({error}); the file is unchanged. Free disk space, then run it again."
        ) from error


def list_result_files(path: Path) -> list[Path]:
    """Return a results file, or all results*.jsonl files below a folder without those of searches.

    Raises:
        ResultError: the path is missing.
    """
    if path.is_dir():
        searches = set(list_searches(path))
        return [file for file in sorted(path.rglob("results*.jsonl")) if not searches & set(file.parents)]
    if path.is_file():
        return [path]
    raise ResultError(f"{path} does not exist: give a results file, or a folder that `finlora evaluate` wrote to.")


def read_results(path: Path) -> list[Result]:
    """Read every Result of a file, or of all results*.jsonl files below a folder, in file and line order.

    Skips searches below the folder: their trials are scored on held-out training examples, not on the test split. Give a
    search's own folder to read them.

    Raises:
        ResultError: the path is missing or has no results, or a line is not a Result; names file and line.
    """
    results = [result for file in list_result_files(path) for result in _read_file(file)]
    if not results:
        raise ResultError(f"{path} holds no results: run `finlora train` or `finlora evaluate` first.")
    return results


def list_searches(path: Path) -> list[Path]:
    """Return the folders of searches below a folder, whose trials `read_results` skips."""
    return sorted({mark.parent for mark in path.rglob(SEARCH_MARK)} - {path}) if path.is_dir() else []


def _read_file(file: Path) -> list[Result]:
    results = []
    # Not splitlines: it also splits at characters such as U+2028, which JSON strings may hold unescaped.
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            results.append(Result(**unseal(json.loads(line))))
        except (ValueError, TypeError) as error:
            raise ResultError(
                f"{file} line {number} is not a result ({error}): expected one JSON object per line, as written by "
                "`finlora evaluate`. A crash cut the line short, or it was changed: remove it."
            ) from error
    return results
