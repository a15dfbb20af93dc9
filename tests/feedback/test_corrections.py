"""Corrections: what each row must have, what the audit log adds, and the words of every refusal."""

from __future__ import annotations

import pytest
from correction_rows import letter, write_corrections
from letters import LETTERS

from finlora.data.sets.catalog import TASKS
from finlora.data.taskfile.load import task_file_from_tree
from finlora.data.taskfile.read import make_task
from finlora.errors import DatasetError, ResultError
from finlora.feedback.corrections import COLUMNS, read_corrections
from finlora.serve.accounts.audit import AuditEntry, AuditLog, hash_text

TASK = make_task(task_file_from_tree(LETTERS))
RENDER = TASK.form.render


@pytest.fixture
def log(tmp_path):
    """Folder of an audit log: one request of two texts without texts in it, one with them, one of another task."""

    def entry(request_id, asked, answer, index=0, **texts):
        plain = dict.fromkeys(("key_id", "path", "model", "base_hash", "outcome"), "x")
        numbers = dict.fromkeys(("prompt_tokens", "completion_tokens", "seconds"), 1)
        hashes = {"prompt_hash": hash_text(asked), "output_hash": hash_text(answer), "adapter_hash": None}
        return AuditEntry(request_id=request_id, index=index, **plain, **numbers, **hashes, **texts)

    audit = AuditLog(tmp_path / "audit")
    for index, text in enumerate(("One letter", "Two letters")):
        audit.append(entry("hashed", RENDER(text, ""), "good", index))
    for index, text in enumerate(("Three letters", "Four letters")):
        audit.append(entry("whole", RENDER(text, ""), "bad", index, prompt=RENDER(text, ""), output="bad"))
    audit.append(entry("other", "Tell me a story", "Once", prompt="Tell me a story", output="Once"))
    audit.close()
    return tmp_path / "audit"


def read(path, audit=None, task=TASK):
    return read_corrections(path, task, audit)


@pytest.mark.parametrize("name", ["corrections.jsonl", "corrections.csv"])
def test_rows_of_the_task_are_read_and_others_counted(tmp_path, name):
    rows = [
        letter(label="1", answered="bad", by="A. Analyst", time="2026-11-30T10:15+01:00", comment="x", mood="blue"),
        letter(),
        letter(text="Another", label="good"),
        letter(task="fpb", text="Profit rose", label="positive"),
    ]
    rows[1]["label"] = "1"
    found = read(write_corrections(tmp_path, rows, name))
    first, second = found.kept
    assert (first.label, first.answered, first.by, first.comment) == ("good", "bad", "A. Analyst", "x")
    assert (first.time, first.source) == ("2026-11-30T09:15:00", f"{name}:{2 if name.endswith('.csv') else 1}")
    assert (first.prompt, second.text) == (RENDER("Dear bank", ""), "Another")
    assert [each.text for each in found.duplicates] == ["Dear bank"]
    assert (found.other_tasks, found.ignored_columns) == ({"fpb": 1}, ("mood",))


def test_audit_log_gives_texts_and_the_models_labels(tmp_path, log):
    rows = [
        {"task": "letters", "request_id": "whole", "index": 1, "label": "good"},
        letter(text="Two letters", request_id="hashed", label="good"),
        letter(text="Of no request", label="good"),
    ]
    found = read(write_corrections(tmp_path, rows), log).kept
    assert [(each.text, each.answered) for each in found] == [
        *(("Four letters", "bad"), ("Two letters", "good"), ("Of no request", "")),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (letter(label="bda"), "label 'bda' is not one of letters (did you mean bad?): expected bad, good, 0, 1"),
        (letter(label=" "), "label is empty: expected the right label"),
        (letter(answered="worse"), "answered='worse' is not a label of letters: leave it empty if unknown"),
        (letter(about="x"), "about='x': letters does not ask that, leave it empty"),
        (letter(time="30/11/2026"), "time='30/11/2026': expected ISO 8601, such as 2026-11-30T09:15"),
        (letter(text=""), "text is empty: fill it in, or give the request_id"),
        (letter(label=["bad"]), "column label: found ['bad'], expected a text or a number."),
        (letter(text="", request_id="gone"), "the audit log has no request 'gone': correct request_id"),
        (letter(text="", request_id="whole"), "request 'whole' has 2 texts: say which one under index, from 0"),
        (letter(text="", request_id="whole", index=2), "request 'whole' has no text of index 2: it has 2, from 0"),
        (
            letter(text="", request_id="hashed", index=1),
            "holds hashes of texts alone (audit_texts is off): fill the text in",
        ),
        (letter(text="", request_id="other"), "request 'other' did not ask letters: correct task or request_id"),
        (
            letter(request_id="whole"),
            "request 'whole' did not ask letters about this text: the hash of its prompt differs",
        ),
        (
            letter(text="Two letters", request_id="hashed", answered="bad"),
            "answered='bad', and the audit log says 'good': correct the row",
        ),
    ],
)
def test_row_that_cannot_be_used_is_refused_by_line(tmp_path, log, row, words):
    path = write_corrections(tmp_path, [letter(text="Fine"), row])
    with pytest.raises(DatasetError) as caught:
        read(path, log)
    assert str(caught.value).startswith("corrections.jsonl: 1 fault in its corrections:\n  - corrections.jsonl:2: ")
    assert words in str(caught.value)


def test_request_without_a_log_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="text is empty: fill it in, or give the server's audit log with --audit"):
        read(write_corrections(tmp_path, [letter(text="", request_id="whole")]))


def test_two_labels_for_one_text_name_their_rows(tmp_path):
    rows = [letter(), letter(text="Other"), letter(label="good"), letter(label="0")]
    with pytest.raises(DatasetError) as caught:
        read(write_corrections(tmp_path, rows))
    said = str(caught.value)
    assert "corrections.jsonl:1 says 'bad', corrections.jsonl:3 says 'good', corrections.jsonl:4 says 'bad'" in said
    assert "for the same text: agree on one label, and take the other rows out" in said


def test_many_faults_are_counted_and_the_first_shown(tmp_path):
    with pytest.raises(DatasetError) as caught:
        read(write_corrections(tmp_path, [letter(text=f"Text {number}", label="x") for number in range(20)]))
    assert str(caught.value).startswith("corrections.jsonl: 20 faults in its corrections:")
    assert str(caught.value).endswith("and 8 more")
    assert str(caught.value).count("is not one of letters") == 12


def test_table_without_the_columns_or_the_task_is_refused(tmp_path, log):
    with pytest.raises(DatasetError, match=r"has no column label: found task, lable; .* Did you mean lable\?"):
        read(write_corrections(tmp_path, [{"task": "letters", "lable": "bad"}]))
    with pytest.raises(DatasetError, match="corrects fpb, and nothing of letters: choose another --task"):
        read(write_corrections(tmp_path, [letter(task="fpb")]))
    next(log.glob("*.jsonl")).write_text('{"request_id": "whole"}\n')
    with pytest.raises(ResultError, match="is not an entry of an audit log"):
        read(write_corrections(tmp_path, [letter(request_id="whole")]), log)


def test_entity_and_question_are_required_where_the_task_asks_them(tmp_path):
    row = {"task": "ner", "text": "Rome met Ines.", "label": "person"}
    with pytest.raises(DatasetError, match="about is empty: name the entity that was asked"):
        read(write_corrections(tmp_path, [row]), task=TASKS["ner"])
    with pytest.raises(DatasetError, match="the entity 'Oslo' is not in the text"):
        read(write_corrections(tmp_path, [row | {"about": "Oslo"}]), task=TASKS["ner"])
    (found,) = read(write_corrections(tmp_path, [row | {"about": "Ines"}]), task=TASKS["ner"]).kept
    assert found.prompt == TASKS["ner"].form.render("Rome met Ines.", "Ines")


def test_of_kind_multi_the_label_is_named_and_its_answer_corrected(tmp_path):
    task = make_task(task_file_from_tree({**LETTERS, "kind": "multi"}))
    rows = [letter(about="good", label="Yes", answered="No"), letter(about="bad", label="No")]
    found = read(write_corrections(tmp_path, rows), task=task).kept
    assert [(each.about, each.label, each.answered) for each in found] == [("good", "Yes", "No"), ("bad", "No", "")]
    with pytest.raises(DatasetError, match="letters question 'worse' is not known: expected one of bad, good"):
        read(write_corrections(tmp_path, [letter(about="worse", label="Yes")]), task=task)


def test_generated_set_is_corrected_under_the_name_that_is_asked(tmp_path):
    row = {"task": "fpb", "text": "Profit rose", "label": "positive"}
    (found,) = read(write_corrections(tmp_path, [row]), task=TASKS["synthetic_sentiment"]).kept
    assert (found.task, found.label) == ("synthetic_sentiment", "positive")
    with pytest.raises(DatasetError, match="synthetic cannot be asked, so that its answers cannot be corrected"):
        read(write_corrections(tmp_path, [row | {"task": "synthetic"}]), task=TASKS["synthetic"])


def test_numbers_are_read_as_the_task_file_writes_them(tmp_path):
    tree = {"name": "letters", "kind": "number", "source": {"files": "n.csv"}, "number": {"decimal_mark": ","}}
    task = make_task(task_file_from_tree(tree | {"prompt": {"instruction": "How much?"}}))
    (found,) = read(write_corrections(tmp_path, [letter(label="1.234,50")]), task=task).kept
    assert found.label == "1234.50"
    with pytest.raises(DatasetError, match=r"corrections\.jsonl:1: column answer: found 'much', expected a number"):
        read(write_corrections(tmp_path, [letter(label="much")]), task=task)
    (found,) = read(write_corrections(tmp_path, [letter(label="5", answered="4,0")]), task=task).kept
    assert found.answered == "4.0"


def test_columns_are_those_of_the_reference_page():
    assert (
        *(
            "task",
            "label",
            "text",
            "about",
            "answered",
            "request_id",
            "index",
            "group",
            "by",
            "time",
            "comment",
            "messages",
        ),
    ) == COLUMNS
