"""Parsers of the commands' output, on real output, and the walk's command line."""

from __future__ import annotations

import json

import pytest

from acceptance.arguments import read_arguments
from acceptance.verbs.answering import answer_of, compare_merged, difference, probabilities
from acceptance.verbs.preparing import counts
from acceptance.verbs.serving import read_body, read_stream
from acceptance.verbs.training import curve, last_step, losses_told, progress_steps
from finlora.cli.app import ORDER

ASKED = """
  answer     probability
 ────────────────────────────────────
  positive         63.5%   ██████████
  negative         36.5%   █████
"""
PREPARED = """
  split   examples   labels                    duplicates   prompt chars (median / max)   sha256
  train   3,634      neutral 2,150             4            242 / 437                     0d5f
  test    1,212      neutral 729, positive 338   2          242 / 425                     2d73
"""


def test_probabilities_are_read_off_the_table_of_ask():
    assert probabilities(ASKED) == {"positive": 0.635, "negative": 0.365}
    assert probabilities("Model error: no such folder") == {}


def test_answer_ends_where_a_library_writes_on():
    assert answer_of("loading\nIt is H2O.2026-11-30 04:29:37,428\tINFO dag.py -- Tearing down\n") == "It is H2O."
    assert answer_of("loading\nIt is H2O.\n") == "It is H2O."
    assert answer_of("loading") == "no such line"


def test_difference_is_the_largest_of_a_label_and_infinite_where_there_is_none():
    assert difference({"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}) == 0.25
    assert difference({}, {}) == difference({"a": 1.0}, {"b": 1.0}) == float("inf")


def test_merged_weights_are_the_sum_in_bfloat16_and_another_sum_is_seen(tmp_path):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    weight, kept = torch.randn(6, 4).bfloat16(), torch.randn(3).bfloat16()
    b, a = torch.randn(6, 2), torch.randn(2, 4)
    name = "model.layers.0.self_attn.q_proj"
    lora = {f"base_model.model.{name}.lora_B.weight": b, f"base_model.model.{name}.lora_A.weight": a}
    right = (weight.float() + 4.0 * b @ a).bfloat16()
    for folder, merged in (("base", weight), ("right", right), ("wrong", (weight.float() + 4.2 * b @ a).bfloat16())):
        (tmp_path / folder).mkdir()
        save_file({f"{name}.weight": merged, "model.norm.weight": kept}, tmp_path / folder / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file(lora, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 8.0, "r": 2}')
    changed, error = compare_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "right")
    assert changed == 1
    assert 0 < error <= 2**-8
    assert compare_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "wrong")[1] > 2**-8


def test_counts_are_read_off_the_table_of_prepare():
    assert counts(PREPARED) == (3634, 1212)
    assert counts("Dataset error: no") == (0, 0)


def test_losses_are_read_off_the_last_line_of_train():
    assert losses_told("Adapter /runs/x (0.64 MiB): loss 2.9583 -> 0.4168 in 1:06") == (2.9583, 0.4168)
    assert losses_told("Stopped.") == (1.0, float("inf"))


def test_curve_takes_the_later_of_two_records_of_a_step_and_no_half_line(tmp_path):
    records = [(1, 3.0), (2, 2.0), (3, 1.0), (3, 1.5), (4, 0.5)]
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in records]
    (tmp_path / "progress.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    assert curve(tmp_path) == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 0.5)]
    assert progress_steps(tmp_path) == [1, 2, 3, 3, 4]
    assert last_step(tmp_path) == 4
    assert last_step(tmp_path / "nowhere") == 0


def test_stream_is_read_as_events_and_its_end():
    assert read_stream('data: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n') == ([{"a": 1}, {"a": 2}], True)
    assert read_stream('data: {"a": 1}\n\n') == ([{"a": 1}], False)
    assert (read_body(b'{"a": 1}'), read_body(b"<html>")) == ({"a": 1}, "<html>")


def test_command_line_takes_a_base_and_a_fresh_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    chosen = read_arguments(["--base", str(tmp_path), "--output", str(tmp_path / "out"), "--only", "ask"])
    assert [step.name for step in chosen.steps] == ["prepare", "train-main", "ask"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "accept.yaml").write_text("")
    for words, said in (
        (
            ["--base", str(tmp_path / "out"), "--output", "x"],
            "holds no config.json: make it with jobs/bases/real_base.py",
        ),
        (["--base", str(tmp_path), "--output", str(tmp_path / "out")], "holds a walk already"),
        (["--base", str(tmp_path), "--output", "x", "--only", "fly"], "fly: no such step"),
        (["--base", str(tmp_path), "--output", "x", "--data", str(tmp_path)], "holds no folder fpb"),
    ):
        with pytest.raises(SystemExit):
            read_arguments(words)
        assert said in " ".join(capsys.readouterr().err.split())


def test_every_verb_is_typed_by_some_step():
    """The walk checks the same at its end; this test reads the source of its steps."""
    from pathlib import Path

    source = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py") if "test_" not in path.name)
    assert [verb for verb in ORDER if f'"{verb}"' not in source] == []
