"""Settings in which runs deviate from the paper's, read from their configs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from finlora.report.pairing import Paired
from finlora.report.paper import PAPER, PAPER_SETTINGS, XBRL_SETTINGS
from finlora.report.tables import TextTable

_TASKS = {task for value in PAPER for name in value.tasks for task in name.split("+")}
_OF_BOTH, _OF_SCORING = ("model.",), ("eval.", "data.max_test_examples")
"""Starts of the settings that trainings and evaluations use, and of those of evaluations; trainings use the others."""


def deviation_table(paired: Paired) -> TextTable:
    """One row for each setting and value that is not the paper's, with the tasks of the runs that have it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for _, result in paired.kept:
        tasks = result.task.split("+")
        if not _TASKS.intersection(tasks):
            continue
        for setting, papers, ours in list_deviations(result.config, tasks):
            # An evaluation repeats the settings of a training, which it did not use, and the other way round.
            if setting.startswith(_OF_BOTH) or setting.startswith(_OF_SCORING) == (result.kind == "evaluation"):
                found.setdefault((setting, papers, ours), []).extend(tasks)
    return TextTable(
        title="Settings other than the paper's",
        header=("setting", "paper's", "ours", "tasks"),
        rows=tuple((*key, ", ".join(dict.fromkeys(tasks))) for key, tasks in found.items()),
    )


def list_deviations(config: Mapping[str, Any], tasks: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return each setting of a config that is not the paper's, with the paper's value and its own.

    Args:
        config: sections of settings, as a result holds it. A setting that it lacks is not compared.
        tasks: of the run; XBRL has settings of its own.
    """
    papers = PAPER_SETTINGS | (XBRL_SETTINGS if any(task.startswith("xbrl") for task in tasks) else {})
    deviations = []
    for setting, expected in papers.items():
        section, key = setting.split(".")
        values = config.get(section)
        if not isinstance(values, Mapping) or key not in values:
            continue
        ours = values[key]
        if setting == "model.base":  # a hub id, or a folder
            ours = str(ours).rstrip("/").rpartition("/")[2]
        ours = list(ours) if isinstance(ours, tuple) else ours
        if ours not in expected:
            deviations.append((setting, _say(expected[0]), _say(ours)))
    return deviations


def _say(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
