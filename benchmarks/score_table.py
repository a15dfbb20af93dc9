"""`finlora score` over a large table: rows a second beside the bare engine's in one run, and the memory of its processes.

    python benchmarks/score_table.py --base BASE --rows 20000 --output DIR             # a few minutes on two cores
    python benchmarks/score_table.py --base .demo/base --adapter .demo/adapters/synthetic --rows 1000000 --output DIR

The table is a CSV file of generated news sentences. First the bare engine answers `--bare-rows` of them: loaded in one process,
prompts encoded beforehand, no table, no Ray. Then the command scores the whole table as a user types it. Its rate is taken
between the first part and the last, so that start-up is apart. Memory is the resident set of the driver, of the engines (Ray
Data's actors), and of all other processes together (Ray's own), once every `--every` seconds.

Writes DIR/score_table.json and DIR/score_table.png.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TASK = "fpb"
GIB = 2**30
KINDS = ("driver", "engines", "others")
WARM, MIN_ENDS = 256, 2


def write_table(path: Path, num_rows: int) -> None:
    """Write generated sentences with a number; the same for the same number of rows."""
    from finlora.data.prompts import SENTIMENTS
    from finlora.data.tasks.synthetic import sentiment_sentence

    rng = random.Random("score-table")
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["number", "text"])
        for number in range(num_rows):
            writer.writerow([number, sentiment_sentence(rng, "test", rng.choice(SENTIMENTS))[0]])


def settings_of(options: argparse.Namespace) -> list[str]:
    """Return the settings that the command and the bare engine share."""
    return [
        *("name=score-table", f"model.base={options.base}", f"model.bits={options.bits}", f"eval.bits={options.bits}"),
        *(f"model.template={options.template}", f"data.tasks=[{TASK}]", f"eval.device={options.device}", *options.set),
    ]


def measure_bare(options: argparse.Namespace, table: Path) -> dict[str, float]:
    """Answer all rows of a table by an engine in this process; returns rows a second, without loading and encoding."""
    import torch

    from finlora.configfile import load_config
    from finlora.model.base_files import read_base_files
    from finlora.score.score_plan import make_plan
    from finlora.score.scorer import Scorer, plan_cache
    from finlora.score.table import PART_ROWS, open_table

    if options.device == "cpu":
        torch.set_num_threads(1)  # as an engine of the command, which reserves one core
    config = load_config(options.config, settings_of(options))
    base, rows = read_base_files(config.model), open_table(table, PART_ROWS[options.device])
    plan = make_plan(config, base, options.adapter, rows, task=TASK, text="text", about=None, threshold=None)
    scorer = Scorer(plan, table.with_name("bare"), plan_cache(plan, base), base)
    try:
        # The command's own encoding and engine, so that only the table, Ray and the sealing of parts differ.
        asked = [row.prompt_ids for part in rows.parts for row in scorer._ask(part) if row.reason is None]
        choices = [scorer._choices] * len(asked)
        scorer._engine.score_choices(asked[:WARM], choices[:WARM], lambda _done: None)
        started = time.perf_counter()
        scorer._engine.score_choices(asked, choices, lambda _done: None)
        seconds = time.perf_counter() - started
    finally:
        scorer.close()
    return {"rows": len(asked), "seconds": seconds, "rows_per_second": len(asked) / seconds}


class Watch:
    """Parts sealed and memory held, sampled while the command runs.

    Args:
        process: of the command.
        out: its output.
    """

    def __init__(self, process: subprocess.Popen[bytes], out: Path) -> None:
        import psutil

        self._driver, self._parts = psutil.Process(process.pid), out.with_name(out.name + ".parts")
        self._started = time.monotonic()
        self.samples: list[dict[str, float]] = []

    def sample(self) -> None:
        """Note seconds since the start, sealed parts, and GiB of driver, engines and other processes."""
        import psutil

        held = {"driver": 0.0, "engines": 0.0, "others": 0.0}
        try:
            family = [self._driver, *self._driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                title, size = " ".join(process.cmdline()[:1]), process.memory_info().rss / GIB
            except psutil.Error:
                continue
            kind = "driver" if process == self._driver else "engines" if "ScoreActor" in title else "others"
            held[kind] += size
        parts = sum(1 for _ in self._parts.glob("part-*.parquet")) if self._parts.is_dir() else 0
        self.samples.append({"seconds": time.monotonic() - self._started, "parts": float(parts), **held})


def measure_command(options: argparse.Namespace, table: Path, out: Path) -> tuple[list[dict[str, float]], float]:
    """Run the command over the table; returns the samples and its seconds.

    Raises:
        SystemExit: it failed.
    """
    model = ["--adapter", str(options.adapter)] if options.adapter else ["--base"]
    command = [
        *(sys.executable, "-m", "finlora.cli.main", "score", str(table), str(out), "--task", TASK, "--text", "text")
    ]
    command += [
        *model,
        "--engines",
        str(options.engines),
        *(["--config", str(options.config)] if options.config else []),
        *settings_of(options),
    ]
    with out.with_suffix(".log").open("wb") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        watch = Watch(process, out)
        while process.poll() is None:
            watch.sample()
            time.sleep(options.every)
    if process.returncode:
        raise SystemExit(f"finlora score ended with {process.returncode}: see {out.with_suffix('.log')}")
    return watch.samples, time.monotonic() - started


def find_rate(samples: list[dict[str, float]], rows_a_part: int) -> float:
    """Return rows a second between the first sample with a sealed part and the last one with a new part; nan if there are none.

    Both ends are samples in which parts were new, so that waiting for the end of a part counts neither before nor after.
    """
    new = [one for before, one in itertools.pairwise(samples) if one["parts"] > before["parts"]]
    if len(new) < MIN_ENDS:
        return float("nan")
    return (new[-1]["parts"] - new[0]["parts"]) * rows_a_part / (new[-1]["seconds"] - new[0]["seconds"])


def describe_memory(samples: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the most GiB of each kind of process: in the first tenth of the samples with a sealed part, the middle, the last."""
    sealed = [one for one in samples if one["parts"]] or samples
    size = max(1, len(sealed) // 10)
    middle = (len(sealed) - size) // 2
    tenths = {"first tenth": sealed[:size], "middle": sealed[middle : middle + size], "last tenth": sealed[-size:]}
    return {name: {kind: max(one[kind] for one in own) for kind in KINDS} for name, own in tenths.items()}


def draw(samples: list[dict[str, float]], rows_a_part: int, path: Path) -> None:
    """Plot memory over rows scored."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    rows = [one["parts"] * rows_a_part / 1000 for one in samples]
    for kind, colour in zip(KINDS, ("#1f5fa8", "#b3541e", "#777777"), strict=True):
        axes.plot(rows, [one[kind] for one in samples], label=kind, color=colour, linewidth=1.2)
    axes.set(
        xlabel="thousand rows scored",
        ylabel="GiB resident",
        ylim=(0, None),
        title="finlora score: memory over the table",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--config", type=Path, help="YAML of the run; default: FinLoRA's defaults")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--template", default="raw")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--bare-rows", type=int, default=4_096)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two samples")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], help="further settings, as key=value")
    options = parser.parse_args()
    from finlora.machine.cpu import set_environment
    from finlora.score.table import PART_ROWS

    set_environment()
    options.output.mkdir(parents=True, exist_ok=True)
    table, sample, out = (options.output / name for name in ("table.csv", "sample.csv", "scored.csv"))
    write_table(sample, options.bare_rows)
    write_table(table, options.rows)
    bare = measure_bare(options, sample)
    samples, seconds = measure_command(options, table, out)
    size = PART_ROWS[options.device]
    rate = find_rate(samples, size)
    found: dict[str, Any] = {
        "rows": options.rows,
        "device": options.device,
        "bare": bare,
        "rows_per_second": rate,
        "engines": options.engines,
        "share_of_bare": rate / bare["rows_per_second"] / options.engines,
        "seconds": seconds,
        "memory_gib": describe_memory(samples),
        "samples": samples,
    }
    (options.output / "score_table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(samples, size, options.output / "score_table.png")
    print(
        f"bare engine {bare['rows_per_second']:,.0f} rows/s; finlora score {rate:,.0f} rows/s, {found['share_of_bare']:.1%}"
    )
    print(f"{options.rows:,} rows in {seconds:,.0f} s, start-up included; memory in GiB:")
    for name, held in found["memory_gib"].items():
        print(f"  {name}: " + ", ".join(f"{kind} {value:.2f}" for kind, value in held.items()))


if __name__ == "__main__":
    main()
