"""Settings of a served model: the `args` of an application in serve_configs/*.yaml, checked like a run's config.

Host, port and TLS of the proxy are in Ray Serve's own `http_options`, the number of replicas in its `deployments`. Settings
hold no secrets: keys come hashed from a file, or from the environment.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finlora.config import Bits, ModelConfig, Transport
from finlora.configfile import settings_from_tree
from finlora.errors import ConfigError
from finlora.machine.working_dir import describe_lost

_ORIGIN = re.compile(r"https?://[^/\s?#*]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesConfig:
    """Pipeline stages of a replica: Ray actors, each with a range of layers."""

    num: int = 1
    """Pipeline stages that share the layers. A single stage also runs in a process of its own, so that a GPU fault does not
    end the server."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the stages. FinLoRA never falls back to `cpu` by itself."""
    gpus: float = 1.0
    """GPUs that Ray reserves for each stage."""
    cpus: float = 1.0
    """CPU cores that Ray reserves for each stage."""
    cache_rows: int = 32768
    """Tokens that the KV cache holds, over all requests. Each stage holds the part of its own layers."""
    keep_unpacked: bool = False
    """Hold 4-bit weights as bfloat16: faster long prompts, four times the memory."""
    transport: Transport = "messages"
    """How hidden states pass between stages: as Ray messages, by NCCL from GPU to GPU, or by gloo over sockets. With
    `messages`, stages on one machine whose GPUs reach each other's memory copy from GPU to GPU."""
    wait_s: float | None = 600.0
    """Seconds to wait for GPUs and cores that others hold. None: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """Limits of a single request, and of all requests together. Limits of a key are in the key file."""

    max_body_bytes: int = 2 * 2**20
    """Largest request body, in bytes."""
    max_new_tokens: int = 2048
    """Most new tokens in an answer."""
    default_new_tokens: int = 256
    """Most new tokens in an answer whose request does not set max_tokens."""
    default_extract_tokens: int = 48
    """The same for `/v1/extract`, whose answers are a tag or a number."""
    max_texts: int = 256
    """Most texts in one classification, and most prompts in one completion."""
    max_waiting: int = 1024
    """Most requests in the queue; further ones get 429."""
    max_batch_tokens: int = 2048
    """Most tokens in a micro-batch."""
    deadline_s: float = 300.0
    """Seconds after which an unfinished answer ends with 408."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectConfig:
    """Direct port of the server: its own HTTP processes answer there, without Ray Serve's proxy.

    A request takes a third of the processor time there, and the requests are distributed over the processes.
    """

    port: int | None = None
    """Port of the server's own HTTP processes, beside Ray Serve's proxy. All copies on a node share it. None: no such port."""
    host: str | None = None
    """Address to listen at. None: 127.0.0.1; under `finlora serve` the proxy's address."""
    processes: int = 2
    """HTTP processes of each copy of the server."""
    ssl_certfile: str | None = None
    """Certificate as a PEM file. None: plain HTTP; under `finlora serve` the proxy's certificate, if it has one."""
    ssl_keyfile: str | None = None
    """Private key as a PEM file without a password. None: plain HTTP."""
    keep_alive_timeout_s: int = 75
    """Seconds that an idle connection stays open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    name: str = "base"
    """Name of the base in `/v1/models`. An adapter on it is called `name:adapter`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base; model.bits says how it is held."""
    stages: StagesConfig = field(default_factory=StagesConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    direct: DirectConfig = field(default_factory=DirectConfig)
    metrics_port: int | None = None
    """Port at which Prometheus reads metrics without a key, under `finlora serve`. None: a free port, which it prints. On a
    cluster it is the port of `ray start --metrics-export-port`."""
    adapters_dir: str | None = None
    """Folder of adapters. `DIR/NAME` is an adapter, or a run folder of `finlora train`, or holds the adapter's versions
    `DIR/NAME/v1`, `v2` and so on. None: the base alone."""
    require_approval: bool = False
    """Serve only adapters that `finlora approve` has approved as their files are now. Of an adapter with versions, the newest
    approved one is served."""
    min_agreement: float | None = None
    """Serve an adapter at other bits than those of its training, or a model merged from one, only if `finlora parity` has shown
    that it gives the same answers: least lower end of the 95 % interval of their share, such as 0.98, for each task. None:
    it is served, and the log says so where no report covers it."""
    max_adapters: int = 16
    """Adapters held in memory at once; the least recently used one is dropped."""
    keys_file: str | None = None
    """File of hashed API keys, as `finlora key` writes it. None: the one key in the environment variable
    FINLORA_API_KEY."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of other web pages that a browser lets ask this server (CORS), such as `https://desk.example`; `*`: every page. A
    key is needed all the same. Empty: none."""
    audit_dir: str | None = None
    """Folder of the audit log; each copy of the server writes files of its own. None: no audit log."""
    audit_texts: bool = False
    """Write prompts and answers into the audit log, besides their hashes."""
    ready_every_s: float = 1.0
    """Seconds between two health checks of the stages."""
    seed: int = 42
    """Seed of the weights where model.weights is `random`; nothing else uses it."""

    def __post_init__(self) -> None:
        stages, limits = self.stages, self.limits
        least = {
            "stages.num": (stages.num, 1),
            "stages.cache_rows": (stages.cache_rows, 64),
            "limits.max_body_bytes": (limits.max_body_bytes, 1024),
            "limits.max_new_tokens": (limits.max_new_tokens, 1),
            "limits.default_new_tokens": (limits.default_new_tokens, 1),
            "limits.default_extract_tokens": (limits.default_extract_tokens, 1),
            "limits.max_texts": (limits.max_texts, 1),
            "limits.max_waiting": (limits.max_waiting, 1),
            "limits.max_batch_tokens": (limits.max_batch_tokens, 16),
            "direct.processes": (self.direct.processes, 1),
            "direct.keep_alive_timeout_s": (self.direct.keep_alive_timeout_s, 1),
            "max_adapters": (self.max_adapters, 1),
        }
        above = {
            "stages.cpus": stages.cpus,
            "limits.deadline_s": limits.deadline_s,
            "ready_every_s": self.ready_every_s,
        }
        faults = [f"{key}={value}: expected at least {low}" for key, (value, low) in least.items() if value < low]
        faults += [f"{key}={value}: expected more than 0" for key, value in above.items() if value <= 0]
        if self.min_agreement is not None and not 0 < self.min_agreement < 1:
            faults.append(f"min_agreement={self.min_agreement}: expected a share between 0 and 1, or null")
        if stages.gpus <= 0:
            faults.append(
                f"stages.gpus={stages.gpus}: expected more than 0; to serve without a GPU, set stages.device=cpu and leave this "
                "out"
            )
        if not self.name or set(self.name) & set(":@/ \n"):
            faults.append(f"name={self.name!r}: expected a name without colon, at sign, slash and space")
        faults += [
            f"limits.{name}={value}: expected at most limits.max_new_tokens={limits.max_new_tokens}"
            for name in ("default_new_tokens", "default_extract_tokens")
            if (value := getattr(limits, name)) > limits.max_new_tokens
        ]
        faults += [
            f"allowed_origins holds {origin!r}: expected scheme and host without a path, such as https://desk.example, or *"
            for origin in self.allowed_origins
            if origin != "*" and not _ORIGIN.fullmatch(origin)
        ]
        port, pair = self.direct.port, (self.direct.ssl_certfile, self.direct.ssl_keyfile)
        if port is not None and not 1 <= port <= 65535:
            faults.append(f"direct.port={port}: expected 1 to 65535, or null")
        if self.metrics_port is not None and not 1 <= self.metrics_port <= 65535:
            faults.append(f"metrics_port={self.metrics_port}: expected 1 to 65535, or null")
        if (pair[0] is None) != (pair[1] is None):
            faults.append("direct.ssl_certfile and direct.ssl_keyfile: expected both, or neither")
        if self.audit_texts and self.audit_dir is None:
            faults.append("audit_texts=true without an audit log: set audit_dir, or leave it out")
        if faults:
            raise ConfigError(faults)

    @property
    def bits(self) -> Bits:
        return self.model.bits

    @property
    def adapters_folder(self) -> Path | None:
        return _expand(self.adapters_dir)

    @property
    def keys_path(self) -> Path | None:
        return _expand(self.keys_file)

    @property
    def audit_folder(self) -> Path | None:
        return _expand(self.audit_dir)


def _expand(path: str | None) -> Path | None:
    return Path(path).expanduser() if path else None


def read_settings(args: Mapping[str, Any], overrides: Sequence[str] = ()) -> ServeConfig:
    """Check the `args` of an application, after `key=value` overrides.

    Raises:
        ConfigError: every unknown key, wrong type and value out of range, all in one error.
    """
    return settings_from_tree(ServeConfig, args, overrides)


def to_args(config: ServeConfig) -> dict[str, Any]:
    """Return plain dicts and scalars that `read_settings` reads back equal."""
    return dataclasses.asdict(config)


def make_absolute(config: ServeConfig) -> ServeConfig:
    """Return the settings with absolute paths: a replica runs in a folder of its own.

    Raises:
        ConfigError: the audit log would be written into the temporary folder of a Ray job.
    """
    lost = describe_lost("audit_dir=", config.audit_dir) if config.audit_dir else None
    if lost:
        raise ConfigError(f"{lost}.")

    def absolute(path: str | None) -> str | None:
        return str(Path(path).expanduser().absolute()) if path else path

    # A base that is not a local folder is a name of the model hub.
    base = absolute(config.model.base) if Path(config.model.base).expanduser().exists() else None
    model = dataclasses.replace(
        config.model, base=base or config.model.base, tokenizer=absolute(config.model.tokenizer)
    )
    return dataclasses.replace(
        config,
        model=model,
        adapters_dir=absolute(config.adapters_dir),
        keys_file=absolute(config.keys_file),
        audit_dir=absolute(config.audit_dir),
        direct=dataclasses.replace(
            config.direct,
            ssl_certfile=absolute(config.direct.ssl_certfile),
            ssl_keyfile=absolute(config.direct.ssl_keyfile),
        ),
    )
