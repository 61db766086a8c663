"""A plot of the KL of each layer when only it is quantized, with each quantizer, and of the chosen quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from distill.reporting.plots import INKS, Plot, log_scale, render

MARKERS = "osD^vP*X"


def sensitivity_plot(stage: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """One mark per layer and quantizer, in the model's order; filled for the chosen quantizer.

    Args:
        stage: name of the stage, for the plot's name.
        rows: the content of sensitivity.json.
    """

    def draw(axes: Axes) -> None:
        for marker, label in zip(MARKERS, rows[0]["grids"], strict=False):
            losses = [max(row["grids"][label]["kl"], 1e-12) for row in rows]
            got = [place for place, row in enumerate(rows) if row["chosen"] == label]
            axes.plot(
                range(len(rows)), losses, marker, color=INKS["accent"], fillstyle="none", markersize=3, label=label
            )
            axes.plot(got, [losses[place] for place in got], marker, color=INKS["accent"], markersize=3)
        log_scale(axes)
        axes.set_ylabel("KL with only this layer quantized, nats")
        axes.set_xlabel("layer, in the model's order")
        axes.legend(frameon=False, fontsize=6.5, labelcolor=INKS["muted"])

    svg, png = render(f"sensitivity_{stage}", (4.25, 2.6), draw)
    return Plot(f"sensitivity_{stage}", "sensitivity of the layers", svg, png, "Filled: the chosen quantizer.")
