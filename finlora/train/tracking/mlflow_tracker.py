"""Run in MLflow: in an SQLite file without any server, or on a server that the user names."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finlora.config import SQLITE
from finlora.errors import ResourceError
from finlora.train.tracking.tracker import Card, Point, RunState

# MLflow's limits for one request, and for the length of a value.
_MAX_METRICS, _MAX_TEXTS, _MAX_LENGTH = 1000, 100, 5000
_STATES = {
    RunState.RUNNING: "RUNNING",
    RunState.FINISHED: "FINISHED",
    RunState.STOPPED: "KILLED",
    RunState.FAILED: "FAILED",
}


class MlflowTracker:
    """Client of one MLflow run. A trial's run is nested in that of its search.

    Args:
        address: `sqlite:///PATH`, whose files go into the folder PATH without its suffix plus `-files`; or a server's.
        project: name of the experiment, which is made where it is missing.
    """

    def __init__(self, address: str, project: str, card: Card, run_id: str | None) -> None:
        # MLflow sends usage statistics and asks for updates otherwise; a dead server would hold a request for minutes.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        is_file = address.startswith(SQLITE)
        if is_file:
            _require_writable(Path(address.removeprefix(SQLITE)))
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # an error is raised too, and told in one line
        self._client: Any = MlflowClient(tracking_uri=address)
        files = Path(address.removeprefix(SQLITE)).with_suffix("").as_uri() + "-files" if is_file else None
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project, files)
        if run_id is None:
            tags = {"mlflow.parentRunId": card.parent.run_id} if card.parent else {}
            tags |= {"mlflow.source.name": "finlora", "mlflow.source.type": "LOCAL"}
            run = self._client.create_run(experiment_id, card.started_ms, tags, card.name)
            run_id = str(run.info.run_id)
            self.run_id = run_id
            self._log_texts("params", card.params)
        else:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")

    def log_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, point.at_ms, point.step) for point in points for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS])

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._log_texts("tags", tags)

    def log_files(self, files: Sequence[Path]) -> None:
        for file in files:
            if file.is_dir():
                self._client.log_artifacts(self.run_id, str(file), file.name)
            else:
                self._client.log_artifact(self.run_id, str(file))

    def end(self, state: RunState, at_ms: int) -> None:
        if state != RunState.RUNNING:
            self._client.set_terminated(self.run_id, _STATES[state], at_ms)

    def _log_texts(self, kind: str, texts: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        make = {"params": Param, "tags": RunTag}[kind]
        items = [make(name, value[:_MAX_LENGTH]) for name, value in texts.items()]
        for start in range(0, len(items), _MAX_TEXTS):
            self._client.log_batch(self.run_id, **{kind: items[start : start + _MAX_TEXTS]})


def _require_writable(path: Path) -> None:
    """Open the SQLite file for writing: MLflow would try ten times over 100 s before it says that it cannot.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except (OSError, sqlite3.Error) as error:
        raise ResourceError(f"{path} cannot be written ({error})") from error
