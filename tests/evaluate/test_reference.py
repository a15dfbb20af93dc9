"""Reference of an adapter: facts of its labels by hand, the evaluation that counts, and what is refused when it is read."""

from __future__ import annotations

import dataclasses
import json

import pytest
from carded import make_run

from finlora.durable import hash_file, seal
from finlora.errors import AdapterError
from finlora.evaluate.reference import (
    REFERENCE_FILE,
    Reference,
    choose_references,
    find_reference,
    measure_labels,
    read_references,
    refresh_reference,
)
from finlora.model.contract import read_contract
from finlora.results import Result, append_result

PROBABILITIES = [[0.9, 0.1], [0.7, 0.3], [0.25, 0.75], [0.4, 0.6]]
FACTS = dataclasses.asdict(measure_labels(("bad", "good"), PROBABILITIES, ["bad", "good", "good", "good"]))


def evaluate(weights="w", **changes):
    plain = {"kind": "evaluation", "task": "letters", "variant": "4bit-r4", "base": "b", "bits": 8, "labels": FACTS}
    return Result(**plain | {"adapter_hash": weights, "created": "2026-01-01"} | changes)


def make_reference(**changes):
    (reference,) = choose_references([evaluate()], "w")
    return dataclasses.replace(reference, **changes)


def test_facts_count_answers_truths_and_abstentions():
    reference = make_reference()
    assert (reference.answers, reference.truths, reference.num_answers) == ([2, 2], [1, 3], 4)
    assert (reference.accuracy, reference.num_fitted) == (0.75, 4)
    assert 0.5 < reference.estimated_accuracy < 1
    assert [reference.abstention_at(threshold) for threshold in (0, 0.6, 0.61, 0.7, 0.75, 0.76, 0.9, 1)] == [
        *(0, 0, 0.25, 0.25, 0.5, 0.75, 0.75, 1),
    ]
    assert reference.abstention_at(0.605) == pytest.approx(0.125)


def test_newest_whole_evaluation_of_these_weights_counts():
    found = choose_references(
        [
            evaluate(data_hash="old"),
            evaluate(data_hash="new"),
            evaluate(data_hash="part", is_partial=True),
            evaluate(data_hash="elsewhere", weights="other"),
            evaluate(data_hash="generated", labels={}),
            evaluate(bits=4, data_hash="4 bit"),
            evaluate(bits=16, data_hash="part at 16", is_partial=True),
            evaluate(labels={"choices": ["of another version"]}, bits=2),
        ],
        "w",
    )
    assert [(each.bits, each.data_hash) for each in found] == [(4, "4 bit"), (8, "new"), (16, "part at 16")]


def test_server_takes_the_reference_of_its_bits_and_of_the_question_that_is_asked():
    at_4, at_8 = make_reference(bits=4, created="2026-02-02"), make_reference()
    assert find_reference([at_4, at_8], "letters", ["good", "bad"], 8) is at_8
    assert find_reference([at_4, at_8], "letters", ["good", "bad"], 16) is at_4
    assert find_reference([at_8], "fpb", ["good", "bad"], 8) is None
    assert find_reference([at_8], "letters", ["good", "bad", "ugly"], 8) is None
    generated = make_reference(task="synthetic_sentiment")
    assert find_reference([generated], "fpb", ["good", "bad"], 8) is generated


@pytest.fixture
def adapter(tmp_path):
    """Folder with weights alone, and an evaluation of them beside it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    append_result(tmp_path / "results.jsonl", evaluate(hash_file(adapter / "adapter_model.safetensors")))
    return adapter


def test_reference_is_written_beside_the_weights_and_changes_no_hash_of_the_contract(tmp_path):
    adapter = make_run(tmp_path)
    append_result(adapter.parent / "results.jsonl", evaluate(hash_file(adapter / "adapter_model.safetensors")))
    said = refresh_reference(adapter, adapter.parent / "results.jsonl")
    assert said.startswith(
        f"Reference of monitoring written to {adapter / REFERENCE_FILE}: letters at 8 bit, 4 answers, "
    )
    contract = read_contract(adapter)
    contract.check_files(adapter)
    weights = contract.files["adapter_model.safetensors"]
    (reference,) = read_references(adapter, weights)
    assert isinstance(reference, Reference)
    assert (reference.task, reference.answers) == ("letters", [2, 2])
    with pytest.raises(
        AdapterError, match=r"belongs to other weights \(\w{12}, these are other\)\. Run `finlora evaluate`"
    ):
        read_references(adapter, "other")
    (adapter / REFERENCE_FILE).unlink()
    assert read_references(adapter, weights) == ()


def test_reference_of_an_evaluation_into_another_folder_stays(adapter, tmp_path):
    weights = hash_file(adapter / "adapter_model.safetensors")
    refresh_reference(adapter, adapter.parent / "results.jsonl")
    (tmp_path / "other").mkdir()
    append_result(tmp_path / "other" / "results.jsonl", evaluate(weights, bits=4))
    refresh_reference(adapter, tmp_path / "other" / "results.jsonl")
    assert [each.bits for each in read_references(adapter, weights)] == [4, 8]
    (adapter / REFERENCE_FILE).write_text("damaged")
    refresh_reference(adapter, tmp_path / "other" / "results.jsonl")
    assert [each.bits for each in read_references(adapter, weights)] == [4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:50], "is not a reference as `finlora evaluate` writes it"),
        (lambda text: text.replace("[2, 2]", "[2, 3]"), "it was changed after it was written"),
        (lambda text: reseal(text, format=2), "it has format 2, expected 1"),
        (lambda text: reseal(text, tasks=[{"task": "letters"}]), "choices is missing"),
        (lambda text: reseal(text, answers=[2]), "its lists of counts do not fit together"),
        (lambda text: reseal(text, temperature=0.0), "its temperature or accuracy is out of range"),
        (lambda text: reseal(text, below=[4] * 100 + [0]), "its counts below a threshold do not grow"),
    ],
)
def test_damaged_reference_is_refused_by_what_is_wrong(adapter, change, words):
    refresh_reference(adapter, adapter.parent / "results.jsonl")
    path = adapter / REFERENCE_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(AdapterError) as caught:
        read_references(adapter, hash_file(adapter / "adapter_model.safetensors"))
    assert words in str(caught.value)


def reseal(text, **changes):
    """Return a reference with keys of the file or of its task changed, and a new seal."""
    values = json.loads(text)
    del values["sha256"]
    for name, value in changes.items():
        (values if name in values else values["tasks"][0])[name] = value
    return json.dumps(seal(values))


def test_folder_that_cannot_be_written_keeps_its_state(adapter, monkeypatch):
    def fail(_path, _text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finlora.evaluate.reference.write_whole", fail)
    said = refresh_reference(adapter, adapter.parent / "results.jsonl")
    assert said.endswith(
        "reference.json is not written (No space left on device): a server compares with its old state, if there is one."
    )
