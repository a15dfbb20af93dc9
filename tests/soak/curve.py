"""Curves of the soak test: memory and descriptors of each process role over time, their slopes, and a figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tests.chaos.record import say

RAYS_OWN = "Ray's own"
WARM_UP_SHARE = 1 / 3
MEMORY_SHARE, MEMORY_MIB, DESCRIPTORS = 0.04, 8.0, 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """One quantity, summed over all processes of a role."""

    name: str
    seconds: list[float]
    values: list[float]

    @property
    def settled(self) -> tuple[list[float], list[float]]:
        """The curve without its first third (warm-up)."""
        start = WARM_UP_SHARE * self.seconds[-1]
        pairs = [(s, v) for s, v in zip(self.seconds, self.values, strict=True) if s >= start]
        return [s for s, _ in pairs], [v for _, v in pairs]

    @property
    def slope_per_hour(self) -> float:
        """Theil-Sen slope of the settled part: the median over all pairs, robust to single jumps."""
        from scipy.stats import theilslopes

        seconds, values = self.settled
        return float(theilslopes(values, [s / 3600 for s in seconds]).slope)

    @property
    def median(self) -> float:
        return sorted(self.settled[1])[len(self.settled[1]) // 2]


def curves_of(samples: list[dict[str, Any]], quantity: str) -> dict[str, Curve]:
    names = sorted({f"{row['side']}: {row['role']}" for sample in samples for row in sample["processes"]})
    found = {}
    for name in names:
        sums = [
            sum(row[quantity] for row in sample["processes"] if f"{row['side']}: {row['role']}" == name)
            for sample in samples
        ]
        found[name] = Curve(name, [sample["seconds"] for sample in samples], sums)
    return found


def report(samples: list[dict[str, Any]], figure: Path | None) -> int:
    """Print a row for each role and draw the curves; returns 1 where a role of ours grows."""
    memory, descriptors = curves_of(samples, "rss_mib"), curves_of(samples, "descriptors")
    minutes = samples[-1]["seconds"] / 60
    say(
        f"{minutes:.0f} minutes, {len(samples)} samples, {samples[-1]['asked']:,} answers, {samples[-1]['step']:,} steps"
    )
    say("| role | MiB, median | MiB an hour | descriptors | an hour | |\n| --- | --- | --- | --- | --- | --- |")
    growing = []
    for name, curve in memory.items():
        limit = max(MEMORY_MIB, MEMORY_SHARE * curve.median)
        is_flat = curve.slope_per_hour <= limit and descriptors[name].slope_per_hour <= DESCRIPTORS
        if not is_flat and RAYS_OWN not in name:
            growing.append(name)
        say(
            f"| {name} | {curve.median:.0f} | {curve.slope_per_hour:+.1f} | {descriptors[name].median:.0f} | "
            f"{descriptors[name].slope_per_hour:+.1f} | {'flat' if is_flat else 'GROWS'} |"
        )
    if figure:
        draw(memory, descriptors, figure)
    return int(bool(growing))


def draw(memory: dict[str, Curve], descriptors: dict[str, Curve], path: Path) -> None:
    from finlora.report.plots import COLOURS, GREY, new_figures, save_figure

    figure, _ = new_figures(1, 9.5, 6.0)
    figure.clear()
    rows = figure.subplots(2, 2, sharex=True)
    for column, side in enumerate(("server", "training")):
        for row, (curves, label) in enumerate(((memory, "resident memory, MiB"), (descriptors, "file descriptors"))):
            axes = rows[row][column]
            own = [curve for name, curve in curves.items() if name.startswith(f"{side}:")]
            for number, curve in enumerate(own):
                role = curve.name.partition(": ")[2]
                colour = GREY if role == RAYS_OWN else COLOURS[number % len(COLOURS)]
                axes.plot([s / 60 for s in curve.seconds], curve.values, label=role, color=colour, linewidth=1.4)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylabel(label if column == 0 else "")
            if row == 0:
                axes.set_title(side, fontsize=11)
                axes.legend(fontsize=8, frameon=False, ncols=2)
            else:
                axes.set_xlabel("minutes")
    save_figure(figure, path)
