"""`finlora ask --server` against the whole server: the same answers in a terminal, failures by words and exit code."""

from __future__ import annotations

import pytest
from wire import send

from finlora.cli.main import main

TEXT = "Profit rose 12 %"


@pytest.fixture
def ask(live, capsys, monkeypatch):
    """Run the verb; returns exit code, standard output and standard error."""
    monkeypatch.setenv("FINLORA_API_KEY", live.keys["desk"])
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "0")  # main sets them where they are not: afterwards they are as before

    def run(*arguments, server=live.address, model="tiny"):
        options = [*(["--server", server] if server else []), *(["--model", model] if model else [])]
        with pytest.raises(SystemExit) as stop:
            main(["ask", *arguments, *options])
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


def test_labels_are_the_servers(ask, live):
    code, out, _ = ask(TEXT, "--task", "fpb", model="tiny:good")
    body = {"model": "tiny:good", "task": "fpb", "text": TEXT}
    (result,) = send(live.address, "/v1/classify", live.keys["desk"], body).body["results"]
    assert code == 0
    for label, value in result["probabilities"].items():
        assert label in out
        assert f"{value:.1%}" in out


def test_text_and_extract_come_as_they_are_written(ask, live):
    code, out, _ = ask(TEXT)
    body = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}]}
    reply = send(live.address, "/v1/chat/completions", live.keys["desk"], body).body
    assert (code, out.strip("\n")) == (0, reply["choices"][0]["message"]["content"].strip("\n"))
    code, out, _ = ask("<a>12</a>", "--task", "xbrl_values", "--about", "How much?")
    assert code == 0
    assert "the answer" in out


@pytest.mark.parametrize(
    ("arguments", "options", "code", "words"),
    [
        ((TEXT, "--task", "fpb"), {"model": "other"}, 2, "the server answers 404: there is no model 'other'"),
        ((TEXT, "--task", "ner"), {}, 2, "the server answers 400: found no about for task ner"),
        ((TEXT,), {"model": "tiny:chatty"}, 2, "the server answers 422"),
        ((TEXT,), {"server": "http://127.0.0.1:9"}, 5, "no server answers at http://127.0.0.1:9"),
        ((TEXT,), {"server": "file:///etc"}, 2, "expected an address such as http://127.0.0.1:8000"),
        ((TEXT,), {"server": None}, 2, "--server and --model go together"),
        ((TEXT, "--base"), {}, 2, "--server and --model go together"),
    ],
)
def test_failure_has_words_and_an_exit_code(ask, arguments, options, code, words):
    found, _, err = ask(*arguments, **options)
    assert found == code
    assert words in err


def test_key_is_asked_for_and_a_wrong_one_refused(ask, monkeypatch):
    monkeypatch.setenv("FINLORA_API_KEY", "wrong")
    assert "the API key is not known" in ask(TEXT)[2]
    monkeypatch.delenv("FINLORA_API_KEY")
    code, _, err = ask(TEXT)
    assert (code, "FINLORA_API_KEY is not set" in err) == (2, True)
