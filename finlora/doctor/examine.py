"""Checks of `finlora doctor`, and the cheap ones that verbs run before they start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.cluster import connect
from finlora.config import ModelConfig, RunConfig
from finlora.doctor.checks import Finding, check_disk, check_nodes, fault, from_error, ok
from finlora.doctor.facts import NodeFacts, gather, look_at, rebuild
from finlora.doctor.inputs import check_base, check_data, check_hub
from finlora.errors import ConfigError, FinloraError, ResourceError, counted

if TYPE_CHECKING:
    from finlora.data.sets.prepared import SplitName
    from finlora.model.base_files import BaseFiles

_AT_ONCE_S = 0.3
"""Seconds in which a base that is not there is found missing."""


def examine(
    config: RunConfig | None,
    model: ModelConfig | None,
    gpus_wanted: float,
    look_further: Callable[[BaseFiles | None], list[Finding]] = lambda _base: [],
) -> list[Finding]:
    """Check this machine, the cluster of RAY_ADDRESS if it is set, and the inputs of a config.

    Args:
        config: of a run, with absolute paths; None: not given.
        model: the base; None: not given.
        gpus_wanted: total of all workers or stages.
        look_further: adds findings about users of the base; gets the resolved base, None if it has a fault.
    """
    folders = _list_folders(config, model)
    inputs = list(_list_inputs(config, model))
    nodes = [rebuild(gather(folders, inputs))]
    findings = []
    if connect.is_local():
        findings.append(_check_local())
    else:
        others, more = _ask_cluster(folders, inputs)
        nodes += others
        findings += more
    findings = [*check_nodes(nodes, gpus_wanted=gpus_wanted), *findings, *check_hub(model)]
    base = None
    if model is not None:
        more, base = check_base(model)
        findings += more
    if config is not None:
        findings += check_data(config, base)
    return findings + look_further(base)


def require_inputs(config: RunConfig, *, splits: tuple[SplitName, ...]) -> BaseFiles:
    """Check a run's inputs and output folder, before it uses Ray or a GPU.

    Args:
        config: with absolute paths.
        splits: needed of each task, such as `train`.

    Returns:
        The resolved base, for later use in this process.

    Raises:
        ConfigError: the output folder cannot be written.
        DatasetError: a prepared split is missing.
        ModelError: the base's files are not usable.
        ResourceError: the disk is full.
    """
    _require_folders(config, splits)
    return _read_base(config)


def start_inputs(config: RunConfig, *, splits: tuple[SplitName, ...]) -> Future[BaseFiles]:
    """As `require_inputs`, whose slow part, the base with its libraries, goes on in a thread, as while Ray starts.

    Raises:
        FinloraError: as `require_inputs`, for what is found at once; the future raises the rest.
    """
    _require_folders(config, splits)
    pool = ThreadPoolExecutor(1, "inputs")
    future = pool.submit(_read_base, config)
    pool.shutdown(wait=False)
    if wait([future], _AT_ONCE_S).done:
        future.result()
    return future


def _require_folders(config: RunConfig, splits: tuple[SplitName, ...]) -> None:
    from finlora.data.sets.prepared import require_split

    require_output_folder(config)
    for task in config.data.tasks:
        for split in splits:
            require_split(Path(config.data.dir), task, split)


def _read_base(config: RunConfig) -> BaseFiles:
    from finlora.model.base_files import read_base_files

    return read_base_files(config.model)


def require_output_folder(config: RunConfig) -> None:
    """Check that a run's folder can be written and its disk has space.

    Raises:
        ConfigError: the output folder cannot be written.
        ResourceError: the disk is full.
    """
    found = check_disk("this machine", look_at(Path(config.output_dir)))
    if found.level == "fault":
        kind = ConfigError if found.code == ConfigError.exit_code else ResourceError
        raise kind(f"output_dir={config.output_dir}: {found.found}: {found.advice}.")


def count_wanted(config: RunConfig) -> float:
    """Return the GPUs of a config: of training or evaluation, whichever takes more."""
    train, evaluation = config.train, config.eval
    return max(
        train.num_workers * train.gpus_per_worker if train.device == "cuda" else 0.0,
        evaluation.num_stages * evaluation.num_gpus if evaluation.device == "cuda" else 0.0,
    )


def _check_local() -> Finding:
    try:
        connect.prepare()
    except FinloraError as error:
        return from_error("Ray", error)
    return ok("Ray", "RAY_ADDRESS is not set: each command starts its own Ray on this machine")


def _ask_cluster(folders: list[str], inputs: list[str]) -> tuple[list[NodeFacts], list[Finding]]:
    address = os.environ["RAY_ADDRESS"].strip()
    try:
        connect.connect(log_to_driver=False)
    except FinloraError as error:
        return [], [from_error("Ray", error)]
    from finlora.doctor.nodes import gather_nodes  # imports Ray, which reads the connection's settings at import

    nodes, faults = gather_nodes(folders, inputs)
    if not nodes and not faults:
        faults.append(
            fault("nodes", f"the cluster at {address} has no running node", "start one: `ray start --address`")
        )
    return nodes, [ok("Ray", f"the cluster at {address} answers, {counted(len(nodes), 'node')}"), *faults]


def _list_folders(config: RunConfig | None, model: ModelConfig | None) -> list[str]:
    found = ["~/finlora"] if config is None else [config.output_dir, config.data.dir]
    if model is not None and model.cache:
        found.append(model.cache)
    if model is not None and not Path(model.base).expanduser().is_dir():
        found.append(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    return found


def _list_inputs(config: RunConfig | None, model: ModelConfig | None) -> Iterator[str]:
    if model is not None and Path(model.base).is_absolute():
        yield model.base
    if config is not None:
        yield config.data.dir
