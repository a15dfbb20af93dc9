"""Damaged files, truncated or with a flipped bit: the artefact must load as written, or be refused with an error of ours.

Without Ray: artefacts are loaded by the code that training, evaluation and serving use.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finlora.config import LoraConfig, RunConfig
from finlora.configfile import load_config
from finlora.errors import FinloraError
from tests.chaos.record import Injection, plain

CPU = torch.device("cpu")
RUN_HASH = "0123456789abcdef"


@dataclass(frozen=True)
class Artefact:
    """Files on disk that the product reads back."""

    name: str
    files: Callable[[], list[Path]]
    load: Callable[[], Any]
    """Returns a value to compare. Raises FinloraError on a refusal."""
    may_lack: bool = False
    """Whether a damaged record may be skipped, as a line of the progress log is."""


@dataclass(frozen=True)
class World:
    """A folder with one artefact of each kind."""

    folder: Path
    config: RunConfig

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def make_world(folder: Path) -> World:
    """Make a tiny base, a prepared set, an adapter, a checkpoint, a quantised base and records below `folder`."""
    from finlora.data.pretraining.generated_texts import pretraining_texts
    from finlora.data.sets.prepare import prepare_task
    from finlora.model.pretrain import PretrainConfig, pretrain_base

    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_kv_heads": 2}
    settings = PretrainConfig(**shape, num_heads=4, context_length=64, batch_size=4, num_steps=5)
    pretrain_base(pretraining_texts(1, 200), settings, folder / "base", CPU, lambda _step, _loss: None)
    prepare_task("synthetic_sentiment", None, folder / "data", None, "all", False, False)
    config = load_config(
        None,
        [
            *(
                f"model.base={folder / 'base'}",
                f"data.dir={folder / 'data'}",
                f"output_dir={folder / 'runs'}",
                "name=run",
            ),
            *(
                "model.bits=16",
                "model.compute_dtype=float32",
                "train.precision=fp32",
                "data.tasks=[synthetic_sentiment]",
            ),
            *("train.device=cpu", "train.num_workers=1", "train.global_batch_size=4", "data.max_train_examples=64"),
            *("train.epochs=50", "train.max_steps=24", "train.checkpoint_every_steps=3", "train.log_every_steps=1"),
        ],
    )
    world = World(folder, config)
    write_adapter(world, 1)
    write_checkpoint(folder / "checkpoint", 1)
    write_records(world, 1)
    load_cached(world)
    return world


def write_adapter(world: World, value: int) -> None:
    """Write an adapter with all LoRA weights `value`, as training writes it."""
    from finlora.configfile import save_config
    from finlora.model.base import load_base
    from finlora.model.contract import make_contract, write_contract
    from finlora.model.lora import attach_lora, save_adapter, trainable_parameters

    base = load_base(world.config.model, 16, CPU, 0)
    net = attach_lora(base.model, LoraConfig(), world.config.model.base, 1)
    for parameter in trainable_parameters(net).values():
        parameter.data.fill_(value)
    size = save_adapter(net, world.adapter)
    save_config(world.config, world.adapter / "config.yaml")
    metrics = {"loss_last": float(value)}
    write_contract(world.adapter, make_contract(base, "base", LoraConfig(), "raw", {"fpb": "x"}, 5, size, metrics))


def load_adapter_as_served(world: World) -> Any:
    """Check an adapter against its base and read it, as the server does."""
    from finlora.model.base_files import read_base_files
    from finlora.model.contract import read_contract
    from finlora.stage.adapter_weights import read_adapter

    base = read_base_files(world.config.model)
    contract = read_contract(world.adapter)
    base.check_adapter(world.adapter, contract)
    found = read_adapter(world.adapter, base.shape, range(2), torch.float32, CPU, None)
    values = sorted(
        (key, update.scale, update.down.sum().item(), update.up.sum().item())
        for key, updates in found.items()
        for update in updates
    )
    return dataclasses.asdict(contract), values


def load_base_with_adapter(world: World) -> Any:
    """Load the base model of an adapter, as evaluation does."""
    from finlora.model.base import load_base
    from finlora.model.contract import read_contract

    base = load_base(world.config.model, 16, CPU, 0)
    read_contract(world.adapter).check(world.adapter, base, "raw")
    return [tensor.double().sum().item() for tensor in base.model.state_dict().values()]


def load_cached(world: World) -> Any:
    """Load the base model at 4 bit from the cache of quantised bases."""
    from finlora.model.base import load_base, quiet_bitsandbytes

    model = dataclasses.replace(world.config.model, cache=str(world.folder / "cache"))
    with quiet_bitsandbytes():
        base = load_base(model, 4, CPU, 0)
    return [tensor.double().sum().item() for tensor in base.model.state_dict().values()]


def write_checkpoint(folder: Path, step: int) -> None:
    """Write a checkpoint of two workers, with the step as weight value."""
    from finlora.optim.traffic import Wire
    from finlora.train.run.checkpoint import CheckpointInfo, save_checkpoint

    parameters = {name: torch.nn.Parameter(torch.full((64, 64), float(step))) for name in ("a.lora_A", "a.lora_B")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    sum(parameter.sum() for parameter in parameters.values()).backward()
    optimizer.step()
    info = CheckpointInfo(step=step, world_size=2, run_hash=RUN_HASH)
    for worker in range(2):
        save_checkpoint(folder, worker, info, parameters, optimizer.state_dict(), Wire(rounds=step))


def load_checkpoint_as_resumed(folder: Path) -> Any:
    from finlora.train.run.checkpoint import load_checkpoint, read_info

    info = read_info(folder, RUN_HASH, 2)
    parameters = {name: torch.nn.Parameter(torch.zeros(64, 64)) for name in ("a.lora_A", "a.lora_B")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    wires = [load_checkpoint(folder, worker, parameters, optimizer) for worker in range(2)]
    return info, wires, [parameter.sum().item() for parameter in parameters.values()], str(optimizer.state_dict())


def write_records(world: World, value: int) -> None:
    """Write a run's config, progress and results, and the record of a trial."""
    from finlora.results import Result, append_result
    from finlora.train.run.progress import append_progress
    from finlora.train.run.run_folder import open_run
    from finlora.train.search.search_folder import SearchFolder, TrialRecord, write_record
    from finlora.train.search.space import Trial
    from finlora.train.steps.loop import Progress

    run = open_run(world.config)
    names = ("tokens_per_second", "examples_per_second", "memory_gib", "seconds_left")
    for step in range(1, 5):
        numbers = dict.fromkeys(names, 1.5 * value)
        append_progress(
            run, Progress(step=step, total_steps=4, epoch=0.5, loss=1 / step, learning_rate=1e-4, **numbers)
        )
    for task in ("fpb", "ner"):
        append_result(
            run.results,
            Result(kind="evaluation", task=task, variant="base", base="demo", bits=8, metrics={"accuracy": value / 3}),
        )
    trial = Trial(name="000", rank=4, bits=4, learning_rate=1e-4, alpha=32.0, target_modules=("q_proj",))
    record = TrialRecord(
        trial=trial, state="finished", step=4, total_steps=4, held_out_loss=0.5 * value, scores={"a": 0.5}
    )
    write_record(SearchFolder(world.folder / "search"), record)


def load_run_config(world: World) -> Any:
    """Open the run as `finlora train` does, which refuses changed settings."""
    from finlora.train.run.run_folder import open_run

    return str(open_run(world.config))


def load_trial(world: World) -> Any:
    from finlora.train.search.search_folder import SearchFolder, read_record
    from finlora.train.search.space import Trial

    trial = Trial(name="000", rank=4, bits=4, learning_rate=1e-4, alpha=32.0, target_modules=("q_proj",))
    return read_record(SearchFolder(world.folder / "search"), trial)


def artefacts_of(world: World) -> list[Artefact]:
    from finlora.data.sets.prepared import read_prepared
    from finlora.results import read_results
    from finlora.train.run.progress import read_progress
    from finlora.train.run.run_folder import RunFolder

    run = RunFolder(world.folder / "runs" / "run")
    data, adapter, cache = world.folder / "data", world.adapter, world.folder / "cache"
    return [
        Artefact(
            "base, safetensors",
            lambda: [world.folder / "base" / "model.safetensors"],
            lambda: load_base_with_adapter(world),
        ),
        Artefact(
            "quantised base, safetensors", lambda: sorted(cache.glob("*/*.safetensors")), lambda: load_cached(world)
        ),
        Artefact(
            "adapter, safetensors",
            lambda: [adapter / "adapter_model.safetensors"],
            lambda: load_adapter_as_served(world),
        ),
        Artefact(
            "adapter, YAML and JSON",
            lambda: [adapter / "finlora.yaml", adapter / "adapter_config.json", adapter / "config.yaml"],
            lambda: load_adapter_as_served(world),
        ),
        Artefact(
            "checkpoint",
            lambda: sorted((world.folder / "checkpoint").iterdir()),
            lambda: load_checkpoint_as_resumed(world.folder / "checkpoint"),
        ),
        Artefact(
            "prepared set, Parquet",
            lambda: sorted(data.glob("*/train.parquet")),
            lambda: read_prepared(data, "synthetic_sentiment", "train"),
        ),
        Artefact("run's config, YAML", lambda: [run.config], lambda: load_run_config(world)),
        Artefact("results, JSON lines", lambda: [run.results], lambda: read_results(run.results)),
        Artefact("progress, JSON lines", lambda: [run.progress], lambda: read_progress(run), may_lack=True),
        Artefact(
            "trial's record, JSON",
            lambda: [world.folder / "search" / "trials" / "000" / "trial.json"],
            lambda: load_trial(world),
        ),
    ]


def damage(artefact: Artefact, kind: str, seed: int, folder: Path) -> Injection:
    """Damage one file of an artefact, load the artefact, and restore the file."""
    rng = random.Random(seed)
    expected = artefact.load()
    path = rng.choice(artefact.files())
    content = path.read_bytes()
    if kind == "bit flipped":
        spoilt = bytearray(content)
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    else:
        spoilt = bytearray(content[: rng.randrange(len(content))])
    path.write_bytes(spoilt)
    lost = ""
    try:
        found = artefact.load()
    except FinloraError as error:
        seen = f"{type(error).__name__}: {plain(str(error), folder)}"
    except Exception as error:
        seen = f"{type(error).__name__}: {plain(str(error), folder)}"
        lost = "an error that is not FinLoRA's own"
    else:
        seen = "loads as written"
        if found != expected:
            is_lacking = artefact.may_lack and all(record in expected for record in found)
            seen = "damaged lines are skipped" if is_lacking else "loads with other values"
            lost = "" if is_lacking else "loads with other values, without an error"
    path.write_bytes(content)
    if artefact.load() != expected:
        lost = lost or "the artefact does not load after the file was restored"
    return Injection(kind, artefact.name, seed, seen, lost)
