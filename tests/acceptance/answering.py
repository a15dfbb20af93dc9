"""Steps that let a base or an adapter answer: whole test splits by labels and as text, merged, asked one question."""

from __future__ import annotations

import re
from typing import Any

from acceptance.training import losses_told, run_name
from acceptance.walk import Tools

QUESTIONS = (
    ("positive", "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn in the corresponding period in 2007 ."),
    ("negative", "Operating profit fell to EUR 2.1 mn from EUR 8.7 mn , and the company will cut 200 jobs ."),
)
SAME_MODEL = 0.02
"""Most that a probability may differ between two ways through one model, in bfloat16: some thousandths were seen."""


def evaluate_base(tools: Tools) -> None:
    """The base alone, by labels: what every adapter must beat."""
    record = evaluate(tools, "base", "--base")
    # It answers `positive` nearly always; a base above this would make the adapter's floor say nothing.
    tools.checks.at_most("accuracy of the base", 0.5, record["metrics"]["accuracy"])


def evaluate_adapter(tools: Tools) -> None:
    """The main adapter by labels, in one process and over two stages as a Ray task."""
    checks, scale = tools.checks, tools.scale
    record = evaluate(tools, "main")
    accuracy = record["metrics"]["accuracy"]
    checks.at_least("accuracy of the adapter", scale.accuracy, accuracy)
    checks.at_least("its weighted F1", scale.weighted_f1, record["metrics"]["weighted_f1"])
    checks.at_least("accuracy above the base's", 0.15, accuracy - recorded(tools, "base")["metrics"]["accuracy"])
    adapter = tools.walk.runs / "main" / "adapter"
    staged = evaluate(tools, "main-staged", "--adapter", adapter, "--ray", "eval.num_stages=2")
    # One or two of a hundred stand so near the border that bfloat16 moves them.
    checks.close("accuracy over two stages", accuracy, staged["metrics"]["accuracy"], 0.02)
    damaged = tools.finlora("evaluate", "--config", tools.walk.config, "name=nowhere", code=4)
    checks.contains("an adapter that is not there", "adapter", damaged.text)


def evaluate_text(tools: Tools) -> None:
    """Adapter and base by free generation, at the default batch size."""
    checks, scale = tools.checks, tools.scale
    settings = ("eval.method=generate", f"data.max_test_examples={scale.num_texts}")
    adapter = evaluate(tools, "text", "--adapter", tools.walk.runs / "main" / "adapter", *settings)["metrics"]
    checks.at_least("accuracy of the adapter's texts", scale.accuracy - 0.1, adapter["accuracy"])
    checks.at_most("share of its texts that are no label", 0.1, adapter["unparsable"])
    base = evaluate(tools, "base-text", "--base", *settings)["metrics"]
    checks.at_most("strict accuracy of the base's texts", adapter["strict_accuracy"], base["strict_accuracy"])


def xbrl(tools: Tools) -> None:
    """An adapter that reads filings, generated and real, scored by its texts at the default batch size."""
    walk, checks, scale = tools.walk, tools.checks, tools.scale
    sets = [("xbrl", "[synthetic_xbrl]", scale.num_xbrl_train, scale.xbrl_accuracy)]
    if walk.data and walk.device == "cuda":  # filings of 5,000 tokens take two cores a minute each
        sets.append(("xbrl-real", "[xbrl_tags,xbrl_values]", scale.num_xbrl_train, 0.0))
    for name, tasks, num_train, floor in sets:
        settings = (f"data.tasks={tasks}", f"data.max_test_examples={scale.num_xbrl_test}", "data.too_long=skip")
        base = evaluate_all(tools, f"{name}-base", "--base", *settings)
        done = tools.finlora(
            *("train", "--config", walk.config, f"name={name}", *settings, f"data.max_train_examples={num_train}")
        )
        first, last = losses_told(done.text)
        checks.at_most("last loss, as a share of the first", 0.7, last / first)
        adapter = evaluate_all(tools, name, *settings)
        for before, after in zip(base, adapter, strict=True):
            checks.equal(f"method of {after['task']}", "generate", after["method"])
            accuracies = before["metrics"]["accuracy"], after["metrics"]["accuracy"]
            checks.at_least(f"accuracy of {after['task']}", floor, accuracies[1])
            checks.at_least(f"accuracy of {after['task']}, beside the base's", accuracies[0], accuracies[1])


def merge(tools: Tools) -> None:
    """An adapter of 16 bit in its base answers as beside it; one of 4 bit is merged only where that is asked for."""
    walk, checks = tools.walk, tools.checks
    adapter, merged = walk.runs / run_name(16, "adamw") / "adapter", walk.output / "merged"
    done = tools.finlora("merge", "--adapter", adapter, "--output", merged)
    # Three projections of 30 layers.
    checks.contains("merged", "90 weights changed", done.text)
    weights = merged / "model.safetensors"
    checks.close(
        "GiB of its weights",
        (walk.base / "model.safetensors").stat().st_size / 2**30,
        weights.stat().st_size / 2**30,
        0.01,
    )
    settings = ("model.bits=16", "eval.bits=16", f"data.max_test_examples={min(200, walk.scale.num_test // 2)}")
    beside = evaluate(tools, "beside", "--adapter", adapter, *settings)["metrics"]["accuracy"]
    inside = evaluate(tools, "merged", "--base", f"model.base={merged}", *settings)["metrics"]["accuracy"]
    checks.close("accuracy of the merged model, beside the adapter's", beside, inside, 0.03)
    for label, text in QUESTIONS[:1]:
        one = ask_labels(tools, text, "--adapter", adapter, "model.bits=16", "eval.bits=16")
        other = ask_labels(tools, text, "--base", f"model.base={merged}", "model.bits=16", "eval.bits=16")
        checks.at_most(f"largest difference of a probability ({label})", SAME_MODEL, difference(one, other))
    if (walk.runs / "main" / "adapter").is_dir():
        refused = tools.finlora(
            "merge", "--adapter", walk.runs / "main" / "adapter", "--output", walk.output / "no", code=4
        )
        checks.contains("one of 4 bit", "--allow-other-bits", refused.text)


def ask(tools: Tools) -> None:
    """One question, in one process and over two stages: the right label, equal probabilities, equal text."""
    walk, checks = tools.walk, tools.checks
    for label, text in QUESTIONS:
        one = ask_labels(tools, text)
        checks.equal("likeliest label", label, max(one, key=one.__getitem__) if one else None)
        checks.close("sum of the probabilities", 1.0, sum(one.values()), 0.002)
        two = ask_labels(tools, text, "--stages", "2")
        checks.at_most("largest difference over two stages", SAME_MODEL, difference(one, two))
    capital = "What is the capital of France?"
    one_text = tools.finlora("ask", capital, "--config", walk.config, "--base", "eval.bits=16").text
    checks.contains("the base's own knowledge", "Paris", one_text)
    two_text = tools.finlora("ask", capital, "--config", walk.config, "--base", "eval.bits=16", "--stages", "2").text
    checks.equal("its text over two stages", answer_of(one_text), answer_of(two_text))


def ask_labels(tools: Tools, text: str, *words: object) -> dict[str, float]:
    """Ask and return the probabilities shown."""
    return probabilities(tools.finlora("ask", text, "--task", "fpb", "--config", tools.walk.config, *words).text)


def probabilities(text: str) -> dict[str, float]:
    """Read label and probability out of the table that `ask` shows."""
    return {
        label: float(value) / 100 for label, value in re.findall(r"^\s*(\w+)\s+([\d.]+)%", text, flags=re.MULTILINE)
    }


def answer_of(text: str) -> str:
    """Return the line that holds the answer: others are warnings of libraries."""
    return next((line.strip() for line in text.splitlines() if "Paris" in line), "no such line")


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Return the largest difference of a label's probability; infinite where labels differ or there are none."""
    if not one or one.keys() != other.keys():
        return float("inf")
    return max(abs(one[label] - other[label]) for label in one)


def evaluate(tools: Tools, name: str, *words: object) -> dict[str, Any]:
    """Type `evaluate` and return the record of its one task."""
    return evaluate_all(tools, name, *words)[-1]


def evaluate_all(tools: Tools, name: str, *words: object) -> list[dict[str, Any]]:
    """Type `evaluate` under a name of its own, check that what it shows is what it records, and return the records."""
    done = tools.finlora("evaluate", "--config", tools.walk.config, f"name={name}", *words)
    records = [record for record in tools.results(name) if record["kind"] == "evaluation"]
    for record in records:
        tools.checks.contains(
            f"{record['task']}: accuracy shown", f"{record['metrics']['accuracy']:.1%}"[:-1], done.text
        )
        total = sum(sum(row.values()) for row in record["counts"].values())
        if record["counts"]:
            tools.checks.equal(f"{record['task']}: answers counted", record["num_examples"], total)
    return records


def recorded(tools: Tools, name: str) -> dict[str, Any]:
    """Return the record of an evaluation that another step made."""
    return next(record for record in tools.results(name) if record["kind"] == "evaluation")
