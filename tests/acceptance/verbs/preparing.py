"""Steps before training: prepared tasks, a mirror of a hub, a pretrained base."""

from __future__ import annotations

import csv
import itertools
import re
import sys

from acceptance.walk import ROOT, Tools

GENERATED = ("synthetic_sentiment", "synthetic_xbrl", "synthetic_formulas")
HUB_NAME = "bank/tiny"
"""The only model on the tests' hub."""


def prepare(tools: Tools) -> None:
    """Prepare raw files and generated sets; checks the published counts of FPB and of the shared XBRL questions."""
    walk, checks = tools.walk, tools.checks
    for task in GENERATED:
        done = tools.finlora("prepare", task, "--output", walk.prepared)
        checks.equal(f"examples of {task}", (2400, 600), counts(done.text))
    again = tools.finlora("prepare", GENERATED[0], "--output", walk.prepared)
    checks.contains("prepared a second time", "already holds the same set", again.text)
    if walk.data is None:
        checks.skip("fpb, xbrl_tags, xbrl_values", "no --data with their raw files")
        return
    done = tools.finlora("prepare", "fpb", "--source", walk.data / "fpb", "--output", walk.prepared)
    # 4,846 sentences, split by the datasets library with seed 42 and a quarter for the test (the paper's Table 2).
    checks.equal("examples of fpb", (3634, 1212), counts(done.text))
    checks.contains("labels of its test split", "neutral 729, positive 338, negative 145", done.text)
    # Questions of the published files of 2025-03-10.
    for task, number in (("xbrl_tags", 115), ("xbrl_values", 102)):
        done = tools.finlora("prepare", task, "--source", walk.data / "xbrl", "--output", walk.prepared)
        checks.equal(f"test examples of {task}", number, counts(done.text)[1])


def own_table(tools: Tools) -> None:
    """A table that nobody has described: `new-task` guesses its columns, what it writes can be prepared, and then corrected."""
    checks, folder = tools.checks, tools.walk.output / "own"
    folder.mkdir()
    things = ("profit", "loss", "turnover", "order book", "margin", "dividend", "debt", "capacity")
    towns = ("Helsinki", "Espoo", "Oulu", "Turku", "Tampere", "Vantaa", "Lahti", "Pori")
    with (folder / "letters.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("letter_id", "body", "tone"))
        for number, (thing, town) in enumerate(itertools.product(things, towns)):
            verb, tone = (("rose", "P+"), ("fell", "G-"))[number % 2]
            writer.writerow(
                (number, f"Our {thing} in {town} {verb} by {3 + number} %, says letter {37 * number}.", tone)
            )
    guessed = tools.finlora("new-task", folder / "letters.csv").text
    for words in ("Guessed text: the longest texts", 'Guessed "P+": a code?'):
        checks.contains("what it guessed", words, guessed)
    done = tools.finlora("prepare", "--task-file", folder / "letters.yaml", "--output", folder / "data")
    train, test = counts(done.text)
    checks.equal("examples of both splits", 64, train + test)
    text = "Nobody told us why the branch in Rauma was closed last week."
    (folder / "corrections.csv").write_text(f"task,text,label,answered\nletters,{text},G-,P+\n", encoding="utf-8")
    words = ("--task", "letters", "--data", folder / "data", "--output", folder / "next")
    done = tools.finlora("feedback", folder / "corrections.csv", *words)
    checks.equal("examples with a correction more", (train + 1, test), counts(done.text))


def counts(text: str) -> tuple[int, int]:
    """Read the number of examples in both splits from the table of `prepare`; 0 for a missing split."""
    found = dict(re.findall(r"^\s*(train|test)\s+([\d,]+)\s", text, flags=re.MULTILINE))
    train, test = (int(found.get(split, "0").replace(",", "")) for split in ("train", "test"))
    return train, test


def prefetch(tools: Tools) -> None:
    """Mirror the base from a hub on this machine, check the mirror, damage it, and check again."""
    walk, checks = tools.walk, tools.checks
    hub = tools.background([sys.executable, str(ROOT / "tests" / "model" / "hub_server.py"), str(walk.base), "none"])
    tools.until(lambda: hub.text.strip().isdigit(), hub, "the hub's port")
    online = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.text.strip()}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    mirror = walk.output / "mirror"
    done = tools.finlora("prefetch", "--models", HUB_NAME, "--output", mirror, environment=online)
    checks.contains("the mirrored base", "hashes agree", done.text)
    folder = mirror / "models" / HUB_NAME
    same = (folder / "model.safetensors").stat().st_size == (walk.base / "model.safetensors").stat().st_size
    checks.equal("weights of the mirror as long as the base's", True, same)
    checks.equal("chat template in the mirror", True, (folder / "chat_template.jinja").is_file())
    done = tools.finlora("prefetch", "--check", "--output", mirror)
    checks.contains("checked without a network", "hashes agree", done.text)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    done = tools.finlora("prefetch", "--check", "--output", mirror, code=4)
    checks.contains("one bit changed", "model.safetensors differs", done.text)


def pretrain(tools: Tools) -> None:
    """Pretrain a tiny base on generated text, and let `plan` read it."""
    walk, checks = tools.walk, tools.checks
    small = ("vocab_size=512", "hidden_size=64", "intermediate_size=128", "num_layers=2", "num_steps=30")
    output = walk.output / "pretrained"
    done = tools.finlora(
        "pretrain", "--tasks", "synthetic", "--output", output, "--device", walk.device, *small, "context_length=64"
    )
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.text)]
    checks.contains("steps done", "30 steps", done.text)
    # A uniform guess among 512 tokens costs ln 512 = 6.2 nats.
    checks.at_most("last loss shown", 6.1, losses[-1] if losses else float("inf"))
    checks.equal("weights are there", True, (output / "model.safetensors").is_file())
