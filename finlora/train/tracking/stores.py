"""Stores of runs: which tracking systems a config names, where they keep runs, and how a run is opened there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finlora.config import SQLITE, RunConfig, TrackingConfig
from finlora.errors import ConfigError
from finlora.machine.working_dir import resolve_output
from finlora.train.tracking.tracker import OFFLINE, Card, Tracker

Kind = Literal["tensorboard", "mlflow", "wandb"]


@dataclass(frozen=True, slots=True)
class Store:
    """Place where a tracking system keeps runs."""

    kind: Kind
    address: str
    """TensorBoard: empty, since it writes into the folder of the run."""
    project: str

    @property
    def title(self) -> str:
        """Name in messages: `MLflow (sqlite:////mnt/mlflow.db)`."""
        name = {"mlflow": "MLflow", "wandb": "W&B", "tensorboard": "TensorBoard"}[self.kind]
        return f"{name} ({self.address})" if self.address else name

    def open(self, card: Card, run_id: str | None) -> Tracker:
        """Open a run, or make a new one.

        Args:
            run_id: of a run that this store has already. None: a new one.

        Raises:
            ConfigError: the library is not installed.
            Exception: of any kind, of the library.
        """
        try:
            if self.kind == "mlflow":
                from finlora.train.tracking.mlflow_tracker import MlflowTracker

                return MlflowTracker(self.address, self.project, card, run_id)
            if self.kind == "wandb":
                from finlora.train.tracking.wandb_tracker import WandbTracker

                return WandbTracker(self.address, self.project, card, run_id)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{self.title} needs the package {error.name}, which is not installed: pip install 'finlora[{self.kind}]'"
            ) from error
        from finlora.train.tracking.tensorboard_tracker import TensorboardTracker

        return TensorboardTracker(card)


def list_stores(config: RunConfig, *, is_training: bool) -> list[Store]:
    """Return the stores that a config names.

    Args:
        is_training: include TensorBoard, which shows the curves of a training only.
    """
    tracking = config.tracking
    stores = [Store("tensorboard", "", tracking.project)] if tracking.tensorboard and is_training else []
    if tracking.mlflow is not None:
        stores.append(Store("mlflow", tracking.mlflow, tracking.project))
    if tracking.wandb is not None:
        stores.append(Store("wandb", tracking.wandb, tracking.project))
    return stores


def choose_store(config: RunConfig, root: Path, kind: Literal["mlflow", "wandb"], address: str | None) -> Store:
    """Return the store of an export: the named one, else that of the config, else one on this machine.

    Args:
        root: folder of the run. MLflow's file is then `mlflow.db` beside it.

    Raises:
        ConfigError: the address is none, or its relative path would be lost with a job's working directory.
    """
    tracking = config.tracking
    if address is not None:
        TrackingConfig(mlflow=address) if kind == "mlflow" else TrackingConfig(wandb=address)  # checks it
        if address.startswith(SQLITE):
            address = f"{SQLITE}{resolve_output(f'--to {SQLITE}', Path(address.removeprefix(SQLITE)))}"
    named = tracking.mlflow if kind == "mlflow" else tracking.wandb
    local = f"{SQLITE}{root.parent / 'mlflow.db'}" if kind == "mlflow" else OFFLINE
    return Store(kind, address or named or local, tracking.project)
