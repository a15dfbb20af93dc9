"""The page of deviations from the paper: caveats from finlora/report/paper.py, settings from jobs/configs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from generate import clean, code, page, table

CONFIGS = Path(__file__).resolve().parents[1] / "jobs" / "configs"
FOLDERS = {"real-base": "SmolLM2-135M-Instruct"}
"""Folder in a config -> base that jobs/bases/ puts there."""


def make_deviations() -> str:
    from finlora.report.paper import DIFFERENCES

    return page(
        "Deviations from the paper",
        "What differs between the rows of [`finlora reproduce`](../how-to/reproduce.md) and the paper (arXiv:2412.11378v2). A "
        "report lists the same for the runs that it shows.",
        "## Settings",
        table(("setting", "paper's", "ours", "rows"), _list_settings()),
        "## Data, scores and measurements",
        table(("of", "what differs"), ((clean(of), clean(what)) for of, what in DIFFERENCES)),
    )


def _list_settings() -> Iterator[tuple[str, ...]]:
    from finlora.configfile import config_to_tree, load_config
    from finlora.report.deviations import list_deviations
    from finlora.report.paper import PAPER_SETTINGS

    found: dict[tuple[str, str, str], list[str]] = {}
    # The formulas are not in the paper.
    rows = [
        path.stem for path in sorted(CONFIGS.glob("*.yaml")) if re.match(r"(llama|smollm2)-(?!.*formulas)", path.stem)
    ]
    for row in rows:
        config = load_config(CONFIGS / f"{row}.yaml")
        for deviation in list_deviations(config_to_tree(config), config.data.tasks):
            found.setdefault(deviation, []).append(row)
    order = list(PAPER_SETTINGS)
    for (setting, papers, ours), names in sorted(found.items(), key=lambda each: order.index(each[0][0])):
        yield code(setting), clean(papers), clean(FOLDERS.get(ours, ours)), _shorten(names, rows)


def _shorten(names: Sequence[str], rows: Sequence[str]) -> str:
    """Return rows by family, `all` for each task of it."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_family(name), []).append(name.removeprefix(f"{_family(name)}-"))
    parts = []
    for family, tasks in families.items():
        is_all = len(tasks) == sum(_family(row) == family for row in rows)
        parts.append(f"{family}: {'all' if is_all else ', '.join(tasks)}")
    return "; ".join(parts)


def _family(name: str) -> str:
    found = re.match(r".*?-r\d+", name)
    assert found is not None, name
    return found[0]
