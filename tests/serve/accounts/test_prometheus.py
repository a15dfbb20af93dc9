"""Grafana dashboard: it shows exactly the metrics that the server exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

from finlora.serve.accounts import prometheus

ROOT = Path(__file__).resolve().parents[3]
NAMES = set(re.findall(r'"(finlora_\w+)"', Path(prometheus.__file__).read_text()))


def test_dashboard_shows_every_metric():
    board = json.loads((ROOT / "serve_configs" / "grafana-dashboard.json").read_text())
    text = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    asked = {name.removesuffix("_bucket") for name in re.findall(r"ray_(finlora_\w+)", text)}
    assert len(NAMES) > 15
    assert asked == NAMES


def test_panels_do_not_overlap_and_use_the_chosen_data_source():
    board = json.loads((ROOT / "serve_configs" / "grafana-dashboard.json").read_text())
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {"${datasource}"}
