"""Step of serving: every path of the server, with the right key and without, and its answers compared with `ask`'s."""

from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import yaml

from acceptance.checks import Checks
from acceptance.verbs.answering import ANSWER, KNOWN, QUESTIONS, SAME_MODEL, ask_labels, difference, probabilities
from acceptance.walk import Tools, free_port

_FRAGMENT = "<us-gaap:Revenues>48213</>\n<us-gaap:NetIncomeLoss>5120</>\n<us-gaap:Assets>90117</>"


@dataclass
class Client:
    """Client of one server that records the requested paths."""

    address: str
    key: str
    paths: set[str] = field(default_factory=set)

    def ask(
        self,
        path: str,
        body: object = None,
        key: str | None = "",
        route: str = "",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, body (parsed if it is JSON) and headers.

        Args:
            body: sent as JSON with POST. None: GET.
            key: "": the client's own; None: none.
            route: the path as the server declares it, if it contains a name.
        """
        self.paths.add(route or path)
        sent = dict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {key or self.key}"
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        # No proxy of the environment: the server is on the loopback interface.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(self.address + path, data, sent), timeout=120) as reply:
                return reply.status, read_body(reply.read()), {k.lower(): v for k, v in reply.headers.items()}
        except urllib.error.HTTPError as error:
            return error.code, read_body(error.read()), {k.lower(): v for k, v in error.headers.items()}


def read_body(content: bytes) -> Any:
    """Return parsed JSON, or else the text."""
    text = content.decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_stream(text: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the events of a stream, and whether it ended with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"], lines[-1:] == ["[DONE]"]


def serve(tools: Tools) -> None:
    """Serve two adapters on two stages, from the start to Ctrl-C."""
    walk, checks = tools.walk, tools.checks
    folder = walk.output / "serve"
    for name in ("v1", "v2"):
        shutil.copytree(walk.runs / "main" / "adapter", folder / "adapters" / "main" / name)
    damaged = (
        shutil.copytree(walk.runs / "main" / "adapter", folder / "adapters" / "damaged") / "adapter_model.safetensors"
    )
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    port, direct = free_port(), free_port()
    (folder / "serve.yaml").write_text(yaml.safe_dump(settings_of(tools, folder, port)), encoding="utf-8")
    keys = {}
    for name, words in (("desk", ("--admin",)), ("narrow", ("--adapters", "base")), ("slow", ("--requests", "2"))):
        made = tools.finlora("key", name, "--file", folder / "keys.yaml", *words)
        keys[name] = made.text.strip().splitlines()[-1]
    checks.equal("keys that begin with their names", True, all(keys[n].startswith(f"finlora-{n}-") for n in keys))
    stored = (folder / "keys.yaml").read_text(encoding="utf-8")
    checks.equal("keys that the file holds in plain text", [], [n for n in keys if keys[n] in stored])
    dry = tools.finlora("serve", "--config", folder / "serve.yaml", "--dry-run")
    checks.contains("dry run", "at 4 bit in 2 stages", dry.text)
    server = tools.start("serve", "--config", folder / "serve.yaml", "--port", port, "--direct-port", direct)
    tools.until(lambda: "Serving accept at" in server.text, server, "the server comes up")
    checks.about(f"finlora {walk.shorten(['serve', '--config', str(folder / 'serve.yaml')])}", server.seconds)
    client = Client(f"http://127.0.0.1:{port}", keys["desk"])
    _ask_health(client, checks)
    _ask_models(client, checks)
    _ask_labels(tools, client, checks, f"http://127.0.0.1:{direct}")
    _ask_texts(client, checks)
    _ask_forms(client, checks)
    _ask_refused(client, checks, keys)
    _ask_versions(client, checks, keys)
    _read_metrics(tools, checks)
    paths = client.ask("/openapi.json")[1]["paths"]
    checks.equal("paths of the server without a request", [], sorted(set(paths) - client.paths))
    shown = tools.finlora(
        *("ask", QUESTIONS[0][1], "--task", "fpb", "--server", client.address, "--model", "accept:main"),
        environment={"FINLORA_API_KEY": keys["desk"]},
    )
    served = client.ask("/v1/classify", {"model": "accept:main", "task": "fpb", "text": QUESTIONS[0][1]})[1]
    checks.at_most(
        "`ask --server` beside /v1/classify",
        0.002,
        difference(probabilities(shown.text), served["results"][0]["probabilities"]),
    )
    server.send(signal.SIGINT)
    ended = tools.end(server)
    checks.contains("Ctrl-C", "Finishing the answers in flight", ended.text)
    audit = tools.finlora("audit", folder / "audit")
    checks.contains("the audit log", "intact", audit.text)
    # The replica and each process of the direct port have their own log.
    log = max((folder / "audit").glob("*.jsonl"), key=lambda path: path.stat().st_size)
    lines = log.read_text(encoding="utf-8").splitlines()
    checks.at_least("entries of it", 10, len(lines))
    log.write_text("\n".join([lines[0], *lines[2:]]) + "\n", encoding="utf-8")
    cut = tools.finlora("audit", folder / "audit", code=7)
    checks.contains("one entry taken out", "line 2", cut.text)


def settings_of(tools: Tools, folder: Any, port: int) -> dict[str, Any]:
    """Return a Serve YAML like those of serve_configs/."""
    walk = tools.walk
    gpu = {"gpus": walk.scale.share} if walk.device == "cuda" else {}
    args = {
        "name": "accept",
        "model": {"base": str(walk.base), "bits": 4, "template": "chat", "max_seq_len": 1024},
        "stages": {"num": 2, "device": walk.device, "cpus": 0.25, "cache_rows": 8192, **gpu},
        "limits": {"max_texts": 8, "max_new_tokens": 64, "default_new_tokens": 32, "max_body_bytes": 65536},
        "adapters_dir": str(folder / "adapters"),
        "keys_file": str(folder / "keys.yaml"),
        "audit_dir": str(folder / "audit"),
    }
    application = {
        "name": "finlora",
        "route_prefix": "/",
        "import_path": "finlora.serve.deploy.replica:build",
        "args": args,
        "deployments": [{"name": "Server", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.25}}],
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 330},
        "applications": [application],
    }


def _ask_health(client: Client, checks: Checks) -> None:
    until = time.monotonic() + 60
    while (status := client.ask("/readyz")[0]) != 200 and time.monotonic() < until:
        time.sleep(0.5)
    checks.equal("/readyz", 200, status)
    checks.equal("/healthz without a key", (200, {"status": "alive"}), client.ask("/healthz", key=None)[:2])
    status, page, headers = client.ask("/", key=None)
    checks.equal("/ without a key", (200, True), (status, "<title>" in page))
    checks.contains("its policy", "default-src 'self'", headers.get("content-security-policy", ""))
    stages = client.ask("/v1/stages")[1]
    layers = [stage["layers"] for stage in stages["stages"]]
    checks.equal("/v1/stages: layers", [0, 29], [layers[0][0], layers[-1][1]])
    checks.equal("/v1/stages: stages, losses", (2, 0), (len(layers), stages["losses"]))


def _ask_models(client: Client, checks: Checks) -> None:
    names = [model["id"] for model in client.ask("/v1/models")[1]["data"]]
    checks.equal("/v1/models", ["accept", "accept:damaged", "accept:main"], names)
    found = client.ask("/v1/models/accept:main", route="/v1/models/{model}")
    checks.equal("/v1/models/accept:main", (200, "accept:main"), (found[0], found[1].get("id")))
    checks.equal("/v1/models/nothing", 404, client.ask("/v1/models/nothing", route="/v1/models/{model}")[0])
    tasks = {task["name"]: task["labels"] for task in client.ask("/v1/tasks")[1]["data"]}
    checks.equal("/v1/tasks: labels of fpb", {"positive", "neutral", "negative"}, set(tasks["fpb"]))
    status, refused, _ = client.ask("/v1/classify", {"model": "accept:damaged", "task": "fpb", "text": "x"})
    checks.equal("an adapter of which a bit has changed", 422, status)
    checks.contains("its refusal", "adapter_model.safetensors", str(refused))


def _ask_labels(tools: Tools, client: Client, checks: Checks, direct: str) -> None:
    body = {"model": "accept:main", "task": "fpb", "texts": [text for _, text in QUESTIONS]}
    status, reply, headers = client.ask("/v1/classify", body, headers={"X-Request-Id": "accept-1"})
    labels = [result["label"] for result in reply["results"]] if status == 200 else [str(reply)]
    checks.equal("/v1/classify: label of good news", (200, QUESTIONS[0][0]), (status, labels[0]))
    checks.equal("X-Request-Id comes back", "accept-1", headers.get("x-request-id"))
    served = [result["probabilities"] for result in reply["results"]]
    checks.close("sum of the probabilities", 1.0, sum(served[0].values()), 1e-5)
    more = served[1]["negative"] - served[0]["negative"]
    checks.at_least("probability of `negative`, more in bad news than in good", 0.05, more)
    base = client.ask("/v1/classify", {**body, "model": "accept"})[1]["results"][0]["probabilities"]
    checks.at_least("difference from the base's answer", 0.02, difference(base, served[0]))
    other = Client(direct, client.key).ask("/v1/classify", body)[1]
    checks.at_most(
        "the direct port beside the proxy", SAME_MODEL, difference(other["results"][0]["probabilities"], served[0])
    )
    sure = client.ask("/v1/classify", {"model": "accept", "task": "fpb", "text": "x", "threshold": 1.0})[1]["results"][
        0
    ]
    checks.equal("a threshold that it does not reach", (None, True), (sure["label"], sure["abstained"]))
    asked = ask_labels(tools, QUESTIONS[0][1], "eval.bits=4")
    checks.at_most("`ask` beside /v1/classify", SAME_MODEL, difference(asked, served[0]))


def _ask_texts(client: Client, checks: Checks) -> None:
    chat = {
        "model": "accept",
        "messages": [{"role": "user", "content": KNOWN}],
        "max_tokens": 16,
    }
    status, reply, _ = client.ask("/v1/chat/completions", chat)
    text = reply["choices"][0]["message"]["content"] if status == 200 else str(reply)
    checks.contains("/v1/chat/completions", ANSWER, text)
    events, is_closed = read_stream(client.ask("/v1/chat/completions", {**chat, "stream": True})[1])
    streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    checks.equal("the same as a stream, closed by [DONE]", (text, True), (streamed, is_closed))
    plain = {
        "model": "accept",
        "prompt": ["The capital of France is", "One plus one is"],
        "max_tokens": 4,
        "logprobs": 0,
    }
    reply = client.ask("/v1/completions", plain)[1]
    checks.equal(
        "/v1/completions: choices, tokens", (2, 8), (len(reply["choices"]), reply["usage"]["completion_tokens"])
    )
    checks.contains("its first text", "Paris", reply["choices"][0]["text"])
    tokens = reply["choices"][0]["logprobs"]["token_logprobs"]
    checks.at_most("largest log-probability of its tokens", 0.0, max(tokens))
    drawn = {**plain, "prompt": "Once upon a time", "temperature": 1.0, "seed": 7, "max_tokens": 12}
    texts = [client.ask("/v1/completions", drawn)[1]["choices"][0]["text"] for _ in range(2)]
    checks.equal("texts of one seed", texts[0], texts[1])
    question = {
        "model": "accept",
        "task": "xbrl_values",
        "context": _FRAGMENT,
        "question": "What is the value of Revenues?",
    }
    status, reply, _ = client.ask("/v1/extract", question)
    quote = reply.get("quote")
    quoted = _FRAGMENT[quote["start"] : quote["end"]] if quote else None
    checks.equal(
        "/v1/extract: status; quoted where it says so",
        (200, True),
        (status, quoted is None or quoted in reply["answer"] or reply["answer"] in quoted),
    )
    checks.equal("/v1/extract: grounded", quote is not None, reply["grounded"])


def _ask_forms(client: Client, checks: Checks) -> None:
    """Structured output: a schema, a choice, a tool call, and a keyword that is not supported."""
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}, "country": {"type": "string", "maxLength": 20}},
        "required": ["capital", "country"],
    }
    chat = {
        "model": "accept",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 60,
    }
    wish = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    status, reply, _ = client.ask("/v1/chat/completions", {**chat, "response_format": wish})
    text = reply["choices"][0]["message"]["content"] if status == 200 else str(reply)
    checks.contains("an answer by a JSON Schema", '{"capital": "Paris", "country": "', text)
    chosen = client.ask("/v1/chat/completions", {**chat, "guided_choice": ["Rome", "Paris"]})[1]
    checks.equal("a choice", "Paris", chosen["choices"][0]["message"]["content"])
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    called = client.ask("/v1/chat/completions", {**chat, "tools": [tool], "tool_choice": "required"})[1]
    calls = called["choices"][0]["message"].get("tool_calls") or [{"function": {}}]
    checks.equal("a tool call", "look_up", calls[0]["function"].get("name"))
    wish["json_schema"]["schema"] = {"type": "array", "uniqueItems": True}  # type: ignore[index]
    status, refused, _ = client.ask("/v1/chat/completions", {**chat, "response_format": wish})
    checks.equal("a keyword that is not supported", 400, status)
    checks.contains("its refusal", "uniqueItems", str(refused))


def _ask_refused(client: Client, checks: Checks, keys: dict[str, str]) -> None:
    one = {"model": "accept", "task": "fpb", "text": "Profit rose ."}
    checks.equal("no key", 401, client.ask("/v1/classify", one, key=None)[0])
    wrong = client.ask("/v1/classify", one, key="finlora-desk-" + "x" * 43)
    checks.equal("a wrong key", (401, "invalid_api_key"), (wrong[0], wrong[1]["error"]["code"]))
    narrow = client.ask("/v1/classify", {**one, "model": "accept:main"}, key=keys["narrow"])[0]
    checks.equal(
        "a key for only the base: adapter, base",
        (404, 200),
        (narrow, client.ask("/v1/classify", one, key=keys["narrow"])[0]),
    )
    statuses = [client.ask("/v1/classify", one, key=keys["slow"])[0] for _ in range(4)]
    checks.equal("four requests of a key of two a minute", True, statuses[0] == 200 and statuses[-1] == 429)
    checks.equal(
        "more texts than limits.max_texts",
        400,
        client.ask("/v1/classify", {"model": "accept", "task": "fpb", "texts": ["x"] * 9})[0],
    )
    long = client.ask("/v1/completions", {"model": "accept", "prompt": "word " * 3000, "max_tokens": 4})
    checks.equal(
        "a prompt over model.max_seq_len", (400, "context_length_exceeded"), (long[0], long[1]["error"]["code"])
    )
    checks.equal("a body over limits.max_body_bytes", 413, client.ask("/v1/classify", b" " * 70000)[0])
    checks.equal("a field that is not known", 400, client.ask("/v1/classify", {**one, "colour": "red"})[0])
    checks.equal("a path that is not there", 404, client.ask("/v1/nothing")[0])
    client.paths.discard("/v1/nothing")


def _ask_versions(client: Client, checks: Checks, keys: dict[str, str]) -> None:
    def current() -> Any:
        found = {adapter["name"]: adapter for adapter in client.ask("/v1/adapters")[1]["data"]}
        return found["main"].get("version") or found["main"].get("current")

    route = "/v1/adapters/{name}/version"
    checks.equal("the version served: the newest", "v2", current())
    checks.equal(
        "rolled back without an admin key",
        403,
        client.ask("/v1/adapters/main/version", {"version": "v1"}, keys["slow"], route)[0],
    )
    checks.equal("rolled back", 200, client.ask("/v1/adapters/main/version", {"version": "v1"}, route=route)[0])
    checks.equal("the version served then", "v1", current())


def _read_metrics(tools: Tools, checks: Checks) -> None:
    """Read the Prometheus page of the cluster's node, which Ray updates every few seconds."""
    port, text = tools.walk.metrics_port, ""
    until = time.monotonic() + 30
    while "finlora_answers_total" not in text and time.monotonic() < until:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://127.0.0.1:{port}/metrics", timeout=5
            ) as reply:
                text = reply.read().decode("utf-8", errors="replace")
        except OSError:
            pass
        time.sleep(1)
    if not text and tools.walk.dashboard_port is None:
        checks.skip("metrics", "this Ray has no dashboard, whose agent shows metrics")
        return
    named = {
        line.split("{")[0].removeprefix("ray_") for line in text.splitlines() if "finlora_" in line and line[0] != "#"
    }
    wanted = {"finlora_http_requests_total", "finlora_answers_total", "finlora_prompt_tokens_total", "finlora_ready"}
    wanted |= {"finlora_labels_total", "finlora_label_reference_answers"}
    checks.equal("metrics that are missing", [], sorted(wanted - named))
