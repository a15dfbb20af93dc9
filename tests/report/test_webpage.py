"""HTML report: it has every measurement, loads nothing, and shows names as text, never as markup."""

from __future__ import annotations

from html.parser import HTMLParser

from made_results import make_evaluation, make_training, print_report

from finlora.report.charts import draw_confusion, draw_reliability, has_matrix
from finlora.report.pairing import pair_results
from finlora.report.tables import environment_table, provenance_table

COUNTS = {"negative": {"negative": 30, "(none)": 2}, "positive": {"negative": 1, "positive": 40}}
CALIBRATION = [
    {"low": 0.5, "high": 0.6, "count": 20.0, "confidence": 0.55, "accuracy": 0.5},
    {"low": 0.9, "high": 1.0, "count": 53.0, "confidence": 0.97, "accuracy": 0.99},
]


class _Page(HTMLParser):
    """Parser that collects what a page loads, its headings and the texts of its cells."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.headings, self.cells, self.tags, self.alternatives = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.loads += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.alternatives.append(values["alt"])

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "h2":
            self.headings.append(data.strip())
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data)


def test_html_report_has_everything_and_loads_nothing(tmp_path):
    metrics = {"accuracy": 0.95, "calibration_error": 0.03}
    results = [
        make_evaluation(counts=COUNTS, calibration=CALIBRATION, metrics=metrics, seconds_per_example=0.1),
        make_training(wall_seconds=60.0),
    ]
    print_report(results, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert all(load.startswith(("#", "data:image/svg+xml;base64,")) for load in page.loads)
    assert "script" not in page.tags
    assert page.tags.count("img") == len([load for load in page.loads if load.startswith("data:")]) == 7
    assert all(page.alternatives)
    for heading in (
        *("Evaluation", "Cost", "Accuracy", "Learning curves", "Peak memory", "Time of training", "Time of evaluation"),
        *("Confusion matrices", "Reliability of probabilities", "Where each number comes from", "Environments"),
    ):
        assert heading in page.headings, heading
    for name in ("confusion-1", "reliability-1", "training-time", "evaluation-time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_equal_results_give_equal_html(tmp_path):
    results = [make_evaluation(counts=COUNTS, calibration=CALIBRATION)]
    for name in ("one", "two"):
        print_report(results, tmp_path / name)
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


def test_names_are_never_read_as_markup(tmp_path):
    hostile = "<script>alert(1)</script>"
    print_report([make_evaluation(task=hostile, counts=COUNTS)], tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert hostile not in text
    assert "&lt;script&gt;" in text


def test_charts_show_the_numbers_of_confusions_and_calibration():
    matrix, curve = make_evaluation(counts=COUNTS), make_evaluation(calibration=CALIBRATION)
    texts = [text.get_text() for text in draw_confusion(matrix).axes[0].texts]
    assert texts == ["30", "0", "2", "1", "40", "0"]
    assert [label.get_text() for label in draw_confusion(matrix).axes[0].get_xticklabels()][-1] == "(none)"
    (axes,) = draw_reliability(curve).axes
    assert axes.lines[1].get_xydata().tolist() == [[0.55, 0.5], [0.97, 0.99]]
    assert not has_matrix(make_evaluation(counts={str(n): {"0": 1} for n in range(40)}))


def test_legend_fits_into_the_chart():
    """Three entries side by side would be wider than the chart, which would cut the last one."""
    figure = draw_reliability(make_evaluation(calibration=CALIBRATION))
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_provenance_names_data_settings_and_environment():
    results = [
        make_evaluation(
            data_hash="a" * 64,
            environment={"device": "one"},
            created="2026-01-02T03:04:05+00:00",
            base_hash="1" * 16,
            adapter_hash="2" * 64,
        ),
        make_training(
            data_hash="b" * 64 + "+" + "c" * 64,
            environment={"device": "two", "ray": "2"},
            base_hash="1" * 16,
            adapter_hash="2" * 64,
        ),
    ]
    table = provenance_table(pair_results(results))
    assert table.header[4:] == ("base", "adapter", "data", "settings", "environment")
    assert [row[4:6] for row in table.rows] == [("1" * 12, "2" * 12)] * 2
    assert [row[6] for row in table.rows] == ["a" * 12, "b" * 12 + "+" + "c" * 12]
    assert [row[8] for row in table.rows] == ["E1", "E2"]
    assert table.rows[0][2] == "2026-01-02T03:04:05+00:00"
    assert len(table.rows[0][7]) == 12
    environments = environment_table(pair_results(results))
    assert environments.header == ("", "E1", "E2")
    assert environments.rows == (("device", "one", "two"), ("ray", "not recorded", "2"))
