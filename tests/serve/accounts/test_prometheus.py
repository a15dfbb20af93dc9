"""Grafana dashboard and alert rules: they use exactly the metrics that the server exports; and gauges that end."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from finlora.serve.accounts import prometheus
from finlora.serve.accounts.label_monitor import Watched, WindowFigures
from finlora.serve.accounts.prometheus import Measures

ROOT = Path(__file__).resolve().parents[3]
NAMES = set(re.findall(r'"(finlora_\w+)"', Path(prometheus.__file__).read_text()))


def names_in(text):
    return {name.removesuffix("_bucket") for name in re.findall(r"ray_(finlora_\w+)", text)}


def test_dashboard_shows_every_metric():
    board = json.loads((ROOT / "serve_configs" / "grafana-dashboard.json").read_text())
    text = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    assert len(NAMES) > 25
    assert names_in(text) == NAMES


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
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_alerts_use_exported_metrics_and_are_in_the_guide():
    records, alerts = yaml.safe_load((ROOT / "serve_configs" / "prometheus-alerts.yml").read_text())["groups"]
    guide = (ROOT / "docs" / "how-to" / "monitor.md").read_text()
    rules = {rule["alert"]: rule for rule in alerts["rules"]}
    assert sorted(rules) == sorted(set(re.findall(r"`(Finlora\w+)`", guide)))
    for rule in rules.values():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert names_in(rule["expr"]) <= NAMES
        assert rule["expr"].count("(") == rule["expr"].count(")")
    assert set(re.findall(r"`(finlora_\w+)`", guide)) <= NAMES
    own = {rule["record"] for rule in records["rules"]}
    text = " ".join(rule["expr"] for rule in records["rules"])
    assert names_in(text) <= NAMES
    assert set(re.findall(r"(?<!_)finlora:[\w:]+", text)) <= own
    assert set(re.findall(r"`(finlora:[\w:]+)`", guide)) <= own


@pytest.fixture
def gauges(monkeypatch):
    """Last value of each gauge by its name and labels."""
    found = {}

    class Metric:
        def __init__(self, name, *_rest):
            self.name = name

        def set(self, value, tags):
            found[self.name, *tags.values()] = value

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(prometheus, kind, Metric)
    return found


def test_figures_that_end_become_nan_and_others_stay_absent(gauges):
    measures, watched = Measures(), Watched("tone", "v1", "letters")
    psi, accuracy = ("finlora_label_psi", *watched), ("finlora_label_estimated_accuracy", *watched)
    measures.show_window(watched, WindowFigures(num_answers=100, stability_index=0.3))
    assert (gauges[psi], accuracy in gauges) == (0.3, False)
    measures.show_window(watched, WindowFigures(num_answers=1))
    assert math.isnan(gauges[psi])
    assert (gauges["finlora_label_window_answers", *watched], accuracy in gauges) == (1, False)
    gauges.clear()
    measures.show_window(watched, WindowFigures(num_answers=2))
    assert list(gauges) == [("finlora_label_window_answers", *watched)]
    measures.show_reference(watched, None, {"bad": 0.4})
    measures.show_reference(watched, None, {"good": 0.6})
    assert gauges["finlora_label_tested_ratio", *watched, "good"] == 0.6
    assert math.isnan(gauges["finlora_label_tested_ratio", *watched, "bad"])
    assert gauges["finlora_label_reference_answers", *watched] == 0
