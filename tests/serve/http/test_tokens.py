"""Paths that clients of vLLM know, and what is not offered."""

from __future__ import annotations

import http.client

import openai
import pytest
from wire import send

TEXT = "Profit rose 12 %"


def ask(live, path, body):
    return send(live.address, path, live.keys["desk"], body)


def test_tokens_are_counted_as_completions_count_them(live, client):
    counted = ask(live, "/tokenize", {"model": "tiny", "prompt": TEXT, "return_token_strs": True}).body
    reply = client.completions.create(model="tiny", prompt=counted["tokens"], max_tokens=1)
    assert counted["count"] == len(counted["tokens"]) == reply.usage.prompt_tokens
    assert counted["max_model_len"] == 1024
    assert counted["token_strs"][-1] in TEXT
    said = [{"role": "user", "content": TEXT}]
    turns = ask(live, "/tokenize", {"messages": said}).body
    chat = client.chat.completions.create(model="tiny", messages=said, max_tokens=1)
    assert turns["count"] == chat.usage.prompt_tokens


def test_tokens_become_their_text_again(live):
    ids = ask(live, "/tokenize", {"prompt": TEXT, "add_special_tokens": False}).body["tokens"]
    assert ask(live, "/detokenize", {"tokens": ids}).body == {"prompt": TEXT}
    assert "outside 0 to 511" in ask(live, "/detokenize", {"tokens": [512]}).error["message"]
    assert "either prompt or messages" in ask(live, "/tokenize", {"model": "tiny"}).error["message"]


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_needs_no_key_and_has_no_body(live, path):
    reply = send(live.address, path, None)
    assert (reply.status, reply.text) == (200, "")
    assert send(live.address, "/ping", None, {}).status == 200


def test_head_is_as_get_without_a_body(live):
    host, port = live.address.removeprefix("http://").split(":")
    line = http.client.HTTPConnection(host, int(port), timeout=30)
    for path, status in (("/v1/models", 200), ("/health", 200), ("/", 200), ("/v1/completions", 405)):
        line.request("HEAD", path, headers={"Authorization": f"Bearer {live.keys['desk']}"})
        reply = line.getresponse()
        assert (reply.status, reply.read()) == (status, b"")
    line.close()


def test_what_is_not_offered_says_so(client, live):
    with pytest.raises(openai.NotFoundError, match=r"embeddings are not offered.*Use `/v1/classify` for labels"):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError, match="stored responses are not offered"):
        client.responses.retrieve("resp_1")
    assert ask(live, "/v1/embeddings", {"input": "x"}).error["code"] == "not_offered"


def test_api_page_loads_nothing_from_other_hosts(live):
    page = send(live.address, "/docs", None)
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "POST /v1/chat/completions" in page.text
    assert "<script" not in page.text
    assert "//" not in page.text.replace("http://127.0.0.1", "")
