"""What the tests of all data modules share: requests and small raw files of invented rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finlora.data.task import Request, SplitChoice


@pytest.fixture
def ask() -> Callable[..., Request]:
    """Build a request; by default for both splits as published."""

    def build(source: Path | None, variant: str = "as_published", splits: SplitChoice = "all") -> Request:
        return Request(source=source, variant=variant, splits=splits)

    return build


@pytest.fixture
def fake_hub(monkeypatch) -> Callable[[dict[str, list[dict[str, object]]]], list[tuple[str, dict[str, object]]]]:
    """Replace the hub by tables; returns the list of calls to it."""
    datasets = pytest.importorskip("datasets")

    def install(tables: dict[str, list[dict[str, object]]]) -> list[tuple[str, dict[str, object]]]:
        calls: list[tuple[str, dict[str, object]]] = []

        def load_dataset(hub_id: str, **options: object) -> object:
            calls.append((hub_id, options))
            return datasets.Dataset.from_list(tables[str(options["split"])])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install
