"""Financial endpoints: probabilities equal to `finlora ask`, quotes found in the text, refusals with a message."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from letters import LETTERS
from live_server import make_adapter, make_settings
from made_facts import write_reference
from wire import send

from finlora.data.grounding import find_quote
from finlora.data.prompts import HEADLINE_QUESTIONS
from finlora.data.sets.catalog import FORMS, make_question
from finlora.data.taskfile.load import task_file_from_tree
from finlora.data.taskfile.read import make_task
from finlora.data.taskfile.record import hash_question, render_card
from finlora.engine.request import Sampling
from finlora.evaluate.calibration import calibrate_top
from finlora.evaluate.reference import REFERENCE_FILE
from finlora.evaluate.stability import stability_index
from finlora.inference.ask import ask
from finlora.model.contract import read_contract, write_contract, write_tasks
from finlora.serve.accounts.label_monitor import Watched
from finlora.serve.http.client import ask_server

TEXTS = ["Profit rose 12 %", "Loss widened", "Sales were flat"]


@pytest.fixture
def post(live):
    return lambda path, body, key="desk": send(live.address, path, live.keys[key], {"model": "tiny"} | body)


@pytest.mark.parametrize("adapter", [None, "good"])
def test_probabilities_equal_those_of_finlora_ask(post, make_config, adapters, adapter):
    model = f"tiny:{adapter}" if adapter else "tiny"
    reply = post("/v1/classify", {"model": model, "task": "fpb", "texts": TEXTS}).body
    assert (reply["model"], reply["task"], len(reply["results"])) == (model, "fpb", 3)
    folder = adapters / "good" / "v2" if adapter else None
    for text, result in zip(TEXTS, reply["results"], strict=True):
        alone = ask(make_config(), folder, make_question("fpb", text, None), Sampling(), 1, lambda _piece: None)
        assert result["probabilities"] == pytest.approx(alone.probabilities, rel=1e-4)
        assert list(result["probabilities"]) == list(alone.probabilities)
        assert (result["label"], result["abstained"]) == (alone.text, False)


def test_label_below_the_threshold_abstains(post):
    reply = post("/v1/classify", {"task": "fpb", "text": TEXTS[0], "threshold": 1.0}).body
    (result,) = reply["results"]
    assert (result["label"], result["abstained"], len(result["probabilities"])) == (None, True, 3)
    assert reply["usage"]["prompt_tokens"] > 20


def test_each_text_has_its_own_entity(post):
    texts = ["Ines met Bo in Rome.", "Rome met Ines."]
    reply = post("/v1/classify", {"task": "ner", "texts": texts, "about": ["Rome", "Ines"]})
    assert {frozenset(result["probabilities"]) for result in reply.body["results"]} == {
        frozenset({"location", "organization", "person"})
    }


def test_tasks_list_their_labels_and_questions(live):
    tasks = {task["name"]: task for task in send(live.address, "/v1/tasks", live.keys["desk"]).body["data"]}
    assert tuple(tasks) == tuple(FORMS)
    assert (tasks["fpb"]["about"], tasks["fpb"]["labels"]) == ("none", ["negative", "neutral", "positive"])
    assert (tasks["ner"]["about"], tasks["xbrl_tags"]["labels"]) == ("entity", [])
    assert tasks["headline"]["questions"] == list(HEADLINE_QUESTIONS)


@pytest.mark.parametrize("task", ["xbrl_tags", "xbrl_values"])
def test_extract_locates_the_answer_in_the_context(post, task):
    context = "<us-gaap:Revenues contextRef='FY'>1234</us-gaap:Revenues>"
    asked = {"task": task, "context": context, "question": "How much?", "max_tokens": 12}
    reply = post("/v1/extract", asked).body
    quote = find_quote(reply["answer"], context)
    assert reply["quote"] == ({"start": quote[0], "end": quote[1]} if quote else None)
    assert reply["grounded"] is (quote is not None)
    assert reply["usage"]["completion_tokens"] == 12


def test_extract_has_its_own_default_length(post):
    asked = {"task": "xbrl_values", "context": "<a>1234</a>", "question": "How much?"}
    assert post("/v1/extract", asked).body["usage"]["completion_tokens"] == 48
    assert post("/v1/extract", asked | {"max_tokens": 60}).body["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("classify", {"task": "fpb"}, "expected either text or texts"),
        ("classify", {"task": "fpb", "text": "a", "texts": ["a"]}, "expected either text or texts"),
        ("classify", {"task": "fpb", "texts": []}, "Invalid value for 'texts': list should have at least 1 item"),
        ("classify", {"task": "fpb", "text": "  "}, "found an empty text"),
        ("classify", {"task": "xbrl_tags", "text": "a"}, "task 'xbrl_tags' has no labels here: expected one of fpb,"),
        ("classify", {"task": "ner", "text": "Rome"}, "found no about for task ner: name the entity"),
        ("classify", {"task": "ner", "text": "Rome", "about": "Oslo"}, "'Oslo' is not in the text"),
        (
            "classify",
            {"task": "headline", "text": "Gold"},
            "about for task headline: name the question, one of price, price up, ",
        ),
        ("classify", {"task": "headline", "text": "Gold", "about": "x"}, "headline question 'x' is not known"),
        ("classify", {"task": "fpb", "text": "a", "about": "x"}, "found about='x' for task fpb: leave it out"),
        ("classify", {"task": "ner", "texts": ["a", "b"], "about": ["a"]}, "about holds 1 entries for 2 texts"),
        (
            "classify",
            {"task": "fpb", "text": "a", "threshold": 2},
            "Invalid value for 'threshold': input should be less than or equal to 1",
        ),
        ("classify", {"task": "fpb", "texts": ["a"] * 300}, "found 300 texts: expected at most 256 in one request"),
        ("classify", {"task": "fpb", "text": "rate " * 2000}, "This model's maximum context length is 1024 tokens."),
        (
            "extract",
            {"task": "fpb", "context": "a", "question": "b"},
            "task 'fpb' quotes no answer from a text: expected one of xbrl_tags, xbrl_values.",
        ),
        ("extract", {"task": "xbrl_tags", "context": "a", "question": " "}, "question is empty"),
        ("extract", {"task": "xbrl_tags", "context": "", "question": "b"}, "found an empty text"),
    ],
)
def test_invalid_question_is_refused_with_a_message(post, live, path, body, words):
    reply = post(f"/v1/{path}", body)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert words in reply.error["message"]
    live.wait_until_idle()


@pytest.fixture
def letters(adapters, tiny_base, tmp_path):
    """An adapter `letters` in the served folder with a label task and a text task, whose task files the server does not have."""
    home = adapters / "letters"
    make_adapter(make_settings(tiny_base).model, home, 7)
    tasks = {
        "letters": task_file_from_tree(LETTERS),
        "notes": task_file_from_tree({"name": "notes", "kind": "text", "source": {"files": "n.csv"}}),
    }
    write_tasks(home, {name: render_card(task) for name, task in tasks.items()})
    hashes = {name: hash_question(task) for name, task in tasks.items()}
    write_contract(home, dataclasses.replace(read_contract(home), tasks=hashes))
    yield home
    shutil.rmtree(home)


def test_adapter_brings_its_task_to_the_server(live, post, letters):
    listed = {task["name"]: task for task in send(live.address, "/v1/tasks", live.keys["desk"]).body["data"]}
    assert (listed["letters"]["models"], listed["letters"]["labels"]) == (["tiny:letters"], ["bad", "good"])
    assert (listed["fpb"]["models"], listed["notes"]["quoted"], listed["xbrl_tags"]["quoted"]) == ([], False, True)
    reply = post("/v1/classify", {"model": "tiny:letters", "task": "letters", "text": "Dear bank"})
    assert set(reply.body["results"][0]["probabilities"]) == {"bad", "good"}
    other = post("/v1/classify", {"task": "letters", "text": "Dear bank"})
    words = "task 'letters' comes with the model tiny:letters, and tiny was asked: ask that model."
    assert (other.status, other.body["error"]["message"]) == (400, words)
    assert post("/v1/classify", {"model": "tiny:letters", "task": "leters", "text": "a"}).status == 400


def test_merged_base_brings_its_task_to_the_server(live, post, monkeypatch):
    task = make_task(task_file_from_tree(LETTERS))
    monkeypatch.setattr(live.server, "base", dataclasses.replace(live.server.base, tasks={"letters": task}))
    listed = {task["name"]: task for task in send(live.address, "/v1/tasks", live.keys["desk"]).body["data"]}
    assert listed["letters"]["models"] == ["tiny"]
    reply = post("/v1/classify", {"task": "letters", "text": "Dear bank"})
    assert set(reply.body["results"][0]["probabilities"]) == {"bad", "good"}


def test_text_of_an_adapters_task_is_generated_and_not_quoted(post, letters):
    asked = {"model": "tiny:letters", "task": "notes", "context": "Say a word", "max_tokens": 3}
    reply = post("/v1/extract", asked).body
    assert (reply["quote"], reply["grounded"], reply["usage"]["completion_tokens"] <= 3) == (None, False, True)
    assert post("/v1/classify", {"model": "tiny:letters", "task": "notes", "text": "a"}).status == 400


def test_ask_finds_the_endpoint_of_an_adapters_task(live, letters):
    pieces = []
    for task in ("letters", "notes"):
        reply = ask_server(
            *(live.address, live.keys["desk"], "tiny:letters", task, "Dear bank", None),
            temperature=0.0,
            seed=None,
            on_text=pieces.append,
        )
        assert bool(reply.probabilities) is (task == "letters")
        assert reply.is_quoted is False
    assert len(pieces) == 1


def test_labels_are_counted_and_compared_with_the_adapters_test_split(live, post, letters, tmp_path):
    watched = Watched("letters", "", "letters")
    asked = {"model": "tiny:letters", "task": "letters", "texts": ["Secret one", "Secret two"], "threshold": 1.0}
    post("/v1/classify", asked)
    assert live.meter.references[watched] == (None, {})
    assert [(each[0], *each[3:]) for each in live.meter.labels[-2:]] == [(watched, None, True)] * 2
    write_reference(letters, tmp_path / "results.jsonl", "letters", ["bad", "good"], [150, 50])
    results = post("/v1/classify", asked | {"threshold": 0.0, "texts": ["Secret one"] * 100}).body["results"]
    reference, shares = live.meter.references[watched]
    assert (reference.num_answers, shares) == (200, {"bad": 0.75, "good": 0.25})
    label, tops = results[0]["label"], results[0]["probabilities"]
    assert live.meter.labels[-1][:2] == (watched, label)
    assert live.meter.labels[-1][2:] == (tops[label], pytest.approx(calibrate_top(list(tops.values()), 2.0)), False)
    live.wait_for(lambda: live.meter.windows[watched].num_answers == 100)
    found = [100, 0] if label == "bad" else [0, 100]
    figures = live.meter.windows[watched]
    assert figures.stability_index == pytest.approx(stability_index([150, 50], found))
    assert (figures.abstention, figures.tested_abstention) == (0, 0)
    assert "Secret" not in str((live.meter.labels, live.meter.references, live.meter.windows))


def test_adapter_whose_reference_is_damaged_is_served_without_it(live, post, letters, caplog):
    (letters / REFERENCE_FILE).write_text("{}")
    assert post("/v1/classify", {"model": "tiny:letters", "task": "letters", "text": "Dear bank"}).status == 200
    assert live.meter.references[Watched("letters", "", "letters")] == (None, {})
    assert "Answers are not compared with the test split: " in caplog.text
