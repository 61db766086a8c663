"""The live view of a run in a terminal: its stages, the losses of the one that trains, what is left, and the machine.

Everything is read from the run's folder, so it works from another terminal, over ssh, and after the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from distill.api.open_run import load_run
from distill.core import stop
from distill.core.run_folder import DONE, INPUT, Run
from distill.recipe import Recipe
from distill.tracking.hardware import Samples
from distill.training.metrics import read_rows
from distill.training.spec import BudgetSpec

EVERY_S = 1.0
BARS = "▁▂▃▄▅▆▇█"
SILENT_S = 30.0
"""Without a sample for so long a run on another machine is taken for ended, stopped or killed."""


@dataclass(frozen=True)
class StageView:
    """One stage as it stands.

    Attributes:
        name: of the stage; kind: of its spec.
        state: "done", "running", "stopped" (in the middle) or "to do".
        seconds: that it took; of one that runs, since its first sample. None when nobody knows.
        rows: of its metrics.
        num_steps: that it will train; None when it does not train or nobody knows yet.
    """

    name: str
    kind: str
    state: str
    seconds: float | None
    rows: Sequence[Mapping[str, Any]]
    num_steps: int | None

    def left_s(self) -> float | None:
        """Seconds until its training ends, at the speed of the latest rows; None when that is not known."""
        trained = [row for row in self.rows if row.get("perf/steps_per_s")]
        if self.num_steps is None or not trained or self.state != "running":
            return None
        return max(0, self.num_steps - trained[-1]["step"]) / trained[-1]["perf/steps_per_s"]


def watch(run_dir: Path, *, once: bool = False, console: Console | None = None) -> None:
    """Show a run until it ends or Ctrl-C.

    Args:
        run_dir: folder of a run.
        once: print one view and return.
        console: where to; None is the terminal.

    Raises:
        InputError: the folder is no run.
    """
    load_run(run_dir)
    console, samples = console or Console(), Samples(run_dir)
    if once:
        console.print(view(run_dir, samples.read()))
        return
    with (
        stop.patient(),
        Live(view(run_dir, samples.read()), console=console, refresh_per_second=4, transient=False) as live,
    ):
        while is_live(Run(run_dir), samples.read()) and not stop.asked():
            time.sleep(EVERY_S)
            live.update(view(run_dir, samples.read()))
        stop.finish()  # a signal ends the view, never the run: there is nothing to go on with


def is_live(run: Run, samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a process works at the run: on this machine by its number, on another one by the age of its samples."""
    known = run.is_worked_at()
    return bool(samples) and time.time() - samples[-1]["at"] <= SILENT_S if known is None else known


def view(run_dir: Path, samples: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The whole view as it is now.

    Args:
        run_dir: folder of the run.
        samples: of its ``hardware.jsonl``.
    """
    recipe = Recipe.load(run_dir / "recipe.yaml")
    stages = list(stage_views(recipe, Run(run_dir), samples))
    now = next((stage for stage in stages if stage.state in ("running", "stopped")), None)
    parts: list[RenderableType] = [Text(f"{recipe.name}  {run_dir}", style="bold"), _stages(stages)]
    shown = now or next((stage for stage in reversed(stages) if stage.rows), None)
    if shown is not None and shown.rows:
        parts.append(_losses(shown))
    if samples:
        parts.append(_machine(samples, is_live=now is not None and now.state == "running"))
    return Group(*parts)


def stage_views(recipe: Recipe, run: Run, samples: Sequence[Mapping[str, Any]]) -> Iterable[StageView]:
    """Each stage of the recipe."""
    works, is_first = is_live(run, samples), True
    for name, spec in recipe.stages.items():
        folder, own = run.stage(name), [sample["at"] for sample in samples if sample["stage"] == name]
        rows = read_rows(folder)
        seconds: float | None = own[-1] - own[0] if own else None
        if (folder / DONE).is_file():
            state, done = "done", run.done(name)
            seconds = done.seconds if done is not None else None
        elif (folder / INPUT).is_file():  # begun; of those only the first is being worked at
            state = ("running" if is_first else "to do") if works else "stopped"
            is_first = False
        else:
            state = "to do"
        steps = _num_steps(spec, rows) if isinstance(spec, BudgetSpec) else None
        yield StageView(name, spec.kind, state, seconds, rows, steps)


def _num_steps(budget: BudgetSpec, rows: Sequence[Mapping[str, Any]]) -> int | None:
    if budget.num_steps is not None:
        return budget.num_steps or None
    counted = [row for row in rows if row.get("step") and row.get("tokens")]
    if not counted or not budget.num_tokens:
        return None
    return math.ceil(budget.num_tokens / (counted[-1]["tokens"] / counted[-1]["step"]))


def _stages(stages: Sequence[StageView]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    marks = {"done": ("✓", "green"), "running": ("▶", "bold cyan"), "stopped": ("■", "yellow"), "to do": ("·", "dim")}
    for stage in stages:
        mark, style = marks[stage.state]
        kind = "" if stage.kind == stage.name else f"({stage.kind})"
        took = "" if stage.seconds is None else clock(stage.seconds)
        table.add_row(Text(mark, style), Text(stage.name, style), kind, took, _progress(stage))
    return table


def _progress(stage: StageView) -> Text:
    if not stage.rows or stage.state == "done":
        return Text("")
    step = stage.rows[-1]["step"]
    if stage.num_steps is None:
        return Text(f"step {step:,}")
    share = min(1.0, step / stage.num_steps)
    full = round(20 * share)
    left = stage.left_s()
    eta = f", {clock(left)} left" if left is not None else ""
    return (
        Text("━" * full, "cyan") + Text("━" * (20 - full), "dim") + Text(f" step {step:,} of {stage.num_steps:,}{eta}")
    )


def _losses(stage: StageView) -> Table:
    """Each figure of the metrics that is a loss or a speed: its course, and the latest."""
    table = Table(
        title=f"{stage.name}: metrics", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False
    )
    names = [name for name in dict.fromkeys(key for row in stage.rows for key in row) if _is_shown(name)]
    for name in names:
        values = [float(row[name]) for row in stage.rows if name in row]
        table.add_row(name, Text(sparkline(values), "cyan"), f"{values[-1]:.4g}")
    return table


def _grid(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)


def _is_shown(name: str) -> bool:
    return name.startswith(("train/", "val/")) or name in ("perf/tokens_per_s", "perf/mfu")


def _machine(samples: Sequence[Mapping[str, Any]], *, is_live: bool) -> Table:
    """Load and memory of processors and each GPU, over the latest samples."""
    table = _grid("machine" if is_live else "machine, at the last sample")
    recent, last = samples[-40:], samples[-1]
    load = [float(sample.get("cpu", 0.0)) for sample in recent]
    held = f"{last.get('memory', 0) / 1e9:,.1f} GB in this run's processes"
    table.add_row("CPU", Text(sparkline(load, 0.0, 100.0), "cyan"), f"{load[-1]:.0f} %", held)
    for gpu in last.get("gpus") or ():
        course = [_of(sample, gpu["index"]).get("utilization", 0.0) for sample in recent]
        parts = []
        if "memory" in gpu and gpu.get("memory_total"):
            parts.append(f"{gpu['memory'] / 1e9:,.1f} of {gpu['memory_total'] / 1e9:,.1f} GB")
        parts += [f"{gpu[key]:,.0f} {unit}" for key, unit in (("power", "W"), ("temperature", "°C")) if key in gpu]
        table.add_row(
            f"GPU {gpu['index']}",
            Text(sparkline(course, 0.0, 100.0), "cyan"),
            f"{gpu.get('utilization', 0):.0f} %",
            ", ".join(parts),
        )
    return table


def _of(sample: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    return next((gpu for gpu in sample.get("gpus") or () if gpu.get("index") == index), {})


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None, width: int = 40) -> str:
    """A line of blocks; of more values than fit, means of neighbours.

    Args:
        values: oldest first; what is not finite becomes a gap.
        low, high: ends of the scale; None: those of the values.
        width: of the line, in characters.
    """
    count = len(values)
    num = min(count, width)
    groups = [values[i * count // num : (i + 1) * count // num] for i in range(num)]
    means = [sum(group) / len(group) if all(map(math.isfinite, group)) else math.nan for group in groups]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite) if low is None else low, max(finite) if high is None else high
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    levels = [round((value - low) * scale) if math.isfinite(value) else None for value in means]
    return "".join(" " if level is None else BARS[min(len(BARS) - 1, max(0, level))] for level in levels)


def clock(seconds: float) -> str:
    """Seconds as 12:34, or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
