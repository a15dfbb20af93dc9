"""Walks through the documents for newcomers: every shown command runs, with only the files of the commands before it.

A tiny base replaces the 8B, and generated sentences the raw files. Commands that need GPUs or minutes run with --dry-run, which
makes the verb's checks; the test then writes the files that the verb would.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from made_results import make_evaluation
from shown_commands import ROOT, shown_commands

from finlora.configfile import load_config, save_config
from finlora.data.example import Splits
from finlora.data.sets.catalog import task_named
from finlora.data.sets.prepared import read_prepared, write_prepared
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.contract import make_contract, write_contract
from finlora.model.lora import attach_lora, save_adapter
from finlora.results import append_result
from finlora.serve.accounts.audit import AuditEntry, AuditLog

SMALL = ("model.template=raw", "eval.device=cpu", "eval.bits=16")
"""The tiny base has no chat template, and this machine no GPU."""
ENTRY = AuditEntry(
    **dict.fromkeys(("request_id", "key_id", "path", "model", "base_hash", "prompt_hash", "outcome"), "made"),
    **dict.fromkeys(("adapter_hash", "output_hash"), None),
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "seconds"), 1),
)
HUB_BASE = "meta-llama/Llama-3.1-8B-Instruct"


class Newcomer:
    """Runner of a document's commands, on one machine as server and laptop."""

    def __init__(self, folder, base, sentences, call):
        self.folder, self.base, self.sentences, self.call = folder, base, sentences, call
        self.reaches_hub = True
        self.ran = []
        self.mirror = None

    def type(self, program, *words):
        words = [word.replace("/home/user", str(self.folder / "home")) for word in words]
        words = [re.sub(r"(?<![\w.~/])/(srv|mnt|media)/", rf"{self.folder}/\1/", word) for word in words]
        if program == "ray" and words[:2] == ["job", "submit"]:
            script, *rest = words[words.index("python") + 1 :]
            program, words = "finlora", [Path(script).stem, *rest]
        if program == "finlora":
            getattr(self, words[0])(*words[1:])
            self.ran.append(words[0])

    def prefetch(self, *rest):
        output = Path(rest[rest.index("--output") + 1])
        if "--check" in rest:
            shutil.copytree(self.mirror, output, symlinks=True)  # copied by hand
            return
        self.mirror = output
        (output / "models" / HUB_BASE).parent.mkdir(parents=True)
        (output / "models" / HUB_BASE).symlink_to(self.base)
        for task in rest[rest.index("--tasks") + 1].split(","):
            self.prepare(task, "--output", str(output / "data"))

    def prepare(self, task, *rest):
        if task_named(task).family != "sentiment":
            return
        folder = Path(rest[rest.index("--output") + 1]) if "--output" in rest else Path("~/finlora/data").expanduser()
        if (folder / task).exists():
            return
        parts = {
            split: [dataclasses.replace(each, task=task) for each in self.sentences(split)]
            for split in ("train", "test")
        }
        notes = {"variant": "as_published", "source": "", "version": "", "overwrite": False, "dry_run": False}
        write_prepared(task_named(task), Splits(**parts, notes=()), folder, **notes)

    def plan(self, *rest):
        assert "fits" in self._run("plan", *rest)

    def train(self, *rest):
        assert "optimiser steps of" in self._run("train", *rest, "--dry-run")
        config = self._config(rest)
        folder = Path(config.output_dir).expanduser() / config.name
        with quiet_bitsandbytes():
            base = load_base(config.model, config.model.bits, torch.device("cpu"), 0)
            model = attach_lora(base.model, config.lora, config.model.base, 1)
            size = save_adapter(model, folder / "adapter")
        save_config(config, folder / "adapter" / "config.yaml")
        contract = make_contract(base, config.model.base, config.lora, "raw", {"fpb": "0" * 16}, 9, size, {})
        write_contract(folder / "adapter", contract)

    def evaluate(self, *rest):
        assert "Evaluating" in self._run("evaluate", *rest, "--dry-run")
        config = self._config([word for word in rest if word != "--base"])
        append_result(Path(config.output_dir).expanduser() / config.name / "results.jsonl", make_evaluation())

    def ask(self, *rest):
        if "--server" not in rest:
            assert "positive" in self._run("ask", *rest)

    def report(self, *rest):
        assert "fpb" in self._run("report", *rest, small=())
        assert (Path(rest[rest.index("--output") + 1]).expanduser() / "report.html").is_file()

    def key(self, name, *rest):
        assert re.fullmatch(rf"finlora-{name}-\S+\n", self._run("key", name, *rest, small=()))

    def tune(self, *rest):
        dry = [word for word in rest if word != "--dry-run"]
        assert "000" in self._run("tune", *dry, "--dry-run")

    def reproduce(self, *rest):
        if "--dry-run" in rest:
            assert "llama-8b-4bit-r4-fpb" in self._run("reproduce", *rest, small=())

    def serve(self, *rest):
        assert "tokens of cache" in self._run("serve", *rest, "--dry-run", small=())

    def audit(self, folder, *rest):
        shutil.rmtree(folder, ignore_errors=True)
        log = AuditLog(Path(folder))
        log.append(ENTRY)
        log.close()
        rest = [log.head if re.fullmatch(r"[0-9a-f]{64}", word) else word for word in rest]
        assert "1 entries, intact" in self._run("audit", folder, *rest, small=())

    def _run(self, *words, small=SMALL):
        code, output, error = self.call(*words, *(self._hub() if small else ()), *small)
        assert code == 0, f"finlora {' '.join(words)}: {error}"
        return output

    def _hub(self):
        return (f"model.base={self.base}",) if self.reaches_hub else ()

    def _config(self, rest):
        words = list(rest)
        config = words.pop(words.index("--config") + 1)
        words.remove("--config")
        return load_config(Path(config), [*words, *self._hub(), *SMALL])


@pytest.fixture
def newcomer(tiny_base, prepared_synthetic, tmp_path, monkeypatch, call):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("jobs", "serve_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def sentences(split):
        return read_prepared(prepared_synthetic, "synthetic_sentiment", split).examples[:40]

    return Newcomer(tmp_path, tiny_base, sentences, call)


@pytest.mark.parametrize(
    ("document", "reaches_hub", "verbs"),
    [
        ("README.md", True, ["prepare", "plan", "train", "evaluate", "evaluate", "report", "key", "serve"]),
        ("docs/explanation/life-of-a-run.md", True, ["prepare", "plan", "train", "evaluate", "ask", "report"]),
        (
            "docs/tutorials/first-server.md",
            False,  # as its first sentence says
            ["prefetch", "prefetch", "prepare", "plan", "train", "evaluate", "evaluate", "report", "ask", "key", "ask"],
        ),
    ],
)
def test_newcomer_gets_from_raw_data_to_an_answer(newcomer, document, reaches_hub, verbs):
    newcomer.reaches_hub = reaches_hub
    for program, *words in shown_commands(document):
        if len(newcomer.ran) < len(verbs):
            newcomer.type(program, *words)
    assert newcomer.ran == verbs


@pytest.mark.parametrize(
    "document", ["README.md", "docs/how-to/serve.md", "docs/how-to/search.md", "docs/how-to/reproduce.md"]
)
def test_what_is_cheap_runs_as_shown_where_data_and_base_are_at_hand(newcomer, document):
    newcomer.prepare("fpb")
    shown = [
        (program, *words)
        for program, *words in shown_commands(document)
        if "--address" not in words or "submit" in words
    ]
    for command in shown:
        if {"tune", "reproduce", "serve", "key", "audit", "jobs/tune.py"} & set(command[1:]):
            newcomer.type(*command)
    expected = {"README.md": 2, "docs/how-to/serve.md": 7, "docs/how-to/search.md": 2, "docs/how-to/reproduce.md": 3}
    assert len(newcomer.ran) == expected[document]
