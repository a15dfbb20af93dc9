"""Steps that start many runs or show their results: search, reproduction, report, a job on the cluster."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import json
import re
import shutil
import sqlite3
import sys

import yaml

from acceptance.verbs.answering import recorded
from acceptance.walk import Tools

ROW = "llama-8b-base-formulas-evaluate"
"""A row of the reproduction that needs no raw data."""


def tune(tools: Tools) -> None:
    """Search with few short trials: each ends, best.yaml is of the best score, and its config trains."""
    walk, checks, scale = tools.walk, tools.checks, tools.scale
    settings = (
        *("name=search", f"search.num_trials={scale.num_trials}", "search.rank=[2,4]", "search.bits=[4]"),
        *(f"data.max_train_examples={scale.num_trial_examples}", f"train.max_steps={scale.num_trial_steps}"),
        "search.learning_rate=[5e-4,2e-3]",
        # On two cores two trials at once take turns.
        *("search.validation_share=0.25", f"search.max_concurrent={1 if walk.device == 'cpu' else scale.num_trials}"),
    )
    tools.finlora("tune", "--config", walk.config, *settings)
    folder = walk.runs / "search"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("trials/*/trial.json"))]
    checks.equal("trials that ended", scale.num_trials, sum(r["state"] in ("finished", "pruned") for r in records))
    scores = {record["trial"]["name"]: record["scores"].get("weighted_f1", -1.0) for record in records}
    # Five steps of a trial on a CPU teach little: there only a score must exist.
    floor = 0.25 if walk.device == "cuda" else 0.01
    checks.at_least("best weighted F1 on held-out examples", floor, max(scores.values(), default=-1.0))
    best = yaml.safe_load((folder / "best.yaml").read_text(encoding="utf-8"))
    found = [name for name in scores if f"{best['optim']['learning_rate']:.2e}" in name]
    checks.equal("best.yaml is of the best trial", [max(scores, key=scores.__getitem__)], found)
    checks.contains("its config", "It fits", tools.finlora("plan", "--config", folder / "best.yaml").text)


def reproduce(tools: Tools) -> None:
    """Plan the paper's tables, and reproduce one row."""
    walk, checks = tools.walk, tools.checks
    output = walk.output / "reproduce"
    gpu = (f"eval.num_gpus={walk.scale.share}",) if walk.device == "cuda" else ()
    common = ("reproduce", "--output", output, "--base-8b", walk.base, f"data.dir={walk.prepared}")
    settings = (
        *(f"train.device={walk.device}", f"eval.device={walk.device}", *gpu, "model.template=chat"),
        f"data.max_test_examples={min(64, walk.scale.num_texts)}",
    )
    dry = tools.finlora(*common, *settings, "--dry-run")
    checks.at_least("steps of the paper that it names", 60, len(set(re.findall(r"\bllama-\d+b-[\w-]+", dry.text))))
    checks.contains("70B rows, whose base is not here", "cannot run", dry.text)
    done = tools.finlora(*common, *settings, "--only", ROW)
    checks.contains("the row", "1 done", done.text)
    outcome = json.loads((output / "steps" / f"{ROW}.json").read_text(encoding="utf-8"))
    checks.equal("its outcome", "done", outcome["state"])
    records = [json.loads(line) for path in output.rglob("results.jsonl") for line in path.read_text().splitlines()]
    checks.equal("results", [("synthetic_formulas", "generate")], [(r["task"], r["method"]) for r in records])
    again = tools.finlora(*common, *settings, "--only", ROW)
    checks.contains("the same command again", "1 done", again.text)
    count = sum(len(path.read_text().splitlines()) for path in output.rglob("results.jsonl"))
    checks.equal("results after it", 1, count)


def report(tools: Tools) -> None:
    """Write the report: the HTML has the numbers of `evaluate`, and loads nothing."""
    walk, checks = tools.walk, tools.checks
    source, output = walk.output / "to-report", walk.output / "report"
    for name in ("base", "main"):
        (source / name).mkdir(parents=True)
        shutil.copy(walk.runs / name / "results.jsonl", source / name)
    tools.finlora("report", source, "--output", output)
    page = (output / "report.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for name in ("base", "main"):
        accuracy = recorded(tools, name)["metrics"]["accuracy"]
        checks.contains(f"accuracy of {name} in report.html", f"{accuracy:.1%}"[:-1], text)
    loss = next(record for record in tools.results("main") if record["kind"] == "training")["metrics"]["loss_last"]
    checks.contains("last loss of main", f"{loss:.4f}", text)
    checks.equal("addresses that the page loads from", [], re.findall(r'(?:src|href)="(https?://[^"]+)"', page))
    checks.equal("report.md beside it", True, (output / "report.md").is_file())


def card(tools: Tools) -> None:
    """Write the card of the main adapter, approve it, and write it again: the approval stands in it."""
    walk, checks = tools.walk, tools.checks
    adapter, output = walk.runs / "main" / "adapter", walk.output / "card"
    words = ("card", adapter, "--output", output, "--results", walk.runs / "base", "--results", walk.runs / "main")
    first = tools.finlora(*words)
    accuracy = recorded(tools, "main")["metrics"]["accuracy"]
    checks.contains("verdict", f"right in {100 * accuracy:.1f} %", first.text)
    checks.contains("verdict against the base", "its base (", first.text)
    page = (output / "card.html").read_text(encoding="utf-8")
    checks.contains("an adapter that nobody has approved", "nobody has approved it", page)
    checks.equal("addresses that the page loads from", [], re.findall(r'(?:src|href)="(https?://[^"]+)"', page))
    done = tools.finlora(
        "approve", adapter, "--by", "A. Validator", "--decision", "approved", "--card", output / "card.html"
    )
    (digest,) = re.findall(r"\b[0-9a-f]{64}\b", done.text)
    tools.finlora(*words)
    checks.contains("the approval in the card", digest, (output / "card.md").read_text(encoding="utf-8"))
    checks.contains(
        "scores in the adapter's README", f"{100 * accuracy:.1f} (", (adapter / "README.md").read_text(encoding="utf-8")
    )
    (reference,) = json.loads((adapter / "reference.json").read_text(encoding="utf-8"))["tasks"]
    checks.close("accuracy in the adapter's reference", accuracy, reference["accuracy"], 1e-9)


def export(tools: Tools) -> None:
    """Log a run to an MLflow file, twice: one run there, with the loss and the score of results.jsonl."""
    walk, checks = tools.walk, tools.checks
    database = walk.output / "export" / "mlflow.db"
    words = ("export", "mlflow", walk.runs / "main", "--to", f"sqlite:///{database}")
    if importlib.util.find_spec("mlflow") is None:
        refused = tools.finlora(*words, code=2)
        checks.contains("the package that it needs", "pip install 'finlora[mlflow]'", refused.text)
        checks.skip("runs in MLflow", "the extra mlflow is not installed")
        return
    first, again = tools.finlora(*words), tools.finlora(*words)
    checks.equal("the run that the second export names", first.text.split()[-3:], again.text.split()[-3:])
    with contextlib.closing(sqlite3.connect(database)) as connection:
        runs = connection.execute("SELECT name, status FROM runs").fetchall()
        numbers = dict(connection.execute("SELECT key, value FROM latest_metrics").fetchall())
    checks.equal("runs in MLflow", [("main", "FINISHED")], runs)
    loss = next(record for record in tools.results("main") if record["kind"] == "training")["metrics"]["loss_last"]
    checks.close("last loss in MLflow", loss, numbers["train/loss"], 1e-9)
    accuracy = recorded(tools, "main")["metrics"]["accuracy"]
    checks.close("accuracy in MLflow", accuracy, numbers[f"test/{walk.task}/accuracy"], 1e-9)


def submit_job(tools: Tools) -> None:
    """Submit a verb as a Ray job, if this Ray has its dashboard."""
    walk, checks = tools.walk, tools.checks
    if walk.dashboard_port is None:
        checks.skip("ray job submit", "this Ray has no dashboard page, so no jobs can be submitted")
        return
    address = f"http://127.0.0.1:{walk.dashboard_port}"
    words = ["job", "submit", "--address", address, "--working-dir", ".", "--", "python", "jobs/plan.py"]
    command = [sys.executable, "-m", "ray.scripts.scripts", *words, "--config", str(walk.config)]
    done = tools.command(command, "ray job submit -- python jobs/plan.py --config CONFIG")
    checks.contains("the job's log", "It fits", done.text)
    checks.contains("its end", "succeeded", done.text)
