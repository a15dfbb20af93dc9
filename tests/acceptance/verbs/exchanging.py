"""Steps of adapters made elsewhere, and of an adapter's served forms beside the form of its training."""

from __future__ import annotations

import json
import shutil

from acceptance.verbs.answering import QUESTIONS, SAME_MODEL, ask_labels, difference
from acceptance.walk import Tools

ROWS = 100
LEAST_EQUAL = 0.9
"""Share of equal answers of the training's weights read back to 16 bit; 0.976 of 500 were seen."""


def adopt(tools: Tools) -> None:
    """Take the main adapter's two PEFT files alone, adopt them, and ask: the same answer, with what is unknown named."""
    walk, checks = tools.walk, tools.checks
    given, adapter, adopted = walk.output / "foreign", walk.runs / "main" / "adapter", walk.output / "adopted"
    given.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, given / name)
    done = tools.finlora("adopt", given, "--base", walk.base, "--template", "chat", "--bits", 4, "--output", adopted)
    checks.contains("what is unknown", "training data", done.text)
    asked = tools.finlora("ask", QUESTIONS[0][1], "--task", "fpb", "--config", walk.config, "--adapter", adopted)
    checks.contains("the same beside an answer", "training data", asked.text)
    pair = [ask_labels(tools, QUESTIONS[0][1], "--adapter", folder) for folder in (adapter, adopted)]
    checks.at_most("largest difference from the adapter it is a copy of", SAME_MODEL, difference(*pair))
    refused = tools.finlora("adopt", given, "--base", walk.base, "--bits", 5, "--output", walk.output / "no", code=2)
    checks.contains("bits that no base has", "5", refused.text)


def parity(tools: Tools) -> None:
    """Compare the main adapter, trained at 4 bit, with itself, at 8 bit, and merged onto the weights of its training."""
    walk, checks = tools.walk, tools.checks
    adapter, merged = walk.runs / "main" / "adapter", walk.output / "dequantised"
    tools.finlora("merge", "--adapter", adapter, "--output", merged, "--onto", "dequantised", "--device", walk.device)
    tools.finlora("parity", adapter, "--bits", 4, "--bits", 8, "--merged", merged, "--limit", ROWS)
    rows = {row["form"]: row for row in json.loads((adapter / "parity.json").read_text(encoding="utf-8"))["rows"]}
    checks.equal("forms in parity.json", ["4 bit", "8 bit", "merged onto dequantised weights"], sorted(rows))
    checks.equal("rows of each", [ROWS] * 3, [row["num_rows"] for row in rows.values()])
    checks.equal("equal answers at the bits of the training", ROWS, rows["4 bit"]["num_equal"])
    checks.at_least("equal answers at 8 bit", 1, rows["8 bit"]["num_equal"])
    merged_row = rows["merged onto dequantised weights"]
    checks.at_least("share of equal answers, merged", LEAST_EQUAL, merged_row["num_equal"] / ROWS)
    checks.equal("its report in the merged folder", True, (merged / "parity.json").is_file())
