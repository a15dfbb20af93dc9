"""Report in terminal and Markdown: measured values with their notes, and a word where nothing was measured."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import pytest
from made_results import make_evaluation, make_training, print_report
from rich.console import Console

from finlora.errors import ResultError
from finlora.report.comparable import explain_missing, find_ours
from finlora.report.pairing import pair_results
from finlora.report.paper import PAPER
from finlora.report.scores import score_table, segment_table
from finlora.report.tables import cost_table, format_number, format_score, paper_tables, wire_table
from finlora.report.write import list_base_scores, render_report
from finlora.results import append_result

METRICS = {
    f"{name}{end}": value
    for name in ("accuracy", "strict_accuracy", "weighted_f1")
    for end, value in (("", 0.947), ("_low", 0.908), ("_high", 0.98))
}


def find_paper(**wanted):
    (value,) = [v for v in PAPER if all(getattr(v, key) == entry for key, entry in wanted.items())]
    return value


def test_numbers_without_measurement_are_never_zero():
    assert format_number(None) == "not measured"
    assert format_number(math.nan) == "NaN"
    assert format_number(0.0) == "0.0"
    assert format_number(12345.678, 2) == "12,345.68"
    assert format_score(make_evaluation(metrics={}), "accuracy") == "not measured"
    assert format_score(make_evaluation(metrics={"accuracy": math.nan}), "accuracy") == "NaN"
    assert format_score(make_evaluation(metrics={"accuracy": 0.5}), "accuracy") == "50.0"


def scores_of(*results):
    return score_table(pair_results(results))


def test_score_row_has_accuracy_f1_strict_and_the_gain_over_its_base():
    table = scores_of(make_evaluation(), make_evaluation(0.687, variant="base", is_partial=True))
    assert table.header == ("task", "run", "model", "bits", "accuracy", "weighted F1", "strict", "against base")
    base, adapter = table.rows
    assert base[:5] == ("fpb", "base", "Llama-3.1-8B-Instruct", "8", "68.7 (66.7–69.7)*")
    score = "86.3 (84.3–87.3)"
    assert adapter == ("fpb", "4bit-r4", "Llama-3.1-8B-Instruct, 4bit-r4", "8", score, score, score, "+17.6")
    assert table.notes[-1].startswith("* Partial")


def test_scores_of_the_base_on_the_same_questions_are_found(tmp_path):
    path, adapter = tmp_path / "results.jsonl", make_evaluation()
    assert list_base_scores(path, [adapter]) == []
    base = make_evaluation(0.687, variant="base")
    for result in (
        adapter,
        base,
        make_evaluation(variant="base", task="ner"),
        make_training(),
        make_training(task="fpb"),
    ):
        append_result(path, result)
    assert list_base_scores(path, [adapter]) == [base]
    path.write_text("damaged")
    assert list_base_scores(path, [adapter]) == []


def test_score_of_numbers_has_the_share_within_the_tolerance():
    result = make_evaluation()
    ends = {f"numeric_accuracy{end}": value for end, value in (("", 0.5), ("_low", 0.4), ("_high", 0.6))}
    table = scores_of(dataclasses.replace(result, metrics=result.metrics | ends))
    assert dict(zip(table.header, table.rows[0], strict=True))["within 1 %"] == "50.0 (40.0–60.0)"
    assert "one part in a hundred" in "".join(table.notes)
    assert "one part in a hundred" not in "".join(scores_of(result).notes)


def test_score_of_free_text_has_no_f1():
    metrics = {name: value for name, value in make_evaluation().metrics.items() if "f1" not in name}
    assert scores_of(make_evaluation(metrics=metrics)).rows[0][5] == "none"
    assert scores_of(make_evaluation(metrics={})).rows[0][5] == "not measured"


def test_segments_of_yes_no_questions_show_precision_and_recall_of_yes():
    plain = METRICS | {"count": 40.0}
    yes = {"yes_precision": 0.5, "yes_recall": 0.25, "yes_f1": 1 / 3}
    table = segment_table(
        pair_results([make_evaluation(segments={"topics": {"fraud": plain | yes}, "desk": {"north": plain}})])
    )
    assert table.header[-3:] == ("F1 of Yes", "precision", "recall")
    assert [(row[2], *row[-3:]) for row in table.rows] == [
        ("topics=fraud", "33.3", "50.0", "25.0"),
        ("desk=north", "none", "none", "none"),
    ]
    assert segment_table(pair_results([make_evaluation(segments={"desk": {"north": plain}})])).header[-1] == "strict"


def test_methods_and_test_splits_are_named_if_there_are_several():
    both = scores_of(make_evaluation(), make_evaluation(method="generate"))
    assert [row[0] for row in both.rows] == ["fpb (labels)", "fpb (generate)"]
    base = make_evaluation(variant="base", data_hash="b" * 64)
    table = scores_of(make_evaluation(data_hash="a" * 64), base)
    assert {row[0] for row in table.rows} == {f"fpb (test split {'a' * 12})", f"fpb (test split {'b' * 12})"}
    assert [row[-1] for row in table.rows] == ["not run", ""]  # the base's score is on another test split


COUNTS = {"negative": {"neutral": 20}, "neutral": {"neutral": 60}, "positive": {"neutral": 20}}


def test_majority_line_and_ties_are_shown():
    results = [make_evaluation(0.60, counts=COUNTS), make_evaluation(0.61, variant="base", counts=COUNTS)]
    table = scores_of(*results)
    # Always `neutral`: accuracy 0.6; F1 of neutral 2 * 0.6 / 1.6 = 0.75, weighted by its share 0.45.
    assert table.rows[0] == ("fpb", "majority class", "always neutral", "", "60.0", "45.0", "", "")
    assert table.rows[2][-1] == "-1.0, intervals overlap"
    notes = "\n".join(table.notes)
    assert "fpb: 4bit-r4 and its base tie, as their intervals overlap: 60.0 (58.0–61.0) and 61.0 (59.0–62.0)." in notes
    assert "fpb: 4bit-r4 is not above the majority class: 60.0 (58.0–61.0), where always answering neutral" in notes
    mixed = scores_of(make_evaluation(0.60, counts=COUNTS, num_examples=150))  # a third of them free text
    assert [row[1] for row in mixed.rows] == ["4bit-r4"]
    clear = scores_of(make_evaluation(0.9, counts=COUNTS), make_evaluation(0.7, variant="base", counts=COUNTS))
    assert not any("tie" in note or "majority class" in note for note in clear.notes)


def test_trained_run_without_a_score_is_named():
    notes = scores_of(make_training(run="lonely", adapter="/runs/lonely/adapter"), make_evaluation()).notes
    assert "Trained and not evaluated: lonely." in notes


def test_cost_table_names_device_once_or_per_row():
    result = make_training(wall_seconds=4500.0, waited_seconds=600.0, attempts=2, run="mine")
    one = cost_table(pair_results([result]))
    (row,) = one.rows
    assert row[:2] == ("mine\nLlama-3.1-8B-Instruct, 4bit-r4, 4 bit", "ner\ntraining in 2 attempts")
    assert one.header[2:] == ("adapter MiB", "peak GiB", "run time s", "waited s", "GPU-h")
    assert row[2:] == ("4.50", "26.70", "4,500", "600", "1.2500")
    assert "Measured nowhere: s/example, tokens/s." in one.notes
    assert "Device: Some GPU." in one.notes
    two = cost_table(pair_results([make_training(), make_evaluation(environment={"device": "cpu"}, variant="base")]))
    assert [row[-1] for row in two.rows] == ["Some GPU", "cpu"]
    assert two.rows[1][2] == "none"


def make_wire(seconds: float, **changes: float) -> dict[str, float]:
    return {"rounds": 40, "bytes_sent": 2**20, "bytes_adam": 2**22, "seconds": seconds} | changes


def test_communication_of_two_optimisers_is_shown_side_by_side():
    ours = make_training(
        wire=[make_wire(1.5), make_wire(0.25)],
        metrics={"loss_last": 0.125},
        wall_seconds=61.0,
        config={"name": "ours", "optim": {"name": "zero_one_adam"}},
    )
    plain = make_training(wire=[make_wire(0, bytes_sent=0, bytes_adam=0, rounds=0)], config={"name": "plain"})
    runs = [dataclasses.replace(each, adapter=f"/runs/{each.config['name']}/adapter") for each in (ours, plain)]
    table = wire_table(pair_results([*runs, make_training(), make_evaluation()]))
    assert table.rows == (
        ("ours", "zero_one_adam", "2", "40", "1.00", "25.0 %", "0.25–1.50", "0.1250", "61"),
        ("plain", "not measured", "1", "0", "0.00", "none sent", "0.00", "not measured", "not measured"),
    )
    newer = make_training(wire=[make_wire(9.0)], config=ours.config, created="2027", adapter=runs[0].adapter)
    assert [row[6] for row in wire_table(pair_results([newer, runs[0]])).rows] == ["9.00"]
    assert "Communication" in print_report([ours])
    assert "Communication" not in print_report([make_training()])


def test_paper_numbers_are_shown_beside_ours():
    text = print_report([make_evaluation(0.85), make_training()])
    assert "Beside the paper: Fine-tuning cost" in text
    (row,) = [line for line in text.splitlines() if "fpb" in line and "86.30" in line]
    assert "85.00 (83.00–86.00)" in row
    assert row.rstrip().endswith("4bit-r4")
    *_, missing = paper_tables(pair_results([make_evaluation(0.85)]))
    assert missing.title == "Beside the paper: not run"
    assert sum(int(number) for _, number, _ in missing.rows) == len(PAPER) - 1
    assert ("Inference speed", "1", "no Llama 70B in these results") in missing.rows


def test_only_comparable_measurements_are_shown_beside_the_paper():
    paper = find_paper(quantity="accuracy", variant="4bit-r4", tasks=("fpb",))
    assert find_ours(paper, [make_evaluation()]) is not None
    others = [
        make_evaluation(base="demo"),
        make_evaluation(base="meta-llama/Llama-3.1-70B"),
        make_evaluation(bits=4),
        make_evaluation(variant="8bit-r8"),
        make_evaluation(task="tfns"),
        make_evaluation(config={"model": {"weights": "random"}}),
        make_training(task="fpb"),
    ]
    assert find_ours(paper, others) is None


@pytest.mark.parametrize(
    ("wanted", "results", "reason"),
    [
        ({"quantity": "accuracy"}, [], "no Llama 8B in these results"),
        ({"quantity": "accuracy"}, [make_evaluation(base="demo")], "no Llama 8B in these results"),
        ({"quantity": "accuracy"}, [make_evaluation(variant="8bit-r8")], "no 4bit-r4 of it"),
        ({"quantity": "accuracy"}, [make_evaluation(task="tfns")], "not on this task"),
        ({"quantity": "accuracy"}, [make_training(task="fpb")], "no evaluation of it"),
        ({"quantity": "accuracy"}, [make_evaluation(bits=4)], "not at 8 bit"),
        (
            {"quantity": "accuracy"},
            [make_evaluation(config={"model": {"weights": "random"}})],
            "its weights are random",
        ),
        ({"quantity": "accuracy"}, [make_evaluation(data_hash="0" * 64)], "not on the published test split"),
    ],
)
def test_cell_without_a_measurement_gives_the_reason(wanted, results, reason):
    paper = find_paper(**wanted, variant="4bit-r4", tasks=("fpb",))
    assert explain_missing(paper, results) == reason
    assert find_ours(paper, results) is None


def test_full_measurement_is_preferred_to_newer_partial_one():
    paper = find_paper(quantity="accuracy", variant="base", tasks=("fpb",))
    full = make_evaluation(variant="base")
    partial = make_evaluation(variant="base", is_partial=True, created="2027")
    assert find_ours(paper, [full, partial]) is full


def test_inference_memory_needs_batch_size_one_on_a_gpu():
    paper = find_paper(quantity="inference_memory_gib", size="8B", bits=8)
    batch = {size: {"eval": {"batch_size": size}} for size in (1, 16)}
    assert find_ours(paper, [make_evaluation(peak_memory_gib=8.9, gpu_hours=1.0, config=batch[16])]) is None
    assert find_ours(paper, [make_evaluation(peak_memory_gib=8.9, config=batch[1])]) is None
    assert find_ours(paper, [make_evaluation(peak_memory_gib=8.9, gpu_hours=1.0, config=batch[1])]) is not None


def test_report_writes_markdown_and_plots(tmp_path):
    results = [
        make_evaluation(variant="base", peak_memory_gib=9.0),
        make_evaluation(is_partial=True),
        make_evaluation(task="ner", base="models/odd|name*", metrics={"accuracy": 0.5}),
        make_evaluation(task="tfns", metrics={"accuracy": math.nan}),
        make_training(),
        make_training(task="xbrl_tags+xbrl_values", loss_curve=[[1.0, 2.0]]),
    ]
    output = tmp_path / "new" / "report"
    text = print_report(results, output)
    assert "Written:" in text
    markdown = (output / "report.md").read_text(encoding="utf-8")
    for name in ("accuracy", "loss", "memory"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name}.png)" in markdown
    assert "odd\\|name\\*" in markdown
    assert "86.3 (84.3–87.3)\\* |" in markdown
    widths = [line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("| ")]
    assert min(widths) >= 3


def test_report_without_data_to_draw_writes_no_plot(tmp_path):
    print_report([make_evaluation(metrics={})], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_report_names_what_is_left_out(tmp_path):
    old, new = make_evaluation(0.1), make_evaluation(0.9, created="2026-02-01T00:00:00+00:00")
    stream = io.StringIO()
    render_report([old, new], tmp_path, Console(file=stream, width=200), searches=[Path("/runs/search-fpb")])
    for text in (stream.getvalue(), (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert "superseded by that of 2026-02-01T00:00:00+00:00" in text
        assert "trials of the search search-fpb" in text
    assert "1 measurement, 1 trained run, 2026-02-01. " in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 left out, listed below with the reason" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_stay_whole_if_the_terminal_has_room():
    """A table must not break `synthetic_sentiment` while other columns have room to spare."""
    results = [make_evaluation(task="synthetic_sentiment", run="demo-real-4bit-r4", is_partial=True, metrics=METRICS)]
    for width, name in ((140, "synthetic_sentiment "), (60, "task: synthetic_sentiment")):
        stream = io.StringIO()
        render_report(results, None, Console(file=stream, width=width))
        lines = stream.getvalue().split("% with 95")[0].splitlines()
        assert any(name in line for line in lines)
        assert max(map(len, lines)) <= width


def test_markup_in_names_is_printed_literally():
    assert "[red]odd[/]" in print_report([make_evaluation(task="[red]odd[/]")])


def test_report_without_results_or_with_an_unwritable_folder_is_refused(tmp_path):
    with pytest.raises(ResultError, match="no results to report"):
        print_report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot be written"):
        print_report([make_evaluation()], tmp_path / "file")
