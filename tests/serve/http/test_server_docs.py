"""Examples of docs/how-to/serve.md, run against a real server with only names and addresses replaced."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from wire import send

from finlora.serve.http.asgi import make_app
from finlora.serve.protocol import ChatResponse, CompletionResponse

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "serve.md"
BLOCKS = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
COMMANDS = [block.strip() for block in BLOCKS if block.strip().startswith("curl")]
PROGRAMS = [textwrap.dedent(block) for block in BLOCKS if "import OpenAI" in block]
NAMES = {"llama-8b:sentiment": "tiny:good", "llama-8b": "tiny", "adapters/ner": "adapters/good"}


def run(words, live):
    environment = {
        "SERVER": live.address,
        "KEY": live.keys["desk"],
        "ADMIN_KEY": live.keys["admin"],
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def named(text):
    for name, own in NAMES.items():
        text = text.replace(name, own)
    return text


@pytest.fixture
def newest_version_after(live):
    """Undo the examples' roll-back, because other tests share the server."""
    yield
    reply = send(live.address, "/v1/adapters/good/version", live.keys["admin"], {"version": None})
    assert reply.body["current"] == "v2"


@pytest.mark.usefixtures("newest_version_after")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.search(r"/v1/\w+", command)[0])
def test_curl_example_is_answered(command, live):
    answer = json.loads(run(["bash", "-c", named(command)], live))
    assert "error" not in answer
    assert {"results", "answer", "current"} & set(answer)


def test_openai_example_prints_the_same_text_twice(live):
    (program,) = PROGRAMS
    written = run([sys.executable, "-c", named(program)], live)
    middle = len(written) // 2
    assert written[:middle] == written[middle + 1 :] != ""
    assert written[middle] == "\n"


@pytest.mark.parametrize(
    ("path", "body", "form"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "max_tokens": 2},
            ChatResponse,
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}, ChatResponse),
        ("/v1/completions", {"prompt": ["Hello", "you"], "logprobs": 0, "max_tokens": 2}, CompletionResponse),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 2}, CompletionResponse),
    ],
)
def test_reply_has_the_fields_that_the_reference_names(path, body, form, live):
    reply = send(live.address, path, live.keys["desk"], {"model": "tiny", **body})
    assert reply.status == 200
    assert form.model_validate(reply.body).model_dump(exclude_unset=True) == reply.body


def test_every_kind_of_request_has_an_example():
    assert {re.search(r"/v1/\w+", command)[0] for command in COMMANDS} == {
        "/v1/classify",
        "/v1/extract",
        "/v1/adapters",
    }
    assert len(PROGRAMS) == 1


def test_checkout_that_is_not_installed_serves_too(monkeypatch):
    """`serve deploy` with a working_dir runs from such a checkout."""

    def find(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find)
    limits = SimpleNamespace(max_body_bytes=1)
    server = SimpleNamespace(
        keys=None, config=SimpleNamespace(limits=limits, allowed_origins=()), meter=SimpleNamespace(count_request=None)
    )
    assert make_app(server, has_proxy=True)._app.version == "not installed"
