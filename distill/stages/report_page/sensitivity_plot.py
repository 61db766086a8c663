"""A picture of what each layer costs on each grid, when it alone is quantized, and of the grid that it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.stages.report_page.plots import Plot, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"


def sensitivity_plot(stage: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """One mark a layer and grid, in the model's order; filled where the layer got the grid.

    Args:
        stage: goes into the plot's name.
        rows: of sensitivity.json.
    """

    def draw(axes: Axes, inks: dict[str, str]) -> None:
        for marker, label in zip(MARKERS, rows[0]["grids"], strict=False):
            losses = [max(row["grids"][label]["kl"], 1e-12) for row in rows]
            got = [place for place, row in enumerate(rows) if row["chosen"] == label]
            axes.plot(
                range(len(rows)), losses, marker, color=inks["accent"], fillstyle="none", markersize=3, label=label
            )
            axes.plot(got, [losses[place] for place in got], marker, color=inks["accent"], markersize=3)
        axes.set_yscale("log")
        axes.set_ylabel("KL of that layer alone, nats")
        axes.set_xlabel("layers in the model's order")
        axes.legend(frameon=False, fontsize=6.5, labelcolor=inks["muted"])

    svg, png = render(f"sensitivity_{stage}", (4.25, 2.6), draw)
    return Plot(f"sensitivity_{stage}", "sensitivity of the layers", svg, png, "Filled: the grid that the layer got.")
