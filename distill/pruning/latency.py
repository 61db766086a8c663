"""The decode time of an architecture, estimated from a few architectures that were measured.

    ms_per_token = c + a * layers + b * flops_per_token      c, a, b >= 0, least squares of the relative error

Decoding at batch size 1 reads every weight once per token, so the time grows with the FLOPs. In addition each layer has
a fixed cost for its kernel calls, whatever its width. The estimate only selects which of thousands of architectures are
measured; whether one fits the budget is decided by measurement. If the student will run on other hardware than the
search, use flops_per_token as the budget instead.

Source: roofline models (Williams et al. 2009), for a latency that is nearly affine in depth and in bytes read; NetAdapt
(Yang et al. 2018, arXiv 1804.03230), for a choice by latency measured on the target. The fit is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distill.pruning.budget import Measure, SizeCosts

Sizes = Mapping[str, int]


class LatencyModel:
    """Estimates milliseconds per token from axis sizes; the estimate does not decrease when a size grows.

    Args:
        flops: cost by ``flops_per_token``.
        measured: (axis sizes, milliseconds per token) of at least three architectures.
    """

    measure: ClassVar[Measure] = "decode_ms_per_token"

    def __init__(self, flops: SizeCosts, measured: Sequence[tuple[Sizes, float]]):
        self._flops = flops
        rows = torch.tensor([self._features(sizes) for sizes, _ in measured], dtype=torch.float64)
        times = torch.tensor([ms for _, ms in measured], dtype=torch.float64)
        self._weights = _nonnegative_least_squares(rows / times[:, None])

    def of(self, sizes: Sizes) -> float:
        """Estimated milliseconds per token for these axis sizes."""
        return sum(w * x for w, x in zip(self._weights, self._features(sizes), strict=True))

    def _features(self, sizes: Sizes) -> tuple[float, float, float]:
        return 1.0, float(sizes["layers"]), self._flops.of(sizes)


def _nonnegative_least_squares(rows: Tensor) -> list[float]:
    """Solve ``rows @ w = 1`` in the least-squares sense with w >= 0, dropping one negative column at a time.

    Args:
        rows: [architectures, features].

    Returns:
        w, [features].
    """
    scale = rows.amax(0)  # [features], so that all columns have a comparable range
    kept = list(range(rows.size(1)))
    while True:
        target = torch.ones(len(rows), 1, dtype=rows.dtype)
        found = torch.linalg.lstsq((rows / scale)[:, kept], target, driver="gelsd").solution.flatten()
        if found.min() >= 0:
            weights = torch.zeros_like(scale)
            weights[kept] = found / scale[kept]
            return [float(weight) for weight in weights]
        kept.pop(int(found.argmin()))
