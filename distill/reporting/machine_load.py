"""What each stage took of the machine, for the report: a table, and a plot of the load over the time of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from distill.reporting.plots import INKS, Plot, render
from distill.tracking.spec import Price
from distill.tracking.usage import GAP_S, Usage

MOST_POINTS = 400


def usage_table(usages: Sequence[Usage], price: Price | None) -> list[list[str]]:
    """Rows of cells, headings first; no row without a sample.

    Args:
        usages: of the stages.
        price: of the recipe; None: no column of costs.
    """
    if not usages:
        return []
    with_gpu = any(usage.num_gpus for usage in usages)
    of_gpu = ["GPU load", "GPU memory"] if with_gpu else []
    head = ["stage", "time", "CPU load", "memory (rank 0)", *of_gpu, "energy"]
    lines = [[*head, *(["cost"] if price is not None else [])]]
    for usage in usages:
        line = [usage.stage, f"{usage.seconds:,.0f} s", f"{usage.cpu:.0f} %", f"{usage.memory_bytes / 1e9:,.2f} GB"]
        if with_gpu:
            gpu, memory = usage.gpu, usage.gpu_memory_bytes
            line += ["-" if gpu is None else f"{gpu:.0f} %", "-" if memory is None else f"{memory / 1e9:,.1f} GB"]
        lines.append([*line, usage.energy(), *([usage.cost(price) or ""] if price is not None else [])])
    return lines


def load_plot(samples: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Load of the processors, and of the GPUs on average, over the time that the run worked; None of fewer than ten
    samples. Time between two calls of the run is left out."""
    if len(samples) < 10:
        return None
    cpu, gpu, minutes, before = list[tuple[float, float]](), list[tuple[float, float]](), 0.0, samples[0]["at"]
    for sample in samples:
        step = sample["at"] - before
        minutes, before = minutes + (step / 60 if 0 < step <= GAP_S else 0.0), sample["at"]
        cpu.append((minutes, float(sample.get("cpu", 0.0))))
        busy = [one["utilization"] for one in sample.get("gpus") or () if "utilization" in one]
        if busy:
            gpu.append((minutes, sum(busy) / len(busy)))

    def draw(axes: Axes) -> None:
        for points, ink, name in ((cpu, "muted", "CPU"), (gpu, "accent", "GPU")):
            if points:
                axes.plot(*zip(*_thinned(points), strict=True), color=INKS[ink], linewidth=1.1)
                axes.annotate(
                    name, _thinned(points)[-1], xytext=(3, 0), textcoords="offset points", color=INKS[ink], va="center"
                )
        axes.set_ylim(0, 102)
        axes.set_xlabel("minutes of work")
        axes.set_ylabel("load [%]")

    svg, png = render("load", (6.2, 1.9), draw)
    return Plot("load", "Load of the machine", svg, png)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, where there are more points than a plot shows."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
