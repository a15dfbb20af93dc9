"""Outputs of a finished run: the adapter folder and the Result of its training. No Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finlora.card.hub_readme import write_readme
from finlora.config import RunConfig
from finlora.configfile import config_to_tree, save_config
from finlora.errors import FinloraError
from finlora.model.base import BaseModel
from finlora.model.contract import make_contract, read_contract, write_contract, write_tasks
from finlora.model.lora import Start, save_adapter
from finlora.results import Result, describe_environment, read_results
from finlora.train.run.attempts import Attempt
from finlora.train.run.progress import read_progress
from finlora.train.run.run_folder import RunFolder, TrainingSet


def export_adapter(
    config: RunConfig,
    folder: RunFolder,
    base: BaseModel,
    model: Any,
    training_set: TrainingSet,
    start: Start | None = None,
) -> None:
    """Write the adapter folder. finlora.yaml comes last and marks it complete.

    Args:
        start: what the base lacks in training, with a `lora.init` that takes a part out of it.
    """
    size = save_adapter(model, folder.adapter, start)
    save_config(config, folder.adapter / "config.yaml")
    final = read_progress(folder)[-1]
    contract = make_contract(
        base,
        config.model.base,
        config.lora,
        config.model.template,
        training_set.hashes,
        len(training_set.encoded),
        size,
        {"loss_last": final.loss, "steps": float(final.step)},
        training_set.template_date,
        training_set.card_hashes,
    )
    write_tasks(folder.adapter, training_set.cards)
    write_readme(folder.adapter, config, contract, training_set.licences, training_set.cards)
    write_contract(folder.adapter, contract)


def find_finished(folder: RunFolder) -> Result | None:
    """Return the Result of a run's training; None where the training, its adapter or its record is not complete."""
    try:
        read_contract(folder.adapter).check_files(folder.adapter)
        results = read_results(folder.results) if folder.results.is_file() else []
    except (FinloraError, OSError):
        return None
    return next((result for result in reversed(results) if result.kind == "training"), None)


def summarise_run(
    config: RunConfig,
    folder: RunFolder,
    training_set: TrainingSet,
    attempts: Sequence[Attempt],
    metrics: dict[str, Any],
    start_seconds: dict[str, float] | None = None,
) -> Result:
    """Collect the numbers of a finished run.

    Args:
        attempts: all of the run, the last one included; their times are summed.
        metrics: reported by the workers with the last checkpoint. A missing one counts as not measured.
        start_seconds: of each phase of the last attempt's start.
    """
    seconds = sum(attempt.seconds for attempt in attempts)
    records = read_progress(folder)
    weights = folder.adapter / "adapter_model.safetensors"
    on_gpu = config.train.device == "cuda"
    contract = read_contract(folder.adapter)
    return Result(
        kind="training",
        task="+".join(config.data.tasks),
        variant=variant_name(config),
        base=config.model.base,
        bits=config.model.bits,
        base_hash=contract.weights_hash,
        run=config.name,
        adapter=str(folder.adapter),
        adapter_hash=contract.files[weights.name],
        num_examples=len(training_set.encoded),
        is_partial=training_set.num_skipped > 0 or config.data.max_train_examples is not None,
        metrics={"loss_first": records[0].loss, "loss_last": records[-1].loss},
        loss_curve=[[float(record.step), record.loss] for record in records],
        wire=metrics.get("wire", []),
        tokens_per_second=sorted(record.tokens_per_second for record in records)[len(records) // 2],
        wall_seconds=seconds,
        waited_seconds=sum(attempt.waited for attempt in attempts),
        attempts=len(attempts),
        start_seconds=start_seconds or {},
        gpu_hours=seconds / 3600 * config.train.num_workers * config.train.gpus_per_worker if on_gpu else None,
        peak_memory_gib=metrics.get("memory_gib", records[-1].memory_gib),
        adapter_mib=weights.stat().st_size / 2**20,
        data_hash="+".join(training_set.hashes.values()),
        config=config_to_tree(config),
        environment=describe_environment(),
    )


def variant_name(config: RunConfig) -> str:
    """Return the name of an adapter in tables: `4bit-r4`."""
    return f"{config.model.bits}bit-r{config.lora.saved.rank}"
