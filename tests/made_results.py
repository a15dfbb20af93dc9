"""Results made by hand, for the tests of what shows them; on the published test splits."""

from __future__ import annotations

import io

from rich.console import Console

from finlora.published import PUBLISHED
from finlora.report import render_report
from finlora.results import Result

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def make_scores(value: float) -> dict[str, float]:
    names = ("accuracy", "strict_accuracy", "weighted_f1")
    ends = {"": 0.0, "_low": -0.02, "_high": 0.01}
    return {f"{name}{end}": value + shift for name in names for end, shift in ends.items()} | {"unparsable": 0.0}


def make_evaluation(accuracy: float = 0.863, **changes) -> Result:
    plain = {
        "kind": "evaluation",
        "task": "fpb",
        "variant": "4bit-r4",
        "base": LLAMA,
        "bits": 8,
        "method": "labels",
        "metrics": make_scores(accuracy),
        "created": "2026-01-01T00:00:00+00:00",
    }
    forms = PUBLISHED.get(str(changes.get("task", plain["task"])), ())
    published = {"data_hash": next((form.test_hash for form in forms if form.test_hash), None)}
    return Result(**(plain | published | changes))


def make_training(**changes) -> Result:
    plain = {
        "kind": "training",
        "task": "ner",
        "variant": "4bit-r4",
        "base": LLAMA,
        "bits": 4,
        "loss_curve": [[1.0, 2.0], [2.0, 1.0]],
        "peak_memory_gib": 26.7,
        "adapter_mib": 4.5,
        "gpu_hours": 1.25,
        "environment": {"device": "Some GPU"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Result(**(plain | changes))


def print_report(results, output=None, width=200) -> str:
    stream = io.StringIO()
    render_report(results, output, Console(file=stream, width=width))
    return stream.getvalue()
