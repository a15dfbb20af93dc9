"""Fixtures of all tests: reference data if present, a tiny base, a prepared set, a config and one local Ray.

They use no network and write only to pytest's and Ray's temporary folders.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from warm_workers import forking_workers

from finlora.config import RunConfig
from finlora.configfile import load_config
from finlora.machine.cpu import set_environment

pytest_plugins = ["engine_fixtures", "two_processes"]

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Before any test imports these packages: they read their settings once.
set_environment()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["RAY_AUTH_MODE"] = "token"
# Ray Train takes one report a worker at each poll, every 2 s by default: a run with a checkpoint at each second step would
# mostly wait for the next poll. The order of waits does not change.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with reference copies of the real data; tests that use it skip on machines without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the reference data is not on this machine")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of a barely trained Llama (2 layers, hidden 64, 4 heads on 2 key-value heads) with its own tokenizer."""
    import torch

    from finlora.data.pretraining.generated_texts import pretraining_texts
    from finlora.model.pretrain import PretrainConfig, pretrain_base

    folder = tmp_path_factory.mktemp("models") / "tiny"
    settings = PretrainConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        context_length=64,
        batch_size=4,
        answer_weight=1.0,
        num_steps=20,
    )
    pretrain_base(pretraining_texts(1, 200), settings, folder, torch.device("cpu"), lambda _step, _loss: None)
    return folder


@pytest.fixture(params=[0o022, 0o027], ids=["umask 022", "umask 027"])
def file_mode(request) -> Iterator[int]:
    """Mode of a new file under the umask of this test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


DATED_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    '{{- "Today Date: " + date_string + "\\n\\n" }}'
    "{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""Chat template with the lines of Llama 3.2's and 3.3's that write today's date.
Source: chat_template of https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct, tokenizer_config.json."""


@pytest.fixture(scope="session")
def dated_base(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with a chat template that writes today's date."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("models") / "dated")
    (folder / "chat_template.jinja").write_text(DATED_TEMPLATE)
    return folder


@pytest.fixture
def pretend_day(monkeypatch) -> Callable[[str], None]:
    """Set the clock that transformers gives to chat templates to a date, such as 2026-11-30."""
    from datetime import datetime

    from transformers.utils import chat_template_utils

    def pretend(day: str) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return pretend


@pytest.fixture(scope="session")
def prepared_synthetic(tmp_path_factory) -> Path:
    """Folder of prepared tasks: generated sentiment and generated XBRL questions."""
    from finlora.data.sets.prepare import prepare_task

    folder = tmp_path_factory.mktemp("prepared")
    for task in ("synthetic_sentiment", "synthetic_xbrl"):
        prepare_task(task, None, folder, None, "all", False, False)
    return folder


@pytest.fixture(scope="session")
def prepared_fpb(prepared_synthetic, tmp_path_factory) -> Path:
    """Generated examples under the name of a task of the paper."""
    from finlora.data.example import Splits
    from finlora.data.sets.catalog import task_named
    from finlora.data.sets.prepared import read_prepared, write_prepared

    folder = tmp_path_factory.mktemp("paper")
    train, test = (
        read_prepared(prepared_synthetic, "synthetic_sentiment", split).examples for split in ("train", "test")
    )
    options = {"variant": "as_published", "source": "generated", "version": "0", "overwrite": False, "dry_run": False}
    write_prepared(task_named("fpb"), Splits(train=train, test=test), folder, **options)
    return folder


@pytest.fixture
def make_config(tiny_base, prepared_synthetic, tmp_path) -> Callable[..., RunConfig]:
    """Build a config on the tiny base and the generated sentiment set, on CPU in float32; overrides as on the CLI."""
    defaults = [
        f"model.base={tiny_base}",
        "model.bits=16",
        "model.compute_dtype=float32",
        f"data.dir={prepared_synthetic}",
        "data.tasks=[synthetic_sentiment]",
        f"output_dir={tmp_path / 'runs'}",
        "train.device=cpu",
        "train.precision=fp32",
        "eval.device=cpu",
        "eval.bits=null",
    ]

    def build(*overrides: str) -> RunConfig:
        return load_config(None, [*defaults, *overrides])

    return build


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, standard output and standard error."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")  # main sets them if unset; monkeypatch restores them

    from finlora.cli.main import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """Start the one local Ray of this process's tests, with its token and files in a folder that is deleted with it."""
    folder = Path(tempfile.mkdtemp(prefix="finlora-ray-"))
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_TMPDIR": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for key, value in settings.items():
            patch.setenv(key, value)
        from finlora.cluster import connect

        with forking_workers(folder) as wait_for_workers:
            connect.connect(log_to_driver=False)
            wait_for_workers()
            import ray

            yield
            ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
