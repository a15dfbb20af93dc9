"""Real server on the tiny base for tests: the engine in this process, the application on the loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

from finlora.config import LoraConfig, ModelConfig
from finlora.engine.engine import EngineCore
from finlora.grammar.vocabulary import Vocabulary
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base
from finlora.model.contract import make_contract, write_contract
from finlora.model.lora import attach_lora, save_adapter, trainable_parameters
from finlora.serve.accounts.audit import AuditLog
from finlora.serve.accounts.keys import KeyRing, add_key
from finlora.serve.http.asgi import make_app
from finlora.serve.http.server import Server
from finlora.serve.live.engine_thread import AsyncEngine
from finlora.serve.served_model import make_scheduler, read_base
from finlora.serve.settings import ServeConfig, read_settings
from finlora.serve.stage_states import OpenCore, StageFacts
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
ADMIN = "an-admin-key-of-the-tests"


class CountingMeter:
    """Recorder of a server's metrics."""

    def __init__(self) -> None:
        self.requests, self.answers, self.shown = [], [], []
        self.labels, self.references, self.windows = [], {}, {}

    def count_request(self, path, status, seconds) -> None:
        self.requests.append((path, status))

    def count_answer(self, adapter, outcome, *numbers) -> None:
        self.answers.append((adapter, outcome, *numbers))

    def count_label(self, watched, label, probability, calibrated, *, is_abstained) -> None:
        self.labels.append((watched, label, probability, calibrated, is_abstained))

    def show_reference(self, watched, reference, shares) -> None:
        self.references[watched] = (reference, shares)

    def show_window(self, watched, figures) -> None:
        self.windows[watched] = figures

    def show(self, snapshot, *, is_ready) -> None:
        self.shown.append((snapshot, is_ready))


def make_adapter(model: ModelConfig, folder: Path, seed: int, template: str = "raw", date: str | None = None) -> Path:
    """Write an adapter with random weights and its contract."""
    base = load_base(model, 16, CPU, 0)
    net = attach_lora(base.model, LoraConfig(), model.base, 1)
    torch.manual_seed(seed)
    for parameter in trainable_parameters(net).values():
        parameter.data = torch.randn_like(parameter) * 2
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = save_adapter(net, folder)
    write_contract(folder, make_contract(base, model.base, LoraConfig(), template, {"fpb": "x"}, 5, size, {}, date))
    return folder


def make_settings(base: Path, **changes) -> ServeConfig:
    model = {"base": str(base), "bits": 16, "compute_dtype": "float32"}
    stages = {"num": 2, "device": "cpu", "cache_rows": 1024}
    return read_settings({"name": "tiny", "model": model, "stages": stages} | changes)


def open_in_process(config: ServeConfig, executor=InProcess) -> OpenCore:
    """Open the base's two layers as two stages in this process."""
    base, stages = read_base(config), []
    for index in range(2):
        net = load_base(config.model, 16, CPU, 0, range(index, index + 1)).model
        words = Vocabulary(base.tokenizer, base.end_token_id)
        stages.append(Stage(net, range(index, index + 1), config.stages.cache_rows, torch.float32, vocabulary=words))
    core = EngineCore(executor(stages), make_scheduler(config, base, 2, follows=True), base.tokenizer)
    facts = [StageFacts(first_layer=n, last_layer=n, weights_gib=0.1, cache_gib=0.1) for n in range(2)]
    return OpenCore(core=core, stages=tuple(facts), check=lambda: None, close=lambda: None)


@dataclass(frozen=True)
class Live:
    """Running server."""

    address: str
    server: Server
    meter: CountingMeter
    keys: dict[str, str]

    @property
    def engine(self) -> AsyncEngine:
        return self.server.engine

    def wait_until_idle(self) -> None:
        """Return when no request holds a cache row."""
        self.wait_for(lambda: (s := self.engine.snapshot).active + s.queue + s.kv_used == 0)

    def wait_for(self, is_so, seconds: float = 10.0) -> None:
        until = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until, f"not so in {seconds} s: {self.engine.snapshot}"
            time.sleep(0.05)


@contextmanager
def live_server(config: ServeConfig, folder: Path, executor=InProcess) -> Iterator[Live]:
    """Serve while inside, with an admin key of the environment and three keys of a file."""
    keys = {"admin": ADMIN}
    file = folder / "keys.yaml"
    for name, adapters, requests in (("desk", None, None), ("narrow", ("good",), None), ("slow", None, 3)):
        keys[name] = add_key(
            file, name, adapters=adapters, requests_per_minute=requests, tokens_per_minute=None, is_admin=False
        )
    engine = AsyncEngine(lambda: open_in_process(config, executor), config.max_adapters, 0.2)
    meter = CountingMeter()
    audit = AuditLog(Path(config.audit_dir)) if config.audit_dir else None
    ring = KeyRing(file, {"FINLORA_API_KEY": ADMIN})
    server = Server(config, read_base(config), engine, ring, meter, audit)
    engine.start()
    settings = uvicorn.Config(
        make_app(server, has_proxy=False), host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1
    )
    web = uvicorn.Server(settings)
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    try:
        while not web.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        (socket,) = web.servers[0].sockets
        yield Live(f"http://127.0.0.1:{socket.getsockname()[1]}", server, meter, keys)
    finally:
        web.should_exit = True
        thread.join(timeout=20)
        engine.close()
        if audit is not None:
            audit.close()
