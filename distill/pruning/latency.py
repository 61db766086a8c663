"""How long an architecture takes to decode a token, forecast from a few architectures that were measured.

    ms = start + a * layers + b * flops_per_token        start, a, b >= 0, least squares of the relative error

Decoding one sequence reads every weight once a token, so time grows with what is multiplied; a layer costs its calls
besides, however narrow it is. The forecast says which of thousands of architectures are worth measuring; what fits is
decided by measurement. Leave it for FLOPs where the student is to run on another machine than the one that searches.

Source: that decode latency is close to affine in depth and in the bytes read is common knowledge of roofline models
(Williams et al. 2009); choosing by a latency measured on the target is that of NetAdapt (Yang et al. 2018,
arXiv 1804.03230). The fit is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from distill.pruning.budget import Costs, Measure

if TYPE_CHECKING:
    from torch import Tensor

Sizes = Mapping[str, int]


class Latency:
    """Forecast milliseconds a token, which grow with each size.

    Args:
        flops: counts ``flops_per_token``.
        measured: (axis sizes, milliseconds) of three architectures or more.
    """

    measure: ClassVar[Measure] = "decode_ms_per_token"

    def __init__(self, flops: Costs, measured: Sequence[tuple[Sizes, float]]):
        import torch

        self._flops = flops
        rows = torch.tensor([self._features(sizes) for sizes, _ in measured], dtype=torch.float64)
        times = torch.tensor([ms for _, ms in measured], dtype=torch.float64)
        self._weights = _not_negative(rows / times[:, None])

    def of(self, sizes: Sizes) -> float:
        """Milliseconds that these axis sizes take."""
        return sum(w * x for w, x in zip(self._weights, self._features(sizes), strict=True))

    def _features(self, sizes: Sizes) -> tuple[float, float, float]:
        return 1.0, float(sizes["layers"]), self._flops.of(sizes)


def _not_negative(rows: Tensor) -> list[float]:
    """Weights of the columns, none below zero, whose sum comes closest to 1 in each row."""
    import torch

    scale = rows.amax(0)
    kept = list(range(rows.size(1)))
    while True:
        target = torch.ones(len(rows), 1, dtype=rows.dtype)
        found = torch.linalg.lstsq((rows / scale)[:, kept], target, driver="gelsd").solution.flatten()
        if found.min() >= 0:
            weights = torch.zeros_like(scale)
            weights[kept] = found / scale[kept]
            return [float(weight) for weight in weights]
        kept.pop(int(found.argmin()))
