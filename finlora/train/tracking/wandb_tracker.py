"""Run in Weights & Biases: files in the run's folder that `wandb sync` sends later, or live on a server that the user names."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finlora.errors import ConfigError
from finlora.train.tracking.tracker import OFFLINE, Card, Point, RunState

_STEP = "optimizer_step"


class WandbTracker:
    """One W&B run, from the process of the driver alone. W&B has no nested runs: the trials of a search are one group.

    Args:
        address: `offline`, or a server's. There the key comes from WANDB_API_KEY.
        project: of the run.
    """

    def __init__(self, address: str, project: str, card: Card, run_id: str | None) -> None:
        is_offline = address == OFFLINE
        if not is_offline and not os.environ.get("WANDB_API_KEY"):
            raise ConfigError("WANDB_API_KEY is not set: W&B would ask for the key on the terminal")
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # to W&B's own servers, whatever the address
        os.environ.setdefault("WANDB_CACHE_DIR", str(card.folder / "wandb" / "cache"))  # else below the home folder
        import wandb

        if run_id is not None:  # the name of its folder has the second of its start alone: another start may have it
            time.sleep(1.0)
        self.run_id = run_id or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=project,
            id=self.run_id,
            name=card.name,
            group=card.parent.name if card.parent else None,
            job_type="trial" if card.parent else None,
            dir=str(card.folder),
            config=dict(card.params),
            mode="offline" if is_offline else "online",
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                base_url="https://api.wandb.ai" if is_offline else address,
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_stats=True,  # of the driver's machine, where nothing is trained
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("*", step_metric=_STEP)

    def log_points(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, _STEP: point.step})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._run.config.update(dict(tags), allow_val_change=True)

    def log_files(self, files: Sequence[Path]) -> None:
        # Copies within the folder of W&B: a link would break when that is carried to a machine with a network.
        target = Path(self._run.dir)
        for file in files:
            for path in [each for each in sorted(file.rglob("*")) if each.is_file()] if file.is_dir() else [file]:
                copy = target / path.relative_to(file.parent)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
                self._run.save(str(copy), base_path=str(target), policy="now", glob=False)

    def end(self, state: RunState, at_ms: int) -> None:
        self._run.finish(exit_code=1 if state == RunState.FAILED else 0)
