"""`finlora score` over a large table: rows a second beside the bare engine's in one run, and the memory of its processes.

    python benchmarks/score_table.py --base BASE --rows 20000 --output DIR             # a few minutes on two cores
    python benchmarks/score_table.py --base BASE --rows 1000000 --engines 12 --minutes 9 --output DIR
    python benchmarks/score_table.py --redraw --output DIR                             # the curve again, from its samples

The table is a CSV file of generated news sentences, no two of them equal. First the bare engine answers `--bare-rows` of them:
loaded in a process of its own, prompts encoded beforehand, no table, no Ray; for several engines, as many processes at the same
time. Then the command scores the whole table as a user types it. Its rate is taken between the first part and the last, so that
start-up is apart, and compared with the faster of two runs of the bare engine, one before and one after. Memory is the resident
set of the driver, of each engine (Ray Data's actors), and of all other processes together (Ray's own), once every `--every`
seconds.

After `--minutes` the command is interrupted as by Ctrl+C. The same call resumes it and goes on with its samples.

Writes DIR/samples.jsonl (while it runs), DIR/score_table.json and DIR/score_table.png.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TASK = "fpb"
GIB = 2**30
KINDS = ("driver", "engines", "others")
WARM, MIN_ENDS = 1024, 2


def write_table(path: Path, num_rows: int) -> None:
    """Write generated sentences, each with its own number; the same for the same number of rows."""
    from finlora.data.prompts import SENTIMENTS
    from finlora.data.tasks.synthetic import sentiment_sentence

    rng = random.Random("score-table")
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["number", "text"])
        for number in range(num_rows):
            sentence = sentiment_sentence(rng, "test", rng.choice(SENTIMENTS))[0]
            writer.writerow([number, f"{sentence} Notice {number} ."])


def settings_of(options: argparse.Namespace) -> list[str]:
    """Return the settings that the command and the bare engine share."""
    return [
        *("name=score-table", f"model.base={options.base}", f"model.bits={options.bits}", f"eval.bits={options.bits}"),
        *(f"model.template={options.template}", f"data.tasks=[{TASK}]", f"eval.device={options.device}", *options.set),
    ]


def measure_bare(options: argparse.Namespace, table: Path) -> dict[str, float]:
    """Answer all rows of a table by one engine a process, all at once; returns rows a second of one, without loading."""
    context = multiprocessing.get_context("spawn")
    loaded = context.Barrier(options.engines)
    with context.Pool(options.engines, _share_barrier, (loaded,)) as pool:
        found = pool.starmap(_run_bare, [(options, table)] * options.engines, chunksize=1)
    seconds = max(seconds for _, seconds in found)
    return {"rows": found[0][0], "seconds": seconds, "rows_per_second": found[0][0] / seconds}


def _share_barrier(barrier: Any) -> None:
    global _loaded
    _loaded = barrier


def _run_bare(options: argparse.Namespace, table: Path) -> tuple[int, float]:
    """Return the rows answered and their seconds."""
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

        def answer(count: int) -> None:
            # In the scorer's own thread, which keeps the compiled kernels.
            scorer._computing.submit(
                scorer._engine.score_choices, asked[:count], choices[:count], lambda _done: None
            ).result()

        answer(WARM)
        _loaded.wait()
        started = time.perf_counter()
        answer(len(asked))
        return len(asked), time.perf_counter() - started
    finally:
        scorer.close()


class Watch:
    """Rows scored and memory held, sampled while the command runs, and appended to a file.

    Args:
        process: of the command.
        out: its output.
        rows_a_part: rows of each part but the last.
        num_rows: of the table.
        path: file of the samples, which may hold those of an interrupted run.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], out: Path, rows_a_part: int, num_rows: int, path: Path
    ) -> None:
        import psutil

        self._driver, self._parts = psutil.Process(process.pid), out.with_name(out.name + ".parts")
        self._rows_a_part, self._num_rows, self._path = rows_a_part, num_rows, path
        self.samples = read_samples(path)
        last = self.samples[-1] if self.samples else {"run": 0, "seconds": 0.0}
        self._run, self._started = last["run"] + 1, time.monotonic() - last["seconds"]
        self._done = 0
        """Rows; the parts are removed when the output is written."""

    def sample(self) -> None:
        """Note seconds since the start, rows of sealed parts, and GiB of driver, each engine and other processes."""
        import psutil

        held: dict[str, Any] = {"driver": 0.0, "engines": {}, "others": 0.0}
        try:
            family = [self._driver, *self._driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                title, size = " ".join(process.cmdline()[:1]), process.memory_info().rss / GIB
            except psutil.Error:
                continue
            if process == self._driver:
                held["driver"] = size
            elif "ScoreActor" in title:
                held["engines"][str(process.pid)] = size
            else:
                held["others"] += size
        parts = sum(1 for _ in self._parts.glob("part-*.parquet")) if self._parts.is_dir() else 0
        self._done = max(self._done, min(self._num_rows, parts * self._rows_a_part))
        self.samples.append({"run": self._run, "seconds": time.monotonic() - self._started, "rows": self._done, **held})
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.samples[-1]) + "\n")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples of a file; none if it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure_command(options: argparse.Namespace, table: Path, out: Path, until: float) -> list[dict[str, Any]]:
    """Run the command over the table until a time of time.monotonic(); returns the samples.

    Raises:
        SystemExit: it failed.
    """
    from finlora.score.table import PART_ROWS

    command = [
        *(sys.executable, "-m", "finlora.cli.main", "score", str(table), str(out), "--task", TASK, "--text", "text"),
        *(["--adapter", str(options.adapter)] if options.adapter else ["--base"]),
        *("--engines", str(options.engines)),
        *(["--config", str(options.config)] if options.config else []),
        *settings_of(options),
    ]
    with out.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        watch = Watch(process, out, PART_ROWS[options.device], options.rows, out.with_name("samples.jsonl"))
        while process.poll() is None and time.monotonic() < until:
            watch.sample()
            time.sleep(options.every)
        is_stopped = process.poll() is None
        if is_stopped:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    if process.returncode and not is_stopped:
        raise SystemExit(f"finlora score ended with {process.returncode}: see {out.with_suffix('.log')}")
    return watch.samples


def find_rate(samples: list[dict[str, Any]]) -> float:
    """Return rows a second of the last run, between the first sample with new rows and the last one; nan if there are none.

    Both ends are samples in which parts were new, so that waiting for the end of a part counts neither before nor after.
    """
    own = [one for one in samples if one["run"] == samples[-1]["run"]]
    new = [one for before, one in itertools.pairwise(own) if one["rows"] > before["rows"]]
    if len(new) < MIN_ENDS:
        return float("nan")
    return (new[-1]["rows"] - new[0]["rows"]) / (new[-1]["seconds"] - new[0]["seconds"])


def held_by(sample: dict[str, Any], kind: str) -> float:
    """Return the GiB of a kind of process; of the engines, the largest one's."""
    return max(sample[kind].values(), default=0.0) if kind == "engines" else sample[kind]


def describe_memory(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the most GiB of each kind of process: in the first tenth of the samples with a sealed part, the middle, the last."""
    sealed = [one for one in samples if one["rows"] and one["engines"]] or samples
    size = max(1, len(sealed) // 10)
    middle = (len(sealed) - size) // 2
    tenths = {"first tenth": sealed[:size], "middle": sealed[middle : middle + size], "last tenth": sealed[-size:]}
    return {name: {kind: max(held_by(one, kind) for one in own) for kind in KINDS} for name, own in tenths.items()}


def draw(samples: list[dict[str, Any]], bare_rate: float, path: Path) -> None:
    """Plot rows a second and memory over rows scored.

    Args:
        bare_rate: rows a second of the bare engines together.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    ends: list[tuple[dict[str, Any], dict[str, Any]]] = []
    start, few = samples[0], max(6_000, samples[-1]["rows"] / 25)
    for before, one in itertools.pairwise(samples):
        if one["run"] != before["run"] or not start["rows"]:
            start = one
        elif one["rows"] - start["rows"] >= few and one["rows"] > before["rows"]:
            ends.append((start, one))
            start = one
    rates = [(other["rows"] - one["rows"]) / (other["seconds"] - one["seconds"]) for one, other in ends]
    above.plot(
        [other["rows"] / 1000 for _, other in ends], rates, color="#1f5fa8", linewidth=1.2, label="finlora score"
    )
    above.axhline(bare_rate, color="#777777", linewidth=1, linestyle="--", label="bare engines")
    above.set(ylabel="rows a second", ylim=(0, None), title="finlora score over one table")
    samples = [one for one in samples if one["engines"]]
    rows = [one["rows"] / 1000 for one in samples]
    for kind, colour in zip(KINDS, ("#1f5fa8", "#b3541e", "#777777"), strict=True):
        label = {"engines": "largest engine", "others": "Ray's other processes together"}.get(kind, kind)
        below.plot(rows, [held_by(one, kind) for one in samples], label=label, color=colour, linewidth=1.2)
    below.set(xlabel="thousand rows scored", ylabel="GiB resident", ylim=(0, None))
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--config", type=Path, help="YAML of the run; default: FinLoRA's defaults")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--template", default="raw")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--bare-rows", type=int, default=4_096)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two samples")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many; the same call resumes")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw the curve of an earlier call")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], help="further settings, as key=value")
    options = parser.parse_args()
    written, picture = options.output / "score_table.json", options.output / "score_table.png"
    if options.redraw:
        found = json.loads(written.read_text(encoding="utf-8"))
        draw(found["samples"], found["bare"]["rows_per_second"] * found["engines"], picture)
        return
    until = time.monotonic() + 60 * options.minutes
    from finlora.machine.cpu import set_environment

    set_environment()
    options.output.mkdir(parents=True, exist_ok=True)
    table, sample, out = (options.output / name for name in ("table.csv", "sample.csv", "scored.csv"))
    write_table(table, options.rows)
    write_table(sample, options.bare_rows)
    bare = [measure_bare(options, sample)]
    samples = measure_command(options, table, out, until)
    if time.monotonic() < until:
        bare.append(measure_bare(options, sample))
    bare.sort(key=lambda one: -one["rows_per_second"])
    rates = " and ".join(f"{one['rows_per_second']:,.0f}" for one in bare)
    print(f"bare engine: {rates} rows/s, {options.engines} at once")
    rate = find_rate(samples)
    found = {
        "rows": options.rows,
        "rows_scored": samples[-1]["rows"],
        "device": options.device,
        "bare": bare[0],
        "rows_per_second": rate,
        "engines": options.engines,
        "share_of_bare": rate / bare[0]["rows_per_second"] / options.engines,
        "seconds": samples[-1]["seconds"],
        "memory_gib": describe_memory(samples),
        "samples": samples,
    }
    written.write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(samples, bare[0]["rows_per_second"] * options.engines, picture)
    print(
        f"finlora score {rate:,.0f} rows/s with {options.engines} engines, {found['share_of_bare']:.1%} of the bare ones"
    )
    print(
        f"{samples[-1]['rows']:,} of {options.rows:,} rows in {samples[-1]['seconds']:,.0f} s, start-up included; GiB:"
    )
    for name, held in found["memory_gib"].items():
        print(f"  {name}: " + ", ".join(f"{kind} {value:.2f}" for kind, value in held.items()))


if __name__ == "__main__":
    main()
