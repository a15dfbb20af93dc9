"""The documents that lead a newcomer, walked: each command finds what those before it made, and has nothing else.

A tiny base stands in for the 8B, and made sentences for the raw files. What needs GPUs or minutes runs with --dry-run, which
looks at everything that the verb looks at first, and leaves behind what the whole verb would.
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
from finlora.data.catalog import task_named
from finlora.data.example import Splits
from finlora.data.prepared import read_prepared, write_prepared
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.contract import make_contract, write_contract
from finlora.model.lora import attach_lora, save_adapter
from finlora.results import append_result

SMALL = ("model.template=raw", "eval.device=cpu", "eval.bits=16")
"""The tiny base has no turns, and this machine no GPU."""
HUB_BASE = "meta-llama/Llama-3.1-8B-Instruct"


class Newcomer:
    """Somebody who types what a document shows, on one machine that stands for server and laptop."""

    def __init__(self, folder, base, sentences, call, *, reaches_hub):
        self.folder, self.base, self.sentences, self.call = folder, base, sentences, call
        self.reaches_hub = reaches_hub
        self.ran = []
        self.mirror = None

    def type(self, program, *words):
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
            shutil.copytree(self.mirror, output, symlinks=True)  # carried over by hand
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

    def key(self, *rest):
        assert re.fullmatch(r"finlora-desk-\S+\n", self._run("key", *rest, small=()))

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


@pytest.mark.parametrize(
    ("document", "reaches_hub", "verbs"),
    [
        ("README.md", True, ["prepare", "train", "evaluate", "evaluate", "report", "ask"]),
        ("docs/life-of-a-run.md", True, ["prepare", "plan", "train", "evaluate", "ask", "report"]),
        (
            "docs/first-server.md",
            False,  # as its first sentence says
            ["prefetch", "prefetch", "prepare", "plan", "train", "evaluate", "evaluate", "report", "ask", "key", "ask"],
        ),
    ],
)
def test_newcomer_gets_from_raw_data_to_an_answer(
    document, reaches_hub, verbs, tiny_base, prepared_synthetic, tmp_path, monkeypatch, call
):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("jobs", "serve_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def sentences(split):
        return read_prepared(prepared_synthetic, "synthetic_sentiment", split).examples[:40]

    newcomer = Newcomer(tmp_path, tiny_base, sentences, call, reaches_hub=reaches_hub)
    for program, *words in shown_commands(document):
        words = [word.replace("/home/user", str(tmp_path / "home")) for word in words]
        if program in ("finlora", "ray") and len(newcomer.ran) < len(verbs):
            newcomer.type(program, *words)
    assert newcomer.ran == verbs
