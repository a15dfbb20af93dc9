"""Tasks that an adapter brings: tasks.yaml beside its weights holds the task files that it was trained on.

So a machine that never saw a task file can ask the adapter its question. The contract holds the SHA-256 of tasks.yaml, and the
hash of what each task asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from finlora.configfile import show
from finlora.data.task import Task
from finlora.data.taskfile.load import read_card
from finlora.data.taskfile.read import make_task
from finlora.durable import write_whole
from finlora.errors import AdapterError, ConfigError
from finlora.model.adapter_files import check_file
from finlora.model.contract import TASKS_FILE, Contract
from finlora.yamltext import read_yaml

_MAX_BYTES = 2**22


def write_tasks(folder: Path, cards: Mapping[str, str]) -> None:
    """Write the cards of an adapter's tasks into its folder; none writes no file."""
    if cards:
        write_whole(folder / TASKS_FILE, yaml.safe_dump(dict(cards), sort_keys=False, allow_unicode=True))


def read_tasks(folder: Path, contract: Contract) -> dict[str, Task]:
    """Return the tasks that an adapter brings, by name.

    Raises:
        AdapterError: tasks.yaml is missing, was changed, or is not of the contract's tasks.
    """
    if not contract.tasks:
        return {}
    path = folder / TASKS_FILE
    try:
        check_file(path, _MAX_BYTES)
        cards = read_yaml(path, _MAX_BYTES)
        if not isinstance(cards, dict) or not all(isinstance(card, str) for card in cards.values()):
            raise ValueError(f"it holds {show(cards)}")
        tasks = {name: make_task(read_card(card)) for name, card in cards.items()}
    except (OSError, ValueError, yaml.YAMLError, ConfigError) as error:
        raise AdapterError(f"{path} is no list of tasks ({error}): copy the adapter again.") from error
    found = {name: task.card_hash for name, task in tasks.items()}
    if found != contract.tasks or any(name != task.name for name, task in tasks.items()):
        raise AdapterError(f"{path} holds other tasks than the adapter was trained on: copy the adapter again.")
    return tasks


def require_same_task(folder: Path, contract: Contract, name: str, card_hash: str | None) -> None:
    """Refuse to score or go on with an adapter on a task of its name that asks something else.

    Args:
        card_hash: of the prepared task; None: it is built in.

    Raises:
        AdapterError: names both hashes.
    """
    trained = contract.tasks.get(name)
    if name in contract.data_hashes and trained != card_hash:
        raise AdapterError(
            f"{folder} was trained with task hash {_show_hash(trained)}, the prepared task {name} has {_show_hash(card_hash)}: "
            "its kind, labels or prompt were changed, which makes it another task. Prepare it from the file of that training, or "
            "give it another name and train on it."
        )


def _show_hash(card_hash: str | None) -> str:
    return card_hash[:12] if card_hash else "none, as a built-in task"
