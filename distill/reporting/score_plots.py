"""Plots of pruning scores: the score of each unit, and which units were kept."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from distill.pruning.base import Scores
from distill.pruning.plan import Plan
from distill.reporting.plots import INKS, Plot, log_scale, render

TITLES = {
    "mlp_neurons": "MLP neurons",
    "attention_heads": "attention heads",
    "kv_groups": "KV groups",
    "hidden_channels": "hidden channels",
    "experts": "experts",
    "layers": "layers",
    "layer_blocks": "blocks of layers",
}
MOST_CELLS = 48
"""Cells per layer. If a layer has more units, they are sorted by score, and a cell is the mean over several units."""
DECADES = 2
"""The palest colour is this many powers of ten below the best score."""


def score_plots(stage: str, scores: Scores, plan: Plan) -> list[Plot]:
    """One plot per axis: bars for layers, a sorted curve for hidden channels, and a row of cells per layer otherwise.

    Args:
        stage: name of the stage, for the names of the plots.
        scores: the scores of the plan.
        plan: the units that stay.
    """
    plots = []
    for axis, tensor in scores.tensors().items():
        values = tensor.double().numpy()
        drawing = _bars if axis in ("layers", "layer_blocks") else _curve if values.ndim == 1 else _cells
        size, note, draw = drawing(axis, values, plan)
        svg, png = render(f"scores_{stage}_{axis}", size, draw, f"{stage}: scores of {TITLES[axis]}", note)
        plots.append(Plot(f"scores_{stage}_{axis}", TITLES[axis], svg, png, note))
    return plots


def _bars(axis: str, values: np.ndarray, plan: Plan) -> tuple[tuple[float, float], str, Any]:
    gone = [layer for layer in range(plan.before["layers"]) if layer not in plan.layers]
    whole = axis == "layers"

    def draw(axes: Axes) -> None:
        dropped = [i in gone if whole else i == gone[0] for i in range(len(values))]
        fills = ["none" if one else INKS["accent"] for one in dropped]
        axes.bar(range(len(values)), values, color=fills, edgecolor=INKS["accent"], linewidth=0.8, width=0.72)
        axes.set_ylabel("score")
        axes.set_xlabel("layer" if whole else f"first of {len(gone)} layers removed together")
        _whole_numbers(axes)

    return (3.0, 1.9), "Filled: kept. Hollow: removed." if whole else "Hollow: the removed block.", draw


def _curve(axis: str, values: np.ndarray, plan: Plan) -> tuple[tuple[float, float], str, Any]:
    kept, ranked = plan.after[axis], np.sort(values)[::-1]

    def draw(axes: Axes) -> None:
        rank = np.arange(1, len(ranked) + 1)
        axes.plot(rank, ranked, color=INKS["accent"], linewidth=1.4)
        axes.fill_between(
            rank[:kept], ranked[:kept], min(0.0, ranked[-1]), color=INKS["accent"], alpha=0.18, linewidth=0
        )
        if ranked[-1] > 0 and ranked[0] > 30 * ranked[-1]:
            log_scale(axes)
        axes.axvline(kept + 0.5, color=INKS["muted"], linewidth=0.9, dashes=(4, 3))
        axes.set_ylabel("score")
        axes.set_xlabel("units, sorted by score")

    return (3.0, 1.9), f"Left of the line: the {kept} kept units.", draw


def _cells(axis: str, values: np.ndarray, plan: Plan) -> tuple[tuple[float, float], str, Any]:
    """One row of cells per layer; few units are in the model's order, many units are sorted by score."""
    ranked = values.shape[-1] > MOST_CELLS
    if ranked:
        values = -np.sort(-values, axis=-1)
    values = values.reshape(len(values), -1, values.shape[-1]).mean(1)  # neurons of an expert: ranked, then their mean
    units, share = values.shape[1], plan.after[axis] / plan.before[axis]
    edges = np.linspace(0, units, min(units, MOST_CELLS) + 1).round().astype(int)
    cells = np.stack([values[:, a:b].mean(1) for a, b in itertools.pairwise(edges)], 1)
    best = cells.max(1, keepdims=True).clip(1e-300)
    depth = (1 + np.log10((cells / best).clip(10.0**-DECADES)) / DECADES).clip(0.04)
    kept = getattr(plan, axis)
    stays = {layer: {*kept[new]} for new, layer in enumerate(plan.layers)} if kept is not None else {}

    def draw(axes: Axes) -> None:
        for layer, row in enumerate(depth):
            colors = [to_rgba(INKS["accent"], float(d)) for d in row]
            axes.bar(
                edges[:-1],
                0.86,
                np.diff(edges) * (1 if ranked else 0.94),
                layer - 0.43,
                align="edge",
                color=colors,
                linewidth=0,
            )
            gone = [] if ranked else [u for u in range(units) if u not in stays.get(layer, ())]
            axes.plot([u + 0.47 for u in gone], [layer] * len(gone), "x", color=INKS["ink"], markersize=3, linewidth=0)
        if ranked:
            rows = [layer for layer in range(len(depth)) if layer in plan.layers]
            low, high = ([layer + side for layer in rows] for side in (-0.5, 0.5))
            axes.vlines([units * share] * len(rows), low, high, INKS["ink"], (0, (4, 3)), linewidth=0.9)
            gone_rows = [layer for layer in range(len(depth)) if layer not in plan.layers]
            axes.hlines(gone_rows, 0, units, color=INKS["ink"], linewidth=0.9)
        _colour_key(axes)
        axes.grid(visible=False)
        axes.set_xlim(0, units)
        axes.set_ylim(len(depth) - 0.5, -0.5)
        axes.set_ylabel("layer")
        axes.set_xlabel("units of the layer, sorted by score" if ranked else "unit")
        _whole_numbers(axes)
        if not ranked:
            numbers = range(0, units, 1 + units // 9)
            axes.set_xticks([u + 0.47 for u in numbers], [str(u) for u in numbers])

    cut = f"left of the dashed line: the {plan.after[axis]} kept units" if ranked else "crossed out: removed units"
    cut += ", struck through: removed layers" if ranked and len(plan.layers) < len(depth) else ""
    height = 1.2 + 0.085 * max(8, min(len(depth), 80))
    note = f"Colour: score relative to the layer's best, on a logarithmic scale of {DECADES} decades; {cut}."
    return (3.0, height), note, draw


def _colour_key(axes: Axes) -> None:
    steps = {"the layer's best": 1.0, "a tenth": 1 - 1 / DECADES, f"1/{10**DECADES} or less": 0.04}
    patches = [Patch(facecolor=to_rgba(INKS["accent"], depth), label=label) for label, depth in steps.items()]
    place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "ncols": len(steps)}
    room: Any = {"handlelength": 1.0, "handletextpad": 0.4, "columnspacing": 0.9, "fontsize": 6.5}
    axes.legend(handles=patches, frameon=False, labelcolor=INKS["muted"], **place, **room)


def _whole_numbers(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_label().get_text() != "score":
            axis.set_major_locator(MaxNLocator(5, integer=True))
